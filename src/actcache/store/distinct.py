"""Which of many keys are there first, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from actcache.store.keys import Ints, KeyTable, Mask
from actcache.store.spill import Spill


def count_keys(keys: Iterable[tuple[npt.NDArray[np.uint8], Mask | None]], spill: Spill) -> int:
    """How many different keys there are among `keys` uint8 ``[n, 16]``, of which some count (None: all)."""
    table = KeyTable(spill)
    for number, (some, live) in enumerate(keys):
        table.add(number, some, live)
    count = 0
    for piece in table.pieces():
        high, low = piece.high, piece.low
        same = high[1:] == high[:-1]
        if (same & (low[1:] != low[:-1])).any():
            # First words that agree by chance: only a full sort brings equal keys together.
            order = np.lexsort((low, high))
            high, low = high[order], low[order]
            same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        count += len(piece) - int(same.sum())
    return count


class Distinct:
    """`count` rows with keys, in an order of their own, of which the first of each key is wanted."""

    def __init__(self, count: int, spill: Spill) -> None:
        self._spill = spill
        self._table = KeyTable(spill)
        self._begins: list[int] = []
        self._later = spill.zeros(count, bool)
        self._added = 0

    def add(
        self, keys: npt.NDArray[np.uint8], live: Mask | None = None, later: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """The next rows: their `keys` uint8 ``[n, 16]``, which count (None: all), and which come after all others of
        their key."""
        self._table.add(len(self._begins), keys, live)
        self._begins.append(self._added)
        if later is not None:
            self._later[self._added : self._added + len(keys)] = later
        self._added += len(keys)

    def first(self) -> Mask:
        """Which rows are the first of their key, bool ``[count]``."""
        found = self._spill.zeros(len(self._later), bool)
        for _, first in self.alike():
            found[first] = True
        return found

    def alike(self) -> Iterator[tuple[Ints, Ints]]:
        """Which rows there are, and of each the first of its key, int64; those of one key come together."""
        begins = np.array(self._begins, np.int64)
        for piece in self._table.pieces():
            at = begins[piece.segment] + piece.row
            order = np.lexsort((at, self._later[at], piece.low, piece.high))
            high, low, rows = piece.high[order], piece.low[order], at[order]
            new = np.ones(len(order), bool)
            new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
            yield rows, rows[new][np.cumsum(new) - 1]
