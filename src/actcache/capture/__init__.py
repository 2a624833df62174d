"""One forward pass into memory: hooks on, values out, hooks off.

This room shares its name with its main function, and stands for it: ``ac.capture(...)`` is `hooks.capture`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Once imported it is here, and an import statement would look for it each time.
        hooks = self.__dict__.get("hooks") or import_module("actcache.capture.hooks")
        return hooks.capture(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        from actcache.capture.hooks import capture

        return capture.__doc__

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from actcache.capture.hooks import capture

        return signature(capture)


sys.modules[__name__].__class__ = _CallableRoom
