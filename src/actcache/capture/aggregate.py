"""Ready-made strategies for joining batches, for `ActivationCache.register_aggregation`.

A strategy takes what there is so far (None at the first batch) and the value of the next batch, and returns the two
merged. It changes neither.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actcache.capture.merging import check, merge, signature
from actcache.errors import JoinError

__all__ = ["collect", "default", "flatten", "keep_newest", "layernorm_statistics"]


def default(old: Any, new: Any) -> Any:
    """What is done without a strategy: tensors and arrays join on dim 0, dicts per key, other values into a list."""
    if old is None:
        return new
    check(signature(old, (1,)), signature(new, (1,)), "value")
    return merge([old, new])


def keep_newest(old: Any, new: Any) -> Any:
    """The value of the last batch."""
    return new


def flatten(old: Any, new: Any) -> list[Any]:
    """One flat list: lists and tuples give their items, anything else is one item."""
    return [*_items(old), *_items(new)] if old is not None else _items(new)


def collect(old: Any, new: Any) -> list[Any]:
    """A list with one item per batch, whatever the item is. Register it before the first batch is joined."""
    return [new] if old is None else [*old, new] if isinstance(old, list) else [old, new]


def layernorm_statistics(old: Any, new: Any) -> dict[str, Tensor]:
    """Dicts of tensors (mean, variance, second_moment), each joined on dim 0; the names must be the same."""
    for one in (old, new):
        if one is not None and not (isinstance(one, dict) and all(isinstance(item, Tensor) for item in one.values())):
            raise JoinError(f"layernorm_statistics joins dicts of tensors, not {type(one).__name__}")
    result: dict[str, Tensor] = default(old, new)
    return result


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
