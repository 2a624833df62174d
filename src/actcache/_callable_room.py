"""Rooms that share their name with their main function, and stand for it: ``ac.capture(...)`` is `hooks.capture`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self)(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return _function(self).__doc__

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(_function(self))


def _function(room: ModuleType) -> Callable[..., Any]:
    module, name = _STANDS_FOR[room.__name__]
    # Once imported it is in the room, and an import statement would look for it each time.
    found = room.__dict__.get(module) or import_module(f"{room.__name__}.{module}")
    function: Callable[..., Any] = getattr(found, name)
    return function


_STANDS_FOR: dict[str, tuple[str, str]] = {}


def stand_for(room: str, module: str) -> None:
    """Make the imported package `room` callable, as the function of its own name in its `module`.

    That is imported when it is first called, or asked what it is.
    """
    _STANDS_FOR[room] = module, room.rpartition(".")[2]
    sys.modules[room].__class__ = _CallableRoom
