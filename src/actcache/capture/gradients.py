"""What arrived at captured values: gradients, in the form of the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from actcache.capture.values import map_tensors
from actcache.errors import GradientError

_NO_NUMBERS = "has no gradient: it holds no floating-point tensor"


class Gradients:
    """What arrived for each tensor of one value, in their order: None where nothing did.

    `watched`: whether any of the tensors is part of a graph.
    """

    __slots__ = ("__weakref__", "_values", "watched")

    def __init__(self, values: Sequence[Tensor | None], *, watched: bool = True) -> None:
        self._values = list(values)
        self.watched = watched

    def values(self) -> list[Tensor | None]:
        return list(self._values)

    def arrived(self, place: int, gradient: Tensor) -> None:
        before = self._values[place]
        # A new tensor: what was read before stays as it was.
        self._values[place] = gradient if before is None else before + gradient

    def require(self, what: str = "this value") -> None:
        """Raise `GradientError` where no gradient can ever arrive."""
        if not self.watched:
            raise GradientError(f"{what} {_NO_NUMBERS}.")

    def of(self, value: Any) -> Any:
        """`value` with the gradient of each tensor in its place; None while nothing has arrived."""
        self.require()
        found = self.values()
        if all(gradient is None for gradient in found):
            return None
        left = iter(found)
        return map_tensors(value, lambda _: next(left))

    def __getstate__(self) -> tuple[list[Tensor | None], bool]:
        return self.values(), self.watched

    def __setstate__(self, state: tuple[list[Tensor | None], bool]) -> None:
        self._values, self.watched = state


class Changed(Gradients):
    """The gradients of a value of which something was made: moved, cast, some of its prompts. What arrives later
    arrives here too."""

    __slots__ = ("_function", "_seen", "_source")

    def __init__(self, source: Gradients, function: Callable[[Any], Any]) -> None:
        super().__init__((), watched=source.watched)
        self._source = source
        self._function = function
        self._seen: list[Tensor | None] = []

    def values(self) -> list[Tensor | None]:
        found = self._source.values()
        seen = self._seen or [None] * len(found)
        self._values = [
            mine if new is old else self._function(new)
            for new, old, mine in zip(found, seen, self._values or seen, strict=True)
        ]
        self._seen = found
        return list(self._values)

    def __reduce__(self) -> Any:
        return _plain, (self.values(), self.watched)


def _plain(values: list[Tensor | None], watched: bool) -> Gradients:
    return Gradients(values, watched=watched)


class Lost(Gradients):
    """Stands for gradients that did not come along."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(())

    def require(self, what: str = "this value") -> None:
        raise GradientError(f"{what} is of joined caches, which hold no gradients: join what gradients() gives of each")

    def __reduce__(self) -> Any:
        return Lost, ()
