"""Rows out of the very bytes that came from elsewhere, before these are in any file."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store import memory
from actcache.store.container import Tensor
from actcache.store.keys import Ints
from actcache.store.statistics import as_float, is_float

# Arrays of so many bytes lie together in memory: one by one they take several times as long to fill.
_TOGETHER = memory.HUGE


class Taker(Protocol):
    """What takes bytes of an object to where they are wanted."""

    def take(self, start: int, data: memoryview) -> None:
        """Copy what is wanted of `data`, which begins at `start` of the object."""


class Targets:
    """Where bytes of an object are wanted: those from ``starts[i]`` on in ``outs[i]``, uint8, as many as fit."""

    def __init__(self, starts: Sequence[int], outs: Sequence[npt.NDArray[np.uint8]]) -> None:
        order = sorted(range(len(starts)), key=starts.__getitem__)
        self._starts = [starts[i] for i in order]
        self._outs = [outs[i] for i in order]
        self._longest = max(map(len, outs), default=0)

    def take(self, start: int, data: memoryview) -> None:
        """Copy what is wanted of `data`, which begins at `start` of the object."""
        some, stop = np.frombuffer(data, np.uint8), start + len(data)
        # There may be one for each of many prompts, and `data` is for few of them.
        low, high = bisect_right(self._starts, start - self._longest), bisect_left(self._starts, stop)
        for begin, out in zip(self._starts[low:high], self._outs[low:high], strict=True):
            end = begin + len(out)
            if begin >= start and end <= stop:
                out[:] = some[begin - start : end - start]
            elif end > start:
                a, b = max(start, begin), min(stop, end)
                out[a - begin : b - begin] = some[a - start : b - start]


class Rows:
    """Rows ``starts[i]:stops[i]`` of a matrix, wanted as ``into[places[i]]``, arrays ``[T, D]`` that may be written to.

    They are there from the beginning, and filled as something comes. Neighbours lie together in memory, 2 MB of them or
    so: they are copied together, and whoever keeps one array keeps little else. One that is as large lies alone.
    """

    def __init__(self, tensor: Tensor, starts: Ints, stops: Ints, places: Ints, into: list[npt.NDArray[Any]]) -> None:
        dim = tensor.shape[1]
        width = dim * tensor.dtype.itemsize
        order = np.argsort(starts, kind="stable")
        starts, stops, places = starts[order], stops[order], places[order]
        ends = np.cumsum(stops - starts)
        begins = ends - (stops - starts)
        sources: list[int] = []
        outs: list[npt.NDArray[np.uint8]] = []
        for some in _runs(_together(begins, ends, _rows_together(int(ends[-1]), width)), 0):
            first = int(begins[some.start])
            made = memory.empty((int(ends[some.stop - 1]) - first, dim), tensor.dtype)
            flat = made.reshape(-1).view(np.uint8)
            each = zip(
                (begins[some] - first).tolist(), (ends[some] - first).tolist(), places[some].tolist(), strict=True
            )
            for a, b, place in each:
                into[place] = made[a:b]
            # Where each row begins beside where it goes: neighbours there that are neighbours here.
            for run in _runs(starts[some] - begins[some], some.start):
                a, b = (int(begins[run.start]) - first) * width, (int(ends[run.stop - 1]) - first) * width
                sources.append(tensor.start + int(starts[run.start]) * width)
                outs.append(flat[a:b])
        self._targets = Targets(sources, outs)

    def take(self, start: int, data: memoryview) -> None:
        """Copy what is wanted of `data`, which begins at `start` of the object."""
        self._targets.take(start, data)


def _rows_together(rows: int, width: int) -> int:
    """How many of so many `rows` of `width` bytes lie together: as many in each part, of about `_TOGETHER` bytes."""
    return max(1, -(-rows // max(1, round(rows * width / _TOGETHER))))


def _together(begins: Ints, ends: Ints, rows: int) -> Ints:
    """A number for each array ``begins[i]:ends[i]``, the same for neighbours that lie together: less than twice so many
    `rows`, or one array that has as many by itself."""
    blocks, long = begins // rows, ends - begins >= rows
    apart = np.diff(blocks, prepend=blocks[:1]) != 0
    apart |= long
    apart[1:] |= long[:-1]
    return np.cumsum(apart)


def _runs(values: Ints, first: int) -> Iterator[slice]:
    """Neighbours that are equal, as slices, of which the first begins at `first`."""
    for a, b in pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]):
        yield slice(first + a, first + b)


@dataclass
class Received:
    """Bytes of one object that have come and are right: where each run of them begins, and the run. Threads fill it."""

    runs: list[tuple[int, memoryview]] = field(default_factory=list)
    targets: Taker | None = None
    """Where all of them are wanted as they are; then they are there, too, as soon as they have come."""

    @property
    def nbytes(self) -> int:
        return sum(len(data) for _, data in self.runs)

    def add(self, start: int, data: memoryview) -> None:
        self.runs.append((start, data.toreadonly()))
        if self.targets is not None:
            self.targets.take(start, data)

    def rows(self, tensor: Tensor) -> ReceivedRows:
        """What is here of a matrix."""
        return ReceivedRows(self, tensor)


class ReceivedRows:
    """The rows ``[*, D]`` of one matrix that were received, as read-only views wherever a row is in one run."""

    def __init__(self, received: Received, tensor: Tensor) -> None:
        self._dtype, self._dim = tensor.dtype, tensor.shape[1]
        width = self._dim * tensor.dtype.itemsize
        runs = sorted(
            (
                (start - tensor.start, data)
                for start, data in received.runs
                if start < tensor.stop and start + len(data) > tensor.start
            ),
            key=lambda run: run[0],
        )
        self._firsts: list[int] = []
        self._parts: list[npt.NDArray[Any]] = []
        rest = np.empty(0, np.uint8)
        behind = 0
        for start, data in runs:
            begin, end = max(start, 0), min(start + len(data), tensor.nbytes)
            some = np.frombuffer(data, np.uint8)[begin - start : end - start]
            if begin != behind:
                rest = rest[:0]
            # The row that begins in what came before, if there is one.
            behind = end
            if len(rest):
                missing = width - len(rest)
                rest = np.concatenate([rest, some[:missing]])
                if len(rest) < width:
                    continue
                self._add((begin + missing) // width - 1, rest)
                begin, some = begin + missing, some[missing:]
            begin, some = begin + -begin % width, some[-begin % width :]
            count = len(some) // width
            if count:
                self._add(begin // width, some[: count * width])
            rest = some[count * width :]

    def _add(self, first: int, data: npt.NDArray[np.uint8]) -> None:
        # A backend may give bytes that begin anywhere.
        part = np.require(data.view(self._dtype).reshape(-1, self._dim), requirements="A")
        part.flags.writeable = False
        self._firsts.append(first)
        self._parts.append(part)

    def between(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop`, a view where they lie in one run. NotCachedError where some are not here."""
        k = bisect_right(self._firsts, start) - 1
        if k >= 0:
            first, part = self._firsts[k], self._parts[k]
            if stop - first <= len(part):
                return part[start - first : stop - first]
        if start == stop:
            return np.empty((0, self._dim), self._dtype)
        found = []
        at = start
        while k >= 0 and k < len(self._parts) and at < stop:
            first, part = self._firsts[k], self._parts[k]
            if not first <= at < first + len(part):
                break
            found.append(part[at - first : stop - first])
            at += len(found[-1])
            k += 1
        if at < stop:
            raise NotCachedError(f"row {at} was not received: ask again")
        whole = np.concatenate(found)
        whole.flags.writeable = False
        return whole

    def gather(self, rows: Ints, out: npt.NDArray[Any], at: Ints) -> None:
        """``out[at] = rows``; NotCachedError where some are not here."""
        if not len(rows):
            return
        firsts = np.array(self._firsts, np.int64)
        part_of = np.searchsorted(firsts, rows, "right") - 1
        stops = firsts + np.array([len(part) for part in self._parts], np.int64)
        if part_of.min() < 0 or (rows >= stops[part_of]).any():
            raise NotCachedError("rows that are asked for were not received: ask again")
        # Neighbours that go to neighbours in one copy.
        cuts = np.flatnonzero((np.diff(part_of) != 0) | (np.diff(rows) != 1) | (np.diff(at) != 1)) + 1
        if 4 * len(cuts) < len(rows):
            for a, b in pairwise([0, *cuts.tolist(), len(rows)]):
                k = int(part_of[a])
                low, place = int(rows[a]) - self._firsts[k], int(at[a])
                out[place : place + b - a] = self._as(self._parts[k][low : low + b - a], out.dtype)
            return
        order = np.argsort(part_of, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(part_of[order])) + 1):
            k = int(part_of[mine[0]])
            out[at[mine]] = self._as(self._parts[k][rows[mine] - self._firsts[k]], out.dtype)

    @staticmethod
    def _as(part: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return as_float(part) if part.dtype != dtype and is_float(part.dtype) else part
