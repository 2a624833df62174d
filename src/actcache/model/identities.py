"""The identity check: one short forward pass that finds a model's branches and holds its sites to what they promise."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.discovery import find_form
from actcache.model.forms import BlockForm, BlockRun, Call, Side, check_form, first_input, first_tensor
from actcache.model.probe import DECODER_TOKENS, PROMPTS, TOKENS, of_this_thread, probe_inputs, undisturbed
from actcache.model.runs import copied, modules_inside
from actcache.model.sites import Site
from actcache.model.structure import Stack, descend, text_config

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

# Attention and MLP lie at most this deep below a block (T5's layer.0.SelfAttention, BERT's attention.output.dense).
_DEPTH = 4
# A longer list of modules inside a block is a list of experts, each of which sees some of the tokens.
_EXPERTS = 8


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
        idle: by stack and layer, why a block did not run, where others did: what is inside it is not known.
        passing: whether a branch gave nothing but zeros where its block's form was found (as weights do that training
            starts from), so that it may be another one when they change.
    """

    forms: dict[tuple[str | None, int], BlockForm | None] = field(default_factory=dict)
    final_norms: dict[str | None, str | None] = field(default_factory=dict)
    identities: list[Identity] = field(default_factory=list)
    refused: dict[Site, str] = field(default_factory=dict)
    idle: dict[tuple[str | None, int], str] = field(default_factory=dict)
    passing: bool = False


_STREAM = ("resid_pre", "resid_post")
BRANCHES = ("attn_out", "cross_attn_out", "mixer_out", "resid_mid", "mlp_out")


def check(anatomy: Anatomy) -> Findings:
    """Run the model once on a few tokens and find each block's form.

    Blocks must chain (each one's output is the next one's input) and run once; the branches must add up in every
    block. What fails is refused, with the reason; the rest can be used.
    """
    findings = Findings()
    watches = [_StackWatch(anatomy, stack, findings) for stack in anatomy.structure.stacks]
    try:
        _run(anatomy, watches, findings)
        if any(watch.unsolved for watch in watches):
            # Blocks of one build that do not share a form: what all their modules did is needed after all.
            _run(anatomy, watches, findings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if any(watch.broke for watch in watches):
            raise
        # Architectures that cannot be run on token ids alone still have their stream.
        why = f"the model could not be run on {PROMPTS} x {TOKENS} token ids ({type(error).__name__}: {error})"
        for watch in watches:
            findings.refused |= {Site(name, stack=watch.stack.name): why for name in (*BRANCHES, "final_norm")}
        return findings
    for watch in watches:
        watch.conclude()
    return findings


def _run(anatomy: Anatomy, watches: Sequence[_StackWatch], findings: Findings) -> None:
    with undisturbed(anatomy.model), torch.no_grad(), ExitStack() as hooks:
        for watch in watches:
            watch.listen(hooks)
        _watch_norms(anatomy, watches, findings, hooks)
        anatomy.backbone(**probe_inputs(anatomy))


class _StackWatch:
    """Follows one stack through the pass. Each block is solved as it ends, so that one block's values are held."""

    def __init__(self, anatomy: Anatomy, stack: Stack, findings: Findings) -> None:
        self.stack = stack
        self.last: Tensor | None = None
        self.unsolved: dict[int, str] = {}
        self.broke = False
        self._anatomy = anatomy
        self._findings = findings
        self._blocks = anatomy.blocks_of(stack.name)
        self._runs = self._first_runs = [0] * len(self._blocks)
        self._known: dict[object, BlockForm] = {}
        self._failed: str | None = None
        self._unchained: str | None = None
        self._shape: str | None = None
        self._second = False
        decoder = DECODER_TOKENS if stack.name == "decoder" else TOKENS
        self._tokens = min(decoder, anatomy.context_length or decoder)

    def listen(self, hooks: ExitStack) -> None:
        self._second = bool(self.unsolved)
        self._runs = [0] * len(self._blocks)
        if not self._second:
            self._first_runs = self._runs
        self.last = None
        for layer, block in enumerate(self._blocks):
            if not self._second or layer in self.unsolved:
                _BlockWatch(block, self, layer).listen(hooks)

    def claim(self, layer: int) -> BlockForm | None:
        """The form of an earlier block of the same build."""
        return None if self._second else self._known.get(_build(self._blocks[layer]))

    def ended(self, layer: int, run: BlockRun) -> None:
        # What goes wrong in here is no property of the model.
        self.broke = True
        self._runs[layer] += 1
        if self._runs[layer] == 1:
            self._chain(layer, run)
            self._solve(layer, run)
        self.broke = False

    def _chain(self, layer: int, run: BlockRun) -> None:
        if self._second:
            return
        rows = tuple(run.pre.shape[:-1])
        if rows != (PROMPTS, self._tokens) and self._shape is None:
            self._shape = (
                f"for {PROMPTS} x {self._tokens} tokens, block {layer} ({self.stack.block_paths[layer]}) was given "
                f"rows {rows}, not one for each token of each prompt"
            )
        if self.last is not None and not torch.equal(self.last, run.pre) and self._unchained is None:
            self._unchained = f"resid_post.{layer - 1} = resid_pre.{layer} does not hold"
            if bool(self.last.isnan().any()):
                self._unchained = f"block {layer - 1} ({self.stack.block_paths[layer - 1]}) returns nan"
        self.last = run.post

    def _solve(self, layer: int, run: BlockRun) -> None:
        form, why = self.claim(layer), None
        if form is not None:
            errors, why = check_form(form, run)
            if why is not None:
                self.unsolved[layer] = why
                return
        else:
            form, progress = find_form(run, _factors(self._blocks[layer], self._anatomy.model))
            if form is None:
                if self._failed is None:
                    why = self.unsolved.get(layer, progress)
                    self._failed = f"in block {layer} ({self.stack.block_paths[layer]}), {why}"
            else:
                errors, _ = check_form(form, run)
                branches = [run.value(place) for step in form.steps for _, place in step.branches]
                self._findings.passing |= any(value is not None and not value.any() for value in branches)
                self._known.setdefault(_build(self._blocks[layer]), form)
        self._findings.forms[self.stack.name, layer] = form
        if form is not None:
            self._findings.identities += [Identity(self.stack.name, layer, text, error) for text, error in errors]

    def conclude(self) -> None:
        name, refused = self.stack.name, self._findings.refused
        idle = {layer for layer, runs in enumerate(self._first_runs) if runs == 0}
        if len(idle) == len(self._blocks):
            idle = set()
        again = next((layer for layer, runs in enumerate(self._first_runs) if runs != 1 and layer not in idle), None)
        if again is not None:
            path, runs = self.stack.block_paths[again], self._first_runs[again]
            why = f"block {again} ({path}) ran {runs} times in one pass"
            if runs > 1:
                why += f", as blocks do that share their weights: capture the module {path!r}, its visits are its runs"
            # Nothing inside them is of one layer either.
            self._findings.forms |= {(name, layer): None for layer in range(len(self._blocks))}
            refused |= {Site(site, stack=name): why for site in (*BRANCHES, *_STREAM)}
            return
        if self._shape is not None:
            refused |= {Site(site, stack=name): self._shape for site in (*BRANCHES, *_STREAM, "embed", "final_norm")}
            return
        for layer in idle:
            # Blocks that attend to images are left out where there are none.
            why = f"block {layer} ({self.stack.block_paths[layer]}) does not run on text alone, so that its parts"
            self._findings.forms[name, layer] = None
            self._findings.idle[name, layer] = f"{why} are not known: capture modules in it by path"
        if self._unchained is not None:
            refused |= {Site(site, stack=name): self._unchained for site in (*_STREAM, "final_norm")}
        if self._failed is not None:
            refused |= {Site(site, stack=name): self._failed for site in BRANCHES}


def _build(block: nn.Module) -> object:
    return type(block), tuple((name, type(child)) for name, child in block._modules.items())


class _BlockWatch:
    """Records one block while it runs: what its modules are given and return, copied, since some architectures add to
    a branch's output in place right after it was returned. Of a block whose form is claimed, only the claimed modules.
    """

    def __init__(self, block: nn.Module, stack: _StackWatch, layer: int) -> None:
        self._block = block
        self._stack = stack
        self._layer = layer
        self._pre: Tensor | None = None
        self._calls: dict[str, Call] = {}
        self._clock = 0
        self._wanted: set[tuple[str, Side]] | None = None
        self._inside = ExitStack()

    def listen(self, hooks: ExitStack) -> None:
        begin, end = of_this_thread(self._begin_block), of_this_thread(self._end_block)
        hooks.callback(self._block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        hooks.callback(self._block.register_forward_hook(end).remove)
        hooks.callback(self._inside.close)

    def _begin_block(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._pre, self._calls, self._clock = copied(first_input((args, kwargs))), {}, 0
        claim = self._stack.claim(self._layer)
        self._wanted = None if claim is None else _reads(claim)
        for path, module in (
            modules_inside(block, depth=_DEPTH) if self._wanted is None else _named(block, self._wanted)
        ):
            begin = module.register_forward_pre_hook(
                of_this_thread(lambda m, args, kwargs, path=path: self._begin(path, m, args, kwargs)), with_kwargs=True
            )
            end = module.register_forward_hook(
                of_this_thread(lambda m, args, output, path=path: self._end(path, output))
            )
            self._inside.callback(begin.remove)
            self._inside.callback(end.remove)

    def _end_block(self, block: nn.Module, args: Any, output: Any) -> None:
        self._inside.close()
        pre, calls = self._pre, list(self._calls.values())
        self._pre, self._calls = None, {}
        if pre is not None:
            self._stack.ended(self._layer, BlockRun(pre, copied(first_tensor(output)), calls))

    def _begin(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._clock += 1
        if path in self._calls:
            self._calls[path].runs += 1
            return
        call = self._calls[path] = Call(path, type(module).__name__, self._clock)
        if self._wanted is not None and (path, "input") not in self._wanted:
            return
        with suppress(StopIteration):
            call.input = self._fitting(first_input((args, kwargs)), call, "input")

    def _end(self, path: str, output: Any) -> None:
        call = self._calls.get(path)
        if call is None:
            return
        self._clock += 1
        call.ended = self._clock
        if self._wanted is not None and (path, "output") not in self._wanted:
            return
        with suppress(IndexError, KeyError, TypeError, StopIteration):
            call.output = self._fitting(first_tensor(output), call, "output")

    def _fitting(self, tensor: Tensor, call: Call, side: Side) -> Tensor | None:
        """A copy of a value of the stream's size, in the stream's shape; None for anything else."""
        pre = self._pre
        if pre is None or not tensor.is_floating_point() or tensor.shape[-1:] != pre.shape[-1:]:
            return None
        if tensor.shape == pre.shape:
            return copied(tensor)
        if tensor.ndim != 2 or tensor.numel() != pre.numel():
            return None
        call.flat.add(side)
        return copied(tensor).reshape(pre.shape)


def _reads(form: BlockForm) -> set[tuple[str, Side]]:
    """The modules, and their sides, at which a form is read and checked."""
    places = [place for step in form.steps for place in (*dict(step.branches).values(), step.total, step.norm)]
    places.append(form.middle)
    return {(place.path, place.side) for place in places if place is not None}


def _named(block: nn.Module, wanted: set[tuple[str, Side]]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `block` that are wanted; those it lacks are left out."""
    for path in {path for path, _ in wanted}:
        with suppress(KeyError):
            yield path, descend(block, path.split("."))


def _watch_norms(anatomy: Anatomy, watches: Iterable[_StackWatch], findings: Findings, hooks: ExitStack) -> None:
    """The final norm is the norm outside the blocks that is given the last block's output."""
    for watch in watches:
        findings.final_norms.setdefault(watch.stack.name, None)
    lists = {watch.stack.blocks for watch in watches}

    def given(path: str, args: Any, kwargs: Any) -> None:
        tensor = first_input((args, kwargs))
        for watch in watches:
            stack = watch.stack.name
            if findings.final_norms[stack] is not None or watch.last is None:
                continue
            if tensor.shape == watch.last.shape and torch.equal(tensor.cpu(), watch.last):
                findings.final_norms[stack] = path
                return

    for path, module in _outside(anatomy.backbone, anatomy.structure.backbone, lists):
        if "norm" in type(module).__name__.lower():
            hook = module.register_forward_pre_hook(
                of_this_thread(lambda _, args, kwargs, path=path: given(path, args, kwargs)), with_kwargs=True
            )
            hooks.callback(hook.remove)


def _outside(module: nn.Module, path: str, lists: Container[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules below `module` that are in none of the `lists` of blocks."""
    for name, child in module._modules.items():
        below = f"{path}.{name}" if path else name
        if child is not None and below not in lists:
            yield below, child
            yield from _outside(child, below, lists)


def _factors(block: nn.Module, model: nn.Module) -> list[float]:
    """Numbers by which this block may multiply a branch: its own, then the config's."""
    return [value for _, _, value in numbers_of([block], model) if math.isfinite(value) and value != 0]


def numbers_of(blocks: Iterable[nn.Module], model: nn.Module) -> list[tuple[Mapping[str, Any], str, float]]:
    """The numbers that blocks hold themselves, then those of the config: holder, name, value. A branch that was found
    with one of them as its factor has to be found again when it changes."""
    config = text_config(model)
    holders = [vars(block) for block in blocks]
    if config is not None:
        holders.append(vars(config))
    return [(holder, name, value) for holder in holders for name, value in holder.items() if type(value) is float]
