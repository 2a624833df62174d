"""Which neighbouring rows share scales: as many as lose little by it, and of a longer prompt none with other prompts.

A scale is as coarse as the largest value that it stands for. Where one row is a hundred times as long as those beside
it, as that of the first token often is, sharing would leave little of the others. So a block ends before a row with
which one of its rows would lose too much, whatever its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.quantize import BLOCK_ROWS, FLOAT8, INT8
from actcache.store.statistics import as_float

Ints = npt.NDArray[np.int64]

MOST_LOST = 0.03
"""How much of its length a row may lose to steps that are larger than it needs: some five times what is usual."""
OWN_ROWS = 16
"""Prompts of so many rows share scales with no other prompt: what is stored of them depends on nothing else."""

# How many steps of the same size a dtype has between zero and the largest value: for float8 those of the subnormals.
_STEPS = {INT8: 127.0, FLOAT8: 448.0 * 512}
# Squares of others, and their sums, are not exact enough in float32.
_LEAST, _MOST = 1e-15, 1e15
_FEW = 8
_ROWS_AT_ONCE = 4 * BLOCK_ROWS
# What rounding to a step takes of a value, on average, in squares of the largest value of its column.
_LOST_EACH = {dtype: 1 / (12 * steps**2) for dtype, steps in _STEPS.items()}
# How much longer all rows together may be than the shortest, in squares, for nobody to lose too much whatever they are.
_MOST_SHARED = {dtype: MOST_LOST**2 / lost for dtype, lost in _LOST_EACH.items()}


class Rows:
    """Rows ``[n, D]`` of one site that lie in several arrays, as one; `count`: n, `dim`: D, `dtype`: of their codes."""

    def __init__(self, parts: Sequence[npt.NDArray[Any]], dtype: np.dtype[Any]) -> None:
        self._parts, self.dtype, self.dim = parts, dtype, parts[0].shape[1]
        self._ends = np.cumsum([0, *map(len, parts)])
        self.count = int(self._ends[-1])

    def between(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop`, which are some, as `as_float` gives them."""
        first = int(np.searchsorted(self._ends, start, "right")) - 1
        last = int(np.searchsorted(self._ends, stop, "left"))
        found = [
            as_float(part[max(start - a, 0) : stop - a])
            for part, a in zip(self._parts[first:last], self._ends[first:last].tolist(), strict=True)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)


def plan(columns: Sequence[Rows], row_offset: Ints) -> Ints:
    """Where blocks of rows that share scales begin and end, int64 ``[blocks + 1]``.

    `columns`: the rows of all sites that have scales; `row_offset` ``[n + 1]``: which of them are whose.
    """
    offsets, likely = [0], BLOCK_ROWS
    alike = [_Alike(rows) for rows in columns]
    for start, end in pairwise(_borders(row_offset)):
        at = start
        while at < end:
            most = min(BLOCK_ROWS, end - at)
            tried = min(most, likely)
            size = _sharing(alike, at, tried)
            if size == tried < most:
                size = _sharing(alike, at, most)
            # Short blocks come in rows: to look at 64 rows for each of them would take many times as long.
            likely = BLOCK_ROWS if size == most else max(_FEW, 2 * size)
            at += size
            offsets.append(at)
    return np.array(offsets, np.int64)


def least_scales(lengths: Ints) -> float:
    """How many scales for each dimension the rows of prompts of these `lengths` need, and more where rows differ much.

    A fraction where prompts are short, which share theirs with others.
    """
    long = lengths[lengths >= OWN_ROWS]
    shared = int(lengths.sum()) - int(long.sum())
    return float(-(-long // BLOCK_ROWS).sum() + shared / BLOCK_ROWS)


class _Alike:
    """Rows of one site, and how long they are: where none is much longer than another, nothing more need be known."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._squares, self._start = np.empty(0, np.float32), 0

    def sharing(self, at: int, size: int) -> int:
        """`sharing` of the rows from `at` on."""
        if size < 2:
            return size
        squares = self._of(at, at + size)
        least = float(squares.min())
        most = _MOST_SHARED[self.rows.dtype] * least
        rows = None
        if least > _LEAST and float(squares.max()) < _MOST**2:
            # All squares together are at least those of the largest value of each column.
            if float(squares.sum(dtype=np.float64)) <= most:
                return size
            rows = self.rows.between(at, at + size)
            largest = np.maximum(rows.max(axis=0), -rows.min(axis=0))
            if float(largest @ largest) <= most:
                return size
        return sharing(self.rows.between(at, at + size) if rows is None else rows, self.rows.dtype)

    def _of(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The squared lengths of rows, which are computed for many at once: they are asked for in order."""
        if not self._start <= start <= stop <= self._start + len(self._squares):
            end = min(max(stop, start + _ROWS_AT_ONCE), self.rows.count)
            found = self.rows.between(start, end)
            with np.errstate(over="ignore", invalid="ignore"):
                self._squares, self._start = np.einsum("ij,ij->i", found, found), start
        return self._squares[start - self._start : stop - self._start]


def _sharing(columns: Sequence[_Alike], at: int, size: int) -> int:
    for rows in columns:
        size = rows.sharing(at, size)
    return size


def _borders(row_offset: Ints) -> list[int]:
    """The rows at which a block begins in any case, and the number of rows."""
    long = np.flatnonzero(np.diff(row_offset) >= OWN_ROWS)
    return sorted({*row_offset[[0, -1]].tolist(), *row_offset[long].tolist(), *row_offset[long + 1].tolist()})


def sharing(rows: npt.NDArray[Any], dtype: np.dtype[Any]) -> int:
    """How many of the first of `rows` ``[n, D]`` can share scales of codes of `dtype`: at least 1.

    Each of them loses at most `MOST_LOST` of its length by that. Values that are not finite are nobody's.
    """
    n = len(rows)
    if n < 2 or not rows.shape[1]:
        return n
    with np.errstate(over="ignore"):
        size: npt.NDArray[Any] = np.abs(rows).astype(np.float32, copy=False)
    largest = size.max(axis=0)
    if not np.isfinite(largest).all():
        size[~np.isfinite(size)] = 0
        largest = size.max(axis=0)
    squares = np.einsum("ij,ij->i", size, size)
    if not (largest.max() < _MOST and squares.min() > _LEAST):
        size, largest = size.astype(np.float64), largest.astype(np.float64)
        squares = np.einsum("ij,ij->i", size, size)
    # A row without length has nothing to lose.
    allowed = MOST_LOST**2 * np.where(squares > 0, squares, np.inf)
    lost_each = _LOST_EACH[dtype]
    # The rows that could lose too much, beside the largest values of all: mostly one or two, or none.
    at_risk = np.flatnonzero(allowed < lost_each * (largest @ largest))
    if not len(at_risk):
        return n

    def too_many(count: int, largest: npt.NDArray[Any]) -> bool:
        some = at_risk[: np.searchsorted(at_risk, count)]
        # A value smaller than a step loses itself, and not more.
        lost = np.minimum(size[some], lost_each**0.5 * largest)
        return bool((np.einsum("ij,ij->i", lost, lost) > allowed[some]).any())

    # Mostly it is the first row that is unlike the others, or no row at all, so that there is little to look at.
    for looked_at in (min(_FEW, n), n):
        if looked_at == n and not too_many(n, largest):
            return n
        reach = _largest_so_far(size[:looked_at])
        doubtful = lost_each * np.einsum("ij,ij->i", reach, reach) > np.minimum.accumulate(allowed[:looked_at])
        enough = int(doubtful.argmax()) if doubtful.any() else looked_at
        if enough < looked_at and too_many(enough + 1, reach[enough]):
            return enough
    low, high = enough + 1, n
    while high - low > 1:
        count = (low + high) // 2
        low, high = (low, count) if too_many(count, reach[count - 1]) else (count, high)
    return low


def _largest_so_far(size: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`np.maximum.accumulate` down the rows, several times as fast."""
    reach = np.empty_like(size)
    reach[0] = size[0]
    for i in range(1, len(size)):
        np.maximum(reach[i - 1], size[i], out=reach[i])
    return reach
