"""Proof, on the user's machine and model, that what is read, extracted and stored is what the model computes.

This room shares its name with its main function, and stands for it: ``ac.selftest(...)`` is `run.selftest`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from actcache.selftest.run import selftest

        return selftest(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        from actcache.selftest.run import selftest

        return selftest.__doc__

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from actcache.selftest.run import selftest

        return signature(selftest)


sys.modules[__name__].__class__ = _CallableRoom
