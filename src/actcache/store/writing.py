"""Writing a segment: data first, streamed and hashed, then the index that makes it valid."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache._version import __version__
from actcache.store import container
from actcache.store.files import atomic_file, write_all
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, FORMAT, TOKENS, VERSION, SegmentInfo, flat_bytes
from actcache.store.statistics import Moments, is_float

_WRITE_BATCH = 4 << 20


@dataclass(frozen=True)
class Column:
    """The rows of one site that go into a segment, in pieces, and their moments where already known."""

    site: str
    dtype: np.dtype[Any]
    dim: int
    pieces: Iterable[tuple[npt.NDArray[Any], Moments | None]]


class BlockHasher:
    """xxh3-64 of each 128 KiB block of a stream of pieces."""

    def __init__(self) -> None:
        self.digests: list[int] = []
        self._open = xxhash.xxh3_64()
        self._filled = 0

    def update(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            if not self._filled and len(data) - at >= BLOCK:
                self.digests.append(xxhash.xxh3_64_intdigest(data[at : at + BLOCK]))
                at += BLOCK
                continue
            part = data[at : at + BLOCK - self._filled]
            self._open.update(part)
            self._filled += len(part)
            at += len(part)
            if self._filled == BLOCK:
                self._flush()

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
    space: str,
    created_ns: int,
    replaces: Mapping[str, Sequence[str]] | None = None,
) -> SegmentInfo:
    """Write one segment whose data arrives in pieces; memory stays that of the prompts and a few blocks."""
    n = len(prompts)
    row_offset = prompts.token_offset if layout == TOKENS else np.arange(n + 1, dtype=np.int64)
    rows = int(row_offset[-1])
    sizes = [rows * c.dim * c.dtype.itemsize for c in columns]
    moments = [Moments.empty(c.dim) if is_float(c.dtype) else None for c in columns]
    index: dict[str, npt.NDArray[Any]] = {
        "digest": np.zeros(2, np.uint64),
        "row_offset": row_offset,
        "token_offset": prompts.token_offset,
        "text_offset": prompts.text_offset,
        "checksum": np.zeros(sum(-(-size // BLOCK) for size in sizes), np.uint64),
        "moments": np.zeros(sum(2 * len(m.mean) for m in moments if m)),
        "prompt_key": prompts.token_key,
        "text_key": prompts.text_key,
        "token_ids": prompts.token_ids,
        "kind": prompts.kind,
        "text": prompts.text,
    }
    metadata = {
        "format": FORMAT, "version": VERSION, "writer": f"actcache {__version__}", "space": space, "layout": layout,
        "created_ns": str(created_ns), "text_context": prompts.text_context,
    }  # fmt: skip
    if replaces:
        metadata["replaces"] = json.dumps({k: list(v) for k, v in replaces.items()}, separators=(",", ":"))
    prefix = "" if layout == TOKENS else f"{layout}/"
    shapes = [(name, array.dtype, array.shape) for name, array in index.items()]
    shapes += [(prefix + c.site, c.dtype, (rows, c.dim)) for c in columns]
    head, placed = container.encode(metadata, shapes)
    data_start = placed[prefix + columns[0].site].start if columns else 0
    total = max(t.stop for t in placed.values())
    name = f"{uuid.uuid4().hex}.safetensors"

    with atomic_file(folder, name, needed=total) as fd:
        write_all(fd, [head], 0)
        digests: list[int] = []
        for column, moment in zip(columns, moments, strict=True):
            tensor = placed[prefix + column.site]
            digests += _write_column(fd, column, tensor, moment)
        index["checksum"][:] = digests
        known = [part for m in moments if m for part in (m.mean, m.m2)]
        if known:
            index["moments"][:] = np.concatenate(known)
        region = bytearray(data_start - len(head))
        for tensor_name, array in index.items():
            at = placed[tensor_name].start - len(head)
            region[at : at + array.nbytes] = flat_bytes(array)
        region[:16] = np.array(
            [xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(memoryview(region)[16:])], "<u8"
        ).tobytes()
        write_all(fd, [region], len(head))
        # Pads at the very end (there are none today) and empty tensors must not leave the file short.
        if os.fstat(fd).st_size != total:
            os.ftruncate(fd, total)
    return SegmentInfo(
        name[:32], space, layout, tuple((c.site, container.code_of(c.dtype), c.dim) for c in columns), n, rows, total,
        created_ns, prompts.text_context, {k: tuple(v) for k, v in (replaces or {}).items()},
        prompts.token_key, prompts.text_key,
    )  # fmt: skip


def _write_column(fd: int, column: Column, tensor: container.Tensor, moment: Moments | None) -> list[int]:
    hasher = BlockHasher()
    at, pending, size = tensor.start, [], 0
    for rows, known in column.pieces:
        data = flat_bytes(rows)
        hasher.update(data)
        if moment is not None:
            if known is None:
                moment.update(rows)
            else:
                moment.merge(known.count, known.mean, known.m2)
        pending.append(data)
        size += len(data)
        if size >= _WRITE_BATCH:
            at = write_all(fd, pending, at)
            pending, size = [], 0
    at = write_all(fd, pending, at)
    if at != tensor.stop:
        raise ValueError(f"{column.site}: {at - tensor.start} bytes of data for {tensor.nbytes}")
    return hasher.finish()
