"""What one space holds, in memory: segments, tombs and sorted keys, kept in step with the folder."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actcache.errors import FormatError
from actcache.store.catalog import Catalog
from actcache.store.damage import KnownDamage
from actcache.store.files import ELSEWHERE, OPEN_NAME, SEGMENT_NAME, TOMB_NAME, TRANSIENT, log, named
from actcache.store.graves import Graves, dead
from actcache.store.keys import Group, Ints, KeyTable, Mask, keys_of, ranks
from actcache.store.listing import Listing
from actcache.store.mapped import ask_for
from actcache.store.mapping import Segment
from actcache.store.opened import OpenFiles
from actcache.store.opening import open_known, read_info
from actcache.store.recency import LastReads
from actcache.store.records import SegmentInfo
from actcache.store.saved_keys import KeysHere
from actcache.store.tombs import Keys
from actcache.store.working_copy import WorkingCopy

if TYPE_CHECKING:
    from actcache.store.everything import Everything

KEEP_OPEN = 4096
"""So many segments stay mapped."""
_MOST_HOLDERS = 256
_ATTEMPTS = 16


class SpaceIndex:
    """The index of one space folder (of a working copy: `copy`). Thread-safe; others' changes show after `refresh`."""

    def __init__(self, folder: Path, catalog: Catalog, copy: WorkingCopy | None = None) -> None:
        self.folder, self._name = folder, folder.name
        self.copy = copy
        self.lock = threading.RLock()
        self._catalog = catalog
        self._keys_here = KeysHere(catalog.path.parent, folder.name)
        self._numbers: dict[str, int] = {}
        self._infos: list[SegmentInfo | None] = []
        self._rank: Ints | None = None
        self._groups: dict[tuple[str, tuple[str, ...]], Group] = {}
        self._holders: dict[tuple[str, tuple[str, ...]], list[Group] | None] = {}
        self._contexts: list[str] | None = None
        self._graves = Graves(folder, copy)
        self._dead: dict[int, Mask] = {}
        self._damage = KnownDamage()
        self._refused: dict[str, Exception] = {}
        self.spill = self._keys_here.spill
        self.reads = LastReads(catalog, folder.name)
        self._open: OrderedDict[str, Segment] = OrderedDict()
        self.listing = Listing(folder)
        self.opened = OpenFiles(folder)
        """The files that are being written; each batch in them counts as a segment."""
        self._loaded = False
        self.everything: Everything | None = None
        """What was last asked for as a whole, for as long as nothing comes or goes."""

    # -- keeping in step with the folder ---------------------------------------------------------------

    def refresh(self, *, force: bool = False) -> None:
        """Take notice of segments, batches and tombs that came or went; one `stat` when nothing did."""
        with self.lock:
            if self.copy is not None:
                self.copy.begin(self._name)
            for _ in range(_ATTEMPTS):
                names = self.listing.look(force=force)
                if names is None and self.opened.poll():  # a file that grows leaves the folder as it is
                    self._take_in([])
                # What has gone between listing and reading may lie in a segment that was not there to be listed.
                if names is None or self._synchronise(names):
                    self.listing.settle()
                    break

    def _synchronise(self, names: set[str]) -> bool:
        """Take in what is listed; whether all of it could be looked at."""
        segments = {n[:32] for n in names if SEGMENT_NAME.fullmatch(n)}
        tombs = {n for n in names if TOMB_NAME.fullmatch(n)}
        self.opened.keep(n[:32] for n in names if OPEN_NAME.fullmatch(n))
        self.opened.poll()
        present = segments | self.opened.names
        if not self._loaded:
            self._loaded = True
            # A folder that is not there at all may come back, as that of a file system that is not mounted.
            if present:
                self._catalog.keep_only(self.folder.name, present)
            for known in self._catalog.load(self.folder.name, self._keys_here.keep):
                if known.name in segments:
                    self._insert(known)
        gone = [name for name in self._numbers if name not in present]
        listed = segments - self._numbers.keys() - self._refused.keys()
        new = [info for name in sorted(listed) if (info := self._read(name))]
        buried = self._graves.names
        # All that can fail has been read before anything changes.
        fresh_tombs = self._graves.read(tombs - buried)
        self._refused = {name: error for name, error in self._refused.items() if name in segments}
        for name in gone:
            self._remove(name)
        self._catalog.record(self.folder.name, new, gone)
        if gone and not present:
            self._keys_here.forget()
        touched = self._graves.update(fresh_tombs, buried - tombs)
        touched |= {i.name for i in self._infos if i is not None and touched & i.replaces.keys()}
        self._take_in(new)
        self._bury(touched)
        return self._numbers.keys() | self._refused.keys() >= listed

    def _take_in(self, new: list[SegmentInfo]) -> None:
        """Insert `new` segments and batches; tombs that are long known count for them, too."""
        new += [batch.info for batch in self.opened.batches if batch.info.name not in self._numbers]
        for info in new:
            self._insert(info)
        self._bury({info.name for info in new})

    def _read(self, name: str) -> SegmentInfo | None:
        try:
            # Copies, so that the index does not keep every file mapped.
            return self._keys_here.kept(read_info(self.path(name), self.copy))
        except FileNotFoundError:
            return None
        except (FormatError, OSError) as error:
            self._refuse(name, error)
            return None

    def _refuse(self, name: str, error: Exception) -> None:
        if isinstance(error, ELSEWHERE) or getattr(error, "errno", None) in TRANSIENT:
            raise error
        log.warning("ignoring a segment, what it held counts as absent: %s", named(self.path(name), error))
        self._refused[name] = error

    def _insert(self, info: SegmentInfo) -> None:
        if info.name in self._numbers:
            return
        self._numbers[info.name] = len(self._infos)
        self._enlist(info)

    def _enlist(self, info: SegmentInfo) -> None:
        """Find from now on what is live of a segment, or of a remnant, under the next number."""
        number = len(self._infos)
        self._infos.append(info)
        self._rank = self.everything = None
        self._contexts = None
        key = (info.layout, tuple(sorted(info.sites)))
        if key not in self._groups:
            self._groups[key] = Group(*key)
            self._holders.clear()
        group = self._groups[key]
        group.members[number] = None
        for kind, table in group.tables.items():
            table.add(number, *self._keys(number, kind))

    def _remove(self, name: str) -> None:
        number = self._numbers.pop(name)
        self._open.pop(name, None)
        for listed in (*self._damage.remnants_of(number), number):
            self._delist(listed)
        self._damage.forget(number)
        self._dead.pop(number, None)
        self.reads.forget(name)

    def _delist(self, number: int) -> None:
        info, self._infos[number] = self._infos[number], None
        assert info is not None
        self._contexts = self.everything = None
        group = self._groups[info.layout, tuple(sorted(info.sites))]
        del group.members[number]
        for table in group.tables.values():
            table.drop(number)

    def _keys(self, number: int, kind: str) -> tuple[Keys, Mask | None]:
        info = self._infos[number]
        assert info is not None
        return keys_of(info, kind, self.live(number))

    def add(self, info: SegmentInfo) -> None:
        """Take in a segment that this process has just written."""
        with self.lock:
            if not self._loaded:
                self.refresh(force=True)
            if info.name not in self._numbers:
                self._insert(self._keys_here.kept(info))
                # Written from segments of which something may have gone in the meantime.
                self._bury({info.name})
                self._catalog.record(self.folder.name, [info], [])

    # -- rows that are gone ----------------------------------------------------------------------------

    def live(self, number: int) -> Mask | None:
        """Which prompts of a segment are neither tombed nor found damaged at any site; None for all.

        Of a remnant: which are in it, and not tombed.
        """
        intact, buried = self._damage.live(number), self._dead.get(self._damage.whole(number))
        if intact is None:
            return None if buried is None else ~buried
        return intact if buried is None else intact & ~buried

    def untombed(self, number: int) -> Mask:
        """Which prompts of a segment no tomb names, damaged or not."""
        info, buried = self._infos[number], self._dead.get(number)
        return np.ones(0 if info is None else info.prompts, bool) if buried is None else ~buried

    def mark_damaged(self, number: int, sites: Sequence[str], rows: Ints, intact: npt.NDArray[np.bool_]) -> None:
        """Leave out of these prompts of a segment what is not `intact`, bool ``[sites, rows]``, in this process.

        What is intact of them is found as a remnant: with a number of its own, and those sites alone.
        """
        with self.lock:
            number = self._damage.whole(number)
            info = self._infos[number]
            if info is not None:
                for remnant in self._damage.remnants_of(number):
                    self._delist(remnant)
                left = self._damage.mark(number, info, sites, rows, intact)
                self._rekey(number)
                for part in left:
                    self._damage.add(len(self._infos), number, part.keep)
                    self._enlist(replace(info, columns=tuple(c for c in info.columns if c[0] in part.sites)))

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
            buried, before = dead(info, tombs), self._dead.get(number)
            if not np.array_equal(buried, before if before is not None else np.zeros(info.prompts, bool)):
                self._dead[number] = buried
                for stale in (number, *self._damage.remnants_of(number)):
                    self._rekey(stale)

    def tombs_of(self, info: SegmentInfo) -> dict[str, Keys | None]:
        """Tombs that count for a segment, inherited ones included; the keys of one that cannot be read are None."""
        return self._graves.of(info)

    def own_dead(self, info: SegmentInfo) -> Mask:
        """Which prompts of a segment are named by tombs of its own, inherited ones left aside."""
        return dead(info, self._graves.own(info))

    @property
    def refused(self) -> dict[str, Exception]:
        """Segments that cannot be read, of which nothing is known but why."""
        return dict(self._refused)

    def _rekey(self, number: int) -> None:
        info, self.everything = self._infos[number], None
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
        return self._table(group, kind).find(keys, self.rank)

    def find_one(self, group: Group, kind: str, high: int, low: int) -> tuple[int, int]:
        """`find` for one key, given as two words."""
        return self._table(group, kind).find_one(high, low, self.rank)

    def _table(self, group: Group, kind: str) -> KeyTable:
        table = group.tables.get(kind)
        if table is None:
            held = [(n, i) for n in group.members if (i := self._infos[n]) is not None]
            last = [not self.is_remnant(n) and i.name not in self.opened for n, i in held]
            members = [(n, i.name if lasts else "", i.prompts) for (n, i), lasts in zip(held, last, strict=True)]
            table = group.tables[kind] = self._keys_here.table_of(group, kind, members, self._keys, self._groups)
        return table

    def holders(self, layout: str, sites: tuple[str, ...]) -> list[Group] | None:
        """The groups of `layout` that have `sites`; None where some have a part of them only."""
        key = (layout, sites)
        if key not in self._holders:
            wanted = set(sites)
            some = [g for g in self._groups.values() if g.layout == layout and not g.sites.isdisjoint(wanted)]
            if len(self._holders) >= _MOST_HOLDERS:
                self._holders.clear()
            self._holders[key] = some if sites and all(g.sites >= wanted for g in some) else None
        return self._holders[key]

    @property
    def rank(self) -> Ints:
        """Age rank of each segment number: the later created, the higher."""
        if self._rank is None:
            self._rank = ranks(self._infos)
        return self._rank

    def segments(self) -> Iterator[tuple[int, SegmentInfo]]:
        """Number and description of every segment."""
        return ((n, i) for n, i in self.parts() if not self.is_remnant(n))

    def parts(self) -> Iterator[tuple[int, SegmentInfo]]:
        """`segments`, and remnants: each live activation is in one of them, and in none twice."""
        return ((n, i) for n, i in enumerate(list(self._infos)) if i is not None)

    def is_remnant(self, number: int) -> bool:
        """Whether it is one of `parts` only, and no segment."""
        return self._damage.whole(number) != number

    def sealed(self) -> Iterator[tuple[int, SegmentInfo]]:
        """`segments` without the batches of files that grow."""
        return ((n, i) for n, i in self.segments() if i.name not in self.opened)

    def info(self, number: int) -> SegmentInfo | None:
        return self._infos[number]

    def open_all(self, wanted: Callable[[int, SegmentInfo], bool]) -> list[tuple[int, SegmentInfo, Segment]]:
        """Every one of `parts` that is `wanted`, mapped, so that nothing is missed while others merge.

        When one has vanished all are looked for again: what it held may lie in another now.
        """
        with self.lock:
            for _ in range(_ATTEMPTS):
                held = [(number, info) for number, info in self.parts() if wanted(number, info)]
                self.ask_for([number for number, _ in held])
                opened = [(number, info, self.open(number)) for number, info in held]
                if all(segment is not None for _, _, segment in opened):
                    break
                self.refresh()
            return [(number, info, segment) for number, info, segment in opened if segment is not None]

    def contexts(self) -> list[str]:
        """Every text context that a segment of this space has."""
        with self.lock:
            if self._contexts is None:
                self._contexts = sorted({i.text_context for _, i in self.segments()} - {""})
            return self._contexts

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def ask_for(self, numbers: Sequence[int]) -> None:
        """Have the disk fetch headers and index tensors of segments that are opened next, all at the same time."""
        for number in numbers if len(numbers) > 1 else ():
            info = self._infos[number]
            if info is not None and info.name not in self._open:
                ask_for(self.path(info.name), info.size - info.data_bytes)

    def open(self, number: int) -> Segment | None:
        """The segment of that number, mapped; None when it is gone or refused (and is then forgotten)."""
        info = self._infos[self._damage.whole(number)]
        if info is None:
            return None
        segment = self.opened.batch(info.name) or self._open.get(info.name)
        if segment is None:
            try:
                segment = self._open[info.name] = open_known(self.path(info.name), info, self.copy)
            except FileNotFoundError:
                self._forget(info.name)
                return None
            except (FormatError, OSError) as error:
                self._refuse(info.name, error)
                self._forget(info.name)
                return None
            if len(self._open) > KEEP_OPEN:
                self._open.popitem(last=False)
        if info.name in self._open:
            self._open.move_to_end(info.name)
        return segment

    def _forget(self, name: str) -> None:
        self._remove(name)
        self.listing.forget()
        self._catalog.record(self.folder.name, [], [name])

    def forget(self, name: str) -> None:
        """Leave out a segment that this process has just removed."""
        with self.lock:
            if name in self._numbers:
                self._forget(name)

    def unmap(self, name: str) -> None:
        """Open a segment anew at its next use: its file has gone, or is another one by now."""
        self._open.pop(name, None)
        self.everything = None
        self.listing.forget()

    def note_read(self, segment: int | str, prompts: Ints | int) -> None:
        """Remember that these prompts of a segment, known by its number or name, are read now."""
        number = self._numbers.get(segment) if isinstance(segment, str) else segment
        if number is not None and (info := self._infos[number]) is not None:
            self.reads.note(info, prompts)

    def write_reads(self) -> None:
        """Write when prompts were last read, as far as it is gathered in memory."""
        with self.lock:
            self.reads.write()
