"""Models whose weights accelerate puts in place around each call: where the weights are, and when they go back.

With a `device_map` that names the disk (or the CPU beside an accelerator) weights are on the meta device between calls.
A hook in a module's forward brings them in before, and takes them out after: a call that is left by an exception never
takes them out. The hook sits on every module that has weights of its own, so what stays in memory then is what the
interrupted modules hold themselves: the parameters beside the children of a mixer or of fused experts, or whole blocks
where accelerate was told to preload them. A pass through such a model must therefore run to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.model.identity import stat_signature

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """A weight that is not in its module.

    Attributes:
        state: what changes when the weight does; None when that cannot be told without reading it.
        load: reads it, in the dtype in which the module gets it.
    """

    state: tuple[Any, ...] | None
    load: Callable[[], Tensor]


def is_dispatched(model: nn.Module) -> bool:
    """Whether hooks move weights of `model` in and out around calls, so that a pass must not be ended by an exception.

    Hooks that only bring inputs to the device of the weights (several devices, nothing offloaded) need no ending.
    """
    # Of a hook that is not known nothing is taken for granted.
    return any(getattr(hook, "offload", True) for module in model.modules() for hook in hooks_of(module))


def hooks_of(module: nn.Module) -> list[Any]:
    """The accelerate hooks of one module."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return []
    return list(_flat(hook))


def _flat(hook: Any) -> Iterator[Any]:
    inner = getattr(hook, "hooks", None)
    if not isinstance(inner, (list, tuple)):
        yield hook
        return
    # A module that has several names (an embedding that both stacks share) has been given hooks under each.
    for one in inner:
        yield from _flat(one)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids must be for a pass: the device of the embedding, or the one it is brought to for a call."""
    import torch

    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    start = model if embedding is None else embedding
    for hook in hooks_of(start):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(start.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def stored_weights(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Stored]:
    """The offloaded parameters and buffers of a model, by their names in it; in place for a call or not.

    `modules` are its ``named_modules()``.
    """
    found: dict[str, Stored] = {}
    for path, module in modules:
        for hook in hooks_of(module):
            weights = getattr(hook, "weights_map", None)
            if not getattr(hook, "offload", False) or not isinstance(weights, Mapping):
                continue
            for name, tensor in _tensors(module, hook):
                key = f"{path}.{name}" if path else name
                found[key] = Stored(_state(weights, name), _loader(weights, name, tensor.dtype))
    return found


def _tensors(module: nn.Module, hook: Any) -> Iterator[tuple[str, Tensor]]:
    recurse = bool(getattr(hook, "place_submodules", False))
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    if getattr(hook, "offload_buffers", False):
        for name, buffer in module.named_buffers(recurse=recurse, remove_duplicate=False):
            owner, _, own_name = name.rpartition(".")
            # Those that are in no checkpoint stay where they are.
            if own_name not in module.get_submodule(owner)._non_persistent_buffers_set:
                yield name, buffer


def _loader(weights: Mapping[str, Any], name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def load() -> Tensor:
        weight: Tensor = weights[name]
        return weight.to(dtype)

    return load


def _state(weights: Mapping[str, Any], name: str) -> tuple[Any, ...] | None:
    # accelerate's views of one collection: for each module those with its prefix.
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        name, weights = f"{weights.prefix}{name}", weights.dataset
    memory: Any = getattr(weights, "state_dict", weights)
    if isinstance(memory, Mapping) and name in memory and hasattr(memory[name], "is_inference"):
        tensor = memory[name]
        return (id(tensor), -1 if tensor.is_inference() else tensor._version)
    index = getattr(weights, "index", None)
    if not isinstance(index, Mapping) or name not in index:
        return None
    file = index[name].get("safetensors_file") or f"{getattr(weights, 'save_folder', '')}/{name}.dat"
    try:
        return (index[name].get("weight_name", name), *stat_signature([Path(file)]))
    except OSError:
        return None
