"""What a module was called with, or returned, with another tensor in the place of one of its own."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import Tensor

from actcache.model.forms import first_input
from actcache.model.read_points import Inputs


def with_first_tensor(output: Any, new: Tensor) -> Any:
    """What a module returned, with `new` in the place of its `first_tensor`."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, dict):
        first = next(iter(output))
        return with_item(output, first, with_first_tensor(output[first], new))
    rest = (with_first_tensor(output[0], new), *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def with_first_input(call: Inputs, new: Tensor) -> Inputs:
    """A call with `new` in the place of its `first_input`."""
    args, kwargs = call
    if not (args and isinstance(args[0], Tensor)):
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": new}
        old = first_input(call)
        name = next((name for name, value in kwargs.items() if value is old), None)
        if name is not None:
            return args, {**kwargs, name: new}
        at = next(i for i, value in enumerate(args) if value is old)
        return (*args[:at], new, *args[at + 1 :]), kwargs
    return (new, *args[1:]), kwargs


def with_tensor(output: Any, number: int, new: Tensor) -> Any:
    """What a module returned, with `new` in the place of one of its tensors: the `number`-th in order, tuples and dicts
    taken apart, as `runs.tensors_of` counts them."""
    numbers = count()

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            return new if next(numbers) == number else value
        if isinstance(value, dict):
            changed = {key: put(item) for key, item in value.items()}
            return type(value)(**changed) if hasattr(type(value), "__dataclass_fields__") else type(value)(changed)
        if isinstance(value, (tuple, list)):
            items = [put(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return put(output)


def with_item(output: Any, key: str, new: Any) -> Any:
    """What a module returned as a dict, with `new` under `key`."""
    items = {**output, key: new}
    # A model output is built from its fields; what the module returned may be held by somebody else.
    return type(output)(**items) if hasattr(type(output), "__dataclass_fields__") else type(output)(items)
