"""Values that belong to the prompts of a batch: labels, and whatever else is to be kept beside the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from actcache.errors import JoinError, OptionError, did_you_mean

Columns = Callable[[Any], Mapping[str, Any]] | Sequence[str]


class BatchColumns:
    """Reads the columns of every batch, and holds each to what it was in the first."""

    def __init__(self, asked: Columns | None) -> None:
        if asked is not None and not callable(asked) and not _are_names(asked):
            raise OptionError(f"columns is {asked!r}: expected a function of the batch, or a list of field names")
        self._asked = asked
        self._kinds: dict[str, Any] | None = None

    def read(self, batch: Any, size: int) -> dict[str, Any]:
        """The columns of a batch of `size` prompts; raises `OptionError` or `JoinError`, naming the column."""
        if self._asked is None:
            return {}
        given = self._asked(batch) if callable(self._asked) else _fields(batch, self._asked)
        if not isinstance(given, Mapping):
            raise OptionError(f"columns returned a {type(given).__name__}: expected a dict of one value per prompt")
        found = {name: _column(name, value, size) for name, value in given.items()}
        kinds = {name: _kind(value) for name, value in found.items()}
        if self._kinds is None:
            self._kinds = kinds
        if kinds != self._kinds:
            name = next(n for n in {**self._kinds, **kinds} if kinds.get(n) != self._kinds.get(n))
            raise JoinError(
                f"column {name!r} is {_in_words(kinds.get(name))}, and in the batches before it was "
                f"{_in_words(self._kinds.get(name))}: make them alike"
            )
        return found


def _are_names(columns: Any) -> bool:
    return isinstance(columns, (list, tuple)) and len(columns) > 0 and all(isinstance(name, str) for name in columns)


def _fields(batch: Any, names: Sequence[str]) -> dict[str, Any]:
    """The fields of these names: of the batch, or of what stands behind the inputs in a pair."""
    holders = batch if isinstance(batch, (tuple, list)) else [batch]
    fields = next((part for part in reversed(holders) if isinstance(part, Mapping)), None)
    if fields is None:
        raise OptionError(
            f"columns={list(names)!r} names fields, and the batch is no dict: give a function of the batch"
        )
    for name in names:
        if name not in fields:
            known = [field for field in fields if isinstance(field, str)]
            raise OptionError(f"column {name!r} is no field of the batch: {known}.{did_you_mean(name, known)}")
    return {name: fields[name] for name in names}


def _column(name: str, value: Any, size: int) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    listed = isinstance(value, (list, tuple)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)
    if not listed and hasattr(value, "to_numpy"):
        value, listed = value.to_numpy(), True
    if not listed or len(value) != size:
        has = f"has {len(value)} values" if listed else f"is {value!r:.60}"
        raise OptionError(
            f"column {name!r} {has}, and the batch has {size} prompts: expected a list, an array or a tensor with one "
            "value for each"
        )
    return list(value) if isinstance(value, tuple) else value


def _kind(value: Any) -> Any:
    """What must be the same in every batch."""
    if isinstance(value, Tensor):
        return "a tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape[1:])
    if isinstance(value, np.ndarray):
        return "an array", value.dtype.kind if value.dtype.kind in "US" else str(value.dtype), value.shape[1:]
    return ("a list",)


def _in_words(kind: Any) -> str:
    if kind is None:
        return "not there"
    what, *form = kind
    return f"{what} of {form[0]} {list(form[1]) or ''}".rstrip() if form else str(what)
