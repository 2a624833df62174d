"""What threads of this process are reading from elsewhere at the moment, so that none reads the same beside another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from actcache.store.keys import Ints


class Some(Protocol):
    """Blocks of an object."""

    @property
    def numbers(self) -> Ints: ...


Blocks = Sequence[tuple[str, Some]]
"""Objects, and blocks of each."""


class Flights:
    """Blocks on their way. Thread-safe; whoever waits here holds nothing that others wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._coming: dict[str, list[Some]] = {}

    def begin(self, blocks: Blocks) -> bool:
        """Whether none of `blocks` was on its way; now all of them are, until `end`.

        False when others were bringing some: they have ended, and what is missing is to be looked for again.
        """
        with self._changed:
            if self._coming and self._overlap(blocks):
                self._changed.wait_for(lambda: not self._overlap(blocks))
                return False
            for name, some in blocks:
                self._coming.setdefault(name, []).append(some)
            return True

    def end(self, blocks: Blocks) -> None:
        """They have come, or will not."""
        with self._changed:
            for name, some in blocks:
                if left := [other for other in self._coming.pop(name, ()) if other is not some]:
                    self._coming[name] = left
            self._changed.notify_all()

    def _overlap(self, blocks: Blocks) -> bool:
        return any(
            np.isin(some.numbers, other.numbers).any() for name, some in blocks for other in self._coming.get(name, ())
        )
