"""Sites whose blocks hold the same rows, and which of these blocks are known to be good."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Shape = tuple[tuple[int, int], ...]
"""Of each tensor of a site the bytes of a row, and how many blocks it has."""
Ranges = list[tuple[Ints, Ints]]
"""Blocks, by number: the first, and one behind the last, of each row asked for."""


class BlockGroup:
    """Sites of one shape; `first`: the number of each one's first block, `size`: the bytes of a block.

    `known` bool ``[blocks]``: which blocks are known to be good at all of them.
    """

    def __init__(self, shape: Shape, sites: Sequence[str], first: Sequence[int], size: int) -> None:
        self.shape, self.sites, self.first = shape, list(sites), np.array(first, np.int64)
        self.known = np.zeros(sum(count for _, count in shape), bool)
        self._unknown_before = np.arange(len(self.known) + 1)
        (width, _), *scales = shape
        self._rows = 0 if scales or not width or size % width else size // width
        """How many rows are in a block, if each of them lies in one block only."""

    def knows_rows(self, rows: Ints) -> bool:
        """Whether all blocks of these rows are known to be good; False, too, where they are many for a row."""
        return self._rows > 0 and len(self.known.take(rows // self._rows).nonzero()[0]) == len(rows)

    def knows(self, ranges: Ranges) -> bool:
        """Whether all blocks in `ranges` are known to be good."""
        before = self._unknown_before
        return all(bool((before[low] == before[high]).all()) for low, high in ranges)

    def learn(self, blocks: Ints) -> None:
        """These are good at all of the sites."""
        self.known[blocks] = True
        before = np.zeros(len(self.known) + 1, np.int64)
        np.cumsum(~self.known, out=before[1:])
        self._unknown_before = before

    def marked(self, ranges: Ranges) -> Ints:
        """The blocks that lie in any of `ranges`."""
        return marked(ranges, len(self.known))


def marked(ranges: Ranges, count: int) -> Ints:
    """The blocks, of `count`, that lie in any of `ranges`."""
    change = np.zeros(count + 1, np.int64)
    for low, high in ranges:
        change += np.bincount(low, minlength=count + 1)
        change -= np.bincount(high, minlength=count + 1)
    return np.flatnonzero(np.cumsum(change[:-1]))
