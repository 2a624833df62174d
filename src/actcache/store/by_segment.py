"""Which of many prompts lie in which segment."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_AT_ONCE = 1 << 16
# So few are compared with each of so few numbers in less time than sorting them takes.
_FEW, _FEW_SEGMENTS = 1 << 10, 16


def used_in(segment: npt.NDArray[np.int32]) -> list[int]:
    """The numbers of the segments in `segment`, in ascending order; -1 stands for none."""
    if len(segment) <= _FEW:
        return sorted(set(segment.tolist()) - {-1})
    pieces = [segment[start : start + _AT_ONCE] for start in range(0, len(segment), _AT_ONCE)]
    return sorted({n for piece in pieces for n in np.flatnonzero(np.bincount(piece + 1)[1:]).tolist()})


def by_segment(segment: npt.NDArray[np.int32], members: Ints | None = None) -> list[tuple[int, Ints]]:
    """`members` split by the segment each is in, each part in its order; None: all that are in one (-1: none)."""
    if members is None and len(segment) <= _FEW:
        used = used_in(segment)
        if len(used) <= _FEW_SEGMENTS:
            return [(n, (segment == n).nonzero()[0]) for n in used]
    if members is None:
        members = np.flatnonzero(segment >= 0)
    mine = segment[members]
    if not len(mine):
        return []
    if (mine == mine[0]).all():
        return [(int(mine[0]), members)]
    if not (mine[1:] >= mine[:-1]).all():
        order = np.argsort(mine, kind="stable")
        mine, members = mine[order], members[order]
    edges = [0, *(np.flatnonzero(mine[1:] != mine[:-1]) + 1).tolist(), len(mine)]
    return [(int(mine[a]), members[a:b]) for a, b in pairwise(edges)]
