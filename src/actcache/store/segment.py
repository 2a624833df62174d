"""The segment: one immutable safetensors file of packed prompts and their vectors.

docs/format.md is normative. `write` makes one, `open` maps one, `validate` holds one against the format.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import FormatError
from actcache.store import sparse
from actcache.store.beside import LARGE, Beside
from actcache.store.blocks import Rows, plan
from actcache.store.casting import CastError, Piece, cast, is_cast, quantised
from actcache.store.dtypes import is_scaled, matrix_dtype
from actcache.store.files import SEGMENT_NAME, is_ours
from actcache.store.mapping import Segment
from actcache.store.measuring import Measured
from actcache.store.prompts import PromptTable, needs_text, token_keys
from actcache.store.prompts import offsets as joined_offsets
from actcache.store.records import BLOCK, SCALE, SPARSE, TOKENS, Records, SegmentInfo
from actcache.store.spaces import described_by
from actcache.store.statistics import Moments
from actcache.store.writing import Column, Measurements, write_columns

__all__ = ["BLOCK", "TOKENS", "Records", "Segment", "SegmentInfo", "open", "read_info", "validate", "write"]

_ROWS_AT_ONCE = 4096


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
    first = parts[0]
    given = {site: [part.data[site] for part in parts] for site in first.data}
    scaled = {
        site: Rows(rows, matrix_dtype(first.code(site))) for site, rows in given.items() if is_scaled(first.code(site))
    }
    row_offset = joined_offsets(np.concatenate([np.diff(part.row_offset) for part in parts]))
    offsets = plan(list(scaled.values()), row_offset) if scaled else np.zeros(1, np.int64)
    # Small pieces that are measured one by one take several times as long.
    alike = [s for s, rows in given.items() if not any(is_cast(m, first.code(s)) for m in rows)]
    large = bool(alike) and sum(part.stored_bytes for part in parts) >= LARGE
    measured = Measured([(site, first.code(site), given[site][0].shape[1]) for site in alike])

    def measure() -> None:
        measured.add_given(parts, alike)

    def pieces(site: str) -> Iterator[Piece]:
        if site in scaled:
            return quantised(scaled[site], offsets)
        return _unmeasured(given[site]) if site in alike else _pieces(given[site], first.code(site))

    columns = [Column(site, first.code(site), rows[0].shape[1], pieces(site)) for site, rows in given.items()]
    with Beside(measure) if large else contextlib.nullcontext() as measuring:

        def found() -> Measurements:
            # The rows are on their way to the disk by now, which works meanwhile.
            if measuring is None:
                measure()
            else:
                measuring.wait()
            return measured.all()

        return write_columns(
            folder, PromptTable.concatenate([p.prompts for p in parts]), first.layout, columns,
            row_offset=row_offset, space=space, created_ns=created_ns, block_offset=offsets,
            not_before=max(p.not_before for p in parts), measured=found,
        )  # fmt: skip


def _unmeasured(parts: Sequence[npt.NDArray[Any]]) -> Iterator[Piece]:
    for part in parts:
        yield Piece(np.ascontiguousarray(part), None, None, CastError())


def _pieces(parts: Sequence[npt.NDArray[Any]], code: str) -> Iterator[Piece]:
    for part in parts:
        yield from cast(part, code)


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
    if not is_ours(segment.path, SEGMENT_NAME):
        yield "it does not begin with its metadata, and the format first in it"
    if "description" in segment.metadata and described_by(segment) is None:
        yield "its description is not one of its space"
    for site in segment.info.sites:
        damaged = segment.checks.damaged(site)
        if len(damaged):
            yield f"{site}: checksum of block {', '.join(map(str, damaged[:8]))} does not match"
        else:
            yield from _problems_of_numbers(segment, site)
    yield from problems_of_keys(segment)
    if segment.layout == SPARSE:
        yield from sparse.problems(segment)
    for name in segment.pads():
        yield f"{name} is not filled with zeros"


def _problems_of_numbers(segment: Segment, site: str) -> Iterator[str]:
    """Whether scales and moments of an undamaged site are what they must be."""
    scales = segment.scales(site)
    if scales is not None and not (np.isfinite(scales) & (scales >= 0)).all():
        yield f"{site}: a scale is negative or not finite"
        return
    said = segment.moments(site)
    if said is None:
        return
    found = Moments.empty(len(said.mean))
    for start in range(0, segment.info.rows, _ROWS_AT_ONCE):
        found.update(segment.values(site, start, min(start + _ROWS_AT_ONCE, segment.info.rows)))
    with np.errstate(all="ignore"):
        spread = 1e-4 * np.maximum(found.std, np.abs(found.mean) * 1e-3) + 1e-30
        # Where values are not finite, or their squares are not, there is nothing to compare.
        known = np.isfinite(found.mean) & np.isfinite(found.m2) & (found.m2 < 1e30)
        wrong = known & ~((np.abs(said.mean - found.mean) <= spread) & (np.abs(said.std - found.std) <= spread))
    if wrong.any():
        yield f"{site}: its moments are not those of its rows (column {np.flatnonzero(wrong)[0]})"


def problems_of_keys(segment: Segment) -> Iterator[str]:
    """What is wrong with the keys of a segment, in words."""
    prompts = segment.prompts
    fresh = PromptTable(
        prompts.token_ids, prompts.token_offset, prompts.kind, prompts.text, prompts.text_offset, prompts.text_context
    )
    for name in ("token_key", "text_key"):
        wrong = np.flatnonzero((getattr(fresh, name) != getattr(prompts, name)).any(axis=1))
        if name == "token_key" and len(wrong):
            # Stores of earlier days have keys of the ids alone, whatever these are.
            plain = token_keys(prompts.token_ids, prompts.token_offset)
            old = needs_text(prompts.token_ids, prompts.token_offset, prompts.kind)
            wrong = np.setdiff1d(wrong, old[(plain[old] == prompts.token_key[old]).all(axis=1)])
        if len(wrong):
            yield f"{name} of prompt {wrong[0]} is not the digest of what is stored"


def blocks_of(segment: Segment) -> int:
    """How many blocks with checksums a segment has."""
    return sum(-(-t.nbytes // BLOCK) for site in segment.info.sites for t in segment.parts(site))


def rows_of_blocks(segment: Segment, site: str, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of `site` that lie in these blocks, in part or whole, or whose scales do."""
    found, before = [np.empty(0, np.int64)], 0
    for tensor in segment.parts(site):
        count = -(-tensor.nbytes // BLOCK)
        mine = blocks[(blocks >= before) & (blocks < before + count)] - before
        before += count
        width = max(1, tensor.shape[1] * tensor.dtype.itemsize)
        first, stop = mine * BLOCK // width, (np.minimum((mine + 1) * BLOCK, tensor.nbytes) - 1) // width + 1
        if tensor.name.endswith(SCALE):
            first, stop = segment.block_offset[first], segment.block_offset[stop]
        found += [np.arange(a, b) for a, b in zip(first, stop, strict=True)]
    return np.unique(np.concatenate(found))
