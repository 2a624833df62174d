"""What lies between the last block of a model and its logits: found by a pass, shown to give the logits, and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actcache.model.factors import ROUNDINGS, config_numbers, factor_between, roundings
from actcache.model.forms import first_input, first_tensor
from actcache.model.modes import evaluating
from actcache.model.probe import of_this_thread
from actcache.model.structure import descend, unwrapped

# More modules than this in a row are no head.
_LONGEST = 6
# Logits on which every cap shows.
_LARGE = 1000.0


@dataclass(frozen=True)
class Step:
    """A module, and what becomes of a value before it is given to it."""

    path: str
    factor: float
    dtype: torch.dtype

    def module(self, model: nn.Module) -> nn.Module:
        return descend(model, self.path.split("."))


@dataclass(frozen=True)
class End:
    """What is done to the last module's result ``x``: ``x + bias``, times a factor, then ``cap * tanh(x / cap)``.
    `bias` is the name of a tensor that the model holds itself."""

    bias: str | None = None
    factor: float = 1.0
    cap: float | None = None

    def apply(self, value: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            value = value + bias.to(value.device)
        if self.factor != 1.0:
            value = value * self.factor
        return value if self.cap is None else torch.tanh(value / self.cap) * self.cap


@dataclass(frozen=True)
class Way:
    """Modules in a row, and what is done to the result of the last one."""

    steps: tuple[Step, ...]
    end: End

    def run(self, model: nn.Module, value: Tensor, first: int = 0, *, capped: bool = True) -> Tensor:
        """Logits ``[1, n, V]`` of what is given to step `first` ``[1, n, D]``, without the hooks of the modules."""
        for step in self.steps[first:]:
            value = value if step.factor == 1.0 else value * step.factor
            module = step.module(model)
            with evaluating(module):
                value = first_tensor(module.forward(value.to(step.dtype)))
        bias: Tensor | None = None if self.end.bias is None else getattr(unwrapped(model), self.end.bias)
        end = self.end if capped else replace(self.end, cap=None)
        return end.apply(value, bias)


def find_way(
    model: nn.Module,
    blocks: Iterable[str],
    last_block: nn.Module,
    run: Callable[[], Tensor],
    usable: Callable[[Tensor], bool] = lambda _: True,
) -> tuple[Way | None, Tensor]:
    """The way of `model` to its logits, and the last block's output in the pass by which it was found.

    `blocks`: paths of the lists of blocks; `run`: one pass, which returns the logits ``[B, S, V]``; `usable`: whether
    a way can be looked for behind that output. None where no chain of modules gives the logits.
    """
    trace = _Trace(model, blocks, last_block)
    with trace.listening():
        target = run()
    last = trace.last
    assert last is not None
    if usable(last):
        numbers, biases = config_numbers(model), _biases(model, target.shape[-1])
        for steps, value in _ways(trace, numbers, target):
            if next(_ends(value, target, numbers, biases), None) is None:
                continue
            # A cap shows on large logits only.
            for end in _ends(*_amplified(model, run, steps[-1]), numbers, biases):
                way = Way(steps, end)
                # The same, with the rows in another order: each is to depend on its own row alone.
                rows = last.flip(0, 1).reshape(1, -1, last.shape[-1])
                if roundings(way.run(model, rows).reshape(target.shape).flip(0, 1), target) <= 4 * ROUNDINGS:
                    return way, last
    return None, last


def _amplified(model: nn.Module, run: Callable[[], Tensor], step: Step) -> tuple[Tensor, Tensor]:
    """A large result of the last module, and the logits that the model makes of it."""
    large: list[Tensor] = []

    def amplify(_: nn.Module, args: Any, output: Any) -> Any:
        value = first_tensor(output)
        large.append(value * (_LARGE / value.abs().max().clamp_min(1e-6)))
        return large[-1].clone()

    hook = step.module(model).register_forward_hook(of_this_thread(amplify))
    try:
        logits = run()
    finally:
        hook.remove()
    return large[-1], logits


@dataclass(frozen=True)
class _Call:
    """One run of a module behind the last block."""

    path: str
    begun: int
    ended: int
    given: Tensor
    returned: Tensor


class _Trace:
    """What the modules outside the blocks were given and returned, once the last block had ended."""

    def __init__(self, model: nn.Module, blocks: Iterable[str], last_block: nn.Module) -> None:
        self.last: Tensor | None = None
        self.calls: list[_Call] = []
        self._model = model
        self._lists = set(blocks)
        self._last_block = last_block
        self._clock = 0
        self._open: list[tuple[nn.Module, int, Tensor]] = []

    def listening(self) -> ExitStack:
        hooks = ExitStack()
        inside = {id(m) for path in self._lists for m in descend(self._model, path.split(".")).modules()}
        for path, module in self._model.named_modules():
            if path and id(module) not in inside:
                hooks.callback(module.register_forward_pre_hook(of_this_thread(self._begin), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(of_this_thread(self._ender(path))).remove)
        hooks.callback(self._last_block.register_forward_hook(of_this_thread(self._end_of_blocks)).remove)
        return hooks

    def _end_of_blocks(self, _: nn.Module, args: Any, output: Any) -> None:
        self.last = first_tensor(output).clone()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.last is None:
            return
        with suppress(StopIteration, AssertionError):
            self._clock += 1
            self._open.append((module, self._clock, first_input((args, kwargs)).clone()))

    def _ender(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not self._open or self._open[-1][0] is not module:
                return
            _, begun, given = self._open.pop()
            self._clock += 1
            with suppress(IndexError, KeyError, TypeError):
                returned = first_tensor(output)
                # What only passes on (dropout) computes nothing here, and something else in training.
                if returned.shape != given.shape or not torch.equal(returned, given):
                    self.calls.append(_Call(path, begun, self._clock, given, returned.clone()))

        return end


def _ways(trace: _Trace, numbers: list[float], target: Tensor) -> Iterator[tuple[tuple[Step, ...], Tensor]]:
    """Every chain of modules that ends with a value of the shape of `target`, with that value; the outermost first."""
    calls = sorted(trace.calls, key=lambda call: call.begun)

    def follow(value: Tensor, after: int, steps: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], Tensor]]:
        if steps and value.shape == target.shape:
            yield steps, value
        for call in calls if len(steps) < _LONGEST else ():
            if call.begun > after and call.given.shape == value.shape:
                factor = factor_between(value.to(call.given.dtype), call.given, numbers)
                if factor is not None:
                    step = Step(call.path, factor, call.given.dtype)
                    yield from follow(call.returned, call.ended, (*steps, step))

    assert trace.last is not None
    return follow(trace.last, 0, ())


def _ends(value: Tensor, target: Tensor, numbers: Sequence[float], biases: dict[str, Tensor]) -> Iterator[End]:
    """What may be done to the last module's result `value` so that it becomes `target`."""
    for name in (*biases, None):
        bias = None if name is None else biases[name]
        factor = factor_between(End().apply(value, bias), target, list(numbers))
        if factor is not None:
            yield End(name, factor)
        caps = [End(name, 1.0, cap) for cap in numbers]
        # One row first: most numbers of a config are no caps.
        near = [end for end in caps if roundings(end.apply(value[:1, :1], bias), target[:1, :1]) <= ROUNDINGS]
        errors = {end: roundings(end.apply(value, bias), target) for end in near}
        yield from sorted((end for end in near if errors[end] <= ROUNDINGS), key=lambda end: errors[end])


def _biases(model: nn.Module, vocabulary: int) -> dict[str, Tensor]:
    """Tensors that the model holds itself, beside its modules, with one number for each token."""
    core = unwrapped(model)
    own = (*core.named_buffers(recurse=False), *core.named_parameters(recurse=False))
    return {name: tensor for name, tensor in own if tensor.numel() == vocabulary}
