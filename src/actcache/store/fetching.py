"""Blocks of objects into their mirrors: coalesced, at the same time, and only what its checksum agrees with."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import BackendError, DiskFullError, StoreAccessError
from actcache.store import behind, mirror
from actcache.store.arrivals import Arrivals
from actcache.store.backend import CacheBackend
from actcache.store.files import FULL, log, write_all
from actcache.store.flights import Flights
from actcache.store.keys import Ints
from actcache.store.lazy import lazy
from actcache.store.locks import is_ending
from actcache.store.mirror import Marks
from actcache.store.receiving import Received

# Neighbours with so little between them come in one read.
_GAP = 64 << 10
# No read is longer, and none is cut into shorter ones, which keep all connections busy where little is wanted.
_READ, _SHORT_READ = 8 << 20, 2 << 20
# Whoever has asked for something waits no longer than that for the requests to be under way.
_BEGIN_S = 0.01


class Vanished(FileNotFoundError):
    """Objects that are gone, or mirrors that are not the files any more that were mapped: look for all again.

    `gone`: the mirrors of objects that are gone. `replaced`: mirrors that are there, as another file.
    """

    def __init__(self, gone: Sequence[Path], replaced: Sequence[Path]) -> None:
        super().__init__(f"gone since it was listed: {', '.join(map(str, [*gone, *replaced]))}")
        self.gone, self.replaced = list(gone), list(replaced)


class _Replaced(FileNotFoundError):
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

    def present(self, blocks: int) -> Marks:
        """Which of its `blocks` are said to be there."""
        return mirror.marks_in(self._sidecar, blocks)

    def mark(self, blocks: Ints, *, there: bool) -> None:
        mirror.mark(self.path, blocks, there=there)

    def settle(self) -> None:
        """Return when all that this process has received for the mirror is written there."""
        behind.settle(self.path)

    def check_place(self) -> None:
        """`_Replaced` where the mirror is another file by now than the one that is mapped."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            raise _Replaced(str(self.path)) from None
        if (status.st_dev, status.st_ino) != self._file:
            raise _Replaced(str(self.path))

    def open(self) -> int:
        """A descriptor to write to the very file that is mapped. `_Replaced` where it is another by now."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise _Replaced(str(self.path)) from None
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self._file or not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise _Replaced(str(self.path))
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


@dataclass
class Wanted:
    """Blocks of one object: their numbers, where they lie in it, and what they hash to.

    `done(numbers, good)` is told what was found: blocks that are good are in the mirror when it is called.
    `into`: what takes the blocks that are good; they are written to the mirror behind it.
    """

    fetcher: Fetcher
    numbers: Ints
    starts: Ints
    stops: Ints
    checksums: npt.NDArray[np.uint64]
    done: Callable[[Ints, bool], None]
    into: Received | None = None

    @lazy
    def nbytes(self) -> int:
        return int((self.stops - self.starts).sum())

    def select(self, chosen: Ints | slice) -> Wanted:
        return Wanted(
            self.fetcher, self.numbers[chosen], self.starts[chosen], self.stops[chosen], self.checksums[chosen],
            self.done, self.into,
        )  # fmt: skip

    def runs(self, most: int) -> Iterator[Wanted]:
        """In parts that are one read each, of at most so many bytes, or one block; neighbours in parts about equal."""
        mine = self
        if (self.starts[1:] < self.starts[:-1]).any():
            mine = self.select(np.argsort(self.starts, kind="stable"))
        apart = ((mine.starts[1:] - mine.stops[:-1] > _GAP).nonzero()[0] + 1).tolist()
        starts, stops = mine.starts.tolist(), mine.stops.tolist()
        block = max(1, int((self.stops - self.starts).max()))
        for first, last in pairwise([0, *apart, len(starts)]):
            size = stops[last - 1] - starts[first]
            even = -(-size // max(1, -(-size // most)))
            longest = min(most, -(-even // block) * block)
            while first < last:
                end = max(first + 1, bisect_right(stops, starts[first] + longest, first, last))
                yield mine if end - first == len(starts) else mine.select(slice(first, end))
                first = end


def fetch(wanted: Sequence[Wanted], *, keep: bool = True, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Read what is `wanted`, several reads at a time, and write what is right to the mirrors; without `keep` nowhere.

    What is wrong is read once more before it is said to be so. `meanwhile` is done once, when the first reads are on
    their way and before anything of them goes into an answer.

    Raises:
        Vanished: objects are gone, or their mirrors; all else has been read.
        BackendError, StoreAccessError: as the backend says; what was read by then is kept.
        DiskFullError: the disk of the working copy has no room.
    """
    wanted = [one for one in wanted if len(one.numbers)]
    if not wanted:
        return
    with translated_local(wanted[0].fetcher.path.parent, wanted[0].fetcher.backend):
        _Fetch(wanted[0].fetcher.threads, keep, meanwhile).run(wanted)


@contextlib.contextmanager
def translated_local(folder: Path, backend: CacheBackend) -> Iterator[None]:
    """Errors of the disk on which a working copy lies, as ours; those of the backend as they are."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BackendError | StoreAccessError | FileNotFoundError):
            raise
        if error.errno in FULL:
            raise DiskFullError(
                f"no room in {folder} for what is read from {backend.url} ({os.strerror(error.errno)}): free space "
                "there, let this host keep less of it (local_gb=, ACTCACHE_LOCAL_GB), or keep it in another folder "
                "(index_dir=)"
            ) from error
        raise


class _Fetch:
    """One `fetch`."""

    def __init__(self, threads: Threads, keep: bool, meanwhile: Callable[[], object]) -> None:
        self._threads, self._keep = threads, keep
        self._meanwhile: Callable[[], object] | None = meanwhile
        self._gone: dict[Path, None] = {}
        self._replaced: dict[Path, None] = {}
        self._behind: list[_Right] = []

    def run(self, wanted: Sequence[Wanted]) -> None:
        try:
            for last in (False, True):
                if not wanted:
                    break
                size = sum(one.nbytes for one in wanted)
                most = min(_READ, max(_SHORT_READ, -(-size // self._threads.number)))
                runs = [run for one in wanted if one.fetcher.path not in self._replaced for run in one.runs(most)]
                wanted = self._all(runs, last)
        finally:
            # Not before all has come, which it would slow down.
            if self._behind:
                behind.write([right.late() for right in self._behind])
        if self._gone or self._replaced:
            raise Vanished(list(self._gone), list(self._replaced))

    def _all(self, runs: Sequence[Wanted], last: bool) -> list[Wanted]:
        """Read all `runs`; what of them was wrong."""
        if len(runs) < 2 or self._threads.number < 2 or is_ending():
            self._prepare(runs)
            found = [self._one(run, last) for run in runs]
            return [wrong for wrong in found if wrong is not None]
        arrivals = Arrivals[tuple[Wanted, memoryview], Wanted | None](
            len(runs), lambda come: self._looked_at(*come, last)
        )
        begun = _Begun(min(len(runs), self._threads.number))

        def bring(run: Wanted) -> None:
            begun.another()
            try:
                if arrivals.are_over:
                    arrivals.end(None)
                elif run.into is None:
                    arrivals.end(self._one(run, last))
                elif (data := self._come(run)) is None:
                    arrivals.end(None)
                else:
                    arrivals.come((run, data))
            except BaseException as error:
                # Before this thread takes the next one, which might fail as long again.
                arrivals.end(error)

        pool = self._threads.pool()
        jobs = [pool.submit(bring, run) for run in runs]
        right = False
        try:
            # Whoever went on at once would hold the interpreter, without which no thread can ask for anything.
            begun.all.wait(_BEGIN_S)
            self._prepare(runs)
            arrivals.begin()
            right = arrivals.wait()
        finally:
            if not right:
                # What has begun by now is waited for, and kept.
                arrivals.are_over = True
                wait([job for job in jobs if not job.cancel()])
        if arrivals.failure is not None:
            raise arrivals.failure
        return [wrong for wrong in arrivals.found if wrong is not None]

    def _prepare(self, runs: Sequence[Wanted]) -> None:
        """What is done once, while `runs` are on their way."""
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is None:
            return
        meanwhile()
        for path, fetcher in {run.fetcher.path: run.fetcher for run in runs if run.into is not None}.items():
            try:
                fetcher.check_place()
            except _Replaced:
                self._replaced[path] = None

    def _one(self, run: Wanted, last: bool) -> Wanted | None:
        """Read a run and keep what is right of it; what is wrong."""
        data = self._come(run)
        return None if data is None else self._looked_at(run, data, last)

    def _come(self, run: Wanted) -> memoryview | None:
        """The bytes of a run, or as many as there are; None where its object, or its mirror, is gone."""
        path = run.fetcher.path
        if (self._gone and path in self._gone) or (self._replaced and path in self._replaced):
            return None
        try:
            return run.fetcher.read(int(run.starts[0]), int(run.stops[-1]))
        except FileNotFoundError:
            self._gone[path] = None
        return None

    def _looked_at(self, run: Wanted, data: memoryview, last: bool) -> Wanted | None:
        """Keep what is right of `data`, the bytes of a run; what is wrong."""
        begin = int(run.starts[0])
        good = np.zeros(len(run.numbers), bool)
        for i, (start, stop, checksum) in enumerate(
            zip(run.starts.tolist(), run.stops.tolist(), run.checksums.tolist(), strict=True)
        ):
            part = data[start - begin : stop - begin]
            good[i] = len(part) == stop - start and xxhash.xxh3_64_intdigest(part) == checksum
        whole = bool(good.all())
        if whole or good.any():
            right = _Right(run if whole else run.select(np.flatnonzero(good)), data, begin)
            if run.into is not None:
                for start, part in right.parts():
                    run.into.add(start, part)
                self._behind.append(right)
            else:
                try:
                    if self._keep:
                        right.write()
                except _Replaced:
                    self._replaced[run.fetcher.path] = None
                    return None
                run.done(right.blocks.numbers, True)
        if whole:
            return None
        wrong = np.flatnonzero(~good)
        if last:
            run.done(run.numbers[wrong], False)
        return run.select(wrong)


class _Begun:
    """Whether so many threads have begun."""

    def __init__(self, number: int) -> None:
        self.all = threading.Event()
        self._left = [None] * (number - 1)

    def another(self) -> None:
        try:
            self._left.pop()
        except IndexError:
            self.all.set()


@dataclass
class _Right:
    """Blocks that were read and are right; `data` begins at `begin` of the object."""

    blocks: Wanted
    data: memoryview
    begin: int

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """Where neighbours begin in the object, and their bytes; what lies between was not asked for."""
        starts, stops = self.blocks.starts, self.blocks.stops
        apart = (np.flatnonzero(starts[1:] != stops[:-1]) + 1).tolist()
        for first, last in pairwise([0, *apart, len(starts)]):
            start, stop = int(starts[first]), int(stops[last - 1])
            yield start, self.data[start - self.begin : stop - self.begin]

    def write(self) -> None:
        """Write them to the mirror."""
        self._write()
        self.blocks.fetcher.note(self.blocks.nbytes)

    def late(self) -> behind.Job:
        """What writes them to the mirror in the background, and tells then that they are there."""
        size = self.blocks.nbytes
        # Counted now: whoever keeps mirrors to their size waits for what is under way.
        self.blocks.fetcher.note(size)
        return behind.Job(self.blocks.fetcher.path, size, self._write_late)

    def _write(self) -> None:
        fd = self.blocks.fetcher.open()
        try:
            # Nothing else is ever written there, so that what others have mapped and checked stays what it is.
            for start, part in self.parts():
                write_all(fd, [part], start)
        finally:
            os.close(fd)
        self.blocks.fetcher.mark(np.sort(self.blocks.numbers), there=True)

    def _write_late(self) -> None:
        threads = self.blocks.fetcher.threads
        try:
            self._write()
        except _Replaced:
            return
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not threads.lacks_room:
                log.warning("no room in %s to keep what was read: it is read again", self.blocks.fetcher.path.parent)
            threads.lacks_room = True
            return
        self.blocks.done(self.blocks.numbers, True)
