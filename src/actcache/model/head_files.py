"""The final norm and the head of a model by themselves, read from its files: nothing else of it is built or read.

How a model comes from its last block to logits is found on the model's own class, without weights: its forward pass
runs on random numbers, with blocks in it that hand out what they are told to. Then transformers loads the few modules
that this takes, by its own rules for names, ties and dtypes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import ModelLoadError, SiteUnavailableError
from actcache.model.forward_inputs import accepts
from actcache.model.head import Head, unknown_way
from actcache.model.head_way import Way, find_way
from actcache.model.norms import measure_norm
from actcache.model.structure import find_structure, text_config

# Random numbers that are made once and repeated: of no divisor that a width has.
_PERIOD = 999_983
_PROMPTS, _TOKENS = 2, 4
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")


@dataclass(frozen=True)
class HeadPlan:
    """What is needed of a model to get from its stream to logits.

    Attributes:
        way: modules and what is done between them.
        width, vocab_size: of the stream, of the logits.
    """

    way: Way
    width: int
    vocab_size: int

    @property
    def paths(self) -> set[str]:
        return {step.path for step in self.way.steps}


class _Feeder(nn.Module):
    """Stands for a block: hands out what it is told to, and is like the block in all else."""

    def __init__(self, block: nn.Module, given: Callable[[], Any]) -> None:
        super().__init__()
        # Not among the modules: its weights are nowhere.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_given", given)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._given()


@torch.no_grad()
def plan_head(model: nn.Module) -> HeadPlan:
    """How `model`, built on the meta device, comes from its last block to logits. It is of no use afterwards.

    Raises `SiteUnavailableError` for a model without a head, one with two stacks of blocks, and one of which that
    cannot be made out.
    """
    name = type(model).__name__
    structure = find_structure(model)
    if structure.head is None:
        raise SiteUnavailableError(f"{name} gives no logits: it has no language-model head (load it with its head)")
    if len(structure.stacks) > 1:
        raise SiteUnavailableError(
            f"{name} has two stacks of blocks: its head is not read by itself, only from the model when it is loaded"
        )
    path = structure.stacks[0].blocks
    blocks: Any = model.get_submodule(path)
    fed: list[Any] = [None]
    for i, block in enumerate(list(blocks)):
        blocks[i] = _Feeder(block, lambda: fed[0])
    model.eval()
    generator = torch.Generator().manual_seed(0)
    _fill(model, generator)
    # Some keep the stream wider than they compute.
    wide = bool(getattr(getattr(model, "config", None), "residual_in_fp32", False))
    dtype = torch.float32 if wide else dtype_of(model)
    stream = torch.randn(_PROMPTS, _TOKENS, structure.d_model, generator=generator).to(dtype)
    ids = torch.arange(_PROMPTS * _TOKENS).view(_PROMPTS, _TOKENS) % structure.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs = {key: value for key, value in inputs.items() if accepts(model, key)}
    # Versions of transformers and architectures disagree on what a block returns.
    for form in (stream, (stream,), (stream, None, None)):
        fed[0] = form
        with suppress(AttributeError, IndexError, TypeError, ValueError, RuntimeError, AssertionError, KeyError):
            logits = model(**inputs).logits
            if logits.shape[:2] == ids.shape:
                way, _ = find_way(model, {path}, blocks[-1], lambda: model(**inputs).logits)
                if way is not None:
                    return HeadPlan(way, structure.d_model, structure.vocab_size)
    raise unknown_way(name)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of its first floating parameter; float32 where there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights for all that is left of a model on the meta device; what is shared stays shared."""
    numbers = torch.randn(_PERIOD, generator=generator)
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            count = tensor.numel()
            values = numbers.repeat(-(-count // _PERIOD))[:count].roll(len(made) * 7919)
            made[id(tensor)] = values.view(tensor.shape).to(tensor.dtype)
        return made[id(tensor)]

    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                floating = parameter.is_floating_point()
                value = like(parameter) if floating else torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for held in (module._buffers, vars(module)):
            for key, tensor in list(held.items()):
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    held[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)


def load_head(
    kind: type[nn.Module],
    config: Any,
    plan: HeadPlan,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str,
    name: str,
) -> Head:
    """The head that `plan` says, with weights out of `tensors` (names as in the files), in `dtype` on `device`.

    `kind`: the class of the model; `name`: what it is called in messages. Raises `ModelLoadError` for weights that are
    not among `tensors`.
    """
    parts = _only(kind, plan.paths)
    model, report = parts.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    wrong = [str(entry[0]) for entry in report["mismatched_keys"]]
    if missing or wrong:
        raise ModelLoadError(
            f"the weights of {name!r} have no {', '.join((missing or wrong)[:3])} of the size that its config says: "
            "its logits cannot be computed."
        )
    for parameter in model.parameters():
        # What is mapped is gone when somebody writes the file anew.
        parameter.data = parameter.data.clone()
    model.eval().requires_grad_(False)
    first = plan.way.steps[0]
    like = torch.zeros(1, 1, plan.width, dtype=first.dtype)
    norm = measure_norm(first.module(model), plan.width, like) if first.factor == 1.0 else None
    model = model.to(device)
    sizes = plan.width, plan.vocab_size
    return Head(model, plan.way, norm, int(norm is not None), torch.device(device), sizes, keep=True)


def _only(kind: Any, paths: set[str]) -> Any:
    """`kind` without any module but those at `paths`, and the embedding where its weight is one of theirs."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        _prune(self, "", set(paths) | _tied_to(self, paths))

    # The rest of a file is no surprise.
    own = {"__init__": init, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    return type(kind.__name__, (kind,), own)


def _tied_to(model: Any, paths: set[str]) -> set[str]:
    """The modules of `model`, fresh from its config, that share weights with those at `paths` once it is loaded."""
    names = {id(module): path for path, module in model.named_modules()}
    # From transformers 5 on a model says which weights these are, for all kinds of ties.
    pairs = [[name.rpartition(".")[0] for name in pair] for pair in getattr(model, "all_tied_weights_keys", {}).items()]
    if getattr(text_config(model), "tie_word_embeddings", True):
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        pairs.append([names[id(end)] for end in ends if id(end) in names])
    return {end for pair in pairs if any(_inside(end, paths) for end in pair) for end in pair}


def _inside(path: str, paths: set[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in paths)


def _prune(module: nn.Module, path: str, keep: set[str]) -> None:
    for name, child in list(module._modules.items()):
        here = f"{path}.{name}" if path else name
        if here in keep:
            continue
        if any(kept.startswith(f"{here}.") for kept in keep):
            if child is not None:
                _prune(child, here, keep)
        else:
            module._modules[name] = nn.Identity()


def outside_blocks(names: Iterable[str]) -> list[str]:
    """The names of weights that are not of a block: those are numbered."""
    return [name for name in names if not _NUMBERED.search(name)]


def mapped(path: Path) -> dict[str, Tensor]:
    """The weights in a file that are not of a block, as the file is mapped: what is not used is not read."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in outside_blocks(file.keys())}
    held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name: held[name] for name in outside_blocks(held)}
