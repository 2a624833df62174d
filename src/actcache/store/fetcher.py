"""Where the bytes of a mirror come from, and the threads that bring them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actcache.store import behind, mirror
from actcache.store.backend import CacheBackend
from actcache.store.flights import Flights
from actcache.store.keys import Ints


class Replaced(FileNotFoundError):
    """A mirror is not the file any more that was mapped."""


class Threads:
    """Threads that read from `backend`, as many as may do so at a time.

    They are kept: to start some takes as long as to read a few MB. Who lets go of them needs not wait for their end.
    """

    def __init__(self, backend: CacheBackend) -> None:
        self.backend = backend
        self.lacks_room = False
        """Whether the disk had no room lately for what was to be written behind an answer."""
        self.flights = Flights()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def number(self) -> int:
        return max(1, int(self.backend.concurrency))

    def pool(self) -> ThreadPoolExecutor:
        found = self._pool
        if found is None:
            # Where two make one at the same time, one of them is used once, and ends.
            found = self._pool = ThreadPoolExecutor(self.number, thread_name_prefix="actcache-fetch")
        return found

    def forget(self) -> None:
        """Let them end with their work."""
        self._pool = None

    def after_fork(self) -> None:
        """In a child process: there are none, and nothing is on its way."""
        self._pool, self.flights = None, Flights()


class Fetcher:
    """The object behind one mirror that is mapped; `path` is the mirror, `name` the object."""

    def __init__(
        self, threads: Threads, name: str, path: Path, status: os.stat_result, note: Callable[[int], None]
    ) -> None:
        self.threads, self.backend, self.name, self.path = threads, threads.backend, name, path
        self._sidecar = mirror.sidecar_of(path)
        self.note = note
        """Told how many bytes were written here."""
        self._file = status.st_dev, status.st_ino

    def marks(self, start: int, stop: int) -> bytes:
        """What is said of its blocks `start` to `stop`: a byte for each, `mirror.THERE` where it is there."""
        return mirror.marks_in(self._sidecar, start, stop)

    def mark(self, blocks: Ints, *, there: bool) -> None:
        mirror.mark(self.path, blocks, there=there)

    def settle(self) -> None:
        """Return when all that this process has received for the mirror is written there."""
        behind.settle(self.path)

    def check_place(self) -> None:
        """`Replaced` where the mirror is another file by now than the one that is mapped."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            raise Replaced(str(self.path)) from None
        if (status.st_dev, status.st_ino) != self._file:
            raise Replaced(str(self.path))

    def open(self) -> int:
        """A descriptor to write to the very file that is mapped. `Replaced` where it is another by now."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise Replaced(str(self.path)) from None
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self._file or not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise Replaced(str(self.path))
        return fd

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of the object, or as many of them as it has."""
        data = memoryview(self.backend.read(self.name, start, stop)).cast("B")[: stop - start]
        if len(data) == stop - start or not len(data):
            return data
        parts = [data]
        while len(data) and (at := start + sum(map(len, parts))) < stop:
            data = memoryview(self.backend.read(self.name, at, stop)).cast("B")[: stop - at]
            parts.append(data)
        return memoryview(b"".join(parts))
