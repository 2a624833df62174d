"""Writing a segment: data first, streamed and hashed, then the index that makes it valid."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache._version import __version__
from actcache.store import container
from actcache.store.casting import CastError, Piece
from actcache.store.dtypes import is_scaled, matrix_dtype, value_dtype
from actcache.store.files import atomic_file, write_all
from actcache.store.mapped import start_writing
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, FORMAT, SCALE, TOKENS, VERSION, SegmentInfo, flat_bytes
from actcache.store.spaces import description_of
from actcache.store.statistics import Moments, is_float

_WRITE_BATCH = 4 << 20
_ZEROS = memoryview(bytes(1 << 16))

Measurements = Mapping[str, tuple[Moments | None, CastError]]
"""Of sites, by name: the moments of their rows, and what storing changed."""


@dataclass(frozen=True)
class Column:
    """The rows of one site that go into a segment, in pieces; `code` as in `actcache.store.dtypes`."""

    site: str
    code: str
    dim: int
    pieces: Iterable[Piece]


class BlockHasher:
    """xxh3-64 of each block of a stream of pieces; 128 KiB in a store."""

    def __init__(self, block: int = BLOCK) -> None:
        self.digests: list[int] = []
        self._block = block
        self._open = xxhash.xxh3_64()
        self._filled = 0

    def update(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            if not self._filled and len(data) - at >= self._block:
                self.digests.append(xxhash.xxh3_64_intdigest(data[at : at + self._block]))
                at += self._block
                continue
            part = data[at : at + self._block - self._filled]
            self._open.update(part)
            self._filled += len(part)
            at += len(part)
            if self._filled == self._block:
                self._flush()

    def update_both(self, other: BlockHasher, data: memoryview) -> None:
        """`update` this one and `other`, hashing only once where blocks of both begin with `data`."""
        known = len(self.digests) if not (self._filled or other._filled) else None
        self.update(data)
        if known is not None:
            whole = self.digests[known:]
            other.digests += whole
            data = data[len(whole) * self._block :]
        other.update(data)

    def finish(self) -> list[int]:
        if self._filled:
            self._flush()
        return self.digests

    def _flush(self) -> None:
        self.digests.append(self._open.intdigest())
        self._open = xxhash.xxh3_64()
        self._filled = 0


def write_columns(
    folder: Path,
    prompts: PromptTable,
    layout: str,
    columns: Sequence[Column],
    *,
    row_offset: npt.NDArray[np.int64],
    space: str,
    created_ns: int | None,
    block_offset: npt.NDArray[np.int64],
    replaces: Mapping[str, Sequence[str]] | None = None,
    not_before: int = 0,
    before: Callable[[Path, Path], object] | None = None,
    measured: Callable[[], Measurements] = dict,
    empty: Callable[..., npt.NDArray[Any]] = np.empty,
) -> SegmentInfo:
    """Write one segment whose data arrives in pieces; memory stays that of prompts, a site's scales and a few blocks.

    `row_offset`: which rows are whose, int64 ``[n + 1]``. `created_ns`: None for now, or `not_before` where that is
    later. `before`: as of `atomic_file`. `block_offset`: which rows share a scale, int64 ``[blocks + 1]``; only 0 where
    no column has scales. `empty` makes the array in which the index tensors are put together.
    """
    n = len(prompts)
    rows = int(row_offset[-1])
    prefix = "" if layout == TOKENS else f"{layout}/"
    shapes: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
    for column in columns:
        shapes.append((prefix + column.site, matrix_dtype(column.code), (rows, column.dim)))
        if is_scaled(column.code):
            shapes.append((prefix + column.site + SCALE, np.dtype("<f4"), (len(block_offset) - 1, column.dim)))
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in shapes]
    moments = [Moments.empty(c.dim) if is_float(value_dtype(c.code)) else None for c in columns]
    errors = [CastError() for _ in columns]
    index = index_tensors(prompts, row_offset, block_offset)
    index |= {
        "checksum": np.zeros(sum(-(-size // BLOCK) for size in sizes), np.uint64),
        "moments": np.zeros(sum(2 * len(m.mean) + 1 for m in moments if m)),
        "errors": np.zeros((len(columns), len(CastError().numbers))),
    }
    now = time.time_ns() if created_ns is None else created_ns
    metadata = segment_metadata(folder, layout, now, prompts.text_context, replaces or {}, space=space)
    tensors = [(name, a.dtype, a.shape) for name, a in index.items()] + shapes
    head, placed = container.encode(metadata, tensors)
    data_start = placed[shapes[0][0]].start
    total = max(t.stop for t in placed.values())
    name = f"{uuid.uuid4().hex}.safetensors"

    with atomic_file(folder, name, needed=total, before=before) as fd:
        if created_ns is None:
            # Not before its temporary file tells whoever merges that something is being written.
            now = max(time.time_ns(), not_before)
            head, placed = container.encode({**metadata, "created_ns": str(now)}, tensors)
        write_all(fd, [head], 0)
        digests: list[int] = []
        for k, (column, moment, error) in enumerate(zip(columns, moments, errors, strict=True)):
            name_in_file = prefix + column.site
            digests += _write_column(fd, column, placed[name_in_file], placed.get(name_in_file + SCALE), moment, error)
            index["errors"][k] = error.numbers
        index["checksum"][:] = digests
        known = measured()
        for k, column in enumerate(columns):
            if column.site in known:
                moments[k], error = known[column.site]
                index["errors"][k] = error.numbers
        index["moments"][:] = joined_moments(moments)
        region = index_region(head, index, placed, data_start, empty)
        write_all(fd, [region.data], len(head))
        # Pads at the very end (there are none today) and empty tensors must not leave the file short.
        if os.fstat(fd).st_size != total:
            os.ftruncate(fd, total)
    return SegmentInfo(
        name[:32], space, layout, tuple((c.site, c.code, c.dim) for c in columns), n, rows, total,
        now, prompts.text_context, {k: tuple(v) for k, v in (replaces or {}).items()},
        prompts.token_key, prompts.text_key,
    )  # fmt: skip


def index_tensors(
    prompts: PromptTable, row_offset: npt.NDArray[np.int64], block_offset: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """What is known of the prompts of a segment, as tensors in the order of the file."""
    return {
        "digest": np.zeros(2, np.uint64),
        "row_offset": row_offset,
        "token_offset": prompts.token_offset,
        "text_offset": prompts.text_offset,
        "block_offset": block_offset,
        "prompt_key": prompts.token_key,
        "text_key": prompts.text_key,
        "token_ids": prompts.token_ids,
        "kind": prompts.kind,
        "text": prompts.text,
    }


def segment_metadata(
    folder: Path,
    layout: str,
    created_ns: int,
    text_context: str,
    replaces: Mapping[str, Sequence[str]],
    *,
    space: str,
) -> dict[str, str]:
    """The ``__metadata__`` of a segment in `folder`."""
    metadata = {
        "format": FORMAT, "version": VERSION, "writer": f"actcache {__version__}", "space": space, "layout": layout,
        "created_ns": str(created_ns), "text_context": text_context,
    }  # fmt: skip
    description = description_of(folder)
    if description is not None:
        metadata["description"] = description
    if replaces:
        metadata["replaces"] = json.dumps({k: list(v) for k, v in replaces.items()}, separators=(",", ":"))
    return metadata


def joined_moments(moments: Sequence[Moments | None]) -> npt.NDArray[np.float64]:
    """The tensor of the moments of all columns that have any."""
    return np.concatenate([np.empty(0), *(part for m in moments if m for part in (m.mean, m.m2, [m.norms]))])


def index_region(
    head: bytes,
    index: Mapping[str, npt.NDArray[Any]],
    placed: Mapping[str, container.Tensor],
    stop: int,
    empty: Callable[..., npt.NDArray[Any]] = np.empty,
) -> npt.NDArray[np.uint8]:
    """The bytes of a file behind its header: the index tensors, their digests first.

    From their end on the file has zeros up to `stop`, which the digest is of, too.
    """
    region = empty(max(placed[name].stop for name in index) - len(head), np.uint8)
    end = 0
    for name, array in index.items():
        at = placed[name].start - len(head)
        region[end:at] = 0
        end = at + array.nbytes
        region[at:end] = np.frombuffer(flat_bytes(array), np.uint8)
    digest = xxhash.xxh3_64(region.data[16:])
    # Of the room that a file has grown in most may be empty, and need not be in memory for that.
    for at in range(len(head) + len(region), stop, len(_ZEROS)):
        digest.update(_ZEROS[: stop - at])
    digests = xxhash.xxh3_64_intdigest(head), digest.intdigest()
    region[:16] = np.frombuffer(np.array(digests, "<u8").tobytes(), np.uint8)
    return region


def _write_column(
    fd: int,
    column: Column,
    tensor: container.Tensor,
    scale: container.Tensor | None,
    moment: Moments | None,
    error: CastError,
) -> list[int]:
    """Write a column and its scales; the checksums of both. What its pieces say goes to `moment` and `error`."""
    hasher = BlockHasher()
    at, pending, size = tensor.start, [], 0
    scales = []
    for piece in column.pieces:
        data = flat_bytes(piece.rows)
        hasher.update(data)
        if moment is not None and piece.moments is not None:
            moment.merge(piece.moments)
        if piece.scales is not None:
            scales.append(piece.scales)
        error.add(piece.error)
        pending.append(data)
        size += len(data)
        if size >= _WRITE_BATCH:
            at = _write_started(fd, pending, at)
            pending, size = [], 0
    at = _write_started(fd, pending, at)
    if at != tensor.stop:
        raise ValueError(f"{column.site}: {at - tensor.start} bytes of data for {tensor.nbytes}")
    digests = hasher.finish()
    if scale is not None:
        joined = np.concatenate(scales)
        if joined.shape != scale.shape:
            raise ValueError(f"{column.site}: scales {joined.shape} for {scale.shape}")
        hasher = BlockHasher()
        hasher.update(flat_bytes(joined))
        write_all(fd, [flat_bytes(joined)], scale.start)
        digests += hasher.finish()
    return digests


def _write_started(fd: int, buffers: Sequence[memoryview], at: int) -> int:
    """`write_all`, and the disk begins with it while the next rows are cast and hashed."""
    stop = write_all(fd, buffers, at)
    start_writing(fd, at, stop - at)
    return stop
