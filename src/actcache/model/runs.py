"""One short run of a block with everything that its modules were given and returned, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actcache.model.forms import first_input, first_tensor
from actcache.model.probe import of_this_thread

# Projections lie at most this deep below a block (T5's layer.0.SelfAttention.q), parts of wrapped ones deeper.
_DEPTH = 5
# A longer list of modules inside a block is a list of experts, each of which sees some of the tokens.
_EXPERTS = 8


@dataclass
class Ran:
    """One run of a module of a block: a copy of its first tensor argument and of every tensor it returned (those inside
    a tuple too, in order), and its place among the others."""

    path: str
    module: nn.Module
    begun: int
    ended: int = -1
    runs: int = 1
    input: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def output(self) -> Tensor | None:
        return self.outputs[0] if self.outputs else None

    def gave(self, value: Tensor) -> bool:
        return bool(self.outputs) and same(self.outputs[0], value)

    def given(self, value: Tensor) -> bool:
        return self.input is not None and same(self.input, value)

    def holds(self, other: Ran) -> bool:
        """Whether the module is `other`'s or has it inside."""
        return other.path == self.path or other.path.startswith(f"{self.path}.")


@dataclass
class Softmax:
    """Probabilities that were made during a run of a block: ``[B, H, S, K]`` or ``[B * H, S, K]``; `within`: the paths
    of the modules that were running, the outermost first."""

    at: int
    value: Tensor
    within: tuple[str, ...]


@dataclass
class InsideRun:
    """What one block did with a short input: `pre` and `post` ``[B, S, D]``, its modules that ran, in the order in
    which they began, and every softmax over the last of three or four dimensions."""

    pre: Tensor
    post: Tensor
    ran: list[Ran]
    softmaxes: list[Softmax]

    def at(self, path: str) -> Ran | None:
        """The run of the module at `path`; None unless it ran exactly once."""
        return next((one for one in self.ran if one.path == path and one.runs == 1 and one.ended >= 0), None)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two values are the same rows of the same numbers, however they are arranged in batches."""
    alike = a.dtype == b.dtype and a.shape[-1:] == b.shape[-1:] and a.numel() == b.numel()
    return alike and torch.equal(a.reshape(b.shape), b)


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def modules_inside(module: nn.Module, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules below `module` that may be called, those of long lists left out."""
    for name, child in module._modules.items():
        if child is None:
            continue
        path = f"{prefix}.{name}" if prefix else name
        is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if not is_list:
            yield path, child
        if depth > 1 and not (is_list and len(child) > _EXPERTS):  # type: ignore[arg-type]
            yield from modules_inside(child, path, depth - 1)


class BlockWatch:
    """Records the runs of one block in this thread's pass, and hands each to `ended`.

    Values are copied when they are seen: some architectures add to what a module returned in place, right afterwards.
    """

    def __init__(self, block: nn.Module, ended: Callable[[InsideRun], None]) -> None:
        self._block = block
        self._told = ended
        self._pre: Tensor | None = None
        self._ran: dict[str, Ran] = {}
        self._softmaxes: list[Softmax] = []
        self._running: list[str] = []
        self._clock = 0

    def listen(self, hooks: ExitStack) -> None:
        def listen(module: nn.Module, begin: Callable[..., Any], end: Callable[..., Any]) -> None:
            hooks.callback(module.register_forward_pre_hook(of_this_thread(begin), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(of_this_thread(end)).remove)

        listen(self._block, self._begin_block, self._end_block)
        for path, module in modules_inside(self._block):
            listen(module, partial(self._begin, path), partial(self._end, path))

    def softmax(self, value: Tensor) -> None:
        """Told of probabilities that were made anywhere in the pass."""
        if self._pre is not None and value.ndim in (3, 4):
            self._clock += 1
            self._softmaxes.append(Softmax(self._clock, copied(value), tuple(self._running)))

    def _begin_block(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._pre, self._ran, self._softmaxes, self._clock = copied(first_input((args, kwargs))), {}, [], 0
        self._running = []

    def _end_block(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._pre is None:
            return
        pre, self._pre = self._pre, None
        run = InsideRun(pre, copied(first_tensor(output)), list(self._ran.values()), self._softmaxes)
        self._ran, self._softmaxes = {}, []
        self._told(run)

    def _begin(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._pre is None:
            return
        self._clock += 1
        self._running.append(path)
        known = self._ran.get(path)
        if known is not None:
            known.runs += 1
            return
        ran = self._ran[path] = Ran(path, module, self._clock)
        with suppress(StopIteration):
            value = first_input((args, kwargs))
            ran.input = copied(value) if value.is_floating_point() else None

    def _end(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        ran = self._ran.get(path)
        if self._pre is None or ran is None:
            return
        self._clock += 1
        if path in self._running:
            self._running.remove(path)
        if ran.ended < 0:
            ran.ended = self._clock
            ran.outputs = [copied(value) for value in tensors_of(output)]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor of what a module returned, in order, tuples and dicts taken apart."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)
