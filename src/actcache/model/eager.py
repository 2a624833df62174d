"""Compiled models while a block is open, or a model runs by itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Eager:
    """While any block is open, compiled models run their original code: taps and hooks added after compilation do not
    fire, and compiling anew for the passes of a probe would use up how often torch compiles a module."""

    def __init__(self) -> None:
        self._open = 0
        self._stance: Any = None
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self._open += 1
            if self._open == 1 and _something_is_compiled():
                stance = getattr(torch.compiler, "set_stance", None)
                if stance is not None:
                    self._stance = stance("force_eager")

    def leave(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._stance is not None:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block of its own."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


eager = Eager()


def _something_is_compiled() -> bool:
    """Whether compiled code may exist. Setting the stance costs more than all else on entering a block."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return False
    # Every use of torch.compile leaves its backend there, and what is only kept from being compiled leaves None; where
    # torch keeps no such table, assume the worst.
    backends = getattr(frames, "cached_backends", None)
    return backends is None or any(map(callable, list(backends.values())))
