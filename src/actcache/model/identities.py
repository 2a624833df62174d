"""The identity check: one short forward pass that finds a model's branches and holds its sites to what they promise."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.discovery import find_form
from actcache.model.forms import BlockForm, BlockRun, Call, Side, check_form, first_input, first_tensor
from actcache.model.modes import evaluating
from actcache.model.sites import Site
from actcache.model.structure import Stack, text_config

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

# Lengths differ, so that neither stack of an encoder-decoder can be taken for the other.
_PROMPTS, _TOKENS, _DECODER_TOKENS = 2, 4, 3
# Attention and MLP lie at most this deep below a block (T5's layer.0.SelfAttention, BERT's attention.output.dense).
_DEPTH = 4
# A longer list of modules inside a block is a list of experts, each of which sees some of the tokens.
_EXPERTS = 8
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Identity:
    """One identity of the residual stream as measured: `error` is max |difference| over max |value|."""

    stack: str | None
    layer: int
    text: str
    error: float


@dataclass
class Findings:
    """What the check found.

    Attributes:
        forms: by stack and layer, the form of the block; None where nothing adds up.
        final_norms: by stack, the path of the norm that takes the last block's output.
        identities: every identity that was measured.
        refused: site names (a `Site` without layer) that are refused, with the reason.
    """

    forms: dict[tuple[str | None, int], BlockForm | None] = field(default_factory=dict)
    final_norms: dict[str | None, str | None] = field(default_factory=dict)
    identities: list[Identity] = field(default_factory=list)
    refused: dict[Site, str] = field(default_factory=dict)


BRANCHES = ("attn_out", "cross_attn_out", "mixer_out", "resid_mid", "mlp_out")


def check(anatomy: Anatomy) -> Findings:
    """Run the model once on a few tokens and find each block's form.

    Blocks must chain (each one's output is the next one's input) and run once; the branches must add up in every
    block. What fails is refused, with the reason; the rest can be used.
    """
    findings = Findings()
    watches = [_StackWatch(anatomy, stack, findings) for stack in anatomy.structure.stacks]
    model = anatomy.model
    try:
        with _undisturbed(model), torch.no_grad():
            for watch in watches:
                watch.listen()
            _watch_norms(anatomy, watches, findings)
            anatomy.backbone(**_inputs(anatomy))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if any(watch.broke for watch in watches):
            raise
        # Architectures that cannot be run on token ids alone still have their stream.
        why = f"the model could not be run on {_PROMPTS} x {_TOKENS} token ids ({type(error).__name__}: {error})"
        for watch in watches:
            findings.refused |= {Site(name, stack=watch.stack.name): why for name in (*BRANCHES, "final_norm")}
        return findings
    for watch in watches:
        watch.conclude()
    return findings


class _StackWatch:
    """Follows one stack through the pass. Each block is solved as it ends, so that one block's values are held."""

    def __init__(self, anatomy: Anatomy, stack: Stack, findings: Findings) -> None:
        self.stack = stack
        self.last: Tensor | None = None
        self._anatomy = anatomy
        self._findings = findings
        self._blocks = anatomy.blocks_of(stack.name)
        self._runs = [0] * len(self._blocks)
        self._claim: BlockForm | None = None
        self._failed: str | None = None
        self._unchained: str | None = None
        self.broke = False

    def listen(self) -> None:
        for layer, block in enumerate(self._blocks):
            _BlockWatch(block, lambda run, layer=layer: self._ended(layer, run))

    def _ended(self, layer: int, run: BlockRun) -> None:
        # What goes wrong in here is no property of the model.
        self.broke = True
        self._take(layer, run)
        self.broke = False

    def _take(self, layer: int, run: BlockRun) -> None:
        self._runs[layer] += 1
        if self._runs[layer] > 1:
            return
        if self.last is not None and not torch.equal(self.last, run.pre) and self._unchained is None:
            self._unchained = f"resid_post.{layer - 1} = resid_pre.{layer} does not hold"
        self.last = run.post
        form, errors, why = self._solve(layer, run)
        self._findings.forms[self.stack.name, layer] = form
        self._findings.identities += [Identity(self.stack.name, layer, text, error) for text, error in errors]
        if form is not None:
            self._claim = form
        elif self._failed is None:
            self._failed = f"in block {layer} ({self.stack.block_paths[layer]}), {why}"

    def _solve(self, layer: int, run: BlockRun) -> tuple[BlockForm | None, list[tuple[str, float]], str]:
        why = None
        if self._claim is not None:
            errors, why = check_form(self._claim, run)
            if why is None:
                return self._claim, errors, ""
        form, progress = find_form(run, _factors(self._blocks[layer], self._anatomy.model))
        if form is None:
            return None, [], why or progress
        return form, check_form(form, run)[0], ""

    def conclude(self) -> None:
        name, refused = self.stack.name, self._findings.refused
        again = next((layer for layer, runs in enumerate(self._runs) if runs != 1), None)
        if again is not None:
            why = f"block {again} ({self.stack.block_paths[again]}) ran {self._runs[again]} times in one pass"
            refused |= {Site(site, stack=name): why for site in (*BRANCHES, "resid_pre", "resid_post")}
            return
        if self._unchained is not None:
            refused |= {Site(site, stack=name): self._unchained for site in ("resid_pre", "resid_post", "final_norm")}
        if self._failed is not None:
            refused |= {Site(site, stack=name): self._failed for site in BRANCHES}


class _BlockWatch:
    """Records one block while it runs: what its modules are given and return, cloned, since some architectures add to
    a branch's output in place right after it was returned."""

    def __init__(self, block: nn.Module, ended: Any) -> None:
        self._ended = ended
        self._pre: Tensor | None = None
        self._calls: dict[str, Call] = {}
        self._clock = 0
        block.register_forward_pre_hook(self._begin_block, with_kwargs=True)
        block.register_forward_hook(self._end_block)
        for path, module in _inside(block, "", _DEPTH):
            module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: self._begin(path, m, args, kwargs), with_kwargs=True
            )
            module.register_forward_hook(lambda m, args, output, path=path: self._end(path, output))

    def _begin_block(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._pre, self._calls, self._clock = _copy(first_input((args, kwargs))), {}, 0

    def _end_block(self, block: nn.Module, args: Any, output: Any) -> None:
        pre, calls = self._pre, list(self._calls.values())
        self._pre, self._calls = None, {}
        if pre is not None:
            self._ended(BlockRun(pre, _copy(first_tensor(output)), calls))

    def _begin(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._pre is None:
            return
        self._clock += 1
        if path in self._calls:
            self._calls[path].runs += 1
            return
        call = self._calls[path] = Call(path, type(module).__name__, self._clock)
        with suppress(StopIteration):
            call.input = self._fitting(first_input((args, kwargs)), call, "input")

    def _end(self, path: str, output: Any) -> None:
        call = self._calls.get(path)
        if call is None:
            return
        self._clock += 1
        call.ended = self._clock
        with suppress(IndexError, KeyError, TypeError, StopIteration):
            call.output = self._fitting(first_tensor(output), call, "output")

    def _fitting(self, tensor: Tensor, call: Call, side: Side) -> Tensor | None:
        """A copy of a value of the stream's size, in the stream's shape; None for anything else."""
        pre = self._pre
        if pre is None or not tensor.is_floating_point() or tensor.shape[-1:] != pre.shape[-1:]:
            return None
        if tensor.shape == pre.shape:
            return _copy(tensor)
        if tensor.ndim != 2 or tensor.numel() != pre.numel():
            return None
        call.flat.add(side)
        return _copy(tensor).reshape(pre.shape)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _inside(module: nn.Module, prefix: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        path = f"{prefix}.{name}" if prefix else name
        is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if not is_list:
            yield path, child
        if depth > 1 and not (is_list and len(child) > _EXPERTS):  # type: ignore[arg-type]
            yield from _inside(child, path, depth - 1)


def _watch_norms(anatomy: Anatomy, watches: Iterable[_StackWatch], findings: Findings) -> None:
    """The final norm is the norm outside the blocks that is given the last block's output."""
    findings.final_norms = dict.fromkeys(watch.stack.name for watch in watches)
    lists = tuple(f"{watch.stack.blocks}." for watch in watches)

    def given(path: str, args: Any, kwargs: Any) -> None:
        tensor = first_input((args, kwargs))
        for watch in watches:
            stack = watch.stack.name
            if findings.final_norms[stack] is not None or watch.last is None:
                continue
            if tensor.shape == watch.last.shape and torch.equal(tensor.cpu(), watch.last):
                findings.final_norms[stack] = path
                return

    for path, module in anatomy.backbone.named_modules(prefix=anatomy.structure.backbone):
        if "norm" in type(module).__name__.lower() and not path.startswith(lists):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: given(path, args, kwargs), with_kwargs=True
            )


def _factors(block: nn.Module, model: nn.Module) -> list[float]:
    """Numbers by which this block may multiply a branch: its own, then the config's."""
    config = text_config(model)
    values = [*vars(block).values(), *(vars(config).values() if config is not None else ())]
    return [value for value in values if type(value) is float and math.isfinite(value) and value != 0]


def _inputs(anatomy: Anatomy) -> dict[str, Any]:
    parameters = inspect.signature(anatomy.backbone.forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    tokens = min(_TOKENS, anatomy.context_length or _TOKENS)
    device = input_device(anatomy.model)
    ids = _spread(tokens, anatomy.vocab_size).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs = {name: value for name, value in inputs.items() if name in parameters or any_name}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = _spread(min(_DECODER_TOKENS, tokens), anatomy.vocab_size).to(device)
    return inputs


def _spread(tokens: int, vocabulary: int) -> Tensor:
    """Ids spread over the vocabulary, without touching the random state; the last ids are often special."""
    ids = (torch.arange(_PROMPTS * tokens) * 7919 + 3) % max(1, vocabulary - 1)
    return ids.view(_PROMPTS, tokens)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: where its embeddings are, or will be while they run (accelerate)."""
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    holder = embed if isinstance(embed, nn.Module) else model
    for module in (holder, model):
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(holder.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model by itself: evaluation mode, no hooks but ours; modes, hooks and random state come back after."""
    modules = list(model.modules())
    hooks = [(m, name, m.__dict__[name]) for m in modules for name in _HOOKS if name in m.__dict__]
    shadows = [(m, m.__dict__.pop("_call_impl")) for m in modules if "_call_impl" in m.__dict__]
    cuda = [p.device.index for p in model.parameters() if p.device.type == "cuda"]
    with evaluating(model), torch.random.fork_rng(devices=sorted({d for d in cuda if d is not None})):
        try:
            for module, name, _ in hooks:
                module.__dict__[name] = OrderedDict()
            yield
        finally:
            for module, name, saved in hooks:
                module.__dict__[name] = saved
            for module, shadow in shadows:
                module.__dict__["_call_impl"] = shadow
