"""What a dataset holds, as its metadata says: one description for every published version of the format.

Metadata is one JSON object: the file ``lmprobe_info.json`` of versions 1.x; since 2.0 one value each under keys with
the prefix `PREFIX` in the schema of the Parquet index. It is a stranger's, so nothing of it is used before it was
checked here: numbers are in range, files lie inside the dataset, patterns name a layer and a shard and nothing else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actcache.errors import DatasetFormatError, NewerFormatError

VERSION = "2.0"
PREFIX = "lmprobe:"
INDEX = "index/train-00000-of-00001.parquet"
INFO = "lmprobe_info.json"
CARD = "README.md"

HIDDEN, LOGITS, ROUTER = "hidden_layers", "logits_topk", "router_logits"
"""Names of tensors. Any other is a site of its name, in the layout of `HIDDEN`.

The index columns ``shard_index`` and ``row_offset`` say where the row of a prompt is (of its last token, where these
are apart), in the shards of every tensor that has none of its own (``shard_index_<name>``, ``row_offset_<name>``). For
full sequences ``token_offset`` and ``num_tokens``, or where last tokens are apart ``token_shard_ids`` and
``token_shard_offsets``, say where all its tokens are.
"""
POOLED, FULL_SEQUENCE = "pooled", "full_sequence"

HIDDEN_FILES = "tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors"
HIDDEN_KEYS = "hidden.layer_{layer}"
LOGITS_FILES = "tensors/logits_topk_{shard:03d}.safetensors"
ROUTER_FILES = "tensors/router_logits_{shard:03d}.safetensors"
ROUTER_KEYS = "router.layer_{layer}"

_MOST = 1 << 62
_MAX_WIDTH = 1 << 28
_MAX_LAYERS = 1 << 16
_FIELD = re.compile(r"\{(layer|shard)(?::0(\d)d)?\}")
_JOINED = re.compile(r"\}\d*\{")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Shard:
    """One shard: how many prompts were put into it, its rows in every file of it, and its file where that is named."""

    prompts: int
    rows: int
    file: str | None = None


@dataclass(frozen=True)
class TensorGroup:
    """One kind of tensors: those of all layers and shards.

    Attributes:
        name: what it is called among the tensors of the dataset, such as "hidden_layers".
        layers: the layers it has; empty for logits, and for sites that are of no layer.
        dim: numbers in a row, None where that is not said.
        pooling: how the rows of a prompt became one; None where every token has its row.
        last_token_shards: how many shards, the first ones, hold the last token of each prompt, when the others hold
            the rest of its tokens; 0 when a prompt's tokens are together.
    """

    name: str
    layers: tuple[int, ...]
    dim: int | None
    pooling: str | None
    shards: tuple[Shard, ...]
    last_token_shards: int = 0
    file_pattern: str | None = None
    key_pattern: str | None = None
    described: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def site(self) -> str:
        """The name of the site in this library."""
        return "resid_post" if self.name == HIDDEN else self.name

    @property
    def placed(self) -> tuple[Shard, ...]:
        """The shards with one row per prompt that the index counts, or those with all tokens of theirs."""
        return self.shards[: self.last_token_shards or None]

    def file(self, shard: int, layer: int | None = None) -> str:
        """The path of a file inside the dataset."""
        return self.shards[shard].file or expand(self.file_pattern or "", layer or 0, shard)

    def key(self, layer: int | None) -> str:
        """The name of a layer's tensor inside a file."""
        return expand(self.key_pattern or "", layer or 0, 0)


@dataclass(frozen=True)
class Description:
    """A dataset: its version, model, number of prompts and tensors; `metadata` is all that was said of it."""

    version: str
    model_name: str | None
    revision: str | None
    num_prompts: int
    tensors: Mapping[str, TensorGroup]
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def token_offsets_are_local(self) -> bool | None:
        """Whether ``token_offset`` counts from the beginning of a shard; None where the version does not tell."""
        return {"1.0": True, "1.1": True}.get(self.version, False if self.version.startswith("1.") else None)


def is_name(name: str) -> bool:
    """Whether tensors can be called so: names become parts of paths."""
    return _PART.fullmatch(name) is not None


def expand(pattern: str, layer: int, shard: int) -> str:
    """A pattern with its numbers filled in."""
    numbers = {"layer": layer, "shard": shard}
    return _FIELD.sub(lambda found: str(numbers[found[1]]).zfill(int(found[2] or 0)), pattern)


def check_path(path: Any, where: str) -> str:
    """`path` where it leads to a safetensors file inside the dataset; `DatasetFormatError` otherwise."""
    if not isinstance(path, str) or not path.endswith(".safetensors") or len(path) > 1000:
        raise DatasetFormatError(f"{where}: {path!r:.120} is no path of a safetensors file.")
    if not all(_PART.fullmatch(part) for part in path.split("/")):
        raise DatasetFormatError(f"{where}: {path!r:.120} may lead out of the dataset: expected plain relative parts.")
    return path


def describe(metadata: Any, where: str) -> Description:
    """The dataset that `metadata` describes; `where` names it in errors.

    Raises:
        NewerFormatError: it is of a format that only a later version can read.
        DatasetFormatError: it does not describe a dataset.
    """
    if not isinstance(metadata, dict):
        raise DatasetFormatError(f"{where}: its metadata is no JSON object.")
    version = _version(metadata.get("format_version"), where)
    model = metadata.get("model")
    model = model if isinstance(model, dict) else {"name": model}
    name, revision = (value if isinstance(value, str) else None for value in (model.get("name"), model.get("revision")))
    # The oldest releases called them by another name.
    given = metadata.get("tensors", metadata.get("tensor_types"))
    if not isinstance(given, dict) or not given:
        raise DatasetFormatError(f"{where}: its metadata names no tensors.")
    prompts = _number(metadata.get("num_prompts"), f"{where}: num_prompts", _MOST)
    tensors = {key: _group(key, value, f"{where}: {key:.60}") for key, value in given.items()}
    named: dict[str, str] = {}
    for group in tensors.values():
        if group.site in named:
            raise DatasetFormatError(f"{where}: {named[group.site]} and {group.name} are both the site {group.site!r}.")
        named[group.site] = group.name
        placed = sum(shard.prompts for shard in group.placed)
        if placed != prompts:
            raise DatasetFormatError(
                f"{where}: num_prompts is {prompts:,}, and the shards of {group.name} hold {placed:,} prompts."
            )
    return Description(version, name, revision, prompts, tensors, metadata)


def _version(value: Any, where: str) -> str:
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", value) if isinstance(value, str) else None
    if match is None or int(match[1]) < 1:
        raise DatasetFormatError(f"{where}: format_version is {value!r:.60}: expected 1.0, 1.1, 1.2 or {VERSION}.")
    major, minor = int(match[1]), int(match[2])
    if major > 2:
        raise NewerFormatError(f"{where} is of format {value}: this version reads up to {VERSION}. Upgrade actcache.")
    if minor > {1: 2, 2: 0}[major]:
        warnings.warn(f"{where} is of format {value}, which is not known here: parts may be missed.", stacklevel=2)
    return match[0]


def _group(name: str, given: Any, where: str) -> TensorGroup:
    if not _PART.fullmatch(name) or not isinstance(given, dict):
        raise DatasetFormatError(f"{where}: expected the description of a tensor.")
    layers = given.get("layers", [])
    if not isinstance(layers, list) or len(layers) > _MAX_LAYERS or len(set(map(repr, layers))) != len(layers):
        raise DatasetFormatError(f"{where}: layers is {layers!r:.80}: expected a list of different numbers.")
    layers = tuple(_number(layer, f"{where}: a layer", 10**6) for layer in layers)
    if not layers and name != LOGITS and "key_pattern" not in given:
        raise DatasetFormatError(f"{where}: it has no layers.")
    width = given.get({LOGITS: "k", ROUTER: "num_experts"}.get(name, "dim"))
    dim = None if width is None else _number(width, f"{where}: its width", _MAX_WIDTH)
    whole = given.get("storage") == FULL_SEQUENCE
    pooling = None if whole else given.get("pooling")
    if not whole and not isinstance(pooling, str):
        raise DatasetFormatError(f"{where}: pooling is {pooling!r:.60}, and it is no {FULL_SEQUENCE}.")
    files, keys = _patterns(name, given, len(layers), where)
    shards = _shards(given.get("shards"), files, whole, where)
    last = _number(given.get("last_token_shards", 0), f"{where}: last_token_shards", len(shards))
    if last and not whole:
        raise DatasetFormatError(f"{where}: last_token_shards is {last}, and it is no {FULL_SEQUENCE}.")
    for number, shard in enumerate(shards[:last]):
        if shard.rows != shard.prompts:
            raise DatasetFormatError(
                f"{where}: shard {number} holds the last token of {shard.prompts:,} prompts in {shard.rows:,} rows."
            )
    return TensorGroup(name, layers, dim, pooling, shards, last, files, keys, given)


def _patterns(name: str, given: Mapping[str, Any], layers: int, where: str) -> tuple[str | None, str | None]:
    """The patterns of files and keys, those of the published layout where none are given. The `layers` layers are
    tensors of different names."""
    files = given.get("file_pattern")
    if files is None and name == HIDDEN and given.get("layout") == "per_layer":
        files = HIDDEN_FILES
    keys = given.get("key_pattern", {LOGITS: None, ROUTER: ROUTER_KEYS}.get(name, HIDDEN_KEYS))
    for pattern, what in ((files, "file_pattern"), (keys, "key_pattern")):
        if pattern is None:
            continue
        if not isinstance(pattern, str) or len(pattern) > 500 or set("{}") & set(_FIELD.sub("", pattern)):
            raise DatasetFormatError(
                f"{where}: {what} {pattern!r:.80} is no pattern: braces may hold layer or shard, as in {{shard:03d}}."
            )
        if _JOINED.search(pattern):
            raise DatasetFormatError(
                f"{where}: {what} {pattern!r:.80} has two numbers with nothing but digits between: several files or "
                "tensors may have one name."
            )
    if files is not None:
        check_path(expand(files, 0, 0), where)
    if layers > 1 and keys is not None and "{layer" not in keys:
        raise DatasetFormatError(
            f"{where}: key_pattern {keys!r:.80} names no layer, as in {HIDDEN_KEYS}, and it has {layers:,} layers."
        )
    return files, keys


def _shards(given: Any, pattern: str | None, whole: bool, where: str) -> tuple[Shard, ...]:
    if not isinstance(given, list):
        raise DatasetFormatError(f"{where}: it has no list of shards.")
    shards = []
    for number, item in enumerate(given):
        place = f"{where}: shard {number}"
        if not isinstance(item, dict):
            raise DatasetFormatError(f"{place} is {item!r:.60}: expected its description.")
        prompts = _number(item.get("num_prompts"), f"{place}: num_prompts", _MOST)
        rows = _number(item.get("num_tokens"), f"{place}: num_tokens", _MOST) if whole else prompts
        file = item.get("file")
        if file is not None:
            check_path(file, place)
        elif pattern is None:
            raise DatasetFormatError(f"{place}: neither its file nor a pattern of files is given.")
        shards.append(Shard(prompts, rows, file))
    varies = pattern is not None and any(found[1] == "shard" for found in _FIELD.finditer(pattern))
    named = [shard.file for shard in shards if shard.file is not None]
    if len(set(named)) != len(named) or (len(shards) - len(named) > 1 and not varies):
        raise DatasetFormatError(f"{where}: several of its shards are the same file.")
    return tuple(shards)


def _number(value: Any, what: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DatasetFormatError(f"{what} is {value!r:.60}: expected a whole number from 0 to {most:,}.")
    return value
