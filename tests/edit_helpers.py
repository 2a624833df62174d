"""What the tests of edits share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def plain(tensor: Any) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor[0]


def moved(x: Tensor) -> Tensor:
    return x.flip(-1) * 1.5 + 0.25


def state(model: nn.Module) -> list[Any]:
    return [
        {name: dict(value) if isinstance(value, dict) else id(value) for name, value in module.__dict__.items()}
        for module in model.modules()
    ]


def in_place(function: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """`function` with nothing returned."""

    def change(x: Tensor) -> None:
        function(x)

    return change
