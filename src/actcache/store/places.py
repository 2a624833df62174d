"""Where prompts lie, and what follows from that whatever is read of them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actcache.store.by_segment import Ints, by_segment, used_in
from actcache.store.gather import Piece
from actcache.store.lazy import lazy
from actcache.store.mapping import Segment

# So many neighbours are copied faster on their own than rows are looked at.
_LONG_RUN = 64


@dataclass(frozen=True, eq=False)
class Part:
    """Sites that lie together: for each prompt the segment (-1: absent) and its number in it."""

    sites: tuple[int, ...]
    segment: npt.NDArray[np.int32]
    prompt: Ints


class Places:
    """Of `n` prompts all `parts`; `segments` is what the numbers in there stand for."""

    def __init__(self, n: int, parts: Sequence[Part], segments: Sequence[Segment]) -> None:
        self._n, self._parts, self._segments = n, parts, segments

    @lazy
    def every(self) -> Ints:
        """The number of each prompt."""
        return np.arange(self._n)

    def is_every(self, chosen: Ints) -> bool:
        """Whether that is `every`, which is not made for whoever asks for a few of very many."""
        return chosen is self.__dict__.get("every")

    @lazy
    def used(self) -> list[tuple[Part, Segment]]:
        """For every part the segments in which something is."""
        return [(part, self._segments[number]) for part in self._parts for number in used_in(part.segment)]

    @lazy
    def members(self) -> list[tuple[Part, Segment, Ints]]:
        """`used`, and which prompts are in each."""
        return [
            (part, self._segments[number], members)
            for part in self._parts
            for number, members in by_segment(part.segment)
        ]

    @lazy
    def held(self) -> list[tuple[Segment, Ints]]:
        """Every segment in which something is, with the prompts of it that are."""
        return [(segment, part.prompt[members]) for part, segment, members in self.members]

    @lazy
    def are_elsewhere(self) -> bool:
        """Whether some of the segments stand for objects that lie elsewhere."""
        return any(segment.source is not None for segment in self._segments)

    @lazy
    def elsewhere(self) -> list[tuple[Part, Segment, Ints, Ints]]:
        """`ranges_elsewhere` of all prompts."""
        return list(self.ranges_elsewhere(self.every))

    @lazy
    def pieces(self) -> list[Piece]:
        """Where all prompts are and go, looked at once: neighbours that stay neighbours lie in pieces of their own."""
        found = []
        for part in self._parts:
            number, prompt = part.segment, part.prompt
            cuts = ((number[1:] != number[:-1]) | (prompt[1:] != prompt[:-1] + 1)).nonzero()[0] + 1
            if _LONG_RUN * (len(cuts) + 1) <= self._n:
                found += [
                    Piece(self._segments[part.segment[run[0]]], part.sites, part.prompt[run], run, straight=True)
                    for run in np.split(self.every, cuts)
                ]
            else:
                found += [
                    Piece(segment, part.sites, part.prompt[members], members)
                    for mine, segment, members in self.members
                    if mine is part
                ]
        return found

    def by_segment(self, chosen: Ints) -> Iterator[tuple[Part, Segment, Ints]]:
        """For every part the segments in which prompts `chosen` lie, all found, and which of these do."""
        if self.is_every(chosen):
            yield from self.members
            return
        everything = np.arange(len(chosen))
        for part in self._parts:
            for number, members in by_segment(part.segment[chosen], everything):
                yield part, self._segments[number], members

    def ranges_elsewhere(self, chosen: Ints) -> Iterator[tuple[Part, Segment, Ints, Ints]]:
        """For every part the segments that lie elsewhere, and the rows of prompts `chosen` there: where each run of
        neighbours begins and ends. Without what no segment has."""
        for part, segment, members in self.by_segment(chosen):
            prompts = part.prompt[chosen[members]]
            if segment.source is not None and prompts.min() >= 0 and prompts.max() < segment.info.prompts:
                cuts = (prompts[1:] != prompts[:-1] + 1).nonzero()[0]
                first, last = prompts[np.append(0, cuts + 1)], prompts[np.append(cuts, -1)]
                yield part, segment, segment.row_offset[first], segment.row_offset[last + 1]
