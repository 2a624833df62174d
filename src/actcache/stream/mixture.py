"""How many tokens of which source are among the first so many of a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from actcache.errors import OptionError


class Mixture:
    """Sources of `sizes` tokens, in shares as `weights` say (None: as their sizes).

    `counts`: how many tokens of each an epoch has: none twice, and of one of them all. Token `j` of a source has its
    place at ``(j + 1/2) / count`` of the way, so that the shares are the same all along.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None) -> None:
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.counts = list(sizes)
        if weights is not None:
            exact = [_weight(weight) for weight in weights]
            most = min(size / weight for size, weight in zip(sizes, exact, strict=True))
            self.counts = [math.floor(most * weight) for weight in exact]
            if 0 in self.counts:
                raise OptionError(f"weights {self.weights}: of a source of {min(sizes)} tokens not one would come.")
        self.total = sum(self.counts)

    def between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Which tokens of each source are those of the stream from `start` to `stop`."""
        return list(zip(self._before(start), self._before(stop), strict=True))

    def _before(self, place: int) -> list[int]:
        """How many tokens of each source come before `place`."""
        if len(self.counts) == 1:
            return [place]
        # Rather too few: what is left is counted out.
        about = Fraction(max(0, place - len(self.counts)), self.total)
        found = [math.floor(count * about + Fraction(1, 2)) for count in self.counts]
        while sum(found) < place:
            left = [i for i, count in enumerate(self.counts) if found[i] < count]
            found[min(left, key=lambda i: Fraction(2 * found[i] + 1, self.counts[i]))] += 1
        return found


def _weight(weight: float) -> Fraction:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise OptionError(f"weight {weight!r} of a source: expected a number above 0.")
    return Fraction(weight)
