"""When the prompts of a space were last read: gathered in memory, written to this host's index every few seconds."""

from __future__ import annotations

import time

import numpy as np

from actcache.store.catalog import Catalog, median
from actcache.store.keys import Ints
from actcache.store.records import SegmentInfo
from actcache.store.spill import Spill

_WRITE_EVERY_S = 5.0


class LastReads:
    """Times in nanoseconds, for each prompt of a segment. Whoever uses it holds the lock of the space's index."""

    def __init__(self, catalog: Catalog, space: str) -> None:
        self._catalog = catalog
        self._spill = Spill(catalog.path.parent)
        self._space = space
        self._times: dict[str, tuple[SegmentInfo, Ints]] = {}
        self._written = -_WRITE_EVERY_S

    def note(self, info: SegmentInfo, prompts: Ints | int) -> None:
        """These prompts of a segment are read now."""
        if info.name not in self._times:
            self._times[info.name] = info, self._spill.beside(info.prompts, np.int64)
        self._times[info.name][1][prompts] = time.time_ns()
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what was noted; without an index on disk it stays in memory."""
        self._written = time.monotonic()
        if self._times and self._catalog.note_reads(self._space, dict(self._times.values())):
            self._times.clear()

    def forget(self, name: str) -> None:
        """The segment is gone."""
        self._times.pop(name, None)

    def inherit(self, info: SegmentInfo, times: Ints) -> None:
        """The prompts of a new segment were copied from others, where they had been read at `times`."""
        if not self._catalog.note_reads(self._space, {info: times}):
            self._times[info.name] = info, times

    def times(self, info: SegmentInfo) -> Ints:
        """When each prompt of a segment was last read, or written if that is all that is known."""
        latest = np.zeros(info.prompts, np.int64)
        noted = self._times.get(info.name)
        for known in (
            None if noted is None else noted[1],
            self._catalog.read_times(self._space, info.name, info.prompts),
        ):
            if known is not None:
                latest = np.maximum(latest, known)
        return np.where(latest > 0, latest, info.created_ns)

    def medians(self) -> dict[str, int]:
        """The median of `times`, by segment, of those that were read or merged since the index was made."""
        self.write()
        found = self._catalog.read_medians(self._space)
        found.update({name: median(self.times(info)) for name, (info, _) in self._times.items()})
        return found
