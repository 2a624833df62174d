"""Which pass left a KV cache, or a recurrent state, as it is given to a later one.

A cache is known by the object that it is, or by the first tensor in it: one that was copied may be given to any number
of passes, and which of them goes on from where is then not told by anything.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Caches that are gone are forgotten when there are as many as this.
_MANY = 32


@dataclass(frozen=True)
class Left:
    """The pass that left a cache: its index, the positions there were after it, and its rows."""

    index: int
    end: int
    batch: int
    state: weakref.ref[Tensor] | None


class CachesSeen:
    """The caches that passes left, none of which is kept alive."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[Any], Left]] = {}

    def copy(self) -> CachesSeen:
        made = CachesSeen()
        made._left = dict(self._left)
        return made

    def note(self, cache: Any, index: int, end: int, batch: int) -> None:
        """Note that this pass left `cache`; nothing for None."""
        if cache is None:
            return
        if len(self._left) >= _MANY:
            self._left = {key: pair for key, pair in self._left.items() if pair[0]() is not None}
        state = first_state(cache)
        left = Left(index, end, batch, None if state is None else weakref.ref(state))
        for holder in (cache, state):
            # Tuples of tensors are known by their tensors.
            if holder is not None and not isinstance(holder, (tuple, list, dict)):
                self._left[id(holder)] = weakref.ref(holder), left

    def of(self, cache: Any) -> Left | None:
        """The last pass that left this cache as one that is known; None for any other."""
        for holder in (cache, first_state(cache)):
            found = None if holder is None else self._left.get(id(holder))
            if found is not None and found[0]() is holder:
                return found[1]
        return None


def cache_of(output: Any) -> Any:
    """The KV cache or recurrent state in what a backbone returned; None where there is none."""
    if isinstance(output, (tuple, list)):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    cache = getattr(output, "past_key_values", None)
    return getattr(output, "cache_params", None) if cache is None else cache


def first_state(cache: Any) -> Tensor | None:
    """The first tensor that a KV cache or a recurrent state holds; None where there is none, or where layers move
    between devices. Exchanging rows puts another tensor there, which running the model does not do in between."""
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None or getattr(cache, "offloading", False):
        return None
    layers = getattr(cache, "layers", None)
    holder = layers[0] if layers else cache
    found = getattr(holder, "keys", None) if layers else None
    if not isinstance(found, Tensor):
        found = getattr(holder, "conv_states", cache if isinstance(cache, (tuple, list)) else None)
    while isinstance(found, (tuple, list, dict)) and found:
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return found if isinstance(found, Tensor) else None
