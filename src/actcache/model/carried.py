"""Whether the model goes on with what is written inside its blocks: seen in short passes that write there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.forms import BlockForm, BlockRun, Call, Step, check_form, first_input, first_tensor
from actcache.model.probe import of_this_thread, probe_inputs, undisturbed
from actcache.model.readings import Given, Reading
from actcache.model.replacing import with_first_input, with_first_tensor, with_tensor
from actcache.model.runs import BlockWatch, InsideRun, tensors_of
from actcache.model.structure import descend

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

Key = tuple[str | None, int]


def carried_inputs(anatomy: Anatomy, name: str) -> set[Key]:
    """The blocks that go on with what is written to `attn_in` or `mlp_in`: it reaches every module of the branch that
    is given it, and not the stream, so that the block still returns the stream plus its branches."""
    blocks = anatomy.inner.blocks.items()
    moves = [_MovedInput(anatomy, at, found.readings[name]) for at, found in blocks if name in found.readings]
    _run(anatomy, moves)
    return {move.at for move in moves if move.carried}


def carried_logits(anatomy: Anatomy, name: str) -> set[Key]:
    """The blocks that go on with what is written to `router_logits`: their MLP then returns something else."""
    blocks = anatomy.inner.blocks.items()
    read = [(at, found.readings[name]) for at, found in blocks if name in found.readings]
    moves = [_MovedLogits(anatomy, at, reading) for at, reading in read if reading.place.side == "output"]
    for _ in range(2):
        _run(anatomy, moves)
    return {move.at for move in moves if move.carried}


def _run(anatomy: Anatomy, moves: Sequence[_Move]) -> None:
    if moves:
        with undisturbed(anatomy.model), torch.no_grad(), ExitStack() as hooks:
            for move in moves:
                move.listen(hooks)
            anatomy.backbone(**probe_inputs(anatomy))


class _Move(ABC):
    """Writes at one place of one block, and notes whether the block goes on with it."""

    def __init__(self, anatomy: Anatomy, at: Key, reading: Reading) -> None:
        self.at = at
        self.carried = False
        self._block = anatomy.blocks_of(at[0])[at[1]]
        self._reading = reading
        form = anatomy.findings.forms[at]
        assert form is not None
        self._form = form

    def listen(self, hooks: ExitStack) -> None:
        # In front of the watch, which is to see what was written.
        self._write(descend(self._block, self._reading.place.path.split(".")), hooks)
        BlockWatch(self._block, self._ended).listen(hooks)

    @abstractmethod
    def _write(self, module: nn.Module, hooks: ExitStack) -> None:
        """Hook what is written into `module`, where it is to be written in this pass."""

    @abstractmethod
    def _ended(self, run: InsideRun) -> None:
        """Told what ran in the block."""


class _MovedInput(_Move):
    """Moves what attention or the MLP of one block is given away from what it was, and notes what comes of it."""

    def __init__(self, anatomy: Anatomy, at: Key, reading: Reading) -> None:
        super().__init__(anatomy, at, reading)
        assert isinstance(reading, Given)
        self._beside = reading.beside
        self._form = _without_middle(self._form)
        self._new: Tensor | None = None

    def _write(self, module: nn.Module, hooks: ExitStack) -> None:
        hooks.callback(module.register_forward_pre_hook(of_this_thread(self._move), with_kwargs=True).remove)

    def _move(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._new = _moved(first_input((args, kwargs)))
        return with_first_input((args, kwargs), self._new)

    def _ended(self, run: InsideRun) -> None:
        others = [run.at(path) for path in self._beside]
        new = None if self._new is None else self._new.cpu()
        reached = new is not None and all(one is not None and one.given(new) for one in others)
        self.carried = reached and check_form(self._form, _as_calls(run))[1] is None


class _MovedLogits(_Move):
    """Runs one block as it is, then with other logits of its router, on the same input."""

    def __init__(self, anatomy: Anatomy, at: Key, reading: Reading) -> None:
        super().__init__(anatomy, at, reading)
        self._branch = self._form.places()["mlp_out"].path
        self._before: InsideRun | None = None
        self._output: Any = None

    def listen(self, hooks: ExitStack) -> None:
        super().listen(hooks)
        hooks.callback(self._block.register_forward_hook(of_this_thread(self._same_for_the_next)).remove)

    def _write(self, module: nn.Module, hooks: ExitStack) -> None:
        if self._before is not None:
            hooks.callback(module.register_forward_hook(of_this_thread(self._move)).remove)

    def _move(self, module: nn.Module, args: Any, output: Any) -> Any:
        item = self._reading.item
        return with_tensor(output, item, _moved(list(tensors_of(output))[item]))

    def _same_for_the_next(self, block: nn.Module, args: Any, output: Any) -> Any:
        """What the block returned in the first of the passes."""
        if self._output is None:
            self._output = first_tensor(output).clone()
        return with_first_tensor(output, self._output.clone())

    def _ended(self, run: InsideRun) -> None:
        before, self._before = self._before, run
        one, other = (None if r is None else r.at(self._branch) for r in (before, run))
        if one is not None and other is not None and one.output is not None and other.output is not None:
            self.carried = not torch.equal(one.output, other.output)


def _moved(tensor: Tensor) -> Tensor:
    return tensor.flip(-1) * 1.5 + 0.25


def _without_middle(form: BlockForm) -> BlockForm:
    """What must add up wherever the middle of the block is read, which may be the very place that is written."""
    if form.kind == "post-norm":
        return replace(form, middle=None)
    return BlockForm("parallel", (Step(tuple(branch for step in form.steps for branch in step.branches)),))


def _as_calls(run: InsideRun) -> BlockRun:
    def fitting(value: Tensor | None) -> Tensor | None:
        if value is None or value.shape[-1:] != run.pre.shape[-1:] or value.numel() != run.pre.numel():
            return None
        return value.reshape(run.pre.shape)

    calls = [
        Call(one.path, one.kind, one.begun, one.ended, fitting(one.input), fitting(one.output), one.runs)
        for one in run.ran
    ]
    return BlockRun(run.pre, run.post, calls)
