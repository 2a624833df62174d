"""Values that carry a note."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any


class ValueWithInfo:
    """A value together with what is to be said about it, as `ActivationCache.add_with_info` stores it.

    It behaves like the value in torch functions, indexing, arithmetic, comparisons and attributes; what these give is
    the plain result, except that in-place arithmetic (``noted += 1``) keeps the note. `value()` and `info()` tell the
    two apart. It is not a `torch.Tensor` to ``isinstance``.
    """

    __slots__ = ("_info", "_value")
    # As for a tensor: numpy leaves arithmetic with us to us.
    __array_priority__ = 1000

    def __init__(self, value: Any, info: Any) -> None:
        self._value = value
        self._info = info

    def value(self) -> Any:
        """The plain value."""
        return self._value

    def info(self) -> Any:
        """What was noted about it."""
        return self._info

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_plain(args), **_plain(kwargs or {}))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.asarray(self._value, dtype) if copy is None else np.array(self._value, dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        # Special methods are looked for on copies and while unpickling, before there is a value.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._value, name)

    def __getitem__(self, index: Any) -> Any:
        return self._value[_plain(index)]

    def __setitem__(self, index: Any, item: Any) -> None:
        self._value[_plain(index)] = _plain(item)

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value)

    def __contains__(self, item: object) -> bool:
        return item in self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __float__(self) -> float:
        return float(self._value)

    def __int__(self) -> int:
        return int(self._value)

    def __index__(self) -> int:
        return operator.index(self._value)

    def __eq__(self, other: object) -> Any:
        return self._value == _plain(other)

    def __ne__(self, other: object) -> Any:
        return self._value != _plain(other)

    # As tensors do: by identity, whatever they are equal to.
    __hash__ = object.__hash__

    def __reduce__(self) -> Any:
        return ValueWithInfo, (self._value, self._info)

    def __repr__(self) -> str:
        return f"ValueWithInfo({self._value!r}, info={self._info!r})"


def _plain(value: Any) -> Any:
    """`value` without the notes in it."""
    if isinstance(value, ValueWithInfo):
        return value._value
    if type(value) in (tuple, list):
        return type(value)(_plain(item) for item in value)
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return value


def _forward(name: str, function: Callable[..., Any]) -> None:
    def forward(self: ValueWithInfo, *others: Any) -> Any:
        return function(self._value, *map(_plain, others))

    setattr(ValueWithInfo, f"__{name}__", forward)


def _forward_both(name: str) -> None:
    function = getattr(operator, f"__{name}__")
    _forward(name, function)

    def reflected(self: ValueWithInfo, other: Any) -> Any:
        return function(other, self._value)

    def in_place(self: ValueWithInfo, other: Any) -> ValueWithInfo:
        return ValueWithInfo(getattr(operator, f"__i{name}__")(self._value, _plain(other)), self._info)

    setattr(ValueWithInfo, f"__r{name}__", reflected)
    setattr(ValueWithInfo, f"__i{name}__", in_place)


for _name in ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge"):
    _forward(_name, getattr(operator, f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    _forward_both(_name)
