"""An index written anew: rows of vectors lie elsewhere, and every other column stays as it was, value for value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.share import seal
from actcache.share.index import Index
from actcache.share.rows import Ints

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, Any]
"""Values of columns by name: arrays of numbers, or for lists ``(lengths, numbers)``."""

_ROWS, _TOKENS = 4_000, 250_000
_PIECE = 32 << 20
"""Bytes of text that are in memory at once."""
_MOST_TEXT, _MAX_RATIO = 1 << 30, 100

_TYPES = {
    "token_offset": "int64",
    "token_shard_ids": "list",
    "token_shard_offsets": "list",
}


def rewrite(
    index: Index,
    path: Path,
    *,
    lengths: Ints,
    names: Collection[str],
    make: Callable[[int, int], Columns],
    drop: Collection[str],
    metadata: Mapping[str, bytes],
) -> None:
    """Write `index` into the file `path`.

    Args:
        lengths: tokens of each prompt, which bound how many rows are in memory at once.
        names: columns that are new, or replaced; ``make(start, stop)`` has their values of some rows.
        drop: columns that are left out.
        metadata: of the schema.

    Raises `DatasetFormatError` for an index that cannot be read, or unpacks to far more than it is.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    index.kind("text")
    kept = [name for name in index.columns if name not in names and name not in drop]
    fields = [
        pa.field(name, _type(name) if name in names else index.kind(name))
        for name in index.columns
        if name not in drop or name in names
    ]
    fields += [pa.field(name, _type(name)) for name in names if name not in index.columns]
    schema = pa.schema(fields).with_metadata(dict(metadata))
    ends = np.cumsum(lengths)
    start, texts = 0, 0
    with parquet.ParquetWriter(path, schema, compression="snappy") as writer:
        for batch in index.batches(kept, most_rows=_ROWS):
            count = len(batch["text"])
            if batch["text"].null_count:
                raise index.wrong(f"column 'text' has no value for {batch['text'].null_count:,} prompts")
            sizes = sum((_text_bytes(array) for array in batch.values()), np.zeros(count, np.int64))
            texts += int(sizes.sum())
            if texts > _MOST_TEXT + _MAX_RATIO * index.nbytes:
                raise index.wrong(f"its texts recur so often that written anew they would have {texts:,} bytes")
            for a, b in _parts(sizes, np.diff(ends[start : start + count], prepend=ends[start - 1] if start else 0)):
                columns = {name: array.slice(a, b - a) for name, array in batch.items()}
                new = make(start + a, start + b)
                arrays = [
                    _array(index, new[field.name], field)
                    if field.name in new
                    else _plain(index, columns[field.name], field)
                    for field in schema
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            start += count
    seal.put(path)


def _type(name: str) -> pa.DataType:
    import pyarrow as pa

    kind = _TYPES.get(name, "int32")
    return pa.list_(pa.int64()) if kind == "list" else getattr(pa, kind)()


def _array(index: Index, values: Any, field: pa.Field) -> pa.Array:
    import pyarrow as pa

    try:
        if isinstance(values, tuple):
            lengths, numbers = values
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(numbers, pa.int64()))
        return pa.array(values, field.type)
    except pa.ArrowInvalid:
        raise index.wrong(f"column {field.name!r} would need numbers that are no {field.type}") from None


def _plain(index: Index, array: pa.Array, field: pa.Field) -> pa.Array:
    """The values themselves, where each different text was kept once."""
    import pyarrow as pa

    try:
        return array if array.type == field.type else array.cast(field.type)
    except pa.ArrowException as error:
        raise index.wrong(f"column {field.name!r} cannot be read: {str(error)[:200]}") from None


def _text_bytes(array: pa.Array) -> Ints:
    """Bytes that each value has once it is no entry of a dictionary any more."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = np.asarray(pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        values = np.cumsum(_text_bytes(array.flatten()), dtype=np.int64)
        sums: Ints = np.insert(values, 0, 0)[ends]
        return np.diff(sums)
    if not pa.types.is_dictionary(array.type):
        return np.zeros(len(array), np.int64)
    kind = array.dictionary.type
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind)):
        return np.zeros(len(array), np.int64)
    sizes = np.asarray(pc.binary_length(array.dictionary).fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
    codes = np.asarray(array.indices.fill_null(-1).to_numpy(zero_copy_only=False)).astype(np.int64)
    return np.where(codes >= 0, sizes[codes], 0) if len(sizes) else np.zeros(len(array), np.int64)


def _parts(texts: Ints, tokens: Ints) -> Iterator[tuple[int, int]]:
    """Rows in parts that fit into memory, one at least."""
    start = 0
    text_ends, token_ends = np.cumsum(texts), np.cumsum(tokens)
    while start < len(texts):
        limits = [
            int(np.searchsorted(ends, (ends[start - 1] if start else 0) + most, side="right"))
            for ends, most in ((text_ends, _PIECE), (token_ends, _TOKENS))
        ]
        stop = max(start + 1, min(limits))
        yield start, stop
        start = stop
