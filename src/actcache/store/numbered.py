"""The rows of many prompts, numbered through one prompt after the other, and read in whatever order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store.dtypes import common_dtype
from actcache.store.gather import Piece, gather_pieces
from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.placement import Placement, by_segment
from actcache.store.prompts import offsets
from actcache.store.statistics import Moments, as_float

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class _Runs:
    """Rows that lie one behind the other: of run `k` row ``begin[k] + i`` is row ``first[k] + i`` of a segment."""

    begin: Ints
    segment: npt.NDArray[np.int32]
    first: Ints

    def of(self, numbers: Ints) -> Ints:
        """The run in which each of these rows lies."""
        if len(self.begin) == 1:
            return np.zeros(len(numbers), np.int64)
        return np.searchsorted(self.begin, numbers, "right") - 1


class NumberedRows:
    """The rows of `placement`, every prompt of which must have been found at every site.

    What it holds is mapped, so that it stays readable whoever removes it from the store. Rows are checked when they are
    read for the first time. `starts` int64 ``[n + 1]``: prompt `i` has the rows from ``starts[i]`` to
    ``starts[i + 1]``. Needs a few bytes for each prompt, and none for a row.
    """

    def __init__(self, placement: Placement) -> None:
        self.sites = placement.sites
        self.starts = offsets(placement.row_counts())
        self._segments = placement.segments
        self._runs: dict[str, _Runs] = {}
        known: dict[int, _Runs] = {}
        for site in self.sites:
            segment, prompt = placement.where(site)
            if id(segment) not in known:
                known[id(segment)] = self._run(segment, prompt)
            self._runs[site] = known[id(segment)]

    def _run(self, segment: npt.NDArray[np.int32], prompt: Ints) -> _Runs:
        first = np.zeros(len(segment), np.int64)
        for number, members in by_segment(segment, np.arange(len(segment))):
            offset = self._segments[number].row_offset
            first[members] = offset[prompt[members]]
            if (offset[prompt[members] + 1] - first[members] != self.starts[members + 1] - self.starts[members]).any():
                raise NotCachedError("the same prompts have other numbers of rows at other sites: read them apart")
        behind = first + np.diff(self.starts)
        cut = np.ones(len(segment), bool)
        cut[1:] = (segment[1:] != segment[:-1]) | (first[1:] != behind[:-1])
        return _Runs(self.starts[:-1][cut], segment[cut], first[cut])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, site: str) -> tuple[np.dtype[Any], int]:
        """The dtype that holds all values of `site`, and its width."""
        columns = [self._segments[number].column(site) for number in np.unique(self._runs[site].segment).tolist()]
        widths = sorted({width for _, width in columns})
        if len(widths) != 1:
            raise NotCachedError(f"{site!r} is stored with different widths {widths}, which fit no one batch")
        return common_dtype(dtype for dtype, _ in columns), widths[0]

    def take(self, numbers: Ints, site: str, out: npt.NDArray[Any], at: Ints | None = None) -> None:
        """``out[at[i]] = row numbers[i] at site``, converted to the dtype of `out`; `at` default: one after the other.

        Raises:
            NotCachedError: a row is damaged.
        """
        places = np.arange(len(numbers)) if at is None else at
        runs = self._runs[site]
        pieces = []
        run = runs.of(numbers)
        rows = numbers + (runs.first - runs.begin)[run]
        for number, members in by_segment(runs.segment[run], np.arange(len(numbers))):
            mine = rows if len(members) == len(rows) else rows[members]
            pieces.append(Piece(self._checked(number, site, mine, mine + 1), (0,), mine, places[members]))
        gather_pieces(pieces, [site], out[:, None])

    def copy(self, start: int, stop: int, site: str, out: npt.NDArray[Any]) -> None:
        """`take` of the rows from `start` to `stop`, which are copied run by run."""
        pieces = []
        for number, first, begin, end in self._within(site, start, stop):
            rows = np.arange(first, first + end - begin)
            edges = np.array([first]), np.array([first + end - begin])
            at = np.arange(begin - start, end - start)
            pieces.append(Piece(self._checked(number, site, *edges), (0,), rows, at, straight=True))
        gather_pieces(pieces, [site], out[:, None])

    def _within(self, site: str, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The runs that hold the rows from `start` to `stop`: the segment, the first row there, and which they are."""
        runs = self._runs[site]
        k = int(np.searchsorted(runs.begin, start, "right")) - 1
        while start < stop:
            end = int(runs.begin[k + 1]) if k + 1 < len(runs.begin) else len(self)
            end = min(end, stop)
            if end > start:
                yield int(runs.segment[k]), int(runs.first[k]) + start - int(runs.begin[k]), start, end
            start, k = max(start, end), k + 1

    def _checked(self, number: int, site: str, starts: Ints, stops: Ints) -> Segment:
        segment = self._segments[number]
        segment.require([site], starts, stops)
        return segment

    def prompt_of(self, numbers: Ints) -> Ints:
        """The prompt that each of these rows belongs to."""
        return np.searchsorted(self.starts, numbers, "right") - 1

    def moments(self, site: str, numbers: Ints | None = None) -> Moments:
        """The moments of the rows `numbers` (ascending; default all) at `site`.

        Without reading them where all rows of a segment count, whose moments are recorded.
        """
        dtype, width = self.column(site)
        total = Moments.empty(width)
        every = np.arange(len(self)) if numbers is None else numbers
        left = np.ones(len(every), bool)
        runs = self._runs[site]
        run = runs.of(every)
        for number, members in by_segment(runs.segment[run], np.arange(len(every))):
            known = self._segments[number].moments(site)
            if known is None:
                raise NotCachedError(f"{site!r} holds integers, which have no statistics")
            # No row is there twice, so that so many are all.
            if len(members) == self._segments[number].info.rows:
                total.merge(known)
                left[members] = False
        rest = every[left]
        out = np.empty((min(len(rest), _ROWS_AT_ONCE), width), dtype)
        for start in range(0, len(rest), _ROWS_AT_ONCE):
            some = rest[start : start + _ROWS_AT_ONCE]
            self.take(some, site, out)
            total.update(as_float(out[: len(some)]))
        return total


def numbered(placement: Placement, sites: Sequence[str]) -> NumberedRows:
    """`NumberedRows` of a placement in which all prompts were found."""
    missing = np.flatnonzero(~placement.found)
    if len(missing):
        raise NotCachedError(
            f"{len(missing)} of {len(placement)} prompts have no {' and '.join(map(repr, sites))} in the store (the "
            f"first is prompt {int(missing[0])}): extract them first, or leave them out"
        )
    return NumberedRows(placement)
