"""Sorted keys: which segment and row holds a 128-bit key, for many keys at once."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.store.lazy import lazy
from actcache.store.memory import return_free_memory
from actcache.store.spill import Spill

if TYPE_CHECKING:
    from actcache.store.records import SegmentInfo

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


AT_ONCE = 1 << 15
"""Keys that are sorted at a time; more of them than that lie in a file, where there is one."""
_MANY = 200_000
_FEW = 512

KEY_BYTES = 24
"""Of a key in a run, with where it is."""
KEY_WORDS = struct.Struct("=QQ")
"""A key as the two words it is sorted by."""


@dataclass
class Run:
    """Keys sorted by their first word; `segment` and `row` say where each is.

    `numbers` int32: what the numbers in `segment` stand for, -1 for segments that are left out; None where they stand
    for themselves, and where nothing lies in a file.
    """

    high: Words
    low: Words
    segment: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.high)

    @lazy
    def views(self) -> tuple[memoryview, memoryview, memoryview, memoryview]:
        """The arrays as memoryviews, which give single items many times faster."""
        return self.high.data, self.low.data, self.segment.data, self.row.data

    @lazy
    def _counts(self) -> Ints:
        """How many keys there are under each number in `segment`."""
        assert self.numbers is not None
        found = np.zeros(len(self.numbers), np.int64)
        for start in range(0, len(self), AT_ONCE):
            found += np.bincount(self.segment[start : start + AT_ONCE], minlength=len(found))
        return found

    @property
    def alive(self) -> int:
        """How many keys are not left out."""
        return len(self) if self.numbers is None else int(self._counts[self.numbers >= 0].sum())

    def without(self, gone: Sequence[int]) -> Run:
        """The run without these segments; of what lies in a file nothing is copied."""
        if self.numbers is None:
            return self.keep(~np.isin(self.segment, gone))
        self.numbers[np.isin(self.numbers, gone)] = -1
        return self

    def keep(self, mask: npt.NDArray[np.bool_]) -> Run:
        return Run(self.high[mask], self.low[mask], self.segment[mask], self.row[mask])

    def between(self, start: int, stop: int) -> Run:
        """The keys that count, of which the first word is from `start` on and below `stop`, in memory."""
        a = int(np.searchsorted(self.high, np.uint64(start)))
        b = len(self) if stop >> 64 else int(np.searchsorted(self.high, np.uint64(stop)))
        segment = self.segment[a:b] if self.numbers is None else self.numbers[self.segment[a:b]]
        part = Run(self.high[a:b], self.low[a:b], segment, self.row[a:b])
        return part if self.numbers is None else part.keep(segment >= 0)


class KeyTable:
    """Keys of many segments; of two segments with the same key the one with the greater age rank wins, of two rows of a
    segment the later one.

    Runs of sorted keys are merged when a newer one is half as long, so adding N segments costs N log N and
    a look-up visits few runs. 24 bytes per key, of more than a few in files of `spill`, where there is one.
    """

    def __init__(self, spill: Spill | None = None) -> None:
        self._spill = spill
        self._runs: list[Run] = []
        self._dropped: list[tuple[int, int]] = []
        """Segments to leave out, and of how many of the runs."""
        self._fresh = 0
        """Keys in memory, at the end of the runs."""

    def __len__(self) -> int:
        self._settle()
        return sum(run.alive for run in self._runs)

    def add(self, segment: int, keys: npt.NDArray[np.uint8], live: npt.NDArray[np.bool_] | None = None) -> None:
        """Add the `keys` uint8 ``[n, 16]`` of a segment; rows where `live` is False are left out."""
        words = np.ascontiguousarray(keys).view(np.uint64)
        step = len(words) if self._spill is None else AT_ONCE
        for start in range(0, len(words), step or 1):
            some = words[start : start + step]
            rows = np.arange(start, start + len(some), dtype=np.int32)
            if live is not None:
                chosen = live[start : start + step]
                some, rows = some[chosen], rows[chosen]
            self._runs.append(_sorted(some[:, 0], some[:, 1], np.full(len(rows), segment, np.int32), rows))
            self._fresh += len(rows)
            if self._spill is not None and self._fresh > AT_ONCE:
                self._put_aside(self._spill)

    def take(self, run: Run) -> None:
        """Add keys that are sorted already, with their `numbers`."""
        assert not self._runs
        self._runs.append(run)

    def drop(self, segment: int) -> None:
        """Forget all keys of a segment."""
        self._dropped.append((segment, len(self._runs)))

    def whole(self) -> Run:
        """All keys as one run."""
        self._settle()
        if len(self._runs) != 1 or self._runs[0].alive < len(self._runs[0]):
            self._runs = [_joined(self._runs, self._spill)]
        return self._runs[0]

    def pieces(self) -> Iterator[Run]:
        """All keys, range after range of them: those that are equal, or have one first word, come together."""
        self._filter()
        return _pieces(self._runs)

    @property
    def is_empty(self) -> bool:
        """Whether there is no key."""
        self._settle()
        return not self._runs

    def find(self, keys: npt.NDArray[np.uint8], rank: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], Ints]:
        """Segment and row of each of `keys` uint8 ``[m, 16]``; segment -1 where absent.

        `rank[segment]` orders segments by age; the highest wins.
        """
        self._settle()
        words = np.ascontiguousarray(keys).view(np.uint64)
        high, low = words[:, 0], words[:, 1]
        # `np.full` takes twice as long where little of it is in the processor's caches.
        segment, row = np.empty(len(high), np.int32), np.empty(len(high), np.int32)
        segment.fill(-1)
        row.fill(-1)
        order = None
        if len(high) > _FEW:
            # Looking up in sorted order walks the run once, which the processor's cache likes.
            order = high.argsort()
            high, low = high[order], low[order]
        for run in self._runs:
            if len(run):
                _search(run, high, low, order, rank, segment, row)
        return segment, row.astype(np.int64)

    def find_one(self, high: int, low: int, rank: npt.NDArray[Any]) -> tuple[int, int]:
        """`find` for one key, given as two words."""
        self._settle()
        segment = row = -1
        for run in self._runs:
            highs, lows, segments, rows = run.views
            at = _first(highs, high)
            while at < len(highs) and highs[at] == high:
                new, new_row = segments[at], rows[at]
                if run.numbers is not None:
                    new = int(run.numbers[new])
                if (
                    lows[at] == low
                    and new >= 0
                    and (segment < 0 or (new_row > row if new == segment else rank[new] > rank[segment]))
                ):
                    segment, row = new, new_row
                at += 1
        return segment, row

    def _filter(self) -> None:
        # Many drops (after a merge) are filtered once.
        if self._dropped:
            last = dict(self._dropped)
            runs = []
            for i, run in enumerate(self._runs):
                gone = [segment for segment, until in last.items() if i < until]
                runs.append(run.without(gone) if gone else run)
            self._runs, self._dropped = [run for run in runs if run.alive], []
            # What is mostly left out takes longer to search than to write anew.
            self._runs = [run if 2 * run.alive >= len(run) else _joined([run], self._spill) for run in self._runs]

    def _put_aside(self, spill: Spill) -> None:
        """Write what is in memory to a file."""
        self._filter()
        first = len(self._runs)
        while first and self._runs[first - 1].numbers is None:
            first -= 1
        self._runs[first:] = [_joined(self._runs[first:], spill)] if first < len(self._runs) else []
        self._fresh = 0

    def _settle(self) -> None:
        # Many adds in a row (opening a store) are sorted once.
        self._filter()
        while len(self._runs) > 1:
            total, start = len(self._runs[-1]), len(self._runs) - 1
            while start and len(self._runs[start - 1]) <= 2 * total:
                start -= 1
                total += len(self._runs[start])
            if start == len(self._runs) - 1:
                return
            self._runs[start:] = [_joined(self._runs[start:], self._spill)]
            self._fresh = sum(len(run) for run in self._runs if run.numbers is None)
            if total > _MANY:
                return_free_memory()


class Group:
    """The segments of one layout and one set of sites, and where each key is in them."""

    def __init__(self, layout: str, sites: tuple[str, ...]) -> None:
        self.layout = layout
        self.sites = frozenset(sites)
        self.members: dict[int, None] = {}
        self.tables: dict[str, KeyTable] = {}


def keys_of(info: SegmentInfo, kind: str, live: Mask | None) -> tuple[npt.NDArray[np.uint8], Mask | None]:
    """The keys of kind "text" or "token" of a segment, and which of them are to be found: of the `live` prompts."""
    if kind != "text":
        return info.prompt_key, live
    # Prompts given as ids have no text key; zeros would make them one another's duplicates.
    given: Mask = np.asarray(info.text_key.any(axis=1))
    if given.all():
        return info.text_key, live
    return info.text_key, given if live is None else given & live


def ranks(infos: Sequence[SegmentInfo | None]) -> Ints:
    """Age rank of each segment, by number: the later created, the higher."""
    ages = [(i.created_ns, i.name) if i is not None else (-1, "") for i in infos]
    found = np.empty(len(ages), np.int64)
    found[sorted(range(len(ages)), key=ages.__getitem__)] = np.arange(len(ages))
    return found


def _first(highs: memoryview, high: int) -> int:
    """`bisect_left`, begun where a digest of that value is to be expected: few steps, however many keys there are."""
    n = len(highs)
    expected, spread = high * n >> 64, 4 * isqrt(n) + 4
    start, stop = max(0, expected - spread), min(n, expected + spread)
    if (start and highs[start - 1] >= high) or (stop < n and highs[stop] < high):
        return bisect_left(highs, high)
    return bisect_left(highs, high, start, stop)


def _joined(runs: list[Run], spill: Spill | None) -> Run:
    """What is in `runs` as one, in a file of `spill` where there is much of it."""
    total = sum(run.alive for run in runs)
    if spill is None or total <= AT_ONCE:
        return _concatenated([run.between(0, 1 << 64) for run in runs])
    places = run_in(spill.empty(total * KEY_BYTES, np.uint8), total)
    at = most = 0
    for piece in _pieces(runs):
        to = slice(at, at + len(piece))
        places.high[to], places.low[to] = piece.high, piece.low
        places.segment[to], places.row[to] = piece.segment, piece.row
        at += len(piece)
        most = max(most, int(piece.segment.max(initial=0)))
    places.numbers = np.arange(most + 1, dtype=np.int32)
    return places


def _pieces(runs: list[Run]) -> Iterator[Run]:
    """What is in `runs`, range after range of first words, each sorted and in memory."""
    # Digests lie evenly: so many of them are in each of as many ranges.
    count = -(-sum(run.alive for run in runs) // AT_ONCE)
    for k in range(count):
        yield _concatenated([run.between((k << 64) // count, (k + 1 << 64) // count) for run in runs])


def run_in(raw: npt.NDArray[np.uint8], count: int) -> Run:
    """A run of so many keys as it lies in the bytes `raw`, `KEY_BYTES` each."""
    ends = [0, 8 * count, 16 * count, 20 * count, 24 * count]
    high, low, segment, row = (raw[a:b] for a, b in pairwise(ends))
    return Run(high.view(np.uint64), low.view(np.uint64), segment.view(np.int32), row.view(np.int32))


def _concatenated(runs: list[Run]) -> Run:
    return _sorted(
        np.concatenate([r.high for r in runs]),
        np.concatenate([r.low for r in runs]),
        np.concatenate([r.segment for r in runs]),
        np.concatenate([r.row for r in runs]),
    )


def _sorted(high: Words, low: Words, segment: npt.NDArray[np.int32], row: npt.NDArray[np.int32]) -> Run:
    order = np.argsort(high)
    return Run(high[order], low[order], segment[order], row[order])


def _search(
    run: Run,
    high: Words,
    low: Words,
    places: Ints | None,
    rank: npt.NDArray[Any],
    segment: npt.NDArray[np.int32],
    row: npt.NDArray[np.int32],
) -> None:
    """Take what `run` has of these keys into `segment` and `row`, at `places` (None: one after the other)."""
    at = run.high.searchsorted(high)
    # Behind the last there is nothing that could be equal: it is smaller than what would lie there.
    hits = (run.high.take(at, mode="clip") == high).nonzero()[0]
    if len(hits) < len(high):
        at, high, low = at[hits], high[hits], low[hits]
    places = hits if places is None else places[hits]
    # Duplicates of a prompt, and first words that agree by chance, lie side by side.
    while len(at):
        right = run.low.take(at) == low
        new, new_row = run.segment.take(at), run.row.take(at)
        if run.numbers is not None:
            new = run.numbers.take(new)
            right &= new >= 0
        old = segment.take(places)
        if len((old >= 0).nonzero()[0]):
            # Rows of one segment lie in the order in which they were written.
            later = (new == old) & (new_row > row.take(places))
            right &= (old < 0) | (rank.take(new) > rank.take(old)) | later
        better = right.nonzero()[0]
        if len(better) < len(places):
            segment[places[better]], row[places[better]] = new[better], new_row[better]
        else:
            segment[places], row[places] = new, new_row
        at = at + 1
        more = (run.high.take(at, mode="clip") == high).nonzero()[0]
        if not len(more):
            return
        more = more[at[more] < len(run)]
        at, high, low, places = at[more], high[more], low[more], places[more]
