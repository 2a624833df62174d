"""What happens to a captured value: detached, moved, cast and copied, wherever its tensors are nested."""

from __future__ import annotations

import copy as copying
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.capture.notes import ValueWithInfo
from actcache.errors import OptionError, did_you_mean

CPU = torch.device("cpu")
_KEPT = ("keys", "values", "conv_states", "recurrent_states", "ssm_states")
_CACHE_MODULES = ("transformers.cache_utils",)


@dataclasses.dataclass(frozen=True)
class KVSummary:
    """What is recorded in place of a KV-cache object, which would otherwise be kept alive and go on growing.

    `kind` is its class, `seq_len` the number of positions it held (0 where it holds recurrent states, which do not
    count), `nbytes` the size of its keys, values and states.
    """

    kind: str
    layers: int
    seq_len: int
    nbytes: int


def make_keeper(
    *, device: torch.device | None, dtype: torch.dtype | None, detach: bool, copy: bool
) -> Callable[[Any], Any]:
    """A function that keeps a value: every tensor in it detached (`detach`), on `device` (`CPU`, None: where it is), in
    `dtype` (floating tensors only) and, with `copy`, in memory of its own.

    A tensor that several modules hand on unchanged is copied once.
    """
    to_cpu = device is None or device is CPU
    plain = copy and detach and dtype is None
    convert = make_converter(device=device, dtype=dtype, detach=detach, copy=copy)
    # Weakly: a tensor holds its memory, and the graph behind it.
    last: Callable[[], Tensor | None] = _nothing
    last_version = -1
    last_kept: Tensor | None = None

    def keep_tensor(tensor: Tensor) -> Tensor:
        nonlocal last, last_version, last_kept
        if tensor.is_inference():
            # A copy made outside inference mode is an ordinary tensor, which may be trained on later.
            with torch.inference_mode(False):
                return convert(tensor.clone())
        version = tensor._version
        if tensor is last() and version == last_version and last_kept is not None:
            return last_kept
        if plain and to_cpu and tensor.is_cpu:
            kept = tensor.detach().clone() if tensor.requires_grad else tensor.clone()
        else:
            kept = convert(tensor)
        last, last_version, last_kept = weakref.ref(tensor), version, kept
        return kept

    def keep(value: Any) -> Any:
        kind = type(value)
        if kind is Tensor:
            return keep_tensor(value)
        if kind is tuple:
            # Written out: a closure that calls itself is a cycle, and would keep the last tensor alive.
            return tuple([keep_tensor(v) if type(v) is Tensor else map_tensors(v, keep_tensor) for v in value])
        if value is None or kind is bool or kind is int:
            return value
        return map_tensors(value, keep_tensor)

    return keep


def _nothing() -> None:
    return None


def make_converter(
    *, device: torch.device | None, dtype: torch.dtype | None, detach: bool, copy: bool
) -> Callable[[Tensor], Tensor]:
    """The same for one tensor, of which nothing is remembered."""

    def convert(tensor: Tensor) -> Tensor:
        value = tensor.detach() if detach else tensor
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        place = tensor.device if device is None else device
        if wanted != tensor.dtype or not same_device(place, tensor.device):
            return value.to(device=place, dtype=wanted)
        return value.clone() if copy else value

    return convert


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same, "cuda" standing for the current one."""
    if one.type != other.type:
        return False
    if one.type == "cpu":
        return True
    here = torch.cuda.current_device() if one.type == "cuda" else 0
    return (here if one.index is None else one.index) == (here if other.index is None else other.index)


def map_tensors(value: Any, function: Callable[[Tensor], Any], *, of_cache: Callable[[Any], Any] | None = None) -> Any:
    """`value` with `function` applied to every tensor inside tuples, lists, dicts, named tuples, model outputs and
    dataclasses; KV caches become a `KVSummary` (or what `of_cache` makes of them), anything else stays the object it
    is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (str, bytes, int, float)) or value is None:
        return value
    if isinstance(value, tuple):
        items = [map_tensors(item, function, of_cache=of_cache) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else _same_class(value, items)
    if isinstance(value, list):
        return _same_class(value, [map_tensors(item, function, of_cache=of_cache) for item in value])
    if isinstance(value, dict):
        return _map_dict(value, function, of_cache)
    if isinstance(value, ValueWithInfo):
        return ValueWithInfo(map_tensors(value.value(), function, of_cache=of_cache), value.info())
    if is_kv_cache(value):
        return summarise(value) if of_cache is None else of_cache(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copying.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                mapped = map_tensors(getattr(value, field.name), function, of_cache=of_cache)
                object.__setattr__(result, field.name, mapped)
        return result
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside `value`, in order, with repetitions."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note, of_cache=lambda cache: cache)
    return iter(found)


def same_content(one: Any, other: Any) -> bool:
    """Whether two values hold the same: tensors by shape, dtype and elements, containers by their parts."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.dtype == other.dtype
            and one.device == other.device
            and torch.equal(one, other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, ValueWithInfo):
        return same_content(one.value(), other.value()) and same_content(one.info(), other.info())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_content(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_content(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def is_kv_cache(value: Any) -> bool:
    return any(base.__module__ in _CACHE_MODULES and base.__name__ == "Cache" for base in type(value).__mro__) or (
        (callable(getattr(value, "get_seq_length", None)) and hasattr(value, "update"))
        # transformers 4: the states of a recurrent model, under no common class.
        or (hasattr(value, "conv_states") and hasattr(value, "ssm_states"))
    )


def summarise(cache: Any) -> KVSummary:
    """The summary of a KV cache as it is now."""
    # An encoder-decoder cache holds two caches, and counts its length in the first.
    parts = [getattr(cache, name) for name in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, name)]
    layers = [layer for part in parts or [cache] for layer in getattr(part, "layers", ())]
    # Recurrent states of transformers 4 have no layers: each kind is held for all of them at once.
    count = len(layers) or len(getattr(cache, "conv_states", ()))
    held = [t for holder in layers or [cache] for name in _KEPT for t in tensors_in(getattr(holder, name, None))]
    return KVSummary(type(cache).__name__, count, kv_length(cache), sum(t.nbytes for t in held))


def kv_length(cache: Any) -> int:
    """Positions that a KV cache holds; 0 for None and for what does not say."""
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        try:
            return int(length())
        except ValueError:
            # One that holds recurrent states only, which do not count.
            return 0
    # The older form: a tuple of (keys [B, H, S, hd], values) for each layer.
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], (tuple, list)):
        keys = cache[0][0] if cache[0] else None
        return int(keys.shape[-2]) if isinstance(keys, Tensor) else 0
    return 0


def read_device(device: str | torch.device | int | None) -> torch.device | None:
    """`device` as torch knows it; raises `OptionError` for a name that is none, or a device that is not there."""
    if device is None:
        return None
    if device == "cpu":
        return CPU
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"unknown device {device!r}: expected 'cpu', 'cuda', 'cuda:0', ... or None") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {device!r} asks for CUDA, which torch does not find here: use 'cpu'")
    return CPU if found.type == "cpu" else found


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`dtype` as torch knows it, from its name or itself; it must be a floating type."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        names = ["float16", "bfloat16", "float32", "float64"]
        hint = did_you_mean(dtype, names) if isinstance(dtype, str) else ""
        raise OptionError(f"unknown dtype {dtype!r}: expected a floating type such as {', '.join(names)}.{hint}")
    return found


def _same_class(value: Any, items: list[Any]) -> Any:
    plain = list if isinstance(value, list) else tuple
    if type(value) is plain:
        return plain(items)
    try:
        return type(value)(items)
    except TypeError:
        return plain(items)


def _map_dict(value: dict[Any, Any], function: Callable[[Tensor], Any], of_cache: Callable[[Any], Any] | None) -> Any:
    mapped = {key: map_tensors(item, function, of_cache=of_cache) for key, item in value.items()}
    if type(value) is dict:
        return mapped
    if hasattr(type(value), "__dataclass_fields__"):
        # A model output: its fields are what it is built from.
        return type(value)(**mapped)
    result = copying.copy(value)
    result.update(mapped)
    return result
