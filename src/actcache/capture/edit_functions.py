"""Functions of the caller's that edit values: given copies, and held to returning what the model can go on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from actcache.capture.values import map_tensors
from actcache.errors import EditError

Function = Callable[[Any], Any]


class Called:
    """A function of the caller's, held to returning what the model can go on with."""

    def __init__(self, function: Function, target: str) -> None:
        self._function = function
        self._target = target

    def __call__(self, value: Any) -> Any:
        # A copy: others may hold the value (a module that hands on what it was given, a capture without copies), and
        # autograd may need it as it was.
        given = _copied(value)
        new = self._function(given)
        if new is None or new is given:
            _fits(self._target, value, given)
            return given
        _fits(self._target, value, new)
        # Some models add to what a module returned in place, which must not reach a tensor of the caller's.
        return _copied(new)


def _copied(value: Any) -> Any:
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        # What was one tensor in several places stays one.
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return map_tensors(value, copy, of_cache=lambda cache: cache)


def _fits(target: str, old: Any, new: Any) -> None:
    """Raise `EditError` unless `new` has the form of `old`: containers, shapes, dtypes and devices."""
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor):
            raise EditError(f"the edit of {target!r} returned a {type(new).__name__}: expected {_form(old)}, or None")
        if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            raise EditError(f"the edit of {target!r} returned {_form(new)}: expected {_form(old)}")
        return
    if not isinstance(old, (tuple, list, dict)):
        return
    same = type(new) is type(old) and len(new) == len(old)
    if isinstance(old, dict):
        same = same and new.keys() == old.keys()
    if not same:
        raise EditError(f"the edit of {target!r} returned {_form(new)}: expected {_form(old)}, as the module returns")
    pairs: Iterator[tuple[Any, Any]] = (
        ((old[key], new[key]) for key in old) if isinstance(old, dict) else zip(old, new, strict=True)
    )
    for before, after in pairs:
        _fits(target, before, after)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    if isinstance(value, dict):
        return f"a {type(value).__name__} of {', '.join(map(str, value))}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
