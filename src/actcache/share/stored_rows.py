"""Reading what is stored in the order of a dataset, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.store.by_segment import by_segment
from actcache.store.dtypes import common_dtype
from actcache.store.spill import Spill

if TYPE_CHECKING:
    from actcache.store.asking import Located

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Order = npt.NDArray[np.integer[Any]]
_CHUNK_BYTES = 2 << 20
_MOST_ROWS = 1 << 13
_AT_ONCE = 1 << 16


class Rows:
    """The rows of one stored site, by number of prompt in the order of the dataset."""

    def __init__(
        self, located: Located, site: str, order: Order, spill: Spill, *, whole: bool, like: Rows | None = None
    ) -> None:
        """`order`: which of the `located` prompts comes first, and so on. `like`: another site of the same ones."""
        self.site, self.whole, self._spill = site, whole, spill
        self._placements = [placement.of_site(site) for placement in located.placements]
        # Of all sites the same arrays: there are many of these, and of prompts more.
        self._owner, self._local, self._order = located.owner, located.local, order
        first = {n: _first(located.owner, n, order) for n in range(len(self._placements))}
        used = {n: self._placements[n] for n, at in first.items() if at is not None}
        self.dtype = common_dtype(p.dtype for p in used.values())
        self.width = next(iter(width for p in used.values() for width in p.widths))
        self.stored_as = sorted({p.stored_as(int(self._local[first[n]]))[0] for n, p in used.items()})
        self._loaded: Array | None = None
        self._lengths: Ints | None = None
        self._like = like

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def _step(self) -> int:
        """Rows of a piece. Where they are takes room as well, however narrow they are."""
        return max(1, min(_CHUNK_BYTES // max(1, self.row_bytes), _MOST_ROWS))

    def lengths(self) -> Ints:
        """How many rows each prompt has, int64 ``[n]``."""
        if self._lengths is not None:
            return self._lengths
        if self._like is not None:
            return self._like.lengths()
        found = self._spill.full(len(self._order), 1, np.int64)
        for start in range(0, len(found), _AT_ONCE):
            members = np.arange(start, min(start + _AT_ONCE, len(found)))
            for number, mine, local in self._places(members) if self.whole else ():
                placement = self._placements[number]
                segment, prompt = placement.where(self.site)
                for slot, some in by_segment(segment[local], np.arange(len(local))):
                    offset, prompts = placement.segments[slot].row_offset, prompt[local[some]]
                    found[members[mine[some]]] = offset[prompts + 1] - offset[prompts]
        self._lengths = found
        return found

    def _places(self, members: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """Which of the prompts `members` are in which placement, and their numbers there."""
        at = self._order[members]
        owner, local = self._owner[at], self._local[at]
        for number in range(len(self._placements)):
            mine = np.flatnonzero(owner == number)
            if len(mine):
                yield number, mine, local[mine]

    def load(self, workers: int) -> None:
        """Read everything there is of this site into memory, in the order in which it lies."""
        count = len(self._order)
        if self.whole:
            lengths = self.lengths()
            ends = np.concatenate([[0], np.cumsum(lengths)])
            made = np.empty((int(ends[-1]), self.width), self.dtype)

            def fill(members: Ints) -> None:
                for i, rows in zip(members.tolist(), self._all(members), strict=True):
                    made[ends[i] : ends[i + 1]] = rows

            self._ends = ends
        else:
            made = np.empty((count, self.width), self.dtype)

            def fill(members: Ints) -> None:
                made[members] = self._pooled(members)

        # Neighbours on disk are read one after the other, wherever they go.
        stored = np.lexsort((self._local[self._order], self._owner[self._order]))
        parts = [part for part in np.array_split(stored, max(1, min(workers * 4, count))) if len(part)]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(fill, parts))
        self._loaded = made

    def forget(self) -> None:
        """Give back what `load` took."""
        self._loaded = None

    def one_each(self, start: int, stop: int) -> Iterator[Array]:
        """The row of each prompt, of full sequences that of its last token, in pieces ``[k, D]``."""
        step = self._step
        for a in range(start, stop, step):
            members = np.arange(a, min(a + step, stop))
            if self._loaded is not None:
                yield self._loaded[self._ends[members + 1] - 1] if self.whole else self._loaded[members]
            elif self.whole:
                yield np.stack([rows[-1] for rows in self._all(members)]).astype(self.dtype, copy=False)
            else:
                yield self._pooled(members)

    def all_but_last(self, start: int, stop: int) -> Iterator[Array]:
        """The rows of all tokens but the last, prompt after prompt, in pieces ``[k, D]``."""
        ends = np.cumsum(self.lengths()[start:stop])
        step = self._step
        a = 0
        while a < stop - start:
            before = int(ends[a - 1]) if a else 0
            b = max(a + 1, int(np.searchsorted(ends, before + step, side="right")))
            members = np.arange(start + a, start + b)
            if self._loaded is not None:
                rows = [self._loaded[self._ends[i] : self._ends[i + 1]] for i in members.tolist()]
            else:
                rows = self._all(members)
            yield np.concatenate([one[:-1] for one in rows]).astype(self.dtype, copy=False)
            a = b

    def of(self, members: Ints) -> Array:
        """The rows of some prompts, one each, ``[k, D]``."""
        return self._pooled(members)

    def all_of(self, member: int) -> Array:
        """All rows of a prompt, ``[T, D]``."""
        return self._all(np.array([member]))[0]

    def _pooled(self, members: Ints) -> Array:
        out = np.empty((len(members), 1, self.width), self.dtype)
        for number, mine, local in self._places(members):
            self._placements[number].take(out, index=local, at=mine)
        return out[:, 0]

    def _all(self, members: Ints) -> list[Array]:
        found: list[Any] = [None] * len(members)
        for number, mine, local in self._places(members):
            for at, (rows,) in zip(mine.tolist(), self._placements[number].all_rows(local), strict=True):
                found[at] = rows
        return found


def _first(owner: npt.NDArray[np.int32], number: int, order: Order) -> int | None:
    """The first prompt of `order` that is in a placement."""
    for start in range(0, len(order), _AT_ONCE):
        at = order[start : start + _AT_ONCE]
        mine = np.flatnonzero(owner[at] == number)
        if len(mine):
            return int(at[mine[0]])
    return None
