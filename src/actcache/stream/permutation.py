"""Keyed permutations: every index once, in an order that a key decides, without a table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

Words = npt.NDArray[np.uint32]

_ROUNDS = 6
# Up to so many a table costs nothing, and has none of the regularities of few rounds over a small domain.
_TABLE = 1 << 14
_FIRST, _SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


class Permutation:
    """A permutation of ``range(size)`` that `key` (numbers, not negative) decides; a call gives where indices go.

    A Feistel network over the rectangle ``a * b`` with `b` a power of two, hardly larger than `size`; what falls
    outside is sent through once more, until it is inside. Memory does not depend on `size`. The same key gives the same
    permutation on every machine and in every version.
    """

    def __init__(self, size: int, key: Sequence[int]) -> None:
        self.size = size
        seeds = np.random.SeedSequence(list(key))
        self._table: Ints | None = None
        if size <= _TABLE:
            # Two of 16384 words of 64 bits hardly ever agree; where they do, their order stays.
            self._table = np.argsort(seeds.generate_state(size, np.uint64), kind="stable").astype(np.int64)
            return
        self._keys = seeds.generate_state(2 * _ROUNDS, np.uint32)
        self._bits = math.isqrt(size).bit_length()
        self._mask = np.uint32((1 << self._bits) - 1)
        self._height = np.uint32(-(-size >> self._bits))

    def __call__(self, index: Ints) -> Ints:
        """Where the indices go, int64 of the same shape; each must be in ``range(size)``."""
        if self._table is not None:
            return self._table[index]
        found = self._once(index)
        while len(outside := np.flatnonzero(found >= self.size)):
            found[outside] = self._once(found[outside])
        return found

    def _once(self, index: Ints) -> Ints:
        high, low = (index >> self._bits).astype(np.uint32), index.astype(np.uint32) & self._mask
        for i in range(0, 2 * _ROUNDS, 4):
            step = _mixed(low, self._keys[i], self._keys[i + 1])
            step -= step // self._height * self._height
            high += step
            high -= (high >= self._height) * self._height
            low += _mixed(high, self._keys[i + 2], self._keys[i + 3])
            low &= self._mask
        return (high.astype(np.int64) << self._bits) | low


def _mixed(values: Words, first: np.uint32, second: np.uint32) -> Words:
    """`values` hashed under two keys, so that each bit depends on all bits of the value."""
    values = values ^ first
    values *= _FIRST
    values ^= values >> 15
    values += second
    values *= _SECOND
    values ^= values >> 13
    values *= _FIRST
    values ^= values >> 16
    return values
