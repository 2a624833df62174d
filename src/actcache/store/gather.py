"""Copying rows of mapped matrices into one result, as fast as memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store.statistics import as_float, is_float

Ints = npt.NDArray[np.int64]

_CHUNK_ROWS, _SCATTER_ROWS = 64, 64


def gather(
    matrices: Sequence[npt.NDArray[Any]], rows: Ints, out: npt.NDArray[Any], at: Ints, columns: Sequence[int]
) -> None:
    """``out[at[i], columns[j]] = matrices[j][rows[i]]`` for every i and j.

    `matrices` are ``[R, D]``, `out` is ``[n, sites, D]``. Every row is checked against its matrix first;
    nothing is ever clipped.
    """
    if not len(rows) or not out.shape[2]:
        return
    low, high = int(rows.min()), int(rows.max())
    for matrix in matrices:
        if low < 0 or high >= len(matrix):
            raise NotCachedError(
                f"row {high} of a matrix of {len(matrix)} rows: the file is shorter than its index says"
            )
    if (np.diff(rows) < 0).any():
        order = np.argsort(rows, kind="stable")
        rows, at = rows[order], at[order]
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(at) != 1)) + 1
    convert = any(m.dtype != out.dtype for m in matrices)
    if len(breaks) * 4 <= len(rows):
        edges = [0, *breaks.tolist(), len(rows)]
        for start, stop in pairwise(edges):
            _copy_run(matrices, int(rows[start]), out, int(at[start]), stop - start, columns, convert)
        return
    if not convert and out.strides[2] == out.itemsize:
        # A row as one opaque element: indexing moves it whole instead of number by number.
        whole = np.dtype((np.void, out.shape[2] * out.itemsize))
        matrices = [m.view(whole)[:, 0] for m in matrices]
        out = out.view(whole)[:, :, 0]
    for start in range(0, len(rows), _SCATTER_ROWS):
        chosen, target = rows[start : start + _SCATTER_ROWS], at[start : start + _SCATTER_ROWS]
        for matrix, j in zip(matrices, columns, strict=True):
            out[target, j] = _widened(matrix[chosen]) if convert else matrix[chosen]


def _copy_run(
    matrices: Sequence[npt.NDArray[Any]], row: int, out: npt.NDArray[Any], at: int, count: int,
    columns: Sequence[int], convert: bool,
) -> None:  # fmt: skip
    # A block of rows at a time: all sites of a row are next to one another in the result, and a page of
    # fresh memory is dear the first time it is touched.
    for start in range(0, count, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, count)
        for matrix, j in zip(matrices, columns, strict=True):
            part = matrix[row + start : row + stop]
            out[at + start : at + stop, j] = _widened(part) if convert else part


def _widened(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # Our way from bfloat16 to float32 is several times faster than the cast that assignment would do.
    return as_float(part) if is_float(part.dtype) else part
