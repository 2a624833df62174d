"""The segment: one immutable safetensors file of packed prompts and their vectors.

docs/format.md is normative. `write` makes one, `open` maps one, `validate` holds one against the format.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actcache.errors import FormatError
from actcache.store.files import SEGMENT_NAME
from actcache.store.mapping import Segment
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, TOKENS, Records, SegmentInfo
from actcache.store.writing import Column, write_columns

__all__ = ["BLOCK", "TOKENS", "Records", "Segment", "SegmentInfo", "open", "read_info", "validate", "write"]


def write(
    folder: Path, records: Records | Sequence[Records], *, space: str, created_ns: int | None = None
) -> SegmentInfo:
    """Write `records` (several must agree in their signature) as one durable segment of `space`.

    Either the whole segment exists when this returns, or nothing. Raises DiskFullError or
    StoreAccessError, naming the folder.
    """
    parts = [records] if isinstance(records, Records) else list(records)
    for part in parts:
        part.check()
    if len({p.signature for p in parts}) != 1:
        raise ValueError("records of different layouts, sites, dtypes or text contexts cannot share a segment")
    columns = [
        Column(site, rows.dtype, rows.shape[1], [(np.ascontiguousarray(p.data[site]), None) for p in parts])
        for site, rows in parts[0].data.items()
    ]
    return write_columns(
        folder, PromptTable.concatenate([p.prompts for p in parts]), parts[0].layout, columns, space=space,
        created_ns=time.time_ns() if created_ns is None else created_ns,
    )  # fmt: skip


def open(path: str | os.PathLike[str]) -> Segment:
    """Map the segment at `path`. FormatError when it is none or damaged, FileNotFoundError when gone."""
    return Segment(Path(path))


def read_info(path: str | os.PathLike[str]) -> SegmentInfo:
    """What the segment at `path` holds, without its data."""
    return open(path).info


def validate(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the file at `path`, in words; empty when it is a valid segment, every byte checked."""
    if not SEGMENT_NAME.fullmatch(Path(path).name):
        return [f"name {Path(path).name!r} is not 32 hexadecimal digits and .safetensors"]
    try:
        segment = open(path)
    except (FormatError, OSError) as error:
        return [str(error)]
    return list(_problems(segment))


def _problems(segment: Segment) -> Iterator[str]:
    for site in segment.info.sites:
        damaged = segment.damaged_blocks(site)
        if len(damaged):
            yield f"{site}: checksum of block {', '.join(map(str, damaged[:8]))} does not match"
    prompts = segment.prompts
    fresh = PromptTable(
        prompts.token_ids, prompts.token_offset, prompts.kind, prompts.text, prompts.text_offset, prompts.text_context
    )
    for name in ("token_key", "text_key"):
        wrong = np.flatnonzero((getattr(fresh, name) != getattr(prompts, name)).any(axis=1))
        if len(wrong):
            yield f"{name} of prompt {wrong[0]} is not the digest of what is stored"
