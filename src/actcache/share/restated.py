"""What a dataset of an older version says of itself, as version 2.0 says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actcache.errors import DatasetFormatError
from actcache.share.format import (
    HIDDEN,
    HIDDEN_FILES,
    HIDDEN_KEYS,
    LOGITS,
    LOGITS_FILES,
    ROUTER,
    ROUTER_FILES,
    ROUTER_KEYS,
    VERSION,
    TensorGroup,
    expand,
)
from actcache.share.index import Index
from actcache.share.rows import Ints, one_row
from actcache.share.shards import ShardReader

# Files of 1.0, with all layers of a shard.
_TOGETHER_FILES = "tensors/hidden_layers_{shard:03d}.safetensors"


def told_dtype(reader: ShardReader, group: TensorGroup) -> str | None:
    """What the files hold, where that is one dtype: older releases said float32 of whatever they wrote."""
    if group.key_pattern is None:
        return None
    filled = [number for number, shard in enumerate(group.shards) if shard.rows]
    layers: Sequence[int | None] = group.layers or (None,)
    found = {reader.placed(number, layer, group.key(layer)).dtype.name for number in filled for layer in layers}
    return found.pop() if len(found) == 1 else None


def own_columns(index: Index, *, but: str) -> dict[str, Ints]:
    """Places of other tensors, which so far were where those of `but` are."""
    found: dict[str, Ints] = {}
    for name, group in index.description.tensors.items():
        own = "logits" if name == LOGITS else name
        if name in (but, ROUTER):
            # Rows of the router lie in the order of the index.
            continue
        runs = one_row(index, group)
        if not {f"shard_index_{own}", f"row_offset_{own}"} <= set(index.columns):
            found |= {f"shard_index_{own}": runs.shard, f"row_offset_{own}": runs.start}
    return found


def metadata_of(index: Index) -> dict[str, Any]:
    """What a dataset says of itself, as 2.0 has it: files and keys by patterns where they follow one."""
    found = index.description
    metadata = {key: value for key, value in found.metadata.items() if key not in ("tensor_types", "tensors")}
    for key in metadata:
        if not key.isprintable():
            raise DatasetFormatError(f"{index.source.name}: its metadata has a key {key!r:.60}: expected plain text.")
    metadata |= {"format_version": VERSION, "model": {"name": found.model_name, "revision": found.revision}}
    metadata["tensors"] = {name: _described(name, group) for name, group in found.tensors.items()}
    return metadata


def _described(name: str, group: TensorGroup) -> dict[str, Any]:
    told = dict(group.described)
    files = {HIDDEN: (HIDDEN_FILES, _TOGETHER_FILES), LOGITS: (LOGITS_FILES,), ROUTER: (ROUTER_FILES,)}.get(name, ())
    for pattern in files if "file_pattern" not in told else ():
        per_layer = "{layer" in pattern
        if per_layer and group.file_pattern == pattern:
            told["file_pattern"] = pattern
        named = [shard.file for shard in group.shards]
        if not per_layer and named == [expand(pattern, 0, number) for number in range(len(named))]:
            told["file_pattern"] = pattern
    if name in (HIDDEN, ROUTER):
        told.setdefault("key_pattern", HIDDEN_KEYS if name == HIDDEN else ROUTER_KEYS)
    return told
