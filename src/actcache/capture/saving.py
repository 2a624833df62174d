"""A cache as one safetensors file: the tensors as they are, everything else in the header as JSON.

Nothing that is read is run. The only names that are imported are those of model outputs, from transformers, and those
of strategies, when a join needs them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actcache.capture import aggregate
from actcache.capture.entry import MISSING, Entry
from actcache.capture.joining import Refused
from actcache.capture.keyed import Keyed
from actcache.capture.names import Names
from actcache.capture.notes import ValueWithInfo
from actcache.capture.strategies import Named, Strategies, importable_name
from actcache.capture.tokens import Mask, Tokens
from actcache.capture.values import KVSummary
from actcache.errors import FormatError, MissingFileError, UnsavableError
from actcache.model.layout import Block
from actcache.written import in_place_of

K = TypeVar("K", bound=Keyed)

FORMAT = "actcache.activation_cache"
VERSION = 1
_PLAIN = (bool, int, float, str, type(None))
_ROOT = "transformers."


def save(cache: Keyed, path: str | os.PathLike[str]) -> Path:
    """Write `cache` to `path`: see `ActivationCache.save`."""
    state = cache._state()
    writer = _Writer()
    strategies = cache._strategies.rules if cache._strategies is not None else {}
    described = {
        "format": FORMAT,
        "version": VERSION,
        "saved": time.time(),
        "items": [[key, writer.encode(value, repr(key))] for key, value in cache._data.items()],
        "tables": [[stack, writer.encode(tuple(table), "the tokens")] for stack, table in state.tables.items()],
        "masks": writer.encode({key: tuple(mask) for key, mask in state.masks.items()}, "the masks"),
        "columns": {name: writer.encode(column, f"column {name!r}") for name, column in (cache._columns or {}).items()},
        "metadata": {
            name: writer.encode(value, f"metadata {name!r}") for name, value in (cache._metadata or {}).items()
        },
        "strategies": [[pattern, importable_name(function, pattern)] for pattern, function in strategies.items()],
        "new": sorted(cache._strategies.new) if cache._strategies is not None else [],
        "depths": list(cache._depths.items()),
        "layouts": [[stack, [list(block) for block in blocks]] for stack, blocks in cache._layouts.items()],
        "names": cache._called.given if cache._called is not None else {},
        "cut": cache._cut,
        "missed": cache.missed,
        "tokens": cache.tokens,
        "batches": cache._batches,
    }
    header = {FORMAT: json.dumps(described)}
    target = Path(path)
    if target.is_dir():
        from actcache.capture.saved import new_file

        target = new_file(target)
    if not target.parent.is_dir():
        raise MissingFileError(f"there is no folder {os.fspath(target.parent)!r} to save a cache in: make it first")
    with in_place_of(target) as temporary:
        save_file(writer.tensors, temporary, metadata=header)
    return target


def load(kind: type[K], path: str | os.PathLike[str]) -> K:
    """Read a cache: see `ActivationCache.load`."""
    if not Path(path).is_file():
        raise MissingFileError(f"there is no file {os.fspath(path)!r}: expected one that ActivationCache.save wrote")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            described = (file.metadata() or {}).get(FORMAT)
            # Memory of our own: the file may be written over.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if described else {}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{os.fspath(path)!r} is no safetensors file, or a damaged one: {error}") from error
    if described is None:
        raise FormatError(f"{os.fspath(path)!r} does not hold a cache: expected a file that ActivationCache.save wrote")
    found = json.loads(described)
    if found["version"] != VERSION:
        raise FormatError(
            f"{os.fspath(path)!r} is of version {found['version']} of the format, and this actcache reads {VERSION}: "
            "update actcache"
        )
    decode = Reader(tensors.__getitem__).decode
    cache = kind({key: decode(value) for key, value in found["items"]})
    cache._tokens = {stack: Tokens(*decode(table)) for stack, table in found["tables"]}
    cache._masks = {key: Mask(*mask) for key, mask in decode(found["masks"]).items()}
    cache._columns = {name: decode(column) for name, column in found["columns"].items()}
    cache._metadata = {name: decode(value) for name, value in found["metadata"].items()}
    if found["strategies"]:
        cache._strategies = Strategies()
        for pattern, name in found["strategies"]:
            cache._strategies.rules[pattern] = _strategy(name)
        cache._strategies.new = set(found["new"])
    cache._depths = dict(map(tuple, found["depths"]))
    cache._layouts = {
        stack: tuple(Block(kind, tuple(parts), factor) for kind, parts, factor in blocks)
        for stack, blocks in found.get("layouts", [])
    }
    cache._called = Names(found["names"]) if found.get("names") else None
    cache._batches, cache._cut = found["batches"], found.get("cut")
    cache.missed, cache.tokens = found["missed"], found["tokens"]
    return cache


class _Writer:
    """Values as JSON, with their tensors aside: one that is there several times is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, str] = {}
        # Known by where they are, so they must stay there.
        self._alive: list[Tensor] = []
        self._storages: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is Tensor or isinstance(value, torch.nn.Parameter):
            return {"tensor": self._tensor(value, where)}
        for kind, (name, write) in _WRITERS.items():
            if type(value) is kind:
                return {name: write(self, value, where)}
        if _is_model_output(value):
            kind = type(value)
            return {"output": [f"{kind.__module__}:{kind.__qualname__}", self._pairs(dict(value), where)]}
        if isinstance(value, np.generic):
            return {"number": [value.dtype.str, self.encode(value.item(), where)]}
        raise UnsavableError(
            f"{where} cannot be saved: it holds a {type(value).__module__}.{type(value).__qualname__}. Tensors, "
            "numbers, arrays, strings, lists, tuples, dicts, entries and values with info can: convert or delete it."
        )

    def _tensor(self, tensor: Tensor, where: str) -> str:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UnsavableError(f"{where} cannot be saved: it is a {tensor.layout} tensor on {tensor.device}")
        plain = tensor.detach()
        place = str(plain.device), plain.data_ptr(), tuple(plain.shape), plain.stride(), plain.dtype
        if plain.numel() == 0 or place not in self._known:
            name = str(len(self.tensors))
            self._known[place] = name
            self._alive.append(plain)
            kept = plain.resolve_conj().resolve_neg().cpu().contiguous()
            storage = kept.untyped_storage()
            # Of a view only what it shows, and of memory that two share each its own.
            if storage.nbytes() != kept.nbytes or storage.data_ptr() in self._storages:
                kept = kept.clone()
            self._storages.add(kept.untyped_storage().data_ptr())
            self.tensors[name] = kept
        return self._known[place]

    def _pairs(self, value: Mapping[Any, Any], where: str) -> list[Any]:
        return [[self.encode(key, where), self.encode(item, f"{where}[{key!r}]")] for key, item in value.items()]

    def _array(self, array: np.ndarray[Any, Any], where: str) -> Any:
        if array.dtype.kind in "US":
            return {
                "text": [array.dtype.str, array.tolist() if array.dtype.kind == "U" else array.astype("U").tolist()]
            }
        try:
            return {"tensor": self._tensor(torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)), where)}
        except (TypeError, ValueError) as error:
            raise UnsavableError(
                f"{where} cannot be saved: an array of {array.dtype} has no place in the file"
            ) from error


_WRITERS: dict[type, tuple[str, Callable[[_Writer, Any, str], Any]]] = {
    list: ("list", lambda w, value, where: [w.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]),
    tuple: ("tuple", lambda w, value, where: [w.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]),
    dict: ("dict", lambda w, value, where: w._pairs(value, where)),
    ValueWithInfo: (
        "info",
        lambda w, value, where: [w.encode(value.value(), where), w.encode(value.info(), f"the info of {where}")],
    ),
    Entry: ("entry", lambda w, value, where: [w.encode(value._outputs, where), w.encode(value._inputs, where)]),
    type(MISSING): ("missing", lambda w, value, where: True),
    Refused: ("refused", lambda w, value, where: value.reason),
    KVSummary: ("kv", lambda w, value, where: list(dataclasses.astuple(value))),
    np.ndarray: ("array", lambda w, value, where: w._array(value, where)),
    torch.dtype: ("dtype", lambda w, value, where: str(value).removeprefix("torch.")),
    torch.device: ("device", lambda w, value, where: str(value)),
    slice: ("slice", lambda w, value, where: [w.encode(v, where) for v in (value.start, value.stop, value.step)]),
}


class Reader:
    """Values from JSON; `tensor` gives those that were kept aside."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self._get = tensor

    def decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        return getattr(self, f"_{kind}")(content)

    def _tensor(self, name: str) -> Tensor:
        return self._get(name)

    def _list(self, items: list[Any]) -> list[Any]:
        return [self.decode(item) for item in items]

    def _tuple(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(self._list(items))

    def _dict(self, pairs: list[Any]) -> dict[Any, Any]:
        return {self.decode(key): self.decode(item) for key, item in pairs}

    def _info(self, content: list[Any]) -> ValueWithInfo:
        return ValueWithInfo(*self._list(content))

    def _entry(self, content: list[Any]) -> Entry:
        return Entry(*self._list(content))

    def _missing(self, content: Any) -> Any:
        return MISSING

    def _refused(self, reason: str) -> Refused:
        return Refused(reason)

    def _kv(self, content: list[Any]) -> KVSummary:
        return KVSummary(*content)

    def _array(self, content: dict[str, Any]) -> np.ndarray[Any, Any]:
        if "text" in content:
            dtype, items = content["text"]
            return np.array(items, dtype=dtype)
        array: np.ndarray[Any, Any] = self._get(content["tensor"]).numpy()
        return array

    def _number(self, content: list[Any]) -> Any:
        return np.dtype(content[0]).type(self.decode(content[1]))

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, name)
        return found

    def _device(self, name: str) -> torch.device:
        return torch.device(name)

    def _slice(self, content: list[Any]) -> slice:
        return slice(*self._list(content))

    def _output(self, content: list[Any]) -> Any:
        name, pairs = content
        fields = self._dict(pairs)
        module, _, path = name.partition(":")
        if not module.startswith(_ROOT):
            return fields
        kind: Any = import_module(module)
        for part in path.split("."):
            kind = getattr(kind, part, None)
        # A release that knows no such output: what it held is what counts.
        return kind(**fields) if isinstance(kind, type) and _is_output_class(kind) else fields


def _is_output_class(kind: type) -> bool:
    return any(base.__name__ == "ModelOutput" and base.__module__.startswith(_ROOT) for base in kind.__mro__)


def _is_model_output(value: Any) -> bool:
    return _is_output_class(type(value)) and type(value).__module__.startswith(_ROOT)


def _strategy(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return (
        getattr(aggregate, attribute)
        if module == aggregate.__name__ and attribute in aggregate.__all__
        else Named(name)
    )
