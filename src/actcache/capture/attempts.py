"""Calls of the model that an exception ended: what was read in them is not the answer of a pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from actcache.capture.passes import Passes


class StopForward(Exception):
    """Raised inside a forward pass to end it: everything that was asked for has been read."""

    def __init__(self, owner: object = None) -> None:
        super().__init__("the forward pass was ended: everything asked for has been read")
        self.owner = owner


class Attempts:
    """A listener on the model: where an exception leaves it, what began in this call has failed.

    A backbone may have ended well by then, as when memory runs out in the head."""

    __slots__ = ("_passes",)

    def __init__(self, passes: Sequence[Passes]) -> None:
        self._passes = passes

    def begin(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[int, int]]:
        computed = inputs[1].get("logits_to_keep")
        for one in self._passes:
            one.computed = computed if isinstance(computed, Tensor) else None
        return [one.so_far for one in self._passes]

    def end(self, token: Any, output: Any) -> None:
        return None

    def fail(self, token: list[tuple[int, int]]) -> None:
        # What we end ourselves was read to the end.
        if not isinstance(sys.exc_info()[1], StopForward):
            for one, since in zip(self._passes, token, strict=True):
                one.failed_since(since)
