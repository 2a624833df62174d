"""Prompts that were located some at a time, as if they had been located together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.mapping import Segment
from actcache.store.placement import Placement
from actcache.store.places import Part
from actcache.store.spill import Spill


class Joining:
    """Placements of the same sites become few: of those whose sites lie together in the same way the prompts follow one
    another. What is said of each prompt lies in files."""

    def __init__(self, sites: Sequence[str], layout: str, spill: Spill) -> None:
        self._sites, self._layout, self._spill = sites, layout, spill
        self._alike: dict[tuple[tuple[int, ...], ...], _Joined] = {}

    def add(self, placement: Placement) -> tuple[int, int]:
        """Which of the few `placement` becomes part of, and after how many prompts."""
        form = tuple(part.sites for part in placement._parts)
        if form not in self._alike:
            self._alike[form] = _Joined(len(self._alike), form, self._spill)
        joined = self._alike[form]
        return joined.number, joined.add(placement)

    def placements(self) -> list[Placement]:
        """The few."""
        return [joined.placement(self._sites, self._layout) for joined in self._alike.values()]


class _Joined:
    """What becomes one placement; `form`: which sites lie together."""

    def __init__(self, number: int, form: tuple[tuple[int, ...], ...], spill: Spill) -> None:
        self.number, self._form = number, form
        self._slots: dict[str, int] = {}
        self._segments: list[Segment] = []
        self._where = [(_Growing(np.int32, spill), _Growing(np.int64, spill)) for _ in form]
        self._found = _Growing(np.bool_, spill)

    def add(self, placement: Placement) -> int:
        """After how many prompts its own come."""
        begin = self._found.count
        for segment in placement._segments:
            if self._slots.setdefault(str(segment.path), len(self._segments)) == len(self._segments):
                self._segments.append(segment)
        # Those that were not found are at -1, the last.
        slots = np.array([*(self._slots[str(segment.path)] for segment in placement._segments), -1], np.int32)
        for (segments, prompts), part in zip(self._where, placement._parts, strict=True):
            segments.add(slots[part.segment])
            prompts.add(part.prompt)
        self._found.add(placement.found)
        return begin

    def placement(self, sites: Sequence[str], layout: str) -> Placement:
        parts = [
            Part(mine, segments.array, prompts.array)
            for mine, (segments, prompts) in zip(self._form, self._where, strict=True)
        ]
        found = self._found.array
        return Placement(len(found), sites, layout, parts, self._segments, found=found)


class _Growing:
    """An array to which is added."""

    def __init__(self, dtype: npt.DTypeLike, spill: Spill) -> None:
        self._spill = spill
        self._room = np.empty(0, dtype)
        self.count = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        stop = self.count + len(values)
        if stop > len(self._room):
            room = self._spill.empty(max(stop, 2 * len(self._room)), self._room.dtype)
            room[: self.count] = self.array
            self._room = room
        self._room[self.count : stop] = values
        self.count = stop

    @property
    def array(self) -> npt.NDArray[Any]:
        """What was added."""
        return self._room[: self.count]
