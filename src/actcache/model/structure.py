"""Find the parts of a Hugging Face model from its structure and from what transformers offers. No forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from actcache.errors import OptionError, SiteUnavailableError


@dataclass(frozen=True)
class Stack:
    """One stack of blocks: its name ("encoder" or "decoder" in a model that has both, else None), the path of the
    list of blocks, and how many there are."""

    name: str | None
    blocks: str
    n_layers: int

    @property
    def block_paths(self) -> list[str]:
        return [f"{self.blocks}.{layer}" for layer in range(self.n_layers)]


@dataclass(frozen=True)
class Structure:
    """Paths of a model's parts ("" is the model itself, None is absent) and the numbers that describe it."""

    backbone: str
    stacks: tuple[Stack, ...]
    embed: str | None
    head: str | None
    d_model: int
    vocab_size: int
    context_length: int | None


def find_structure(model: nn.Module) -> Structure:
    """The structure of `model`; raises `SiteUnavailableError` when no list of blocks can be made out."""
    named = dict(model.named_modules())
    paths = {id(module): path for path, module in named.items()}
    # An adapter of peft wraps the model; what transformers offers is on the model inside.
    core = unwrapped(model)
    config = text_config(core)
    lists = {path: module for path, module in named.items() if isinstance(module, nn.ModuleList) and len(module)}
    stacks = _stacks(core, config, lists, list(named.values()))
    backbone = _backbone(core, [lists[stack.blocks] for stack in stacks], paths)
    embed = _accessor(core, "get_input_embeddings")
    head = _accessor(core, "get_output_embeddings")
    return Structure(
        backbone=backbone,
        stacks=stacks,
        embed=paths.get(id(embed)),
        head=paths.get(id(head)),
        d_model=_d_model(config, embed),
        vocab_size=int(getattr(config, "vocab_size", 0) or getattr(embed, "num_embeddings", 0)),
        context_length=_context_length(config),
    )


def require_module(model: object, who: str) -> None:
    """Raise `OptionError` for what is no model, saying of a name what to do with it."""
    if not isinstance(model, nn.Module):
        named = isinstance(model, (str, PathLike))
        load = f": load it, AutoModelForCausalLM.from_pretrained({str(model)!r})" if named else ""
        raise OptionError(
            f"{who} needs a torch.nn.Module, not {type(model).__name__}{load}"
            + (" (ac.activations and ac.UnifiedCache take names)" if named else "")
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside an adapter's wrapper (peft); `model` itself otherwise."""
    inner = getattr(model, "get_base_model", None)
    core = inner() if callable(inner) else model
    return core if isinstance(core, nn.Module) else model


def text_config(model: nn.Module) -> Any:
    """The config that describes the language model, also inside a multimodal one; None for a plain module."""
    config = getattr(model, "config", None)
    # An encoder-decoder has no text config of its own: the getter would return that of one stack.
    if getattr(config, "is_encoder_decoder", False):
        return config
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def descend(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module behind a split path; quicker than ``get_submodule``. Raises `KeyError`."""
    module: nn.Module | None = model
    for name in names:
        module = module._modules[name]  # type: ignore[union-attr]
    if module is None:
        raise KeyError(names)
    return module


def is_script(module: nn.Module) -> bool:
    """Whether `module` is compiled by ``torch.jit``: what it holds runs as code of its own, and not as modules."""
    return isinstance(module, torch.jit.ScriptModule)


def has_forward(module: nn.Module) -> bool:
    """Whether `module` can be called at all (a ModuleList cannot)."""
    # A default, since those that torch.jit compiled have one that their class cannot show.
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in module.__dict__


def _stacks(
    model: nn.Module, config: Any, lists: Mapping[str, nn.ModuleList], modules: Sequence[nn.Module]
) -> tuple[Stack, ...]:
    recorded = _recorded_classes(modules)
    # Named for placing a model on several devices; also right when blocks were taken out of a loaded model.
    whole = {name for m in modules for name in getattr(type(m), "_no_split_modules", None) or ()}

    def stack(lists: Mapping[str, nn.ModuleList], depth: int | None, name: str | None) -> Stack:
        path = _block_list(model, depth, lists, recorded, whole)
        return Stack(name, path, len(lists[path]))

    if getattr(config, "is_encoder_decoder", False):
        under = {
            name: {path: blocks for path, blocks in lists.items() if name in path.split(".")}
            for name in ("encoder", "decoder")
        }
        if all(under.values()):
            return tuple(stack(found, _depth_of(config, name), name) for name, found in under.items())
    return (stack(lists, getattr(config, "num_hidden_layers", None), None),)


def _depth_of(config: Any, stack: str) -> int | None:
    names = (f"{stack}_layers", f"num_{stack}_layers", "num_layers", "num_hidden_layers")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _block_list(
    model: nn.Module,
    depth: int | None,
    lists: Mapping[str, nn.ModuleList],
    recorded: tuple[type, ...],
    whole: set[str],
) -> str:
    def found(lists: Mapping[str, nn.ModuleList]) -> list[str]:
        by_recorder = [
            path for path, blocks in lists.items() if recorded and all(isinstance(m, recorded) for m in blocks)
        ]
        by_length = [path for path, blocks in lists.items() if depth and len(blocks) == depth]
        by_name = [path for path, blocks in lists.items() if all(type(m).__name__ in whole for m in blocks)]
        return by_recorder or by_length or by_name

    # Beside the language model there may be a tower for images or sounds.
    decoder = _accessor(model, "get_decoder")
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    candidates = found({path: blocks for path, blocks in lists.items() if id(blocks) in inside}) or found(lists)
    # A list of experts may be as long as the list of blocks, but lies deeper.
    candidates = sorted(candidates, key=lambda path: path.count("."))
    if not candidates and getattr(model, "config", None) is None:
        raise SiteUnavailableError(
            f"sites are for language models of transformers, and {type(model).__name__} has no config: capture by "
            "module path, which works on any model"
        )
    if not candidates:
        raise SiteUnavailableError(
            f"cannot make out the blocks of {type(model).__name__}: "
            + (
                f"no module list has num_hidden_layers = {depth} members"
                if depth
                else "config.num_hidden_layers is not set"
            )
            + (
                f" (it has {', '.join(f'{path} of {len(blocks)}' for path, blocks in list(lists.items())[:3])})"
                if lists
                else ""
            )
            + "; set it in the config, or name the block's class in _no_split_modules of the model's class; "
            "capture by module path works on any model"
        )
    if len(candidates) > 1 and candidates[0].count(".") == candidates[1].count("."):
        raise SiteUnavailableError(
            f"{type(model).__name__} has several stacks of blocks ({', '.join(candidates[:3])}): sites are not defined "
            "for it; capture by module path works on any model"
        )
    return candidates[0]


def _recorded_classes(modules: Sequence[nn.Module]) -> tuple[type, ...]:
    """Classes whose outputs transformers itself records as hidden states."""
    classes: list[type] = []
    for module in modules:
        recorders = getattr(module, "_can_record_outputs", None) if "config" in module.__dict__ else None
        entry = recorders.get("hidden_states") if isinstance(recorders, dict) else None
        for recorder in entry if isinstance(entry, (list, tuple)) else [entry]:
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                classes.append(target)
    return tuple(classes)


def _backbone(model: nn.Module, stacks: Sequence[nn.Module], paths: Mapping[int, str]) -> str:
    """The smallest of what transformers calls decoder or base model that holds every stack of blocks."""
    decoder = _accessor(model, "get_decoder")
    for candidate in (decoder, getattr(model, "base_model", None)):
        if not isinstance(candidate, nn.Module) or candidate is model or id(candidate) not in paths:
            continue
        path = paths[id(candidate)]
        if has_forward(candidate) and all(paths[id(blocks)].startswith(f"{path}.") for blocks in stacks):
            return path
    return paths[id(model)]


def _d_model(config: Any, embed: Any) -> int:
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    return int(getattr(embed, "embedding_dim", 0))


def _context_length(config: Any) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _accessor(model: nn.Module, name: str) -> nn.Module | None:
    method = getattr(model, name, None)
    if not callable(method):
        return None
    try:
        found = method()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
