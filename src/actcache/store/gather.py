"""Copying rows of mapped matrices into one result, as fast as memory allows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store import quantize
from actcache.store.mapping import Segment
from actcache.store.moving import move
from actcache.store.receiving import Received
from actcache.store.statistics import as_float, is_float

Ints = npt.NDArray[np.int64]

# What is put together in a buffer stays in the processor's cache.
_CHUNK_ROWS, _CHUNK_BYTES = 32, 256 << 10
# Rows of so many bytes lie in pages of their own; of so many the beginnings stay in the processor's cache.
_TOUCHED_BYTES, _TOUCHED_ROWS = 1 << 10, 256
# From so many bytes on, a copy of its own costs less than going through a buffer.
_LONG_BYTES = 8 << 10
# Copying is bound by memory: a few threads saturate it, and small results are done before a thread has started.
_MAX_THREADS = 4
THREAD_BYTES = 8 << 20
"""From so many bytes for each on, copying and hashing are shared among threads."""


@dataclass(frozen=True)
class Piece:
    """What of one segment is wanted: its sites `names[j]` for j in `columns`, their `rows`, and where each goes.

    `straight`: rows and places both go up one by one. `received`: where the rows are, if not in the segment's file.
    """

    segment: Segment
    columns: Sequence[int]
    rows: Ints
    at: Ints
    straight: bool = False
    received: Received | None = None

    def cut(self, start: int, stop: int) -> Piece:
        return replace(self, rows=self.rows[start:stop], at=self.at[start:stop])


def gather_pieces(pieces: Sequence[Piece], names: Sequence[str], out: npt.NDArray[Any]) -> None:
    """``out[at[i], j] = values of names[j] at rows[i]`` for every piece, every i and every j of its columns."""
    size = out.shape[2] * out.itemsize
    total = sum(len(piece.rows) * len(piece.columns) * size for piece in pieces)
    threads = min(allowed_threads(), total // THREAD_BYTES)
    if threads < 2:
        _gather_all(pieces, names, out)
        return
    with ThreadPoolExecutor(threads) as pool:
        for share in [pool.submit(_gather_all, part, names, out) for part in _shares(pieces, threads)]:
            share.result()


def _shares(pieces: Sequence[Piece], number: int) -> list[list[Piece]]:
    """`pieces` cut into `number` lists of as many values each, near enough."""
    weights = [len(piece.rows) * len(piece.columns) for piece in pieces]
    most = -(-sum(weights) // number)
    shares: list[list[Piece]] = [[]]
    room = most
    for piece in pieces:
        start = 0
        while start < len(piece.rows):
            if room <= 0:
                shares.append([])
                room = most
            stop = min(len(piece.rows), start + -(-room // len(piece.columns)))
            shares[-1].append(piece.cut(start, stop))
            room -= (stop - start) * len(piece.columns)
            start = stop
    return shares


def _gather_all(pieces: Sequence[Piece], names: Sequence[str], out: npt.NDArray[Any]) -> None:
    """All is looked at before anything is copied: what is copied takes what looks out of the processor's cache."""
    wanted = [piece for piece in pieces if len(piece.rows) and out.shape[2]]
    for copy in [_prepared(piece, [names[j] for j in piece.columns], out) for piece in wanted]:
        copy()


def _prepared(piece: Piece, sites: Sequence[str], out: npt.NDArray[Any]) -> Callable[[], None]:
    """What copies a piece. Every row is checked against the rows that the segment has; nothing is ever clipped."""
    segment, rows, at = piece.segment, piece.rows, piece.at
    low, high = (int(rows[0]), int(rows[-1])) if piece.straight else (int(rows.min()), int(rows.max()))
    length = segment.info.rows
    if low < 0 or high >= length:
        raise NotCachedError(
            f"row {low if low < 0 else high} of a segment of {length} rows: the file is shorter than its index says"
        )
    if piece.received is not None:
        return partial(_from_received, piece, piece.received, sites, out)
    if segment.source is not None:
        segment.require(sites, rows, rows + 1)
    grid = segment.grid(sites)
    if grid is None or grid[0].dtype != out.dtype:
        return partial(_site_by_site, piece, sites, out)
    region, first = grid
    if piece.straight and len(sites) == 1:
        start, place = int(first[0]) + low, int(at[0])
        return partial(move, out[place : place + len(at), piece.columns[0]], region[start : start + len(at)])
    size = len(sites) * out.shape[2] * out.itemsize
    scattered = 2 * (int(at[-1]) - int(at[0])) >= 3 * len(at)
    if scattered and size >= _LONG_BYTES and _fills_rows(piece.columns, out):
        return partial(_one_by_one, region, rows[:, None] + first, out, at)
    return partial(_on_grid, region, first, rows, out, at, piece.columns)


def _from_received(piece: Piece, received: Received, sites: Sequence[str], out: npt.NDArray[Any]) -> None:
    for site, j in zip(sites, piece.columns, strict=True):
        received.rows(piece.segment.parts(site)[0]).gather(piece.rows, out[:, j], piece.at)


def _site_by_site(piece: Piece, sites: Sequence[str], out: npt.NDArray[Any]) -> None:
    """What must be decoded or converted, or does not lie on one grid."""
    segment, rows, at = piece.segment, piece.rows, piece.at
    plain = []
    for site, j in zip(sites, piece.columns, strict=True):
        matrix, scales = segment.matrix(site), segment.scales(site)
        if scales is None:
            plain.append((matrix, j))
        else:
            quantize.gather(matrix, scales, segment.block_offset, rows, out[:, j], at)
    for start in range(0, len(rows) if plain else 0, _CHUNK_ROWS):
        chosen, target = rows[start : start + _CHUNK_ROWS], at[start : start + _CHUNK_ROWS]
        for matrix, j in plain:
            part = matrix[chosen]
            out[target, j] = _widened(part) if part.dtype != out.dtype else part


def _fills_rows(columns: Sequence[int], out: npt.NDArray[Any]) -> bool:
    """Whether `columns` are all of `out`, in its order and in one piece of memory."""
    return bool(out.flags.c_contiguous) and list(columns) == list(range(out.shape[1]))


def _on_grid(
    region: npt.NDArray[Any], first: Ints, rows: Ints, out: npt.NDArray[Any], at: Ints, columns: Sequence[int]
) -> None:
    """``out[at[i], columns[j]] = region[first[j] + rows[i]]``."""
    if len(columns) == 1 and _by_runs(region[int(first[0]) :], rows, out[:, columns[0]], at):
        return
    index = rows[:, None] + first
    size = len(columns) * out.shape[2] * out.itemsize
    if _fills_rows(columns, out):
        # The result is written once, front to back, which counts for more than the order of the reads.
        runs = np.flatnonzero(np.diff(at) != 1) + 1
        if len(at) * size >= _LONG_BYTES * (len(runs) + 1):
            flat, width = out.reshape(-1, out.shape[2]), out.shape[1]
            edges = [0, *runs.tolist(), len(at)]
            ahead, together = 0, max(1, _TOUCHED_ROWS // width)
            for a, b, place in zip(edges, edges[1:], at[edges[:-1]].tolist(), strict=False):
                some = index[a:b].reshape(-1)
                target = flat[place * width : (place + b - a) * width]
                if b - a > together:
                    _take(region, some, target)
                    continue
                if b > ahead:
                    ahead = a + together
                    _touch(region, index[a:ahead].reshape(-1))
                region.take(some, 0, target, "clip")
            return
    step = max(1, _CHUNK_BYTES // size)
    buffer = np.empty((step * len(columns), out.shape[2]), out.dtype)
    for start in range(0, len(rows), step):
        chosen = index[start : start + step]
        part = buffer[: chosen.size]
        _take(region, chosen.reshape(-1), part)
        out[at[start : start + step, None], columns] = part.reshape(*chosen.shape, -1)


def _one_by_one(region: npt.NDArray[Any], index: Ints, out: npt.NDArray[Any], at: Ints) -> None:
    """``out[at[i]] = region[index[i]]``: few of them are neighbours there, and to look for these costs more."""
    together, take = max(1, _TOUCHED_ROWS // index.shape[1]), region.take
    begins, flat, places = index * region.shape[1], region.reshape(-1), at.tolist()
    for start in range(0, len(places), together):
        stop = min(start + together, len(places))
        if region.shape[1] * region.itemsize >= _TOUCHED_BYTES:
            flat.take(begins[start:stop], mode="clip")
        for k in range(start, stop):
            take(index[k], 0, out[places[k]], "clip")


def _by_runs(matrix: npt.NDArray[Any], rows: Ints, out: npt.NDArray[Any], at: Ints) -> bool:
    """``out[at] = matrix[rows]``, neighbours that go to neighbours in one copy; False: there are too few of them."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(at) != 1)) + 1
    if len(rows) * out.shape[1] * out.itemsize < _LONG_BYTES * (len(breaks) + 1):
        return False
    for a, b in pairwise([0, *breaks.tolist(), len(rows)]):
        row, place = int(rows[a]), int(at[a])
        move(out[place : place + b - a], matrix[row : row + b - a])
    return True


def _take(region: npt.NDArray[Any], index: Ints, out: npt.NDArray[Any]) -> None:
    # Every row has been checked, so there is nothing to clip; the other modes would go through a second buffer.
    for start in range(0, len(index), _TOUCHED_ROWS):
        some = index[start : start + _TOUCHED_ROWS]
        _touch(region, some)
        region.take(some, 0, out[start : start + _TOUCHED_ROWS], "clip")


def _touch(region: npt.NDArray[Any], index: Ints) -> None:
    """Look at the beginnings of rows that are copied next: many at once, where each copy would wait for its own."""
    if region.shape[1] * region.itemsize >= _TOUCHED_BYTES:
        region.reshape(-1).take(index * region.shape[1], mode="clip")


def allowed_threads() -> int:
    """How many threads may copy: as many as torch may use where it is loaded, and no more than help."""
    # Another thread may be in the middle of importing it.
    chosen = getattr(sys.modules.get("torch"), "get_num_threads", _processors)
    return min(_MAX_THREADS, chosen())


def _processors() -> int:
    """How many this process may run on, which a batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _widened(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # Our way from bfloat16 to float32 is several times faster than the cast that assignment would do.
    return as_float(part) if is_float(part.dtype) else part
