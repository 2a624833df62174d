"""Properties, and results, that are computed once.

`functools.cached_property` has a lock in Python 3.11: a child that is forked while another thread computes such a
property, of whatever object, would wait for that lock forever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class lazy(Generic[T]):
    """A property whose value is kept once it is computed, by two threads perhaps; it can be set before."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Self | T:
        if instance is None:
            return self
        value = self._compute(instance)
        # Found there from now on, before anybody asks here.
        instance.__dict__[self._name] = value
        return value


def once(compute: Callable[[], T]) -> Callable[[], T]:
    """What gives each time what `compute` has given the first time; for one thread."""
    kept: list[T] = []

    def get() -> T:
        if not kept:
            kept.append(compute())
        return kept[0]

    return get
