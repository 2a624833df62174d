"""Segments that an eviction may take: how cold they are, and what their prompts take on disk."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints, Mask
from actcache.store.lazy import lazy
from actcache.store.records import SegmentInfo

# What a segment holds beside its rows, roughly: altogether, for each column, and for each number in a row.
_HEADER, _PER_COLUMN, _PER_NUMBER = 4 << 10, 512, 16


class Victim:
    """A segment that may go. `heat`: when half of its prompts had been read for the last time, in nanoseconds."""

    def __init__(self, index: SpaceIndex, number: int, info: SegmentInfo, heat: int) -> None:
        self.index, self.number, self.info, self.heat = index, number, info, heat

    @lazy
    def live(self) -> Mask:
        with self.index.lock:
            return self.index.untombed(self.number)

    @lazy
    def times(self) -> Ints:
        with self.index.lock:
            return self.index.reads.times(self.info)

    @lazy
    def nbytes(self) -> Ints:
        """Roughly what each prompt takes on disk."""
        with self.index.lock:
            segment = self.index.open(self.number)
        if segment is None:
            return np.zeros(self.info.prompts, np.int64)
        rows = np.diff(segment.row_offset)
        return np.asarray(rows * (self.info.size / max(1, int(rows.sum())))).astype(np.int64)

    @property
    def fixed(self) -> int:
        """Roughly what a copy takes on disk however few prompts it has."""
        return _HEADER + sum(_PER_COLUMN + _PER_NUMBER * dim for _, _, dim in self.info.columns)

    def copied(self, threshold: float) -> int:
        """Roughly what a copy of `hot` takes on disk."""
        hot = self.hot(threshold)
        return int(self.nbytes[hot].sum()) + self.fixed if hot.any() else 0

    def hot(self, threshold: float) -> Mask:
        """Live prompts that were read after `threshold`."""
        return np.asarray(self.live & (self.times > threshold))

    def stays_whole(self, keep: Mask) -> bool:
        """Whether `keep` is all that can be read of it, so that nothing has to be written anew."""
        return bool(keep.any() and keep[self.live].all())


class Newer(Victim):
    """A segment that a later version has written: nothing is known of it but its size and age."""

    def __init__(self, index: SpaceIndex, name: str) -> None:
        size = age = 0
        with contextlib.suppress(OSError):
            status = index.path(name).stat()
            size, age = status.st_size, status.st_mtime_ns
        nothing: npt.NDArray[np.uint8] = np.empty((0, 16), np.uint8)
        info = SegmentInfo(name, index.folder.name, "", (), 0, 0, size, age, "", {}, nothing, nothing)
        super().__init__(index, -1, info, age)

    live = lazy(lambda self: np.empty(0, bool))
    times = lazy(lambda self: np.empty(0, np.int64))
    nbytes = lazy(lambda self: np.empty(0, np.int64))
