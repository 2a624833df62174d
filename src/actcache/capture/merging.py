"""How the values of several batches become one value: the rules that hold where no strategy was registered.

Every rule takes all batches at once, and gives the same whether they come at once or one after the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.capture.entry import MISSING, Entry
from actcache.capture.gradients import Lost
from actcache.capture.joining import Refused
from actcache.capture.notes import ValueWithInfo
from actcache.capture.padding import join_tensors
from actcache.capture.values import map_tensors, same_content
from actcache.errors import JoinError

Axes = tuple[int, ...]


def signature(value: Any, axes: Axes) -> Hashable:
    """What two values must share to be joined: equal signatures join, and lists join with anything."""
    if isinstance(value, Tensor):
        shape = value.shape
        fixed = shape[2:] if axes == (1,) else _fixed(shape, axes)
        # A number per batch joins like a row of numbers.
        return "tensor", value.dtype, value.device, value.layout, len(shape) or 1, fixed
    if isinstance(value, list):
        return "list"
    if isinstance(value, ValueWithInfo):
        return "value with info", signature(value.value(), axes)
    if isinstance(value, np.ndarray):
        text = value.dtype.kind in "US"
        return "array", value.dtype.kind if text else value.dtype, max(value.ndim, 1), value.shape[1:]
    if isinstance(value, dict):
        return "dict", tuple(sorted(((repr(key), signature(item, (1,))) for key, item in value.items()), key=_first))
    if isinstance(value, Entry):
        return "entry", len(value), tuple(_structure([visit._output, visit.inputs]) for visit in value)
    return "value"


def check(one: Hashable, other: Hashable, key: str) -> None:
    """Raise `JoinError` when values of these two signatures cannot be joined."""
    if one == other or "list" in (one, other):
        return
    difference = f"is {describe(one)} in one batch and {describe(other)} in another"
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0]:
        if one[0] == "dict":
            mine, theirs = dict(one[1]), dict(other[1])
            for name in mine.keys() & theirs.keys():
                check(mine[name], theirs[name], f"{key}[{name}]")
            only = sorted(mine.keys() ^ theirs.keys())
            if not only:
                return
            difference = f"holds {', '.join(only)} in one batch only"
        elif one[0] == "value with info":
            check(one[1], other[1], key)
            return
    raise JoinError(
        f"{key!r} cannot be joined: it {difference}. Make them alike (cache.to(dtype) casts), or say how they are to "
        "be joined with register_aggregation, such as ac.aggregate.collect."
    )


def merge(parts: Sequence[Any], axes: Axes = (1,), *, pad: bool = True) -> Any:
    """One value out of those of several batches, in order, whose signatures fit.

    Tensors and arrays join on dim 0; other lengths along `axes` are padded with zeros, or without `pad` all tensors
    become a list. Dicts join per key, modules per visit, lists one behind the other; all else collects into a list.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(isinstance(part, list) for part in parts):
        return [item for part in parts for item in (part if isinstance(part, list) else [part])]
    if isinstance(first, Tensor):
        return join_tensors(parts, axes) if pad else list(parts)
    if isinstance(first, ValueWithInfo):
        return ValueWithInfo(
            merge([part.value() for part in parts], axes, pad=pad), distinct([p.info() for p in parts])
        )
    if isinstance(first, np.ndarray):
        return np.concatenate([np.atleast_1d(part) for part in parts])
    if isinstance(first, dict):
        return {key: merge([part[key] for part in parts], pad=pad) for key in first}
    if isinstance(first, Entry):
        return _merge_entries(parts)
    if isinstance(first, Refused):
        return first
    return list(parts)


def distinct(parts: Sequence[Any]) -> Any:
    """The value that all share, or the list of those that differ, in order."""
    found: list[Any] = []
    for part in parts:
        for item in part if isinstance(part, list) else [part]:
            if not any(same_content(item, other) for other in found):
                found.append(item)
    return parts[0] if all(same_content(parts[0], part) for part in parts) else found


def copied(value: Any) -> Any:
    """`value` with tensors, arrays and containers of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Entry):
        return value.map(copied)
    if isinstance(value, np.ndarray):
        return value.copy()
    return map_tensors(value, Tensor.clone)


def absent(template: Any, rows: int, batches: int) -> Any:
    """What stands for `rows` prompts of `batches` batches that lack the value `template`: zeros, or None."""
    if isinstance(template, Tensor):
        return template.new_zeros((rows, *template.shape[1:]))
    if isinstance(template, np.ndarray):
        return np.zeros((rows, *template.shape[1:]), template.dtype)
    if isinstance(template, ValueWithInfo):
        return ValueWithInfo(absent(template.value(), rows, batches), template.info())
    if isinstance(template, Entry):
        return template.map(lambda value: map_tensors(value, lambda tensor: absent(tensor, rows, batches)))
    if isinstance(template, dict):
        return {key: absent(item, rows, batches) for key, item in template.items()}
    return [None] * batches


def describe(found: Hashable) -> str:
    """A signature in words."""
    if not isinstance(found, tuple):
        return f"a {found}"
    if found[0] in ("tensor", "array"):
        *_, ndim, fixed = found
        place = f" on {found[2]}" if found[0] == "tensor" else ""
        if found[0] == "tensor" and found[3] is not torch.strided:
            place += f", {str(found[3]).removeprefix('torch.')},"
        sizes = f" of sizes {list(fixed)}" if fixed else ""
        return f"a {str(found[1]).removeprefix('torch.')} {found[0]}{place} with {ndim} dimensions{sizes}"
    if found[0] == "value with info":
        return f"{describe(found[1])} with info"
    if found[0] == "entry":
        return f"an entry of {found[1]} visits ({'; '.join(map(_words, found[2][:1]))})"
    return f"a {found[0]}"


def _words(found: Any) -> str:
    if isinstance(found, tuple) and found and found[0] == "tensor":
        return describe(found)
    if isinstance(found, tuple):
        return ", ".join(_words(item) for item in found)
    return str(found)


def _first(pair: tuple[str, Hashable]) -> str:
    return pair[0]


def _fixed(shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis > 0 and axis not in axes)


def _nested_axes(tensor: Tensor) -> Axes:
    # Nothing says what a module's tensors are: with four dimensions they have heads before or behind the positions, or
    # queries and keys, as masks do.
    return (1, 2, 3) if tensor.ndim == 4 else (1,)


def _structure(value: Any) -> Hashable:
    """The signature of what a module was given or returned: containers are joined part by part."""
    if isinstance(value, Tensor):
        return signature(value, _nested_axes(value))
    if value is MISSING:
        return "no output"
    if isinstance(value, Mapping):
        return type(value).__name__, tuple((str(key), _structure(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_structure(item) for item in value)
    return "value"


def _merge_entries(parts: Sequence[Entry]) -> Entry:
    runs = range(len(parts[0]))
    outputs, inputs = [part._outputs for part in parts], [part._inputs for part in parts]
    return Entry(
        [_merge_nested([side[run] for side in outputs if side]) for run in runs] if outputs[0] else None,
        [_merge_nested([side[run] for side in inputs if side]) for run in runs] if inputs[0] else None,
        [Lost() for _ in runs] if any(part._gradients is not None for part in parts) else None,
    )


def _merge_nested(parts: Sequence[Any]) -> Any:
    tensors = [_tensors(part) for part in parts]
    joined = iter([join_tensors(same, _nested_axes(same[0])) for same in zip(*tensors, strict=True)])
    return _rebuild(parts, lambda tensor: next(joined))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _rebuild(parts: Sequence[Any], tensor: Any) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return tensor(first)
    if type(first) in (tuple, list):
        return type(first)(_rebuild(items, tensor) for items in zip(*parts, strict=True))
    if type(first) is dict:
        return {key: _rebuild([part[key] for part in parts], tensor) for key in first}
    if isinstance(first, (Mapping, tuple, list)) or _tensors(first):
        # Containers of other classes keep what is no tensor from the first batch.
        return map_tensors(first, tensor)
    return first if first is MISSING else distinct(list(parts))
