"""What one space holds, in memory: segments, tombs and sorted keys, kept in step with the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actcache.errors import FormatError
from actcache.store.catalog import Catalog
from actcache.store.files import SEGMENT_NAME, TOMB_NAME, log
from actcache.store.keys import Ints, KeyTable
from actcache.store.mapping import Segment
from actcache.store.records import SegmentInfo
from actcache.store.tombs import Keys, is_member, read_tomb

_RACY_NS, _COARSE_NS = 250_000_000, 2_500_000_000
_LISTINGS = 8
_KEEP_OPEN = 4096
_TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}

Mask = npt.NDArray[np.bool_]


class Group:
    """The segments of one layout and one set of sites, and where each key is in them."""

    def __init__(self, layout: str, sites: tuple[str, ...]) -> None:
        self.layout = layout
        self.sites = frozenset(sites)
        self.members: dict[int, None] = {}
        self.tables: dict[str, KeyTable] = {}


class SpaceIndex:
    """The index of one space folder. Thread-safe; other processes' changes show after `refresh`."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self._catalog = catalog
        self._numbers: dict[str, int] = {}
        self._infos: list[SegmentInfo | None] = []
        self._rank: Ints | None = None
        self._groups: dict[tuple[str, tuple[str, ...]], Group] = {}
        self._tombs: dict[str, dict[str, Keys | None]] = {}
        self._dead: dict[int, Mask] = {}
        self._damaged: dict[int, Mask] = {}
        self._refused: set[str] = set()
        self._open: OrderedDict[str, Segment] = OrderedDict()
        self._listed: tuple[int, int] | None = None
        self._loaded = False

    # -- keeping in step with the folder ---------------------------------------------------------------

    def refresh(self, *, force: bool = False) -> None:
        """Take notice of segments and tombs that came or went; one `stat` when nothing did."""
        with self.lock:
            try:
                changed = os.stat(self.folder).st_mtime_ns
            except (FileNotFoundError, NotADirectoryError):
                changed = -1
            if not force and self._listed is not None:
                listed_at, seen = self._listed
                # A change within one tick of the file system's clock leaves the same time stamp.
                if changed == seen and _is_settled(listed_at, changed):
                    return
            listed_at = time.time_ns()
            self._synchronise(self._list_all(_is_settled(listed_at, changed)) if changed >= 0 else set())
            self._listed = (listed_at, changed)

    def _list_all(self, settled: bool) -> set[str]:
        """Every name in the folder; where others are at work, listed until nothing goes missing in between.

        No instant is listed: a merged segment can appear behind the reading position and its sources go before it
        gets to them, so that one listing shows neither.
        """
        names = self._list()
        if settled and all(f"{name}.safetensors" in names for name in self._numbers):
            return names
        for _ in range(_LISTINGS):
            before, names = names, self._list()
            if not any(SEGMENT_NAME.fullmatch(name) for name in before - names):
                break
        return names

    def _list(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return {e.name for e in entries}
        return set()

    def _synchronise(self, names: set[str]) -> None:
        segments = {n[:32] for n in names if SEGMENT_NAME.fullmatch(n)}
        tombs = {n for n in names if TOMB_NAME.fullmatch(n)}
        if not self._loaded:
            self._loaded = True
            for known in self._catalog.load(self.folder.name):
                if known.name in segments:
                    self._insert(known)
        gone = [name for name in self._numbers if name not in segments]
        new = [info for name in sorted(segments - self._numbers.keys() - self._refused) if (info := self._read(name))]
        buried = {t for held in self._tombs.values() for t in held}
        # All that can fail has been read before anything changes.
        fresh_tombs = self._read_tombs(tombs - buried)
        self._refused &= segments
        for name in gone:
            self._remove(name)
        for fresh in new:
            self._insert(fresh)
        self._catalog.record(self.folder.name, new, gone)
        # Tombs that are long known count for a new segment, too, when it was merged without them.
        self._bury({info.name for info in new} | self._update_tombs(fresh_tombs, buried - tombs))

    def _read(self, name: str) -> SegmentInfo | None:
        try:
            info = Segment(self.path(name)).info
            if info.space != self.folder.name:
                raise FormatError(f"{self.path(name)} belongs to space {info.space!r}")
        except FileNotFoundError:
            return None
        except (FormatError, OSError) as error:
            self._refuse(name, error)
            return None
        # Copies, so that the index does not keep every file mapped.
        return replace(info, prompt_key=info.prompt_key.copy(), text_key=info.text_key.copy())

    def _refuse(self, name: str, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in _TRANSIENT:
            raise error
        log.warning("ignoring a segment, what it held counts as absent: %s", error)
        self._refused.add(name)

    def _insert(self, info: SegmentInfo) -> None:
        if info.name in self._numbers:
            return
        number = self._numbers[info.name] = len(self._infos)
        self._infos.append(info)
        self._rank = None
        key = (info.layout, tuple(sorted(info.sites)))
        group = self._groups.setdefault(key, Group(*key))
        group.members[number] = None
        for kind, table in group.tables.items():
            table.add(number, *self._keys(number, kind))

    def _remove(self, name: str) -> None:
        number = self._numbers.pop(name)
        info = self._infos[number]
        assert info is not None
        self._infos[number] = None
        self._open.pop(name, None)
        self._dead.pop(number, None)
        self._damaged.pop(number, None)
        group = self._groups[info.layout, tuple(sorted(info.sites))]
        del group.members[number]
        for table in group.tables.values():
            table.drop(number)

    def _keys(self, number: int, kind: str) -> tuple[Keys, Mask | None]:
        info = self._infos[number]
        assert info is not None
        live = self.live(number)
        if kind == "text":
            # Prompts given as ids have no text key; zeros would make them one another's duplicates.
            given: Mask = np.asarray(info.text_key.any(axis=1))
            return info.text_key, given if live is None else given & live
        return info.prompt_key, live

    def add(self, info: SegmentInfo) -> None:
        """Take in a segment that this process has just written."""
        with self.lock:
            if not self._loaded:
                self.refresh(force=True)
            if info.name not in self._numbers:
                self._insert(info)
                self._catalog.record(self.folder.name, [info], [])

    # -- rows that are gone ----------------------------------------------------------------------------

    def live(self, number: int) -> Mask | None:
        """Which prompts of a segment are neither tombed nor found damaged; None for all."""
        dead, damaged = self._dead.get(number), self._damaged.get(number)
        if dead is None:
            return None if damaged is None else ~damaged
        return ~dead if damaged is None else ~(dead | damaged)

    def mark_damaged(self, number: int, rows: Ints) -> None:
        """Leave these prompts of a segment out from now on, in this process."""
        with self.lock:
            info = self._infos[number]
            if info is not None:
                self._damaged.setdefault(number, np.zeros(info.prompts, bool))[rows] = True
                self._rekey(number)

    def _read_tombs(self, names: set[str]) -> dict[str, Keys | None]:
        found: dict[str, Keys | None] = {}
        for tomb in names:
            try:
                found[tomb] = read_tomb(self.folder / tomb)
            except FileNotFoundError:
                continue
            except (FormatError, OSError) as error:
                if isinstance(error, OSError) and error.errno in _TRANSIENT:
                    raise
                log.warning("a tomb cannot be read, so all of its segment counts as gone: %s", error)
                found[tomb] = None
        return found

    def _update_tombs(self, new: dict[str, Keys | None], gone: set[str]) -> set[str]:
        """Take in `new` tombs, forget those `gone`; the segments for which that matters."""
        for tomb in gone:
            self._tombs[tomb[:32]].pop(tomb, None)
        for tomb, keys in new.items():
            self._tombs.setdefault(tomb[:32], {})[tomb] = keys
        touched = {t[:32] for t in new.keys() | gone}
        return touched | {i.name for i in self._infos if i is not None and touched & i.replaces.keys()}

    def _bury(self, names: set[str]) -> None:
        for name in names:
            number = self._numbers.get(name)
            if number is None:
                continue
            info = self._infos[number]
            assert info is not None
            tombs = self.tombs_of(info)
            if not tombs and number not in self._dead:
                continue
            dead = np.zeros(info.prompts, bool)
            for keys in tombs.values():
                dead |= True if keys is None else is_member(info.prompt_key, keys)
            before = self._dead.get(number)
            if not np.array_equal(dead, before if before is not None else np.zeros(info.prompts, bool)):
                self._dead[number] = dead
                self._rekey(number)

    def tombs_of(self, info: SegmentInfo) -> dict[str, Keys | None]:
        """Tombs that count for a segment: its own, and later ones of the segments merged into it.

        The keys of one that cannot be read are None.
        """
        found = dict(self._tombs.get(info.name, {}))
        for source, applied in info.replaces.items():
            found.update({t: k for t, k in self._tombs.get(source, {}).items() if t not in applied})
        return found

    def own_dead(self, info: SegmentInfo) -> Mask:
        """Which prompts of a segment are named by tombs of its own, inherited ones left aside."""
        dead = np.zeros(info.prompts, bool)
        for keys in self._tombs.get(info.name, {}).values():
            dead |= True if keys is None else is_member(info.prompt_key, keys)
        return dead

    @property
    def has_refused(self) -> bool:
        """Whether there are segments that cannot be read, of which nothing is known."""
        return bool(self._refused)

    def _rekey(self, number: int) -> None:
        info = self._infos[number]
        assert info is not None
        for kind, table in self._groups[info.layout, tuple(sorted(info.sites))].tables.items():
            table.drop(number)
            table.add(number, *self._keys(number, kind))

    # -- looking up ------------------------------------------------------------------------------------

    def all_groups(self) -> list[Group]:
        return [g for g in self._groups.values() if g.members]

    def groups(self, layout: str) -> list[Group]:
        return [g for g in self._groups.values() if g.layout == layout and g.members]

    def find(self, group: Group, kind: str, keys: Keys) -> tuple[npt.NDArray[np.int32], Ints]:
        """Segment number (-1: absent) and prompt of each key of `kind` "text" or "token" in `group`."""
        table = group.tables.get(kind)
        if table is None:
            table = group.tables[kind] = KeyTable()
            for number in group.members:
                table.add(number, *self._keys(number, kind))
        return table.find(keys, self.rank)

    @property
    def rank(self) -> Ints:
        """Age rank of each segment number: the later created, the higher."""
        if self._rank is None:
            ages = [(i.created_ns, i.name) if i is not None else (-1, "") for i in self._infos]
            self._rank = np.empty(len(ages), np.int64)
            self._rank[sorted(range(len(ages)), key=ages.__getitem__)] = np.arange(len(ages))
        return self._rank

    def segments(self) -> Iterator[tuple[int, SegmentInfo]]:
        """Number and description of every segment."""
        return ((n, i) for n, i in enumerate(list(self._infos)) if i is not None)

    def info(self, number: int) -> SegmentInfo | None:
        return self._infos[number]

    def contexts(self) -> list[str]:
        """Every text context that a segment of this space has."""
        with self.lock:
            return sorted({i.text_context for _, i in self.segments()} - {""})

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def open(self, number: int) -> Segment | None:
        """The segment of that number, mapped; None when it is gone or refused (and is then forgotten)."""
        info = self._infos[number]
        if info is None:
            return None
        segment = self._open.get(info.name)
        if segment is None:
            try:
                segment = self._open[info.name] = self._opened(info)
            except FileNotFoundError:
                self._forget(info.name)
                return None
            except (FormatError, OSError) as error:
                self._refuse(info.name, error)
                self._forget(info.name)
                return None
            if len(self._open) > _KEEP_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(info.name)
        return segment

    def _opened(self, info: SegmentInfo) -> Segment:
        segment = Segment(self.path(info.name))
        same = segment.info.columns == info.columns and segment.info.prompts == info.prompts
        if not same or not np.array_equal(segment.info.prompt_key, info.prompt_key):
            raise FormatError(f"{segment.path} is not the file it was when it was indexed")
        return segment

    def _forget(self, name: str) -> None:
        self._remove(name)
        self._listed = None
        self._catalog.record(self.folder.name, [], [name])


def _is_settled(listed_at: int, changed: int) -> bool:
    """Whether any later change must show in the folder's time stamp."""
    # Some file systems keep whole seconds, or even ones.
    return listed_at - changed > (_RACY_NS if changed % 1_000_000_000 else _COARSE_NS)
