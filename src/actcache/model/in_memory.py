"""Models in memory: the digest of their weights, and what tells whether anything that decides their values changed.

Weights are parameters, buffers, the packed weights of torch's quantised layers (which are neither), tensors kept on
parameters by quantisers, and weights that accelerate keeps elsewhere between calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from actcache.model.checksum import checksum, local_checksum
from actcache.model.identity import digest_json
from actcache.model.offload import Stored, stored_weights
from actcache.model.rope import ORIGINAL, depends_on_longest


@dataclass(frozen=True)
class _Weight:
    """One weight: `state` changes with it (None: cannot be told), `parts` are its tensors, by what they are.

    `kept` is an object whose id is part of `state`, and must not be reused as long as that is remembered. `passing`:
    its tensors are made for the occasion, and their memory is soon another's.
    """

    state: tuple[Any, ...] | None
    parts: Callable[[], list[tuple[str, Tensor]]]
    kept: object = None
    passing: bool = False


_live: weakref.WeakKeyDictionary[Any, tuple[Any, list[object], str]] = weakref.WeakKeyDictionary()


def live_weights_digest(model: nn.Module) -> str:
    """Digest of all weights of a model in memory: names, shapes, dtypes and bytes. Where they lie makes no difference.

    The state of the weights is recognised by every tensor's `data_ptr` and `_version`, and by a checksum of its bytes
    where it lies: a write through ``.data``, or through an array that shares the memory, moves no version. So each call
    reads all weights once.
    """
    look = _Look()
    weights = dict(_weights_of(model, look))
    state = {name: weight.state for name, weight in weights.items()}
    known = _live.get(model)
    if known is not None and known[0] == state and None not in state.values():
        return known[2]
    digests: dict[str, Any] = {}
    for name, weight in weights.items():
        digest_of = _digest_of if weight.passing else look.digest_of
        digests[name] = [[what, str(t.dtype), list(t.shape), digest_of(t)] for what, t in weight.parts()]
    digest = digest_json(digests)
    _live[model] = (state, [weight.kept for weight in weights.values()], digest)
    return digest


class _Look:
    """One look at tensors that stay where they are meanwhile: each is read once, also when tied weights give it several
    names."""

    def __init__(self) -> None:
        self._checksums: dict[tuple[Any, ...], int] = {}
        self._digests: dict[tuple[Any, ...], str] = {}

    def state_of(self, tensor: Tensor) -> tuple[Any, ...]:
        place = _place_of(tensor)
        if place not in self._checksums:
            self._checksums[place] = local_checksum(tensor)
        return (*place, version_of(tensor), self._checksums[place])

    def digest_of(self, tensor: Tensor) -> str:
        # Torch's quantised tensors hide scales, which may differ at one place.
        if tensor.is_quantized:
            return _digest_of(tensor)
        place = _place_of(tensor)
        if place not in self._digests:
            # On the processor the checksum is the digest.
            known = self._checksums.get(place) if tensor.is_cpu else None
            self._digests[place] = f"{known:032x}" if known else _digest_of(tensor)
        return self._digests[place]


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)


def weights_state(model: nn.Module) -> dict[str, Any]:
    """What changes when somebody changes a weight of a loaded model, by its name; moving it to a device does not.

    Of buffers those that are saved with the model count: others hold what passes leave behind.
    """
    elsewhere = stored_weights(list(model.named_modules()))
    # Some quantisers rearrange their weights as they run.
    quantized = bool(getattr(model, "is_quantized", False))
    state: dict[str, Any] = {
        name: (id(p), str(p.dtype), version_of(p), checksum(p))
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in elsewhere and not (quantized and (type(p) is not nn.Parameter or not p.is_floating_point()))
    }
    for path, module in () if quantized else model.named_modules():
        for own, buffer in module._buffers.items():
            name = f"{path}.{own}" if path else own
            if buffer is not None and own not in module._non_persistent_buffers_set and name not in elsewhere:
                state[name] = (str(buffer.dtype), checksum(buffer))
    return state | {name: stored.state for name, stored in elsewhere.items()}


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 for those of inference mode, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


# Of layers with adapters (peft) and of quantised layers (optimum-quanto): what they do with their weights.
_SETTINGS = (
    "active_adapters",
    "disable_adapters",
    "merged_adapters",
    "scaling",
    "weight_qtype",
    "activation_qtype",
)
_PLAIN = ("torch", "transformers")
# With accelerate's stand-ins for `to` and `cuda`; of a forward on the module itself `refuse_foreign_hooks` decides.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))
# What a pass, a mode or the way of loading leaves on modules, and no value depends on.
_PASSING = frozenset(
    {"_is_hf_initialized", "compute_type_is_set", "gradient_checkpointing", "is_quantized", "name_or_path"}
)
_NUMBERS = (bool, int, float, str)


def settings_of(model: nn.Module, leave_out: frozenset[str] = frozenset()) -> str:
    """Digest of what decides a model's values beside weights and config: the classes of its modules, the numbers,
    switches, names and functions that they hold (an epsilon, a scale, a causal mask or none, an activation), and the
    state of their adapters; without attributes of the names `leave_out`."""
    found: dict[str, Any] = {}
    apart = _OF_EVERY_MODULE | _PASSING | leave_out
    for path, module in model.named_modules():
        kind = type(module)
        plain = _is_plain(kind)
        settings: dict[str, Any] = {"class": kind.__qualname__}
        if not plain:
            settings["class"] = f"{kind.__module__}.{kind.__qualname__}"
            settings |= {n: v for n in _SETTINGS if (v := getattr(module, n, None)) is not None and not callable(v)}
        # A list, since another thread's pass may put something on the module meanwhile.
        for name, value in list(vars(module).items()):
            # The private ones of known libraries are their bookkeeping.
            if name in apart or (name[0] == "_" and plain) or "cache" in name:
                continue
            told = _told(value, containers=not plain)
            if told is not None:
                settings[name] = told
        found[path] = settings
    return digest_json(found)


def attention_of(model: nn.Module) -> str:
    """The attention implementation of a model in memory, with those of its parts that have another one."""
    config = getattr(model, "config", None)
    whole = str(getattr(config, "_attn_implementation", None) or "eager")
    others = [f"{name}: {attention}" for name, attention in _attention_of_parts(config) if attention != whole]
    return f"{whole} ({', '.join(others)})" if others else whole


def _attention_of_parts(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, part in vars(config).items() if config is not None else ():
        attention = getattr(part, "_attn_implementation", None)
        if attention is not None:
            yield prefix + name, str(attention)
            yield from _attention_of_parts(part, f"{prefix}{name}.")


def _is_plain(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _PLAIN and not kind.__module__.startswith("torch.ao.")


def _told(value: Any, *, containers: bool) -> Any:
    """What can be said of an attribute in JSON values, None for what cannot be told from another one."""
    if value is None or isinstance(value, _NUMBERS):
        return value
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial):
        return [_told(part, containers=True) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, (list, tuple)) and (containers or all(type(item) in _NUMBERS for item in value)):
        return [_told(item, containers=containers) for item in value]
    if isinstance(value, dict) and containers:
        return {str(key): _told(item, containers=containers) for key, item in value.items()}
    return None


def _weights_of(model: nn.Module, look: _Look) -> Iterator[tuple[str, _Weight]]:
    modules = list(model.named_modules())
    elsewhere = stored_weights(modules)
    config: Any = getattr(model, "config", None)
    follows = hasattr(config, "to_dict") and depends_on_longest(config.to_dict())
    for path, module in modules:
        prefix = f"{path}." if path else ""
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = prefix + own
            if tensor is None:
                continue
            if own.endswith("inv_freq"):
                # Frequencies that follow the last pass say nothing about the model.
                if not follows or own.endswith(ORIGINAL):
                    yield name, _Weight(look.state_of(tensor), partial(_rounded, tensor), passing=True)
                continue
            if name in elsewhere:
                stored = elsewhere[name]
                yield name, _Weight(stored.state, partial(_loaded, stored), passing=True)
            else:
                parts = _parts_of(tensor)
                yield name, _Weight(tuple([(what, *look.state_of(t)) for what, t in parts]), partial(list, parts))
        foreign = not _is_plain(type(module))
        for own, value in vars(module).items():
            if foreign and own not in _OF_EVERY_MODULE and "cache" not in own:
                # A steering vector or a mask of somebody's own module.
                for what, held in _held(value):
                    parts = _parts_of(held)
                    kept = tuple([(at, *look.state_of(t)) for at, t in parts])
                    yield f"{prefix}{own}{what}", _Weight(kept, partial(list, parts))
            # Unpacking them is too much work for every look at the state.
            if isinstance(value, torch.ScriptObject):
                yield prefix + own, _Weight((id(value),), partial(_unpacked, value), value, passing=True)


def _held(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors that an attribute holds, in lists and mappings too."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _held(item, f"{prefix}.{key}")


def _rounded(frequencies: Tensor) -> list[tuple[str, Tensor]]:
    """Rotary frequencies to four digits: devices compute them with other last bits; a model that was cast to half
    precision as a whole, its frequencies too, is another one."""
    if frequencies.is_meta:
        return [("", frequencies)]
    return [("", frequencies.detach().to("cpu", torch.float64).log2().mul(4096).round())]


def _loaded(stored: Stored) -> list[tuple[str, Tensor]]:
    return [("", stored.load())]


def _parts_of(tensor: Tensor, prefix: str = "") -> list[tuple[str, Tensor]]:
    """The plain tensors that a weight consists of, by what they are in it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, context = flatten()
        inner = [part for name in names for part in _parts_of(getattr(tensor, name), f"{prefix}.{name}")]
        return [(f"{what} {context}", part) for what, part in inner]
    parts = [(prefix, tensor)]
    if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter:
        # Scales that a quantiser keeps on its parameters, or on an object there.
        for name, value in vars(tensor).items():
            held = {"": value} if isinstance(value, Tensor) else getattr(value, "__dict__", {})
            parts += [(f"{prefix}.{name}.{n}", v) for n, v in held.items() if isinstance(v, Tensor)]
    return parts


def _unpacked(value: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """The tensors in packed weights of torch's own, and its numbers beside them in what names them."""
    if isinstance(value, torch.ScriptObject):
        value = value.__getstate__()
    if isinstance(value, Tensor):
        return [(prefix, value)]
    if isinstance(value, (tuple, list)):
        return [part for i, inner in enumerate(value) for part in _unpacked(inner, f"{prefix}.{i}")]
    return [(f"{prefix}={value!r}", torch.empty(0))]


def _digest_of(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return digest_json([_digest_of(part) for part in _quantized_parts(tensor)])
    return xxhash.xxh3_128_hexdigest(_bytes_of(tensor))


def _quantized_parts(tensor: Tensor) -> list[Tensor]:
    """Integers, scales and zero points of a tensor with one of torch's quantised dtypes."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def _bytes_of(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return b""
    plain = tensor.detach()
    flat = (plain if plain.is_cpu else plain.to("cpu")).contiguous().view(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
