"""Which implementation of attention a model runs, and another one for a while."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Those in whose course probabilities are seen (`probabilities`): nothing has to be changed for them.
_SEEN = (None, "eager", "sdpa")
_NAME = "_attn_implementation_internal"
_lock = threading.Lock()


class _Held:
    """The configs of one model that are switched, with what each said before, and by how many blocks."""

    def __init__(self) -> None:
        self.blocks = 0
        self.before: list[tuple[Any, Any]] = []


_held: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()


def run_as(implementation: str, *, probabilities: bool) -> str:
    """The implementation that a model of this one is run with, where its probabilities are needed or not."""
    return "eager" if probabilities and implementation not in _SEEN else implementation


@contextmanager
def holding_probabilities(model: nn.Module) -> Iterator[None]:
    """Run the model with an attention that holds its probabilities: where it runs one that never does (flash or flex
    attention, a kernel of the caller's), with its eager one for the block. Blocks may end in any order; with the last
    of them every config says again what it said. Masks are made at the beginning of a pass, and by the same configs.
    """
    with _lock:
        held = _held.setdefault(model, _Held())
        held.blocks += 1
        if held.blocks == 1:
            held.before = [(config, implementation) for config, implementation in _configs(model)]
            for config, _ in held.before:
                setattr(config, _NAME, "eager")
    try:
        yield
    finally:
        with _lock:
            held.blocks -= 1
            if not held.blocks:
                for config, implementation in held.before:
                    setattr(config, _NAME, implementation)
                del _held[model]


def _configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """The configs of a model's modules that name an implementation which holds no probabilities."""
    configs = {id(config): config for m in model.modules() if (config := m.__dict__.get("config")) is not None}
    named = [(config, getattr(config, _NAME, None)) for config in configs.values()]
    return [(config, implementation) for config, implementation in named if implementation not in _SEEN]
