"""Copying rows of mapped matrices into one result, as fast as memory allows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store.statistics import as_float, is_float

Ints = npt.NDArray[np.int64]

# Rows of the result that are put together in a buffer small enough for the processor's cache.
_CHUNK_ROWS = 32
# Copying is bound by memory: a few threads saturate it, and small results are done before a thread has started.
_MAX_THREADS, _THREAD_BYTES = 4, 8 << 20


def gather(
    matrices: Sequence[npt.NDArray[Any]], rows: Ints, out: npt.NDArray[Any], at: Ints, columns: Sequence[int]
) -> None:
    """``out[at[i], columns[j]] = matrices[j][rows[i]]`` for every i and j.

    `matrices` are ``[R, D]`` and views of one segment, `out` is ``[n, sites, D]``. Every row is checked against
    its matrix first; nothing is ever clipped.
    """
    if not len(rows) or not out.shape[2]:
        return
    low, high = int(rows.min()), int(rows.max())
    for matrix in matrices:
        if low < 0 or high >= len(matrix):
            raise NotCachedError(
                f"row {low if low < 0 else high} of a matrix of {len(matrix)} rows: "
                "the file is shorter than its index says"
            )
    span = _span(matrices) if all(m.dtype == out.dtype for m in matrices) else None
    if span is None:
        _by_column(matrices, rows, out, at, columns)
        return
    region, first = span
    index = rows[:, None] + first
    if list(columns) == list(range(out.shape[1])) and out.flags.c_contiguous and _is_run(at):
        # The result is written once, front to back, which counts for more than the order of the reads.
        start, width = int(at[0]), out.shape[1]
        target = out.reshape(-1, out.shape[2])[start * width : (start + len(at)) * width]
        _take(region, index, target)
        return
    buffer = np.empty((_CHUNK_ROWS * len(columns), out.shape[2]), out.dtype)
    for start in range(0, len(rows), _CHUNK_ROWS):
        chosen = index[start : start + _CHUNK_ROWS]
        part = buffer[: chosen.size]
        _take(region, chosen, part)
        out[at[start : start + _CHUNK_ROWS, None], columns] = part.reshape(*chosen.shape, -1)


def _take(region: npt.NDArray[Any], index: Ints, out: npt.NDArray[Any]) -> None:
    # Every row has been checked, so there is nothing to clip; the other modes would go through a second buffer.
    flat = index.ravel()
    threads = min(_allowed_threads(), out.nbytes // _THREAD_BYTES)
    if threads < 2:
        np.take(region, flat, axis=0, out=out, mode="clip")
        return
    edges = [len(flat) * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(np.take, region, flat[a:b], 0, out[a:b], "clip") for a, b in pairwise(edges)]
    for part in parts:
        part.result()


def _allowed_threads() -> int:
    """How many threads may copy: as many as torch may use where it is loaded, and no more than help."""
    torch = sys.modules.get("torch")
    return min(_MAX_THREADS, torch.get_num_threads() if torch is not None else _processors())


def _processors() -> int:
    """How many this process may run on, which a batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _span(matrices: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], Ints] | None:
    """All `matrices` as one matrix that reaches over them, and where in it each begins.

    None when they do not lie on one grid of rows, as sites of different widths in one segment may not.
    """
    if any(m.strides != matrices[0].strides or m.shape != matrices[0].shape for m in matrices):
        return None
    width = matrices[0].shape[1] * matrices[0].itemsize
    if matrices[0].strides != (width, matrices[0].itemsize):
        return None
    address = np.array([m.__array_interface__["data"][0] for m in matrices], np.int64)
    offset = address - address.min()
    if (offset % width).any():
        return None
    first = offset // width
    lowest = matrices[int(address.argmin())]
    shape = (int(first.max()) + len(lowest), lowest.shape[1])
    return np.lib.stride_tricks.as_strided(lowest, shape, writeable=False), first


def _is_run(at: Ints) -> bool:
    return bool((np.diff(at) == 1).all())


def _by_column(
    matrices: Sequence[npt.NDArray[Any]], rows: Ints, out: npt.NDArray[Any], at: Ints, columns: Sequence[int]
) -> None:
    for start in range(0, len(rows), _CHUNK_ROWS):
        chosen, target = rows[start : start + _CHUNK_ROWS], at[start : start + _CHUNK_ROWS]
        for matrix, j in zip(matrices, columns, strict=True):
            part = matrix[chosen]
            out[target, j] = _widened(part) if part.dtype != out.dtype else part


def _widened(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # Our way from bfloat16 to float32 is several times faster than the cast that assignment would do.
    return as_float(part) if is_float(part.dtype) else part
