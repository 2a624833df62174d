"""What threads of this process are reading from elsewhere at the moment, so that none reads the same beside another."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from actcache.store.keys import Ints

Blocks = Sequence[tuple[str, Ints]]
"""Objects, and numbers of blocks of each."""


class Flights:
    """Blocks on their way. Thread-safe; whoever waits here holds nothing that others wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._coming: dict[str, list[Ints]] = {}

    def begin(self, blocks: Blocks) -> bool:
        """Whether none of `blocks` was on its way; now all of them are, until `end`.

        False when others were bringing some: they have ended, and what is missing is to be looked for again.
        """
        with self._changed:
            if self._overlap(blocks):
                self._changed.wait_for(lambda: not self._overlap(blocks))
                return False
            for name, numbers in blocks:
                self._coming.setdefault(name, []).append(numbers)
            return True

    def end(self, blocks: Blocks) -> None:
        """They have come, or will not."""
        with self._changed:
            for name, numbers in blocks:
                if left := [other for other in self._coming.pop(name, ()) if other is not numbers]:
                    self._coming[name] = left
            self._changed.notify_all()

    def _overlap(self, blocks: Blocks) -> bool:
        return any(np.isin(numbers, other).any() for name, numbers in blocks for other in self._coming.get(name, ()))
