"""Bringing a working copy in step with the objects: one listing, and the head of every segment that is new."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.errors import FormatError
from actcache.store import container, mirror
from actcache.store.backend import ObjectInfo
from actcache.store.fetching import translated_local
from actcache.store.files import (
    OPEN_NAME,
    SEGMENT_NAME,
    SPACE_FILE,
    SPACE_NAME,
    TOMB_NAME,
    log,
    make_folder,
    names_in,
    open_locked,
    remove,
    sync_folder,
    write_all,
)
from actcache.store.mapping import Segment
from actcache.store.records import BLOCK, INDEX_TENSORS
from actcache.store.spaces import ROOT
from actcache.store.together import together

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy

_LISTINGS = 8
# A listing of so many is one page with every kind of server, and shows one instant.
_ONE_PAGE = 1000
_READ = 8 << 20
_LEAST_HEAD, _MOST_GUESSED = 256 << 10, 8 << 20
# What nobody stores: a file that says so is refused for what it is, without asking memory or disk for as much.
_MOST_BYTES, _MOST_HEAD, MOST_SMALL = 1 << 40, 1 << 30, 1 << 30
_PUT_LATELY_S = 3600.0
# Each keeps a file open until it has its name.
_HEADS_AT_ONCE = 128

Listed = dict[str, dict[str, ObjectInfo]]
"""By space and name."""


@dataclass
class _Space:
    """What is to be done in the folder of one space."""

    folder: Path
    small: dict[str, int] = field(default_factory=dict)
    segments: dict[str, int] = field(default_factory=dict)
    vanished: list[str] = field(default_factory=list)
    tombs: set[str] = field(default_factory=set)
    """Tombs that are here and not listed."""
    listed: dict[str, ObjectInfo] = field(default_factory=dict)
    recognised: bool = False
    """Whether there were mirrors without a sidecar."""


@dataclass
class Unfinished:
    """A mirror of which the head is there, and which has no name yet."""

    temporary: Path
    fd: int
    said: mirror.Sidecar

    def link(self, path: Path) -> None:
        """Give it its name, after its sidecar; whoever calls has the space locked. Whatever was there is replaced."""
        try:
            mirror.write_sidecar(path, self.said)
            os.rename(self.temporary, path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing of it, unless it has its name."""
        if self.fd >= 0:
            remove(self.temporary)
            os.close(self.fd)
            self.fd = -1


class Pull:
    """One pull of `space` (None: of all) into `copy`."""

    def __init__(self, copy: WorkingCopy, space: str | None) -> None:
        self.copy, self.space = copy, space
        self._before: set[str] = set()
        """Mirrors that were here before anything was listed: another process may bring others meanwhile."""

    def run(self) -> bool:
        """Whether anything has changed here."""
        with translated_local(self.copy.folder, self.copy.backend):
            return self._run()

    def _run(self) -> bool:
        changed = False
        for _ in range(_LISTINGS):
            work = self._compare(self._listed())
            done, missed = self._bring(work)
            changed |= done
            # What has gone between listing and reading may lie in a segment that was not there to be listed.
            if not missed:
                break
        return changed

    # -- what there is ---------------------------------------------------------------------------------

    def _listed(self) -> Listed:
        """Every object of ours, listed until nothing goes missing in between.

        A merged segment can appear behind the reading position of a long listing, and its sources go before it gets to
        them, so that one listing shows neither.
        """
        known = self._before = {f"{folder.name}/{name}" for folder in self._folders() for name in _mirrors(folder)}
        found = self._list()
        for _ in range(_LISTINGS):
            names = _flat(found)
            if len(names) <= _ONE_PAGE and known <= names:
                break
            found = self._list()
            if names <= _flat(found):
                break
            known = set()
        return found

    def _list(self) -> Listed:
        found: Listed = {} if self.space is None else {self.space: {}}
        for info in self.copy.backend.list(f"{ROOT}/" if self.space is None else f"{ROOT}/{self.space}/"):
            # A listing may hold anything: what is not named as our files are is none of our business.
            root, _, rest = info.name.partition("/")
            space, _, name = rest.partition("/")
            ours = any(p.fullmatch(name) for p in (SEGMENT_NAME, TOMB_NAME, SPACE_FILE))
            if root == ROOT and SPACE_NAME.fullmatch(space) and ours and self.space in (None, space):
                found.setdefault(space, {})[name] = info
        return found

    def _folders(self) -> list[Path]:
        if self.space is not None:
            return [self.copy.root / self.space]
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.copy.root) as entries:
            return [self.copy.root / e.name for e in entries if SPACE_NAME.fullmatch(e.name)]
        return []

    def _compare(self, listed: Listed) -> list[_Space]:
        work = []
        for name in sorted({folder.name for folder in self._folders()} | listed.keys()):
            there = listed.get(name, {})
            space = _Space(self.copy.root / name, listed=there)
            held = self._held(space)
            for other, info in there.items():
                if other not in held:
                    (space.segments if SEGMENT_NAME.fullmatch(other) else space.small)[other] = info.size
            space.vanished = [
                other for other in _mirrors(space.folder) if other not in there and f"{name}/{other}" in self._before
            ]
            space.tombs = {other for other in held - there.keys() if TOMB_NAME.fullmatch(other)}
            work.append(space)
        return work

    def _held(self, space: _Space) -> set[str]:
        """The names of the files in its folder; those of what is listed, and has lost its sidecar, are put right."""
        held = names_in(space.folder)
        for name in held & space.listed.keys():
            if SEGMENT_NAME.fullmatch(name) and f"{name[:32]}.have" not in held:
                space.recognised |= self.copy.spool.recognise(space.folder / name, space.listed[name].size)
        return names_in(space.folder) if space.recognised else held

    # -- what is to be done ----------------------------------------------------------------------------

    def _bring(self, work: list[_Space]) -> tuple[bool, bool]:
        """Do it; whether anything has changed here, and whether something was gone that was listed."""
        small, put, segments = [], [], []
        for space in work:
            small += [(space, name) for name in sorted(space.small)]
            put += [(space, name) for name in space.vanished if self._put_lately(space, name)]
            segments += [(space, name) for name in sorted(space.segments)]
            if space.small or space.segments:
                make_folder(space.folder)
        brought = self._together([partial(self._small, s.folder, name, s.small[name]) for s, name in small])
        still = self._together([partial(self._is_there, s.folder, name) for s, name in put])
        for (space, name), there in zip(put, still, strict=True):
            if there:
                space.vanished.remove(name)
        # Tombs are here by now, so that what they name is not seen in between.
        for first in range(0, len(segments), _HEADS_AT_ONCE):
            some = segments[first : first + _HEADS_AT_ONCE]
            heads = self._together([partial(self._head, s.folder, name, s.segments[name]) for s, name in some])
            brought += heads
            self._link([(s.folder / n, h) for (s, n), h in zip(some, heads, strict=True) if isinstance(h, Unfinished)])
        changed = any(brought)
        # Behind those that they may have been merged into.
        for space in work:
            for name in space.vanished:
                self.copy.drop(space.folder / name)
            changed |= space.recognised | bool(space.vanished) | self._drop_tombs(space)
            changed |= self.copy.spool.settle(space.folder, space.listed)
        return changed, None in brought

    def _together(self, jobs: Sequence[Callable[[], object]]) -> list[object]:
        """What each of `jobs` gives, several at a time; None for what is gone."""
        return together(
            [partial(_or_none, job) for job in jobs], max(1, int(self.copy.backend.concurrency)), undo=_discard
        )

    def _put_lately(self, space: _Space, name: str) -> bool:
        return mirror.put_lately(space.folder / name, _PUT_LATELY_S)

    def _is_there(self, folder: Path, name: str) -> bool:
        """True for an object that is there though a listing does not show it."""
        self.copy.backend.read(self.copy.name_of(folder / name), 0, 1)
        return True

    def _small(self, folder: Path, name: str, size: int) -> bool:
        """Bring a tomb, or a description, here: whole and durable; whether that was possible."""
        if size > MOST_SMALL:
            log.warning("ignoring %s: %s bytes are none of ours", self.copy.name_of(folder / name), f"{size:,}")
            return False
        bring(self.copy, folder / name, size)
        return True

    # -- segments --------------------------------------------------------------------------------------

    def _head(self, folder: Path, name: str, size: int) -> Unfinished:
        return begin_mirror(self.copy, folder / name, size)

    def _link(self, heads: list[tuple[Path, Unfinished]]) -> None:
        """Give unfinished mirrors their names, each after its sidecar."""
        try:
            for path, head in heads:
                with self.copy.locked(path.parent.name):
                    # Another process may have been faster.
                    if not path.exists():
                        head.link(path)
        finally:
            for _, head in heads:
                head.discard()

    def _drop_tombs(self, space: _Space) -> bool:
        """Forget tombs that are gone, as far as what they name is gone, too: a listing may be late."""
        names = names_in(space.folder)
        held = {name[:32] for name in names if not TOMB_NAME.fullmatch(name)}
        gone = [name for name in space.tombs if name[:32] not in held]
        # Those of batches of files that grow are named after what has no file of its own.
        if not gone or any(map(OPEN_NAME.fullmatch, names)):
            return False
        return self._forget_tombs(space.folder, gone)

    def _forget_tombs(self, folder: Path, names: list[str]) -> bool:
        kept: set[str] = set()
        for other in names_in(folder):
            if SEGMENT_NAME.fullmatch(other):
                # One that names it among what it was merged from, and was merged before, needs it.
                try:
                    kept |= Segment(folder / other).info.replaces.keys()
                except (FormatError, OSError):
                    # What it needs is not known.
                    return False
        unneeded = [name for name in names if name[:32] not in kept]
        # One that another process has brought since this listing began is there, and so is what it is for.
        still = self._together([partial(self._is_there, folder, name) for name in unneeded])
        gone = [name for name, there in zip(unneeded, still, strict=True) if not there]
        for name in gone:
            remove(folder / name)
        return bool(gone)


def bring(copy: WorkingCopy, path: Path, size: int) -> None:
    """Make the file at `path` what its object is, which is small: whole and durable."""
    temporary, fd = open_locked(path.parent, ".tmp")
    try:
        copy_range(copy, copy.name_of(path), fd, 0, size, to_end=True)
        os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(fd)
    sync_folder(path.parent)


def begin_mirror(copy: WorkingCopy, path: Path, size: int, put_ns: int = 0) -> Unfinished:
    """An unfinished mirror of the segment that is to be at `path`: its size, and all that comes before its rows."""
    temporary, fd = open_locked(path.parent, ".tmp")
    head = Unfinished(temporary, fd, mirror.Sidecar(size, 0, put_ns))
    try:
        head.said = mirror.Sidecar(size, _read_head(copy, copy.name_of(path), fd, size), put_ns)
    except BaseException:
        head.discard()
        raise
    return head


def _read_head(copy: WorkingCopy, name: str, fd: int, size: int) -> int:
    """Write the head of the segment `name`, of `size` bytes as far as is known, to the empty file `fd`; its blocks.

    A head that is none is left as it is, for whoever opens the file to refuse.
    """
    size = min(size, _MOST_BYTES)
    os.ftruncate(fd, size)
    there = min(size, max(_LEAST_HEAD, min(size // 64, _MOST_GUESSED)))
    copy_range(copy, name, fd, 0, there)
    with contextlib.suppress(FormatError):
        length = container.header_size(os.pread(fd, 8, 0), size)
        if length > there:
            copy_range(copy, name, fd, there, length)
            there = length
        _, tensors = container.parse(os.pread(fd, length, 0), size)
        stop = _head_stop(tensors, length)
        if there < stop <= _MOST_HEAD:
            copy_range(copy, name, fd, there, stop)
        blocks = tensors["checksum"].shape[0] if "checksum" in tensors and tensors["checksum"].shape else 0
        return blocks if blocks <= size // BLOCK + len(tensors) else 0
    return 0


def same_head(fd: int, path: Path) -> bool:
    """Whether the head in an unfinished mirror is that of the file at `path`."""
    with contextlib.suppress(FormatError, OSError), path.open("rb") as file:
        size = os.fstat(fd).st_size
        length = container.header_size(os.pread(fd, 8, 0), size)
        _, tensors = container.parse(os.pread(fd, length, 0), size)
        stop, at = _head_stop(tensors, length), 0
        while at < min(stop, _MOST_HEAD):
            part = os.pread(fd, min(_READ, stop - at), at)
            if not part or part != file.read(len(part)):
                return False
            at += len(part)
        return True
    return False


def _head_stop(tensors: dict[str, container.Tensor], length: int) -> int:
    """Where the rows begin."""
    starts = [t.start for t in tensors.values() if t.name not in INDEX_TENSORS and not t.name.startswith("pad.")]
    return min(starts, default=length)


def copy_range(copy: WorkingCopy, name: str, fd: int, start: int, stop: int, *, to_end: bool = False) -> None:
    """Write bytes `start` to `stop` of an object to the same place of a file, as many as there are.

    With `to_end` the object may end anywhere before.
    """
    while start < stop:
        length = min(stop - start, _READ)
        data = memoryview(copy.backend.read(name, start, start + length)).cast("B")[:length]
        start = write_all(fd, [data], start)
        if not len(data) or (to_end and len(data) < length):
            break


def _or_none(job: Callable[[], object]) -> object:
    try:
        return job()
    except FileNotFoundError:
        return None


def _discard(outcome: object) -> None:
    if isinstance(outcome, Unfinished):
        outcome.discard()


def _mirrors(folder: Path) -> Iterator[str]:
    """The names of the segments in a folder that are mirrors."""
    held = names_in(folder)
    return (name for name in held if SEGMENT_NAME.fullmatch(name) and f"{name[:32]}.have" in held)


def _flat(listed: Listed) -> set[str]:
    return {f"{space}/{name}" for space, names in listed.items() for name in names if SEGMENT_NAME.fullmatch(name)}
