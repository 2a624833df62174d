"""int8 and float8_e4m3 with a scale for each dimension and block of rows: encoding, decoding, gathering.

A value is its code times its scale. A scale belongs to one column and at most 64 rows, so that a dimension whose
values are a thousand times the others' costs those nothing; `actcache.store.blocks` sees to it that a row does not,
either. What cannot be encoded (inf, nan) is read back as nan.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK_ROWS = 64
INT8, FLOAT8 = np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = {INT8: 127.0, FLOAT8: 448.0}
"""The largest code of each dtype, which stands for the largest value of a block's column."""

_INT8_NAN = -128
_FLOAT8_NAN = 0x7F
# Smaller scales would be subnormal, and their reciprocals too inexact or infinite.
_LEAST_SCALE = np.float32(2.0**-126)
_LEAST_NORMAL = np.float32(2.0**-6)
_CHUNK_BYTES = 1 << 20
_LONG_RUN = 8


def blocks_at_once(dim: int) -> int:
    """How many blocks of `dim` columns are best encoded together: so many that they stay in the processor's cache."""
    return max(1, _CHUNK_BYTES // (4 * BLOCK_ROWS * max(dim, 1)))


def encode(rows: Floats, dtype: np.dtype[Any], offsets: Ints) -> tuple[npt.NDArray[Any], Floats]:
    """Codes ``[n, D]`` of `dtype` and scales float32 ``[blocks, D]`` of `rows` ``[n, D]`` in blocks at `offsets`."""
    n, dim = rows.shape
    codes = np.empty((n, dim), dtype)
    scales = np.empty((len(offsets) - 1, dim), np.float32)
    sizes = np.diff(offsets)
    # Neighbours of one size are encoded together, as many as stay in the processor's cache.
    step = blocks_at_once(dim)
    for first, stop in pairwise([0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]):
        for block in range(first, stop, step):
            last = min(block + step, stop)
            a, b, size = int(offsets[block]), int(offsets[last]), int(sizes[block])
            shape = last - block, size, dim
            _encode_blocks(rows[a:b].reshape(shape), codes[a:b].reshape(shape), scales[block:last])
    return codes, scales


def _encode_blocks(blocks: Floats, codes: npt.NDArray[Any], scales: Floats) -> None:
    """Encode `blocks` ``[k, rows, D]`` into `codes`, and their scales into `scales` ``[k, D]``."""
    size = np.abs(blocks)
    largest = size.max(axis=1)
    strange = not np.isfinite(largest).all()
    if strange:
        size = np.where(np.isfinite(size), size, 0)
        largest = size.max(axis=1)
    top = np.float32(LARGEST[codes.dtype])
    np.divide(largest, top, out=scales)
    np.maximum(scales, _LEAST_SCALE, out=scales, where=largest > 0)
    with np.errstate(over="ignore"):
        # The largest value must not become inf because its scale was rounded up.
        np.nextafter(scales, np.float32(0), out=scales, where=np.isinf(scales * top))
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)[:, None]
    if codes.dtype == INT8:
        with np.errstate(invalid="ignore"):
            scaled = np.multiply(blocks, inverse, out=size)
            np.rint(scaled, out=scaled)
            np.copyto(codes, scaled, casting="unsafe")
    else:
        _encode_float8(np.multiply(size, inverse, out=size), np.signbit(blocks), codes.view(np.uint8))
    if strange:
        nan = _INT8_NAN if codes.dtype == INT8 else _FLOAT8_NAN
        codes.view(np.uint8)[~np.isfinite(blocks)] = nan & 255


def _encode_float8(size: Floats, negative: npt.NDArray[np.bool_], codes: npt.NDArray[np.uint8]) -> None:
    """Round `size` (at most 448) to float8_e4m3, ties to even, and put the sign in."""
    bits = size.view(np.uint32)
    # Three of the 23 bits of the fraction stay; the exponent's bias goes from 127 to 7.
    normal = (bits >> 20) & 1
    normal += bits
    normal += np.uint32(0x7FFFF)
    normal >>= 20
    normal -= np.uint32(120 << 3)
    if (size < _LEAST_NORMAL).any():
        # Subnormal codes are multiples of 2**-9, as are the last bits of numbers around 2**14.
        steps = (size + np.float32(2.0**14)).view(np.uint32) - np.float32(2.0**14).view(np.uint32)
        normal = np.where(size < _LEAST_NORMAL, steps, normal)
    np.copyto(codes, normal, casting="unsafe")
    codes |= negative.view(np.uint8) << 7


@cache
def _float8_values() -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
    return values


@cache
def _float8_pairs() -> npt.NDArray[np.uint64]:
    """For each two bytes of codes the eight bytes of their values: half as many look-ups."""
    pairs = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    return np.ascontiguousarray(_float8_values()[pairs]).view(np.uint64).reshape(-1)


def decode(codes: npt.NDArray[Any], scale: Floats, out: Floats) -> None:
    """``out[...] = codes * scale`` for codes ``[n, D]``; `scale` is ``[D]`` or ``[n, D]``, `out` float32 ``[n, D]``."""
    if codes.dtype == INT8:
        np.multiply(codes, scale, out=out, dtype=np.float32)
        if codes.size and codes.min() == _INT8_NAN:
            out[codes == _INT8_NAN] = np.nan
        return
    raw = codes.view(np.uint8)
    values = out if out.flags.c_contiguous else np.empty(out.shape, np.float32)
    if raw.flags.c_contiguous and not raw.size % 2:
        np.take(_float8_pairs(), raw.reshape(-1).view(np.uint16), out=values.reshape(-1).view(np.uint64), mode="clip")
    else:
        np.take(_float8_values(), raw, out=values, mode="clip")
    with np.errstate(invalid="ignore"):
        np.multiply(values, scale, out=out)


def decode_run(codes: npt.NDArray[Any], scales: Floats, offsets: Ints, start: int, stop: int) -> Floats:
    """The values float32 ``[stop - start, D]`` of neighbouring rows; `offsets` says which rows each scale is for."""
    out = np.empty((stop - start, codes.shape[1]), np.float32)
    if stop > start:
        first = int(np.searchsorted(offsets, start, "right")) - 1
        last = int(np.searchsorted(offsets, stop, "left"))
        edges = np.clip(offsets[first : last + 1], start, stop).tolist()
        for block, (a, b) in enumerate(pairwise(edges), first):
            decode(codes[a:b], scales[block], out[a - start : b - start])
    return out


def gather(codes: npt.NDArray[Any], scales: Floats, offsets: Ints, rows: Ints, out: npt.NDArray[Any], at: Ints) -> None:
    """``out[at[i]] = values[rows[i]]`` for `out` ``[n, D]`` of any floating dtype. `rows` must have been checked."""
    if not len(rows):
        return
    block = np.searchsorted(offsets, rows, "right") - 1
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(at) != 1) | (np.diff(block) != 0)) + 1
    if len(rows) >= _LONG_RUN * (len(breaks) + 1):
        edges = [0, *breaks.tolist(), len(rows)]
        for a, b in pairwise(edges):
            row, place = int(rows[a]), int(at[a])
            target = out[place : place + b - a]
            _decode_into(codes[row : row + b - a], scales[block[a]], target)
        return
    for start in range(0, len(rows), BLOCK_ROWS):
        chosen = slice(start, start + BLOCK_ROWS)
        part = np.empty((len(rows[chosen]), codes.shape[1]), np.float32)
        decode(codes[rows[chosen]], scales[block[chosen]], part)
        out[at[chosen]] = part


def _decode_into(codes: npt.NDArray[Any], scale: Floats, target: npt.NDArray[Any]) -> None:
    if target.dtype == np.float32:
        decode(codes, scale, target)
        return
    part = np.empty(codes.shape, np.float32)
    decode(codes, scale, part)
    target[...] = part
