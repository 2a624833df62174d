"""Evaluation mode for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_lock = threading.Lock()
# Modules that train otherwise, and how many blocks hold them in evaluation mode.
_held: dict[nn.Module, int] = {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of `model` in evaluation mode for the block; each gets its own mode back, where blocks overlap (in
    several threads) with the last of them."""
    with _lock:
        training = [module for module in model.modules() if module.training or (_held and module in _held)]
        for module in training:
            _held[module] = _held.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in training:
                _held[module] -= 1
                if not _held[module]:
                    del _held[module]
                    module.training = True
