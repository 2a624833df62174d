"""Read values of a running model: `observe`, inline and without copies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from actcache.capture.taps import Inputs, Taps
from actcache.model.anatomy import ReadPoint

K = TypeVar("K", bound=Hashable)


class StopForward(Exception):
    """Raised inside a forward pass to end it: everything that was asked for has been read."""


class Observation:
    """What `observe` yields: `reset()` starts a new pass when the last one did not reach every point."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen: set[Any] = set()

    def reset(self) -> None:
        self._seen.clear()

    def complete(self, key: Any) -> bool:
        """Count `key`; True (and a fresh start) once every point has been seen."""
        self._seen.add(key)
        if len(self._seen) < self._total:
            return False
        self._seen.clear()
        return True


@contextmanager
def observe(
    points: Mapping[K, ReadPoint], on_value: Callable[[K, Tensor], None], *, stop_after_last: bool = False
) -> Iterator[Observation]:
    """Inside the block, every run of a point's module calls ``on_value(key, tensor)`` inline.

    The tensor is the live one, on the model's device, after all hooks: not a copy and not detached. With
    `stop_after_last`, once every point has been seen in the current forward pass, that pass is ended by `StopForward`,
    which whoever called the model catches.
    """
    observation = Observation(len(points))

    def reader(key: K, point: ReadPoint) -> Callable[[Any], None]:
        extract = point.extract

        def read(value: Any) -> None:
            on_value(key, extract(value))
            if stop_after_last and observation.complete(key):
                raise StopForward

        return read

    outputs: list[tuple[nn.Module, Callable[[Any], None]]] = []
    inputs: list[tuple[nn.Module, _OnInput]] = []
    for key, point in points.items():
        if point.side == "output":
            outputs.append((point.module, reader(key, point)))
        else:
            inputs.append((point.module, _OnInput(reader(key, point))))
    taps = Taps()
    try:
        taps.add(outputs, inputs)
        yield observation
    finally:
        taps.remove()


class _OnInput:
    """A listener that only reads what a module is called with."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[Inputs], None]) -> None:
        self.read = read

    def begin(self, inputs: Inputs) -> None:
        self.read(inputs)

    def end(self, token: Any, output: Any) -> None:
        return None

    def fail(self, token: Any) -> None:
        return None
