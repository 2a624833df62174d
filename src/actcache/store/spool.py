"""What a host has stored and not yet put where its store lies: how it gets there, and how all of it goes.

In a working copy a segment without a sidecar is *spooled*: it lies nowhere else. Whoever uploads, replaces or removes
one holds its lock, so that processes that share a working copy never remove what another one is uploading. Beside a
segment of which an upload has begun lies a file ``<uuid>.sent``: from then on there may be an object. Beside the
description of a space lies ``space.have`` once there was an object of it, which others may have removed since.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import BackendError, FormatError, NewerFormatError, StoreAccessError
from actcache.store import mirror
from actcache.store.backend import ObjectInfo
from actcache.store.files import (
    OPEN_NAME,
    SEGMENT_NAME,
    SPACE_FILE,
    TOMB_NAME,
    log,
    named,
    names_in,
    remove,
    sync_folder,
)
from actcache.store.graves import Graves, dead
from actcache.store.locks import claim
from actcache.store.mapping import Segment
from actcache.store.mirror import Marks, Sidecar, has_hole, is_mirror, mark, read_sidecar, sidecar_of, write_sidecar
from actcache.store.records import SegmentInfo
from actcache.store.spaces import FILE, ROOT, recovered_space, write_space
from actcache.store.together import together
from actcache.store.tombs import is_member, write_tomb
from actcache.store.vouched import Vouched

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy

PATIENCE_S = 600.0
"""How long whoever must have a segment to itself waits for its upload to end."""

_FRESH_S, _FORGOTTEN_S = 1800.0, 3600.0
_SETTLED_NS = 3600 * 10**9
_AT_ONCE = 4
_CONTENT = (SEGMENT_NAME, OPEN_NAME, TOMB_NAME)
_OURS = (SEGMENT_NAME, TOMB_NAME, SPACE_FILE)


def _begun(path: Path) -> Path:
    return path.with_suffix(".sent")


class Spool:
    """The way from a working copy into its backend, and out of both."""

    def __init__(self, copy: WorkingCopy) -> None:
        self._copy, self.backend, self.root = copy, copy.backend, copy.root
        self.concurrency = max(1, int(copy.backend.concurrency))
        self.described: set[str] = set()
        """Spaces of which the description is known to be in the backend."""
        self._unlisted: dict[str, set[str]] = {}
        """Tombs, by space, that are here and count, and were not listed."""
        self._put_ns: dict[str, int] = {}
        """When segments were put, as far as listings say so."""
        self.vouched = Vouched()

    # -- what is spooled -----------------------------------------------------------------------------------

    def spooled(self, space: str) -> list[tuple[Path, int]]:
        """The spooled segments of a space and their sizes in bytes, oldest first; without files that grow."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / space) as entries:
            names = {entry.name: entry for entry in entries}
            for name, entry in names.items():
                if SEGMENT_NAME.fullmatch(name) and f"{name[:32]}.have" not in names:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, self.root / space / name, status.st_size))
        return [(path, size) for _, path, size in sorted(found)]

    @staticmethod
    def is_here_alone(path: Path) -> bool:
        """Whether a segment is spooled, and no upload of it has begun."""
        return not is_mirror(path) and not _begun(path).exists()

    # -- into the backend ----------------------------------------------------------------------------------

    def put(
        self,
        path: Path,
        *,
        wait_s: float = 0.0,
        superseded: Callable[[str], bool] = lambda _: False,
        damaged: Callable[[Path], object] = lambda _: None,
    ) -> bool:
        """Upload a spooled segment, what was invalidated of it first; False where another process is at it.

        `superseded` says of a segment whether another one, which is not of this host alone, was made of it: what an
        earlier upload of unknown outcome left behind must not come back then. `damaged` is told of a segment that stays
        where it is, since blocks of it are wrong; where there is an object of its name it is taken for a mirror.

        Raises as the backend does: it stays spooled, and whether there is an object is unknown.
        """
        with claim(path, wait_s) as mine:
            if not mine:
                return is_mirror(path) or not path.exists()
            if is_mirror(path):
                return True
            try:
                segment = Segment(path)
            except FormatError as error:
                log.warning("a segment is not uploaded, since it cannot be read: %s", named(path, error))
                return True
            begun, checks = _begun(path), segment.checks
            intact = np.ones(checks.blocks, bool) if path in self.vouched else checks.intact_here()
            if begun.exists() or not intact.all():
                if self.is_there(path, segment.info.size):
                    self._recognise(segment, path, intact)
                    return True
                if begun.exists() and superseded(path.name[:32]):
                    log.info("removing %s: what it held was uploaded, and lies in another segment now", path)
                    self._drop(path)
                    return True
                remove(begun)
            if intact.all():
                self._upload(segment, path)
            elif has_hole(path, *(ends[~intact] for ends in segment.checks.spans)):
                # What is stored here has none. What it stood for was removed, and must not come back.
                log.warning("removing %s: it was read from an object that is gone, and is not all there", path)
                self._drop(path)
            else:
                damaged(path)
        return True

    def _upload(self, segment: Segment, path: Path) -> None:
        begun = _begun(path)
        begun.touch()
        # After a loss of power it must be known that there may be an object, which others may have removed by then.
        sync_folder(path.parent)
        self.describe(path.parent)
        self._bury(segment)
        self._put(path, path, segment.info.size)
        self._mark(segment, path, time.time_ns())
        remove(begun)
        log.info("uploaded %s, %d bytes, to %s", path.name, segment.info.size, self.backend.url)

    def _recognise(self, segment: Segment, path: Path, intact: Marks | None = None) -> None:
        """Take a segment without a sidecar for a mirror of its object; `intact`: which of its blocks are, if known."""
        # One whose upload has begun here was put by this host, any other may have been put by anybody.
        self._mark(segment, path, time.time_ns() if _begun(path).exists() else 0)
        if intact is not None:
            mark(path, np.flatnonzero(~intact), there=False)
        remove(_begun(path))
        log.info("%s was uploaded before", path)

    def put_all(self, paths: Sequence[Path], *, wait_s: float = 0.0, **options: Any) -> bool:
        """`put` each of them, several at a time; whether none is left to others. Raises the first error at the end."""
        return all(at_once(lambda path: self.put(path, wait_s=wait_s, **options), paths, _AT_ONCE))

    def put_as(self, temporary: Path, path: Path) -> None:
        """Upload a finished segment under the name of `path`, which it is to get when this returns."""
        segment = Segment(temporary)
        self.describe(path.parent)
        self._put(temporary, path, segment.info.size)
        self._mark(segment, path, time.time_ns())

    def publish(self, path: Path, data: bytes | None = None) -> None:
        """Put a small file, which is never changed: a tomb, the description of a space. `data`: what it holds.

        FileNotFoundError where that is not given, and the file is gone.
        """
        self.backend.put(self._copy.name_of(path), path.read_bytes() if data is None else data)

    def describe(self, folder: Path) -> None:
        """See to it that the space of a folder is described in the backend."""
        if folder.name in self.described:
            return
        if not (folder / FILE).exists():
            info = recovered_space(folder)
            if info is None:
                return
            write_space(self.root, info)
        with contextlib.suppress(FileNotFoundError):
            self.publish(folder / FILE)
            self.described.add(folder.name)
            mirror.note_put(folder / FILE)

    def is_there(self, path: Path, size: int) -> bool:
        """Whether there is an object of that size for the segment at `path`."""
        try:
            # The last byte: that of another size has none there, or more behind it.
            return len(self.backend.read(self._copy.name_of(path), size - 1, size + 1)) == 1
        except FileNotFoundError:
            return False

    def are_there(self, paths: Sequence[Path]) -> bool:
        """Whether each of these segments is still where it was: as an object, or spooled here."""

        def there(path: Path) -> bool:
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                return not is_mirror(path) or self.is_there(path, size)
            return False

        return all(at_once(there, paths, self.concurrency))

    def _put(self, source: Path, path: Path, size: int) -> None:
        try:
            self.backend.put(self._copy.name_of(path), source)
        except Exception:
            # An error may come when all is done.
            with contextlib.suppress(Exception):
                if self.is_there(path, size):
                    return
            raise

    def _bury(self, segment: Segment) -> None:
        """Put a tomb of what was invalidated of a segment that is to be uploaded.

        A new one, or one put lately: whoever has never seen the segment removes old ones, of which nobody could say
        to what they belong.
        """
        folder, info = segment.path.parent, segment.info
        tombs = {name for name in os.listdir(folder) if TOMB_NAME.fullmatch(name)}
        counting = {t for t in tombs if t[:32] == info.name or t not in info.replaces.get(t[:32], (t,))}
        held = Graves(folder).read(counting)
        gone = info.prompt_key[dead(info, held)]
        if not len(gone):
            return
        for name, keys in held.items():
            with contextlib.suppress(FileNotFoundError):
                fresh = abs(time.time() - (folder / name).stat().st_mtime) < _FRESH_S
                if fresh and name[:32] == info.name and keys is not None and is_member(gone, keys).all():
                    self.publish(folder / name)
                    return
        self.publish(*write_tomb(folder, info.name, gone))

    # -- beside what others do -----------------------------------------------------------------------------

    def settle(self, folder: Path, listed: Mapping[str, ObjectInfo]) -> bool:
        """After a listing of the objects of a space: complete what was broken off; whether anything has changed here.

        Tombs that could not be put are put now, as far as that is possible. What is left of a space that others have
        cleared goes.
        """
        space = folder.name
        self._put_ns.update(
            (name[:32], info.modified_ns) for name, info in listed.items() if SEGMENT_NAME.fullmatch(name)
        )
        was_described = space in self.described
        (self.described.add if FILE in listed else self.described.discard)(space)
        held = names_in(folder)
        for name in held:
            # A process was killed behind its upload, or while it removed the segment: one that got its name while all
            # were listed may be missing among them.
            if name.endswith(".sent") and (
                f"{name[:32]}.have" in held or not (folder / name[:32]).with_suffix(".safetensors").exists()
            ):
                with contextlib.suppress(OSError):
                    remove(folder / name)
        self._unlisted[space] = self._counting(
            {n for n in held - listed.keys() if TOMB_NAME.fullmatch(n)}, folder, held
        )
        with contextlib.suppress(BackendError, StoreAccessError):
            self.republish(space)
        seen = sidecar_of(folder / FILE)
        if FILE in listed:
            if FILE in held and seen.name not in held:
                mirror.note_put(folder / FILE)
            return False
        if not held & {FILE, seen.name} or any(p.fullmatch(n) for p in _CONTENT for n in held):
            return False
        with contextlib.suppress(OSError):
            # One that was just written, and put by nobody, is of a space that is about to get its first segment.
            if was_described or seen.name in held or time.time() - (folder / FILE).stat().st_mtime > _FORGOTTEN_S:
                remove(folder / FILE)
                remove(seen)
                folder.rmdir()
                return True
        return False

    def recognise(self, path: Path, size: int) -> bool:
        """Whether a segment without a sidecar, of which an object of that size is listed, has one now, or is gone."""
        # Whoever is uploading it has claimed it.
        with contextlib.suppress(OSError), claim(path) as mine:
            if not mine or is_mirror(path):
                return False
            try:
                segment = Segment(path)
            except NewerFormatError:
                return False
            except FormatError as error:
                log.warning("removing what is here of an object, which is looked at again: %s", named(path, error))
                self._drop(path)
                return True
            if segment.info.size == size:
                self._recognise(segment, path)
                return True
        return False

    def _counting(self, tombs: set[str], folder: Path, held: set[str]) -> set[str]:
        """Those of `tombs` that count for segments of which there are objects."""
        if not tombs:
            return tombs
        named = set()
        for name in held:
            if SEGMENT_NAME.fullmatch(name) and is_mirror(folder / name):
                named.add(name[:32])
                with contextlib.suppress(FormatError, OSError):
                    named |= Segment(folder / name).info.replaces.keys()
        return {tomb for tomb in tombs if tomb[:32] in named}

    def republish(self, space: str) -> None:
        """Put the tombs that should have been listed and were not: an invalidation was broken off, or it is late."""
        waiting = self._unlisted.get(space, set())
        for name in sorted(waiting):
            with contextlib.suppress(FileNotFoundError):
                self.publish(self.root / space / name)
            waiting.discard(name)

    def foreign(self, space: str) -> list[str]:
        """The names of the objects among those of a space that are not named as ours are."""
        found = (info.name for info in self.backend.list(f"{ROOT}/{space}/"))
        return [name for name in found if not any(p.fullmatch(name.rpartition("/")[2]) for p in _OURS)]

    def is_settled(self, path: Path, info: SegmentInfo) -> bool:
        """Whether a segment stays where it is, unless it is evicted or cleared: nobody can be about to take it back."""
        said = read_sidecar(path)
        if not info.replaces or said is None or said.put_ns:
            return True
        put_ns = self._put_ns.get(info.name, 0)
        return put_ns > 0 and time.time_ns() - put_ns > _SETTLED_NS

    # -- out of both ---------------------------------------------------------------------------------------

    def remove(self, path: Path) -> int:
        """Remove a file of ours, its object first; the bytes it had, 0 where it was gone.

        Raises as the backend does (BackendError where another process goes on uploading it): it is there as before.
        """
        if not SEGMENT_NAME.fullmatch(path.name):
            if TOMB_NAME.fullmatch(path.name) or path.name == FILE:
                self.backend.delete(self._copy.name_of(path))
            if path.name == FILE:
                self.described.discard(path.parent.name)
                remove(sidecar_of(path))
            return remove(path)
        with claim(path, PATIENCE_S) as mine:
            if not mine:
                self.check_not_busy(path)
            return self.remove_claimed(path)

    def check_not_busy(self, path: Path) -> None:
        """BackendError where a segment that could not be claimed is there: somebody goes on uploading it."""
        if path.exists():
            raise BackendError(f"{path} is being uploaded to {self.backend.url} for a long time: try again later")

    def remove_claimed(self, path: Path) -> int:
        """Remove a segment that the caller has to itself, its object first."""
        if not self.is_here_alone(path):
            self.backend.delete(self._copy.name_of(path))
        return self._drop(path)

    def remove_all(self, paths: Sequence[Path]) -> None:
        """`remove` each of them, several at a time. Raises the first error at the end."""
        at_once(self.remove, paths, self.concurrency)

    def _mark(self, segment: Segment, path: Path, put_ns: int) -> None:
        """Let the segment that is or will be at `path` stand for its object, of which everything is here."""
        with self._copy.locked(path.parent.name):
            write_sidecar(path, Sidecar(segment.info.size, segment.checks.blocks, put_ns), whole=True)
        self.vouched.discard(path)
        self._copy.note(segment.info.size)

    def _drop(self, path: Path) -> int:
        """Remove a segment of the working copy, and what lies beside it; the bytes it had."""
        with self._copy.locked(path.parent.name):
            size = remove(path)
            for beside in (sidecar_of(path), _begun(path)):
                remove(beside)
        self.vouched.discard(path)
        return size


def at_once(work: Callable[[Path], Any], paths: Sequence[Path], threads: int) -> list[Any]:
    """What `work` gives for each of `paths`, several at a time; the first error at the end."""
    return together([partial(work, path) for path in paths], threads, ended_by=BackendError)
