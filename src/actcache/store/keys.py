"""Sorted keys in memory: which segment and row holds a 128-bit key, for many keys at once."""

from __future__ import annotations

import struct
from bisect import bisect_left
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.lazy import lazy
from actcache.store.mapped import return_free_memory

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


_MANY = 200_000

KEY_WORDS = struct.Struct("=QQ")
"""A key as the two words it is sorted by."""


@dataclass
class _Run:
    """Keys sorted by their first word; `segment` and `row` say where each is."""

    high: Words
    low: Words
    segment: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.high)

    @lazy
    def views(self) -> tuple[memoryview, memoryview, memoryview, memoryview]:
        """The arrays as memoryviews, which give single items many times faster."""
        return self.high.data, self.low.data, self.segment.data, self.row.data

    def keep(self, mask: npt.NDArray[np.bool_]) -> _Run:
        return _Run(self.high[mask], self.low[mask], self.segment[mask], self.row[mask])


class KeyTable:
    """Keys of many segments; of two segments with the same key the one with the greater age rank wins, of two rows of a
    segment the later one.

    Runs of sorted keys are merged when a newer one is half as long, so adding N segments costs N log N and
    a look-up visits few runs. 24 bytes per key.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._dropped: list[tuple[int, int]] = []
        """Segments to leave out, and of how many of the runs."""

    def __len__(self) -> int:
        self._settle()
        return sum(map(len, self._runs))

    def add(self, segment: int, keys: npt.NDArray[np.uint8], live: npt.NDArray[np.bool_] | None = None) -> None:
        """Add the `keys` uint8 ``[n, 16]`` of a segment; rows where `live` is False are left out."""
        words = np.ascontiguousarray(keys).view(np.uint64)
        rows = np.arange(len(words), dtype=np.int32)
        if live is not None:
            words, rows = words[live], rows[live]
        self._runs.append(_sorted(words[:, 0], words[:, 1], np.full(len(rows), segment, np.int32), rows))

    def drop(self, segment: int) -> None:
        """Forget all keys of a segment."""
        self._dropped.append((segment, len(self._runs)))

    def find(self, keys: npt.NDArray[np.uint8], rank: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], Ints]:
        """Segment and row of each of `keys` uint8 ``[m, 16]``; segment -1 where absent.

        `rank[segment]` orders segments by age; the highest wins.
        """
        self._settle()
        words = np.ascontiguousarray(keys).view(np.uint64)
        high, low = words[:, 0], words[:, 1]
        segment = np.full(len(high), -1, np.int32)
        row = np.full(len(high), -1, np.int64)
        if len(high) > 64:
            # Looking up in sorted order walks the run once, which the processor's cache likes.
            order = np.argsort(high)
            high, low = high[order], low[order]
        for run in self._runs:
            if len(run):
                _search(run, high, low, rank, segment, row)
        if len(high) > 64:
            back_segment, back_row = np.empty_like(segment), np.empty_like(row)
            back_segment[order], back_row[order] = segment, row
            return back_segment, back_row
        return segment, row

    def find_one(self, high: int, low: int, rank: npt.NDArray[Any]) -> tuple[int, int]:
        """`find` for one key, given as two words."""
        self._settle()
        segment = row = -1
        for run in self._runs:
            highs, lows, segments, rows = run.views
            at = _first(highs, high)
            while at < len(highs) and highs[at] == high:
                new, new_row = segments[at], rows[at]
                if lows[at] == low and (
                    segment < 0 or (new_row > row if new == segment else rank[new] > rank[segment])
                ):
                    segment, row = new, new_row
                at += 1
        return segment, row

    def _settle(self) -> None:
        # Many adds in a row (opening a store) are sorted once, many drops (after a merge) filtered once.
        if self._dropped:
            last = dict(self._dropped)
            runs = []
            for i, run in enumerate(self._runs):
                gone = [segment for segment, until in last.items() if i < until]
                runs.append(run.keep(~np.isin(run.segment, gone)) if gone else run)
            self._runs, self._dropped = [run for run in runs if len(run)], []
        while len(self._runs) > 1:
            total, start = len(self._runs[-1]), len(self._runs) - 1
            while start and len(self._runs[start - 1]) <= 2 * total:
                start -= 1
                total += len(self._runs[start])
            if start == len(self._runs) - 1:
                return
            self._runs[start:] = [_joined(self._runs[start:])]
            if total > _MANY:
                return_free_memory()


class Group:
    """The segments of one layout and one set of sites, and where each key is in them."""

    def __init__(self, layout: str, sites: tuple[str, ...]) -> None:
        self.layout = layout
        self.sites = frozenset(sites)
        self.members: dict[int, None] = {}
        self.tables: dict[str, KeyTable] = {}


def _first(highs: memoryview, high: int) -> int:
    """`bisect_left`, begun where a digest of that value is to be expected: few steps, however many keys there are."""
    n = len(highs)
    expected, spread = high * n >> 64, 4 * isqrt(n) + 4
    start, stop = max(0, expected - spread), min(n, expected + spread)
    if (start and highs[start - 1] >= high) or (stop < n and highs[stop] < high):
        return bisect_left(highs, high)
    return bisect_left(highs, high, start, stop)


def _joined(runs: list[_Run]) -> _Run:
    return _sorted(
        np.concatenate([r.high for r in runs]),
        np.concatenate([r.low for r in runs]),
        np.concatenate([r.segment for r in runs]),
        np.concatenate([r.row for r in runs]),
    )


def _sorted(high: Words, low: Words, segment: npt.NDArray[np.int32], row: npt.NDArray[np.int32]) -> _Run:
    order = np.argsort(high)
    return _Run(high[order], low[order], segment[order], row[order])


def _search(
    run: _Run, high: Words, low: Words, rank: npt.NDArray[Any], segment: npt.NDArray[np.int32], row: Ints
) -> None:
    at = np.searchsorted(run.high, high)
    last = len(run) - 1
    active = np.flatnonzero(run.high[np.minimum(at, last)] == high)
    active = active[at[active] <= last]
    at = at[active]
    # Duplicates of a prompt, and first words that agree by chance, lie side by side.
    while len(active):
        found = run.low[at] == low[active]
        new = run.segment[at]
        old = segment[active]
        # Rows of one segment lie in the order in which they were written.
        later = (new == old) & (run.row[at] > row[active])
        better = found & ((old < 0) | (rank[new] > rank[old]) | later)
        segment[active[better]] = new[better]
        row[active[better]] = run.row[at[better]]
        at = at + 1
        more = at <= last
        more[more] = run.high[at[more]] == high[active[more]]
        active, at = active[more], at[more]
