"""The safetensors container: encoding and strict parsing of a header.

The library's own writer sorts tensors by dtype and name; we need index tensors first and data in the
order of sites, so the header is made here. Reading is stricter than the library where that keeps
hostile files out, and never looser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from actcache.errors import FormatError

ALIGN = 64
MAX_HEADER = 64 << 20
_ENTRY = {"dtype", "shape", "data_offsets"}
_IMPOSSIBLE = 1 << 62

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
CODES: dict[np.dtype[Any], str] = {dtype: code for code, dtype in DTYPES.items()}


@cache
def code_of(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype; FormatError for one that has none."""
    try:
        return CODES[np.dtype(dtype).newbyteorder("<")]
    except (KeyError, TypeError):
        raise FormatError(f"dtype {dtype} cannot be stored: expected one of {', '.join(DTYPES)}") from None


class Tensor(NamedTuple):
    """One entry of a header. `start` and `stop` are bytes from the beginning of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


_PLACE = attrgetter("start", "stop")


def encode(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]
) -> tuple[bytes, dict[str, Tensor]]:
    """The first bytes of a file (length and header) and where each tensor goes.

    Every tensor starts at a multiple of 64 bytes of the file: the header is padded with spaces, gaps are
    covered by ``pad.N`` tensors since the container allows no holes.
    """
    text, placed = _described(metadata, list(tensors), 0, {})
    text += b" " * (-(len(text) + 8) % ALIGN)
    base = len(text) + 8
    moved = {name: Tensor(name, t.dtype, t.shape, t.start + base, t.stop + base) for name, t in placed.items()}
    return len(text).to_bytes(8, "little") + text, moved


def encode_around(
    metadata: Mapping[str, str],
    tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]],
    starts: Mapping[str, int],
) -> tuple[bytes, dict[str, Tensor]]:
    """`encode` for a file in which the tensors in `starts` already are where they are, in bytes from its beginning.

    ValueError when what comes before one of them does not fit.
    """
    base = 8 + len(_described(metadata, tensors, 0, starts)[0])
    while True:
        # What is in the header depends on how long it is.
        base += -base % ALIGN
        text, placed = _described(metadata, tensors, base, starts)
        if 8 + len(text) <= base:
            text += b" " * (base - 8 - len(text))
            return len(text).to_bytes(8, "little") + text, placed
        base = 8 + len(text)


def _described(
    metadata: Mapping[str, str],
    tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]],
    base: int,
    starts: Mapping[str, int],
) -> tuple[bytes, dict[str, Tensor]]:
    """The text of a header of `base` bytes, and where the tensors go."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    placed = {}
    at, pads = base, 0
    for name, dtype, shape in tensors:
        start = starts.get(name, at + -at % ALIGN)
        if start < at:
            raise ValueError(f"no room for what comes before {name!r}: it is at {start:,}, that ends at {at:,}")
        if start > at:
            entries[f"pad.{pads}"] = {"dtype": "U8", "shape": [start - at], "data_offsets": [at - base, start - base]}
            pads += 1
        at = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": code_of(dtype), "shape": list(shape), "data_offsets": [start - base, at - base]}
        placed[name] = Tensor(name, dtype, shape, start, at)
    return json.dumps(entries, separators=(",", ":")).encode(), placed


def parse(head: bytes, file_size: int, at: int = 0) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a header given as the first ``8 + N`` bytes of a file of `file_size` bytes.

    `at`: where such a file begins inside of another one, of which the tensors are to be.
    Refuses (FormatError) anything but tensors of known dtypes that tile the rest of the file exactly.
    """
    try:
        entries = json.loads(head[8:].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise FormatError("header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ is not a table of strings")
    base = at + len(head)
    tensors = [_tensor(name, entry, base) for name, entry in entries.items()]
    end = base
    for tensor in sorted(tensors, key=_PLACE):
        if tensor.start != end:
            raise FormatError(f"tensor {tensor.name!r} overlaps another or leaves a gap")
        end = tensor.stop
    if end != at + file_size:
        raise FormatError(f"file has {file_size} bytes, its header describes {end - at}")
    return metadata, {t.name: t for t in tensors}


def header_size(first8: bytes, file_size: int) -> int:
    """Size of length field and header together, from the first 8 bytes; FormatError when impossible."""
    if len(first8) < 8:
        raise FormatError(f"file of {file_size} bytes is too short for a header")
    size = int.from_bytes(first8, "little")
    if size > MAX_HEADER or size + 8 > file_size:
        raise FormatError(f"header of {size} bytes does not fit a file of {file_size} bytes")
    return size + 8


def _tensor(name: str, entry: Any, base: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise FormatError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise FormatError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    wrong = type(shape) is not list or type(offsets) is not list
    # A loop: headers are read by the thousand, and `all` of as few numbers takes several times as long.
    for x in () if wrong else (*shape, *offsets):
        wrong = wrong or type(x) is not int or not 0 <= x < _IMPOSSIBLE
    if wrong:
        raise FormatError(f"tensor {name!r} has a wrong shape or wrong offsets")
    if len(offsets) != 2 or len(shape) > 32 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"tensor {name!r}: shape {shape} does not match its offsets {offsets}")
    return Tensor(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
