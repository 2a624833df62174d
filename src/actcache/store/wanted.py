"""Blocks of one object that are wanted, and those of them that have come."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from actcache.store import behind
from actcache.store.fetcher import Fetcher, Replaced
from actcache.store.files import FULL, log, write_all
from actcache.store.keys import Ints
from actcache.store.lazy import lazy
from actcache.store.receiving import Received
from actcache.store.records import BLOCK

# Neighbours with so little between them come in one read.
_GAP = 64 << 10


class Blocks(NamedTuple):
    """All blocks of an object: where each begins and ends in it, and what it hashes to."""

    starts: Ints
    stops: Ints
    checksums: npt.NDArray[np.uint64]


@dataclass
class Wanted:
    """Some of the `blocks` of one object, one at least.

    `which`: their numbers. As a slice: each begins where the one before it ends, and none but the last is shorter than
    `BLOCK`; of such nothing is made before it is needed, which is when they are on their way.
    `done(numbers, good)` is told what was found: blocks that are good are in the mirror when it is called.
    `into`: what takes the blocks that are good; they are written to the mirror behind it.
    """

    fetcher: Fetcher
    blocks: Blocks
    which: Ints | slice
    done: Callable[[Ints, bool], None]
    into: Received | None = None

    @lazy
    def numbers(self) -> Ints:
        return np.arange(self.which.start, self.which.stop) if isinstance(self.which, slice) else self.which

    @lazy
    def starts(self) -> Ints:
        return self.blocks.starts[self.which]

    @lazy
    def stops(self) -> Ints:
        return self.blocks.stops[self.which]

    @lazy
    def checksums(self) -> npt.NDArray[np.uint64]:
        return self.blocks.checksums[self.which]

    @property
    def count(self) -> int:
        return self.which.stop - self.which.start if isinstance(self.which, slice) else len(self.which)

    @property
    def begin(self) -> int:
        """Where the first one begins."""
        return self.blocks.starts.item(self.which.start if isinstance(self.which, slice) else self.which[0])

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return self.blocks.stops.item(self.which.stop - 1 if isinstance(self.which, slice) else self.which[-1])

    @lazy
    def nbytes(self) -> int:
        return self.end - self.begin if isinstance(self.which, slice) else int((self.stops - self.starts).sum())

    def select(self, chosen: Ints | slice) -> Wanted:
        """Those at these places among them; `chosen` as a slice: neighbours."""
        which = self.which
        if isinstance(which, slice) and isinstance(chosen, slice):
            which = slice(which.start + chosen.start, which.start + chosen.stop)
        else:
            which = self.numbers[chosen]
        return Wanted(self.fetcher, self.blocks, which, self.done, self.into)

    def runs(self, most: int) -> Iterator[Wanted]:
        """In parts that are one read each, of at most so many bytes, or one block; neighbours in parts about equal."""
        if isinstance(self.which, slice):
            longest, count, first = _longest(self.nbytes, most, BLOCK), self.count, 0
            while first < count:
                rest = self.nbytes - first * BLOCK
                end = count if rest <= longest else first + max(1, longest // BLOCK)
                yield self if end - first == count else self.select(slice(first, end))
                first = end
            return
        mine = self
        if (self.starts[1:] < self.starts[:-1]).any():
            mine = self.select(np.argsort(self.starts, kind="stable"))
        apart = ((mine.starts[1:] - mine.stops[:-1] > _GAP).nonzero()[0] + 1).tolist()
        starts, stops = mine.starts.tolist(), mine.stops.tolist()
        block = max(1, int((self.stops - self.starts).max()))
        for first, last in pairwise([0, *apart, len(starts)]):
            longest = _longest(stops[last - 1] - starts[first], most, block)
            while first < last:
                end = max(first + 1, bisect_right(stops, starts[first] + longest, first, last))
                yield mine if end - first == len(starts) else mine.select(slice(first, end))
                first = end


def _longest(size: int, most: int, block: int) -> int:
    """How many bytes parts of `size` bytes have that are about equal, each of whole blocks but for the last."""
    each = -(-size // max(1, -(-size // most)))
    return min(most, -(-each // block) * block)


@dataclass
class Right:
    """Blocks that were read and are right; `data` begins at `begin` of the object."""

    blocks: Wanted
    data: memoryview
    begin: int

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """Where neighbours begin in the object, and their bytes; what lies between was not asked for."""
        if isinstance(self.blocks.which, slice):
            yield self.begin, self.data
            return
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
        except Replaced:
            return
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not threads.lacks_room:
                log.warning("no room in %s to keep what was read: it is read again", self.blocks.fetcher.path.parent)
            threads.lacks_room = True
            return
        self.blocks.done(self.blocks.numbers, True)
