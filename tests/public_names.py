"""Every public name with its signature, as text: `python tests/public_names.py > tests/snapshots/public_names.txt`."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import actcache as ac


def lines() -> Iterator[str]:
    for name in sorted(ac.__all__):
        yield from described(name, getattr(ac, name))


def described(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, ModuleType):
        yield f"module {name}"
        for inner in sorted(n for n, v in vars(value).items() if not n.startswith("_") and is_ours(v, value)):
            yield from described(f"{name}.{inner}", getattr(value, inner))
    elif inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if not issubclass(value, BaseException | enum.Enum):
            yield from members(name, value)
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def members(name: str, kind: type) -> Iterator[str]:
    ours = [base for base in kind.__mro__ if base.__module__.startswith("actcache")]
    found = {inner for base in ours for inner in vars(base) if not inner.startswith("_")}
    found |= {inner for base in ours for inner in getattr(base, "__annotations__", {}) if not inner.startswith("_")}
    if any("__init__" in vars(base) for base in ours):
        yield f"  {name}.__init__{signature(kind.__init__)}"
    for inner in sorted(found):
        value = inspect.getattr_static(kind, inner, None)
        if isinstance(value, staticmethod | classmethod):
            yield f"  {type(value).__name__} {name}.{inner}{signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"  {name}.{inner}{signature(value)}"
        else:
            yield f"  {name}.{inner}"


def is_ours(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def signature(value: Any) -> str:
    try:
        # Of a default that has no value of its own only that there is one.
        return re.sub(r"<object object at \w+>", "...", str(inspect.signature(value)).replace("'", ""))
    except (TypeError, ValueError):
        return "(...)"


if __name__ == "__main__":
    print("\n".join(lines()))
