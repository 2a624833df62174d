"""A sparse matrix over many prompts: its rows dense in whatever order, and where one of its columns is not zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import LayerRangeError, NotCachedError
from actcache.store.keys import Ints
from actcache.store.numbered import NumberedRows
from actcache.store.sparse import SparseSite
from actcache.store.statistics import Moments, as_float

_AT_ONCE = 1 << 18


class SparseNumbered:
    """As `NumberedRows`, of a sparse matrix: `numbers` are the numbers of it that are not zero, prompt by prompt.

    `starts` int64 ``[n + 1]``: which rows of the matrix are those of prompt `i`. Needs eight bytes for each row, and
    reads all positions when it is made.
    """

    def __init__(self, numbers: NumberedRows, site: SparseSite, starts: Ints) -> None:
        self.sites, self.starts, self.begins = (site.name,), starts, numbers.begins
        self._site, self._numbers = site, numbers
        # Where the numbers of each row begin, and where those of the last one end.
        self._ends = np.zeros(int(starts[-1]) + 1, np.int64)
        self._count_rows()

    def _count_rows(self) -> None:
        """Set `_ends`."""
        counts = self._ends[1:]
        for start in range(0, len(self._numbers), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(self._numbers))
            position = self._numbers.copy(start, stop, self._site.columns[0])[:, 0]
            prompt = self._numbers.prompt_of(np.arange(start, stop))
            row = self.starts[prompt] + position
            if ((position < 0) | (row >= self.starts[prompt + 1])).any():
                raise NotCachedError(f"{self._site.name!r} has a position outside its prompt: encode it again")
            np.add.at(counts, row, 1)
        np.cumsum(counts, out=counts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def column(self, _: str) -> tuple[np.dtype[Any], int]:
        """The dtype that holds all values, and the width of the matrix."""
        return self._numbers.column(self._site.columns[2])[0], self._site.size

    def take(self, rows: Ints, site: str) -> npt.NDArray[Any]:
        """The rows `rows` in that order, dense: a new array ``[n, D]``.

        Raises:
            NotCachedError: something of them is damaged.
        """
        dtype, width = self.column(site)
        found = np.zeros((len(rows), width), dtype)
        lengths, index, value = self._of(rows)
        found[np.repeat(np.arange(len(rows)), lengths), index] = value
        return found

    def copy(self, start: int, stop: int, site: str) -> npt.NDArray[Any]:
        """`take` of the rows from `start` to `stop`."""
        return self.take(np.arange(start, stop), site)

    def _of(self, rows: Ints) -> tuple[Ints, npt.NDArray[np.int32], npt.NDArray[Any]]:
        """How many numbers each of `rows` has, their indices and their values."""
        first = self._ends[rows]
        lengths = self._ends[rows + 1] - first
        ends = np.cumsum(lengths)
        total = int(lengths.sum())
        numbers = np.arange(total) + np.repeat(first - (ends - lengths), lengths)
        if not total:
            return lengths, np.empty(0, np.int32), np.empty(0, self.column("")[0])
        index = self._numbers.take(numbers, self._site.columns[1])
        value = self._numbers.take(numbers, self._site.columns[2])
        _check_indices(index, self._site)
        return lengths, index[:, 0], value[:, 0]

    def prompt_of(self, rows: Ints) -> Ints:
        """The prompt that each of these rows belongs to."""
        return np.searchsorted(self.starts, rows, "right") - 1

    def moments(self, _: str, rows: Ints | None = None) -> Moments:
        """The moments of the rows `rows` (ascending; default all), zeros included: what is not zero is read."""
        every = np.arange(len(self)) if rows is None else rows
        total = Moments.empty(self._site.size)
        step = max(1, _AT_ONCE // max(1, len(self._numbers) // max(1, len(self))))
        for start in range(0, len(every), step):
            total.merge(self._moments(every[start : start + step]))
        return total

    def _moments(self, rows: Ints) -> Moments:
        lengths, index, given = self._of(rows)
        value = as_float(given).astype(np.float64)
        size, count = self._site.size, len(rows)
        with np.errstate(all="ignore"):
            mean = np.bincount(index, value, size) / count
            zeros = count - np.bincount(index, minlength=size)
            m2 = np.bincount(index, (value - mean[index]) ** 2, size) + zeros * mean**2
            norms = np.sqrt(np.bincount(np.repeat(np.arange(count), lengths), value**2, count)).sum()
        return Moments(count, mean, m2, float(norms))


def occurrences(numbers: NumberedRows, site: SparseSite, column: int) -> tuple[Ints, Ints, npt.NDArray[Any]]:
    """Where `column` is not zero: the prompt, the position, the value, ``[k]`` each, in that order.

    Raises:
        LayerRangeError: there is no such column.
    """
    if not 0 <= column < site.size:
        raise LayerRangeError(f"there is no feature {column}: expected 0 to {site.size - 1}")
    parts = [start + np.flatnonzero(index == column) for start, index in _indices(numbers, site)]
    hits = np.concatenate([np.empty(0, np.int64), *parts])
    if not len(hits):
        return hits, hits, np.empty(0, np.float32)
    position = numbers.take(hits, site.columns[0])[:, 0].astype(np.int64)
    return numbers.prompt_of(hits), position, numbers.take(hits, site.columns[2])[:, 0]


def counts(numbers: NumberedRows, site: SparseSite) -> Ints:
    """In how many rows each column is not zero, int64 ``[n]``."""
    total = np.zeros(site.size, np.int64)
    for _, index in _indices(numbers, site):
        np.add(total, np.bincount(index, minlength=site.size), out=total)
    return total


def _indices(numbers: NumberedRows, site: SparseSite) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """The columns of all numbers, in parts, and which number the first of each part is."""
    for start in range(0, len(numbers), _AT_ONCE):
        index = numbers.copy(start, min(start + _AT_ONCE, len(numbers)), site.columns[1])[:, 0]
        _check_indices(index, site)
        yield start, index


def _check_indices(index: npt.NDArray[np.int32], site: SparseSite) -> None:
    if not 0 <= index.min() <= index.max() < site.size:
        raise NotCachedError(f"{site.name!r} has an index outside of {site.size}: encode it again")
