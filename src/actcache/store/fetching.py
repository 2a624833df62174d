"""Blocks of objects into their mirrors: coalesced, at the same time, and only what its checksum agrees with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import xxhash

from actcache.errors import BackendError, DiskFullError, StoreAccessError
from actcache.store import behind
from actcache.store.arrivals import Arrivals
from actcache.store.backend import CacheBackend
from actcache.store.fetcher import Replaced, Threads
from actcache.store.files import FULL
from actcache.store.locks import is_ending
from actcache.store.wanted import Right, Wanted

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


def fetch(wanted: Sequence[Wanted], *, keep: bool = True, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Read what is `wanted`, several reads at a time, and write what is right to the mirrors; without `keep` nowhere.

    What is wrong is read once more before it is said to be so. `meanwhile` is done once, when the first reads are on
    their way and before anything of them goes into an answer.

    Raises:
        Vanished: objects are gone, or their mirrors; all else has been read.
        BackendError, StoreAccessError: as the backend says; what was read by then is kept.
        DiskFullError: the disk of the working copy has no room.
    """
    if not wanted:
        return
    try:
        _Fetch(wanted[0].fetcher.threads, keep, meanwhile).run(wanted)
    except OSError:
        with translated_local(wanted[0].fetcher.path.parent, wanted[0].fetcher.backend):
            raise


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
        self._behind: list[Right] = []

    def run(self, wanted: Sequence[Wanted]) -> None:
        try:
            for last in (False, True):
                if not wanted:
                    break
                size = sum(one.nbytes for one in wanted)
                most = min(_READ, max(_SHORT_READ, -(-size // self._threads.number)))
                if self._replaced:
                    wanted = [one for one in wanted if one.fetcher.path not in self._replaced]
                runs = [run for one in wanted for run in one.runs(most)]
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
        arrivals: Arrivals[tuple[Wanted, memoryview], Wanted | None] = Arrivals(
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
            begun.wait()
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
        if any(run.into is not None for run in runs):
            behind.expect()
        for fetcher in dict.fromkeys(run.fetcher for run in runs if run.into is not None):
            try:
                fetcher.check_place()
            except Replaced:
                self._replaced[fetcher.path] = None

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
            return run.fetcher.read(run.begin, run.end)
        except FileNotFoundError:
            self._gone[path] = None
        return None

    def _looked_at(self, run: Wanted, data: memoryview, last: bool) -> Wanted | None:
        """Keep what is right of `data`, the bytes of a run; what is wrong."""
        begin, digest = run.begin, xxhash.xxh3_64_intdigest
        good: list[int] = []
        wrong: list[int] = []
        for i, (start, stop, checksum) in enumerate(
            zip(run.starts.tolist(), run.stops.tolist(), run.checksums.tolist(), strict=True)
        ):
            part = data[start - begin : stop - begin]
            (good if len(part) == stop - start and digest(part) == checksum else wrong).append(i)
        if good:
            right = Right(run.select(np.array(good)) if wrong else run, data, begin)
            if run.into is not None:
                for start, part in right.parts():
                    run.into.add(start, part)
                self._behind.append(right)
            else:
                try:
                    if self._keep:
                        right.write()
                except Replaced:
                    self._replaced[run.fetcher.path] = None
                    return None
                run.done(right.blocks.numbers, True)
        if not wrong:
            return None
        left = run.select(np.array(wrong))
        if last:
            run.done(left.numbers, False)
        return left


class _Begun:
    """Whether so many threads have begun."""

    def __init__(self, number: int) -> None:
        self._all: SimpleQueue[None] = SimpleQueue()
        self._left = [None] * (number - 1)

    def another(self) -> None:
        try:
            self._left.pop()
        except IndexError:
            self._all.put(None)

    def wait(self) -> None:
        """Return when they have, or after a while."""
        with contextlib.suppress(Empty):
            self._all.get(timeout=_BEGIN_S)
