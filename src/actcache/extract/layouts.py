"""What the layouts of a store are called for each pooling."""

from __future__ import annotations

from types import CodeType
from typing import Any

from actcache.errors import OptionError
from actcache.store.records import TOKENS


def layout_name(pooling: Any) -> str:
    """The store's name for a pooling; a function is named by its import path, its code and its default arguments.

    Raises `OptionError` for a function without a stable name (a lambda, a local function) or with hidden state (a
    method, a closure).
    """
    if pooling is None:
        return TOKENS
    if isinstance(pooling, str):
        return pooling
    name = f"{getattr(pooling, '__module__', '')}.{getattr(pooling, '__qualname__', '')}"
    code = getattr(pooling, "__code__", None)
    # A method or a closure computes with values that its code does not show.
    hidden = getattr(pooling, "__self__", None) is not None or getattr(pooling, "__closure__", None) is not None
    if "<" in name or code is None or hidden:
        raise OptionError(
            f"pooling {pooling!r} cannot be cached: use a named module-level function, or a built-in pooling."
        )
    from actcache.model.identity import digest_json

    defaults = repr((pooling.__defaults__, pooling.__kwdefaults__))
    return f"function:{name}:{digest_json([_code(code), defaults])[:16]}"


def _code(code: CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]
