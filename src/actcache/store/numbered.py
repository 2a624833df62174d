"""The rows of many prompts, numbered through one prompt after the other, and read in whatever order."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from actcache.errors import NotCachedError
from actcache.store.by_segment import by_segment
from actcache.store.dtypes import common_dtype
from actcache.store.gather import Piece, gather_pieces
from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.placement import Placement
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


class _Field:
    """The matrices of one site in several segments as one: items that are a row each, at any distance in memory.

    So rows of however many segments are taken in one call, in the order in which they are wanted. Between matrices lies
    memory of others, or none, which nothing refers to: whoever takes must have checked the rows.
    """

    def __init__(self, matrices: Sequence[npt.NDArray[Any]], which: Ints, ahead: Ints) -> None:
        """Rows of run `k` are those of ``matrices[which[k]]``, ``ahead[k]`` further on than their numbers say."""
        addresses = np.array([matrix.__array_interface__["data"][0] for matrix in matrices])
        self._dtype, self._width = matrices[0].dtype, matrices[0].shape[1]
        size = self._width * self._dtype.itemsize
        low, high = int(addresses.min()), max(int(a) + m.nbytes for a, m in zip(addresses, matrices, strict=True))
        step = math.gcd(size, *(int(address) - low for address in addresses))
        buffer = memoryview((ctypes.c_ubyte * (high - low)).from_address(low)).cast("B")
        memory = np.frombuffer(buffer, np.uint8)
        one: npt.NDArray[np.void] = memory[:size].view(np.dtype((np.void, size)))
        self._rows = as_strided(one, ((high - low - size) // step + 1,), (step,), writeable=False)
        self._apart = size // step
        self._first = ((addresses - low)[which] + ahead * size) // step
        # Mapped for as long as this is there.
        self._matrices = matrices

    @classmethod
    def of(cls, segments: Sequence[Segment], runs: _Runs, site: str) -> _Field | None:
        """None where values have to be decoded or converted."""
        used, which = np.unique(runs.segment, return_inverse=True)
        held = [segments[number] for number in used.tolist()]
        if any(segment.scales(site) is not None for segment in held):
            return None
        matrices = [segment.matrix(site) for segment in held]
        same = {(matrix.dtype, matrix.shape[1]) for matrix in matrices}
        if len(same) > 1 or not matrices[0].shape[1]:
            return None
        return cls(matrices, which.reshape(-1), runs.first - runs.begin)

    def take(self, numbers: Ints, run: Ints) -> npt.NDArray[Any]:
        """The rows `numbers`, which lie in the runs `run`: a new array ``[n, D]``."""
        found: npt.NDArray[Any] = self._rows[self._first[run] + numbers * self._apart]
        return found.view(self._dtype).reshape(len(numbers), self._width)


class NumberedRows:
    """The rows of `placement`, every prompt of which must have been found at every site.

    What it holds is mapped, so that it stays readable whoever removes it from the store. Rows are checked when they are
    read for the first time. `starts` int64 ``[n + 1]``: prompt `i` has the rows from ``starts[i]`` to
    ``starts[i + 1]``. `begins`: the prompts that do not lie behind the one before, in the same segment. Needs a
    few bytes for each prompt, and none for a row.
    """

    def __init__(self, placement: Placement) -> None:
        self.sites = placement.sites
        self.starts = offsets(placement.row_counts())
        self._segments = placement.segments
        self._runs: dict[str, _Runs] = {}
        self._fields: dict[str, _Field | None] = {}
        known: dict[int, _Runs] = {}
        begins = np.zeros(len(placement), bool)
        for site in self.sites:
            segment, prompt = placement.where(site)
            if id(segment) not in known:
                known[id(segment)] = self._run(segment, prompt)
                begins[1:] |= (segment[1:] != segment[:-1]) | (prompt[1:] != prompt[:-1] + 1)
            self._runs[site] = known[id(segment)]
        self.begins = np.append(0, np.flatnonzero(begins))
        self._unknown = {site: set(np.unique(runs.segment).tolist()) for site, runs in self._runs.items()}
        """Segments of which not every block of a site has been checked."""

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

    def take(self, numbers: Ints, site: str) -> npt.NDArray[Any]:
        """The rows `numbers` at `site` in that order, a new array ``[n, D]``.

        Raises:
            NotCachedError: a row is damaged.
        """
        if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= len(self)):
            raise NotCachedError(f"rows {int(numbers.min())} to {int(numbers.max())} of {len(self)}")
        runs = self._runs[site]
        run = runs.of(numbers)
        self._check(site, numbers, run)
        field = self._field(site)
        if field is not None:
            return field.take(numbers, run)
        dtype, width = self.column(site)
        out = np.empty((len(numbers), width), dtype)
        rows = numbers + (runs.first - runs.begin)[run]
        pieces = [
            Piece(self._segments[number], (0,), rows[members], members)
            for number, members in by_segment(runs.segment[run], np.arange(len(numbers)))
        ]
        gather_pieces(pieces, [site], out[:, None])
        return out

    def copy(self, start: int, stop: int, site: str) -> npt.NDArray[Any]:
        """`take` of the rows from `start` to `stop`, which are copied run by run."""
        dtype, width = self.column(site)
        out = np.empty((stop - start, width), dtype)
        pieces = []
        for number, first, begin, end in self._within(site, start, stop):
            self._segments[number].require([site], np.array([first]), np.array([first + end - begin]))
            rows = np.arange(first, first + end - begin)
            at = np.arange(begin - start, end - start)
            pieces.append(Piece(self._segments[number], (0,), rows, at, straight=True))
        gather_pieces(pieces, [site], out[:, None])
        return out

    def _check(self, site: str, numbers: Ints, run: Ints) -> None:
        """NotCachedError where one of the rows is damaged; each is looked at once."""
        unknown, runs = self._unknown[site], self._runs[site]
        if not unknown:
            return
        rows = numbers + (runs.first - runs.begin)[run]
        for number, members in by_segment(runs.segment[run], np.arange(len(numbers))):
            if number in unknown:
                mine = rows[members]
                self._segments[number].require([site], mine, mine + 1)
                if self._segments[number].checks.all_good([site]):
                    unknown.discard(number)

    def _field(self, site: str) -> _Field | None:
        if site not in self._fields:
            self._fields[site] = _Field.of(self._segments, self._runs[site], site)
        return self._fields[site]

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

    def prompt_of(self, numbers: Ints) -> Ints:
        """The prompt that each of these rows belongs to."""
        return np.searchsorted(self.starts, numbers, "right") - 1

    def moments(self, site: str, numbers: Ints | None = None) -> Moments:
        """The moments of the rows `numbers` (ascending; default all) at `site`.

        Without reading them where all rows of a segment count, whose moments are recorded.
        """
        total = Moments.empty(self.column(site)[1])
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
        for start in range(0, len(rest), _ROWS_AT_ONCE):
            total.update(as_float(self.take(rest[start : start + _ROWS_AT_ONCE], site)))
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
