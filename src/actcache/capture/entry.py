"""What one module was called with and returned, run by run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, overload

from torch import Tensor

from actcache.capture.gradients import Changed, Gradients
from actcache.capture.values import same_content
from actcache.errors import LayerRangeError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class _Missing:
    """The output of a run that raised: not the same as an output that is None."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


class Visit:
    """One run of a module. A side that was not recorded is None."""

    __slots__ = ("_gradients", "_inputs", "_output")

    def __init__(self, output: Any, inputs: Inputs | None, gradients: Gradients | None = None) -> None:
        self._output = output
        self._inputs = inputs
        self._gradients = gradients

    @property
    def output(self) -> Any:
        """Exactly what the module returned, after all hooks."""
        return None if self._output is MISSING else self._output

    @property
    def inputs(self) -> Inputs | None:
        """``(args, kwargs)`` as the module's forward saw them."""
        return self._inputs

    @property
    def input(self) -> Any:
        """The first positional argument, else the first keyword argument, else None."""
        if self._inputs is None:
            return None
        args, kwargs = self._inputs
        return args[0] if args else next(iter(kwargs.values()), None)

    @property
    def hidden(self) -> Tensor | None:
        """The tensor of the output, also where a version of transformers returns it inside a tuple."""
        return hidden_of(self.output)

    @property
    def grad(self) -> Any:
        """The gradient of the output: the output's form with the gradient of each tensor in its place, None for one
        that got none. None in all where ``include_grads`` was off, and while nothing has arrived.

        Raises `GradientError` where the output is part of no graph.
        """
        return None if self._gradients is None or self._output is MISSING else self._gradients.of(self._output)

    @property
    def hidden_grad(self) -> Tensor | None:
        """The gradient of `hidden`."""
        return hidden_of(self.grad)

    @property
    def in_graph(self) -> bool:
        """Whether a gradient can arrive, or has."""
        return self._gradients is not None and self._gradients.watched

    def __repr__(self) -> str:
        return f"Visit(output={brief(self.output)}, input={brief(self.input)})"


class Entry:
    """What was recorded of one module: one visit per run, in the order in which the runs ended.

    `output`, `inputs`, `input`, `hidden`, `grad` and `hidden_grad` give the value when there was one run, and the list
    of values when there were several; a side that was not recorded is None. ``len(entry)``, ``entry[i]`` and iteration
    give the visits.
    """

    __slots__ = ("_gradients", "_inputs", "_outputs")

    def __init__(
        self, outputs: list[Any] | None, inputs: list[Inputs] | None, gradients: list[Gradients] | None = None
    ) -> None:
        self._outputs = outputs
        self._inputs = inputs
        # One for each output.
        self._gradients = gradients

    @property
    def output(self) -> Any:
        """Exactly what the module returned, after all hooks."""
        outputs = self._outputs
        if outputs is None:
            return None
        if len(outputs) == 1:
            return None if outputs[0] is MISSING else outputs[0]
        return [None if output is MISSING else output for output in outputs]

    @property
    def inputs(self) -> Any:
        """``(args, kwargs)`` as the module's forward saw them, after all pre-hooks."""
        return self._each(lambda visit: visit.inputs) if self._inputs is not None else None

    @property
    def input(self) -> Any:
        """The first positional argument, else the first keyword argument, else None."""
        return self._each(lambda visit: visit.input) if self._inputs is not None else None

    @property
    def hidden(self) -> Any:
        """The hidden-state tensor of the output, also where a version of transformers returns it inside a tuple."""
        return self._each(lambda visit: visit.hidden) if self._outputs is not None else None

    @property
    def grad(self) -> Any:
        """The gradient of the output, captured with ``include_grads``: see `Visit.grad`. Several backward passes add
        up, as they do in a parameter's ``.grad``."""
        return self._each(lambda visit: visit.grad) if self._gradients is not None else None

    @property
    def hidden_grad(self) -> Any:
        """The gradient of `hidden`."""
        return self._each(lambda visit: visit.hidden_grad) if self._gradients is not None else None

    def __len__(self) -> int:
        return len(self._outputs if self._outputs is not None else self._inputs or ())

    @overload
    def __getitem__(self, index: int) -> Visit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Visit]: ...

    def __getitem__(self, index: int | slice) -> Visit | list[Visit]:
        """One visit, or several. Raises `LayerRangeError` (an `IndexError`) for one that there is not."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        runs = len(self)
        if not -runs <= index < runs:
            some = f"{runs} visits (0 to {runs - 1})" if runs > 1 else "1 visit (0)" if runs else "no visit"
            raise LayerRangeError(
                f"visit {index} is out of range: the entry has {some}, one for each run of the module"
            )
        output = MISSING if self._outputs is None else self._outputs[index]
        inputs = None if self._inputs is None else self._inputs[index]
        return Visit(output, inputs, None if self._gradients is None else self._gradients[index])

    def __iter__(self) -> Iterator[Visit]:
        return (self[i] for i in range(len(self)))

    def map(self, function: Callable[[Any], Any]) -> Entry:
        """An entry whose recorded values went through `function`."""
        outputs = self._outputs and [value if value is MISSING else function(value) for value in self._outputs]
        gradients = self._gradients and [Changed(one, function) for one in self._gradients]
        return Entry(outputs, self._inputs and [function(value) for value in self._inputs], gradients)

    def values(self) -> list[Any]:
        """Everything recorded, for sizes and comparisons."""
        gradients = [one.values() for one in self._gradients or ()]
        return [*(self._inputs or ()), *(value for value in self._outputs or () if value is not MISSING), *gradients]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entry):
            return NotImplemented
        return same_content(self._outputs, other._outputs) and same_content(self._inputs, other._inputs)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        runs = len(self)
        shown = brief(self[0].output if self._outputs is not None else self[0].input) if runs else "nothing"
        return f"Entry({shown})" if runs < 2 else f"Entry({runs} visits, first: {shown})"

    def _each(self, read: Callable[[Visit], Any]) -> Any:
        values = [read(visit) for visit in self]
        return values[0] if len(values) == 1 else values


def hidden_of(output: Any) -> Tensor | None:
    """The first tensor of a module's output, or None when it holds none."""
    while not isinstance(output, Tensor):
        if isinstance(output, dict):
            output = next(iter(output.values()), None)
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            return None
    return output


def brief(value: Any) -> str:
    """A short form for display: shapes rather than numbers."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return f"{type(value).__name__}({', '.join(f'{k}={brief(v)}' for k, v in list(value.items())[:4])})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(brief(item) for item in value[:4])}{', ...' if len(value) > 4 else ''})"
    return repr(value) if value is None or isinstance(value, (bool, int, float)) else type(value).__name__
