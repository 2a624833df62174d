"""Models in memory: the digest of their weights, and what tells whether anything that decides their values changed.

Weights are parameters, buffers, the packed weights of torch's quantised layers (which are neither), tensors kept on
parameters by quantisers, and weights that accelerate keeps elsewhere between calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from actcache.model.identity import digest_json
from actcache.model.offload import Stored, stored_weights


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

    Computed once per state of the weights. The state is recognised by every tensor's `data_ptr` and
    `_version`, and by a sample of its values, since a write through ``.data`` moves no version.
    """
    weights = dict(_weights_of(model))
    state = {name: weight.state for name, weight in weights.items()}
    known = _live.get(model)
    if known is not None and known[0] == state and None not in state.values():
        return known[2]
    seen: dict[Any, str] = {}
    digests: dict[str, Any] = {}
    for name, weight in weights.items():
        # Tied weights are one tensor under several names.
        known_digests = {} if weight.passing else seen
        digests[name] = [
            [what, str(t.dtype), list(t.shape), _digest_of(t, known_digests)] for what, t in weight.parts()
        ]
    digest = digest_json(digests)
    _live[model] = (state, [weight.kept for weight in weights.values()], digest)
    return digest


def weights_state(model: nn.Module) -> dict[str, Any]:
    """What changes when somebody changes a weight of a loaded model, by its name; moving it to a device does not."""
    elsewhere = stored_weights(list(model.named_modules()))
    # Some quantisers rearrange their weights as they run.
    quantized = bool(getattr(model, "is_quantized", False))
    state: dict[str, Any] = {
        name: (id(p), str(p.dtype), version_of(p))
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in elsewhere and not (quantized and (type(p) is not nn.Parameter or not p.is_floating_point()))
    }
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


def settings_of(model: nn.Module) -> str:
    """Digest of what decides a model's values beside weights and config: the numbers its modules hold (an epsilon, a
    scale), the state of their adapters, and the classes of modules that are neither torch's nor transformers'."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        kind = type(module)
        settings: dict[str, Any] = {k: v for k, v in vars(module).items() if type(v) is float}
        plain = kind.__module__.split(".")[0] in _PLAIN and not kind.__module__.startswith("torch.ao.")
        if not plain:
            settings["class"] = f"{kind.__module__}.{kind.__qualname__}"
            settings |= {n: v for n in _SETTINGS if (v := getattr(module, n, None)) is not None and not callable(v)}
        if settings:
            found[path] = settings
    return digest_json(found)


def _weights_of(model: nn.Module) -> Iterator[tuple[str, _Weight]]:
    modules = list(model.named_modules())
    elsewhere = stored_weights(modules)
    for path, module in modules:
        prefix = f"{path}." if path else ""
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            # Frequencies that follow the last pass say nothing about the weights.
            if tensor is None or own.endswith("inv_freq"):
                continue
            name = prefix + own
            if name in elsewhere:
                stored = elsewhere[name]
                yield name, _Weight(stored.state, partial(_loaded, stored), passing=True)
            else:
                parts = _parts_of(tensor)
                yield name, _Weight(tuple([(what, *_state_of(t)) for what, t in parts]), partial(list, parts))
        for own, value in vars(module).items():
            # Unpacking them is too much work for every look at the state.
            if isinstance(value, torch.ScriptObject):
                yield prefix + own, _Weight((id(value),), partial(_unpacked, value), value, passing=True)


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


def _state_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), version_of(tensor), tuple(tensor.shape), str(tensor.dtype), _sample(tensor)


def _sample(tensor: Tensor) -> int:
    size = tensor.numel()
    if size == 0 or tensor.is_meta or tensor.is_quantized or not tensor.is_contiguous():
        return 0
    return xxhash.xxh3_64_intdigest(_bytes_of(tensor.detach().view(-1)[:: max(1, size // 64)]))


def _digest_of(tensor: Tensor, seen: dict[Any, str]) -> str:
    if tensor.is_quantized:
        return digest_json([_digest_of(part, {}) for part in _quantized_parts(tensor)])
    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    digest = seen.get(place)
    if digest is None:
        digest = xxhash.xxh3_128_hexdigest(_bytes_of(tensor))
        if not tensor.is_meta:
            seen[place] = digest
    return digest


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
