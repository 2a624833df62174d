"""Which columns of a projection belong to which head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """For each head the columns of a value ``[..., width]`` that are its own, in their order."""

    of_heads: tuple[tuple[int, ...], ...]
    width: int

    @classmethod
    def in_turn(cls, heads: int, width: int) -> Columns:
        """One head after the other."""
        each = width // heads
        return cls(tuple(tuple(range(h * each, (h + 1) * each)) for h in range(heads)), width)

    @property
    def heads(self) -> int:
        return len(self.of_heads)

    @property
    def each(self) -> int:
        """Columns of one head."""
        return len(self.of_heads[0])

    def read(self, value: Tensor) -> Tensor:
        """``[..., width]`` as ``[..., heads, columns]``: a view, where the heads lie at even distances."""
        if self._even is not None:
            base, step, offset = self._even
            of_heads: Tensor = value.narrow(-1, base, self.heads * step).unflatten(-1, (self.heads, step))
            return of_heads.narrow(-1, offset, self.each)
        own: Tensor = value.index_select(-1, self._index.to(value.device)).unflatten(-1, (self.heads, self.each))
        return own

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """A copy of `value` with `new` in the place of what `read` gives."""
        index = self._index.to(value.device)
        return value.index_copy(-1, index, new.flatten(-2).to(value.dtype))

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.of_heads).flatten()

    @cached_property
    def _even(self) -> tuple[int, int, int] | None:
        """Where the first group of columns begins, how far the groups are apart, and where in its group a head begins;
        None where there is no such rule."""
        first = self.of_heads[0][0]
        step = self.of_heads[1][0] - first if self.heads > 1 else self.each
        if step < self.each:
            return None
        base = max(0, min(first, self.width - self.heads * step))
        offset = first - base
        rule = tuple(tuple(range(first + h * step, first + h * step + self.each)) for h in range(self.heads))
        fits = base + self.heads * step <= self.width and offset + self.each <= step
        return (base, step, offset) if fits and rule == self.of_heads else None
