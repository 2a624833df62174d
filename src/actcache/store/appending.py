"""What a writer's thread does with what waits: files that grow for long runs, a segment at once for short ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import DiskFullError, StoreAccessError
from actcache.store import adoption, duplicates, merging
from actcache.store.beside import Background
from actcache.store.files import log
from actcache.store.growing import DISK, GrowingFile
from actcache.store.index import SpaceIndex
from actcache.store.records import SPARSE, Records

if TYPE_CHECKING:
    from actcache.store.uploading import Uploader

_SIZES = (32 << 20, 64 << 20, 128 << 20, merging.TARGET)
# A file for fewer batches would rarely be filled.
_LEAST_BATCHES = 4
_MOST_FILES = 8
_ATTEMPTS = 16


class Appender:
    """Stores groups of records in one space, each durable and visible to everyone when `append` returns.

    The first group of a kind becomes a segment; from the second on they go into a file that grows, each with one sync
    and never to be written again. Such a file becomes a segment when it is full, and when all is finished. Thread-safe.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Records]], object],
        prepare: Callable[[Sequence[Records]], list[Records]],
        index: Callable[[], SpaceIndex],
        lock_folder: Path,
        uploader: Uploader | None = None,
    ) -> None:
        """`write` makes a segment; `prepare` describes the space, and sees to what its dtype cannot hold.

        `uploader`: what takes finished segments to where they are to lie.
        """
        self._write, self._prepare, self._index, self._lock_folder = write, prepare, index, lock_folder
        self._uploader, self._lock = uploader, threading.Lock()
        if uploader is not None:
            uploader.watch(self)
        self._known: set[tuple[Any, ...]] = set()
        self._files: dict[tuple[Any, ...], GrowingFile] = {}
        self._made: dict[tuple[Any, ...], int] = {}
        self._can_lock = True
        # One for all files: what the C library has given to a thread stays with its like when it ends, so that with new
        # ones a long run would take more and more memory.
        self._disk = Background(DISK)

    def append(self, given: Sequence[Records]) -> None:
        """Store `given`, of one signature, all or nothing."""
        with self._lock:
            group = self._prepare(given)
            if self._uploader is not None:
                self._uploader.make_room(self._index().folder.name)
            while group:
                count = self._filling(group)
                self._append(group[:count])
                group = group[count:]

    def _filling(self, group: list[Records]) -> int:
        """How many records of `group` go together: where they are uploaded no more than fill a file."""
        file = self._files.get(group[0].signature)
        if self._uploader is None or file is None or file.fits(group):
            return len(group)
        return next((k for k in range(len(group) - 1, 0, -1) if file.fits(group[:k])), len(group))

    def _append(self, group: list[Records]) -> None:
        signature = group[0].signature
        size = sum(part.stored_bytes for part in group)
        # What is larger is not merged in any case, and in a file that grows the prompts say how many rows they have.
        can_grow = not group[0].is_scaled and group[0].layout != SPARSE
        grows = signature in self._known and can_grow and size <= merging.TARGET // 2
        self._known.add(signature)
        if not (grows and self._can_lock and self._grown(group, size)):
            self._write(group)
            self._merge(merging.MANY)

    def _grown(self, group: list[Records], size: int) -> bool:
        """Whether `group` was added to a file that grows; False where files cannot be locked."""
        for _ in range(_ATTEMPTS):
            file = self._file(group, size)
            if file is None:
                return False
            try:
                file.add(group)
            except FileNotFoundError:
                # Evicted or cleared; what is stored now is not what was meant.
                self._drop(file)
                self._prepare(group)
                continue
            except BaseException:
                self._drop(file)
                raise
            self._prepare(group)
            return True
        return False

    def _file(self, group: list[Records], size: int) -> GrowingFile | None:
        signature = group[0].signature
        file = self._files.pop(signature, None)
        if file is not None and not file.fits(group):
            self._finish(file)
            self._merge(merging.MANY)
            file = None
        if file is None:
            if not self._made:
                # Else they would pile up where every run is killed before its end.
                self._adopt()
            made = self._made[signature] = self._made.get(signature, -1) + 1
            index = self._index()
            # What is uploaded need not be larger than what makes one upload.
            sizes = _SIZES if self._uploader is None else [s for s in _SIZES if s <= merging.GATHERED]
            large = next((s for s in sizes[made:-1] if s >= _LEAST_BATCHES * size), sizes[-1])
            try:
                file = GrowingFile(index.folder, index.folder.name, group, large, self._disk)
            except (DiskFullError, StoreAccessError):
                raise
            except OSError as error:
                log.debug("files that grow need locks, which there are none of: %s", error)
                self._can_lock = False
                return None
            if len(self._files) == _MOST_FILES:
                self._finish(self._files.pop(next(iter(self._files))))
        self._files[signature] = file
        return file

    def _drop(self, file: GrowingFile) -> None:
        file.close()
        self._files = {signature: other for signature, other in self._files.items() if other is not file}

    def finish(self, merge: bool) -> None:
        """Make segments of the files that grew; with `merge` of what others left too, merge, and upload."""
        self.seal()
        with self._lock:
            if merge and self._uploader is not None:
                self._uploader.flush([self._index().folder.name])
            elif merge:
                self._adopt()
                self._merge(merging.FEW)

    def seal(self) -> None:
        """Make segments of the files that grew."""
        with self._lock:
            try:
                while self._files:
                    self._finish(self._files.popitem()[1])
            finally:
                self._disk.stop()

    def _finish(self, file: GrowingFile) -> None:
        try:
            adoption.finish(self._index(), file, self._lock_folder)
        except OSError as error:
            # Everything is stored; only not as compactly as could be.
            log.warning("finishing %s failed, whoever writes next does it: %s", file.path, error)
        if self._uploader is not None:
            self._uploader.note(self._index().folder.name, linger=False)

    def _adopt(self) -> None:
        try:
            adoption.adopt(self._index(), self._lock_folder)
        except OSError as error:
            log.warning("making segments of what others have left unfinished failed: %s", error)

    def _merge(self, few: int) -> None:
        try:
            if self._uploader is not None:
                merging.merge_spooled(self._index(), self._lock_folder, few=few)
            elif merging.merge_space(self._index(), self._lock_folder, few=few):
                duplicates.drop_twins(self._index(), self._lock_folder)
        except OSError as error:
            # Everything is stored; only not as compactly as could be.
            log.warning("merging small segments failed: %s", error)
