"""How many bytes values take: of each, of groups of them, and of all together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from actcache.capture.entry import Entry
from actcache.capture.notes import ValueWithInfo
from actcache.capture.values import tensors_in

_NUMBERED = re.compile(r"_L?\d+(?:H\d+)?$")


def held_bytes(values: Iterable[Any]) -> int:
    """Bytes of memory that the values keep alive; what several of them share counts once."""
    seen: dict[Any, int] = {}
    for tensor in _parts(list(values)):
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
        else:
            base = tensor
            while isinstance(base.base, np.ndarray):
                base = base.base
            seen["array", base.ctypes.data] = base.nbytes
    return sum(seen.values())


def own_bytes(values: Iterable[Any]) -> int:
    """Bytes of the elements of the values; a tensor that is there several times counts once."""
    seen: dict[Any, int] = {}
    for tensor in _parts(list(values)):
        if isinstance(tensor, Tensor):
            place = str(tensor.device), tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype
            seen[place] = tensor.numel() * tensor.element_size()
        else:
            seen["array", tensor.ctypes.data, tensor.shape, tensor.strides] = tensor.nbytes
    return sum(seen.values())


def readable(nbytes: int) -> str:
    """``400 B``, ``12.35 MB``: decimal units."""
    if nbytes < 1000:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("KB", "MB", "GB", "TB"):
        size /= 1000
        # What would be rounded to 1000 is 1 of the next unit.
        if size < 999.995 or unit == "TB":
            return f"{size:.2f} {unit}"
    raise AssertionError("unreachable")


def size_of(values: Iterable[Any]) -> str:
    """The size of the values in words; where they are views of more memory than that, with what they keep alive."""
    parts = list(values)
    own, held = own_bytes(parts), held_bytes(parts)
    return readable(own) if held <= own else f"{readable(own)} (view of {readable(held)})"


def tree(data: Mapping[str, Any]) -> dict[str, Any]:
    """The size of every value, nested as the values are."""
    return {shown_key(key, data): _branch(value) for key, value in data.items()}


def grouped(data: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes with layers and heads folded: ``{"resid_post (12 items)": "1.20 MB", "logits": ...}``."""
    found: dict[str, Any] = {}
    for name, keys in groups(data).items():
        if name in data:
            found[shown_key(name, data)] = _branch(data[name])
        else:
            items = "1 item" if len(keys) == 1 else f"{len(keys)} items"
            found[f"{name} ({items})"] = size_of(data[key] for key in keys)
    return found


def groups(data: Iterable[str]) -> dict[str, list[str]]:
    """The keys that are the same but for layers and heads, by what they share; a key without numbers by itself."""
    found: dict[str, list[str]] = {}
    for key in data:
        found.setdefault(shared_name(key), []).append(key)
    return found


def shown_key(key: str, data: Iterable[str]) -> str:
    """`key` as it is shown: the whole model as ``model``, and a child of that name as ``model.model``; both are found
    by that."""
    if key == "model" and "" in data:
        return "model.model"
    return key or "model"


def shared_name(key: str) -> str:
    """`key` without its layer and head: ``resid_post.3`` and ``pattern_L1H2`` -> ``resid_post``, ``pattern``; within a
    path ``transformer.h.*.attn``."""
    names = key.split(".")
    while len(names) > 1 and names[-1].isdigit():
        names.pop()
    names = ["*" if name.isdigit() else name for name in names]
    # Within a path a number at the end of a name is no layer: ``h.0.ln_1``.
    return ".".join(names) if len(names) > 1 else _NUMBERED.sub("", names[0]) or names[0]


def lines(sizes: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """A tree as text: a line per value, with totals for what is nested."""
    shown = {shown_key(key, data): value for key, value in data.items()}
    return [line for name, size in sizes.items() for line in _lines(name, size, shown.get(name), 0)]


def _lines(name: str, size: Any, value: Any, depth: int) -> list[str]:
    indent = "  " * depth
    if isinstance(size, str):
        return [f"{indent}{name}: {size}"]
    value = value.value() if isinstance(value, ValueWithInfo) else value
    text = [f"{indent}{name}: {size_of([value])}"]
    items = size.items() if isinstance(size, dict) else ((f"[{i}]", item) for i, item in enumerate(size))
    inner = list(value.values()) if isinstance(value, dict) else list(value)
    for (label, item), part in zip(items, inner, strict=True):
        text += _lines(str(label), item, part, depth + 1)
    return text


def _branch(value: Any) -> Any:
    if isinstance(value, ValueWithInfo):
        return _branch(value.value())
    if isinstance(value, dict):
        return {key: _branch(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_branch(item) for item in value]
    return size_of([value])


def _parts(values: list[Any]) -> Iterable[Tensor | np.ndarray[Any, Any]]:
    yield from tensors_in([value.values() if isinstance(value, Entry) else value for value in values])
    yield from _arrays(values)


def _arrays(value: Any) -> Iterable[np.ndarray[Any, Any]]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, ValueWithInfo):
        yield from _arrays(value.value())
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _arrays(item)
