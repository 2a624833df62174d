"""What the prompts of a mapped segment are, compared with what is asked for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from actcache.store.container import Tensor
from actcache.store.mapped import MappedFile

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_FEW, _SPREAD = 16, 8


class Contents:
    """The token ids (as stored) or the texts of a segment's prompts: ``tensor[offset[i]:offset[i + 1]]`` as bytes."""

    def __init__(self, file: MappedFile, tensor: Tensor, offset: Ints) -> None:
        self._file = file
        self._start, self._width = tensor.start, tensor.dtype.itemsize
        self._starts, self._stops = offset[:-1], offset[1:]

    def of(self, prompt: int) -> bytes:
        """Those of one prompt."""
        start, stop = int(self._starts[prompt]), int(self._stops[prompt])
        return self._file.bytes(self._start + self._width * start, self._start + self._width * stop)

    def equal(self, prompts: Ints, asked: list[bytes], members: Ints) -> Mask | None:
        """Whether those of ``prompts[k]`` are exactly ``asked[members[k]]``, bool ``[len(prompts)]``; None for all.

        `members` go up.
        """
        starts, stops = self._starts.take(prompts), self._stops.take(prompts)
        if self._width > 1:
            starts, stops = starts * self._width, stops * self._width
        starts, stops = starts + self._start, stops + self._start
        # Runs, and what lies between, are looked at only where most of it is asked for.
        if len(prompts) > _FEW and _lie_close(prompts):
            mine = asked if len(members) == len(asked) else [asked[i] for i in members.tolist()]
            if self._equal_runs(prompts, starts, stops, mine):
                return None
            low, high = int(starts.min()), int(stops.max())
            if high - low <= 2 * _SPREAD * int((stops - starts).sum()):
                # One copy of all, which is cut much faster than the mapping.
                whole = self._file.bytes(low, high)
                starts, stops = starts - low, stops - low
                return _mask([whole[a:b] == c for a, b, c in zip(starts.tolist(), stops.tolist(), mine, strict=True)])
        chars = self._file.touched(starts, stops)
        # Compared one by one, each copy is where the one before was, which is in the processor's cache.
        where = zip(members.tolist(), starts.tolist(), stops.tolist(), strict=True)
        return _mask([chars[a:b] == asked[i] for i, a, b in where])

    def _equal_runs(self, prompts: Ints, starts: Ints, stops: Ints, asked: list[bytes]) -> bool:
        """Whether all is equal, with one comparison for each run of neighbours, the usual case; False: look closer."""
        order = np.argsort(prompts, kind="stable")
        cuts = np.flatnonzero(np.diff(prompts[order]) != 1) + 1
        lengths = np.fromiter(map(len, asked), np.int64, len(asked))
        if len(cuts) * 8 >= len(prompts) or not np.array_equal(stops - starts, lengths):
            return False
        joined = [asked[i] for i in order.tolist()]
        first, last = starts[order].tolist(), stops[order].tolist()
        edges = [0, *cuts.tolist(), len(prompts)]
        data = self._file.bytes
        return all(data(first[a], last[b - 1]) == b"".join(joined[a:b]) for a, b in pairwise(edges))


def _lie_close(prompts: Ints) -> bool:
    """Whether most of what lies between them is among them."""
    most = _SPREAD * len(prompts)
    # Of those that do not, a few say so mostly, and in a fraction of the time.
    few = prompts[:: len(prompts) // 8].tolist()
    return max(few) - min(few) < most and int(prompts.max()) - int(prompts.min()) < most


def _mask(equal: list[bool]) -> Mask | None:
    return np.array(equal) if False in equal else None
