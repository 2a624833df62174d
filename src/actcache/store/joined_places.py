"""Prompts that were located some at a time, as if they had been located together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.placement import Part, Placement


def join(placements: Sequence[Placement]) -> tuple[list[Placement], Ints, Ints]:
    """`placements` of the same sites as few: of those whose sites lie together in the same way the prompts follow one
    another. Which of the few each has become part of, and after how many prompts."""
    alike: dict[tuple[tuple[int, ...], ...], list[Placement]] = {}
    owner, begin = [], []
    for placement in placements:
        some = alike.setdefault(tuple(part.sites for part in placement._parts), [])
        begin.append(sum(map(len, some)))
        some.append(placement)
        owner.append(next(k for k, one in enumerate(alike.values()) if one is some))
    return [_joined(some) for some in alike.values()], np.array(owner, np.int64), np.array(begin, np.int64)


def _joined(placements: list[Placement]) -> Placement:
    first = placements[0]
    if len(placements) == 1:
        return first
    numbers: dict[str, int] = {}
    segments: list[Segment] = []
    slots = []
    for placement in placements:
        for segment in placement._segments:
            if numbers.setdefault(str(segment.path), len(segments)) == len(segments):
                segments.append(segment)
        own = [numbers[str(segment.path)] for segment in placement._segments]
        # Those that were not found are at -1, the last.
        slots.append(np.array([*own, -1], np.int32))
    parts = [
        Part(
            sites,
            np.concatenate([slot[p._parts[k].segment] for slot, p in zip(slots, placements, strict=True)]),
            np.concatenate([p._parts[k].prompt for p in placements]),
        )
        for k, sites in enumerate(part.sites for part in first._parts)
    ]
    return Placement(sum(len(p) for p in placements), first.sites, first.layout, parts, segments)
