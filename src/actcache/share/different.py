"""The prompts of an index, some at a time, and which rows are of the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.share.index import Index
from actcache.share.ours import KIND, KINDS
from actcache.share.rows import Ints
from actcache.share.values import Texts, codes_in, require_texts
from actcache.store.distinct import Distinct
from actcache.store.prompts import TEXT

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = "text"
AT_ONCE = 1 << 12
"""Rows of an index of which there are Python values at the same time."""


@dataclass(frozen=True)
class Some:
    """Rows of an index, from `start` on: the `kinds` uint8 ``[n]`` of their prompts, and their texts."""

    start: int
    kinds: npt.NDArray[np.uint8]
    texts: Texts

    def __len__(self) -> int:
        return len(self.kinds)

    def digests(self) -> npt.NDArray[np.uint8]:
        """What tells prompts apart, uint8 ``[n, 16]``. Whoever made the dataset could not choose two that agree."""
        pairs, which = np.unique(self.texts.codes * len(KINDS) + self.kinds, return_inverse=True)
        data = self.texts.encoded()
        made = [
            hashlib.blake2b(data[pair // len(KINDS)], digest_size=16, key=bytes([pair % len(KINDS) + 1])).digest()
            for pair in pairs.tolist()
        ]
        every: npt.NDArray[np.uint8] = np.frombuffer(b"".join(made), np.uint8).reshape(-1, 16)[which.ravel()]
        return every

    def keys(self) -> list[tuple[int, bytes]]:
        """Kind and encoded text of each."""
        texts = self.texts.encoded()
        return [(kind, texts[c]) for kind, c in zip(self.kinds.tolist(), self.texts.codes.tolist(), strict=True)]


def prompts_in(index: Index, start: int, batch: dict[str, pa.Array]) -> Some:
    """The prompts of a batch of the columns `columns_of`, which begins at row `start`."""
    texts = Texts(index, TEXTS, batch[TEXTS])
    _refuse_absent(index, TEXTS, texts.codes)
    if KIND not in batch:
        return Some(start, np.full(len(texts.codes), TEXT, np.uint8), texts)
    codes, names = codes_in(index, KIND, batch[KIND])
    _refuse_absent(index, KIND, codes)
    unknown = sorted(set(names) - set(KINDS))
    if unknown:
        raise index.wrong(f"column {KIND!r} names the kind {unknown[0]!r:.60}: expected {', '.join(KINDS)}")
    return Some(start, np.array([KINDS.index(name) for name in names], np.uint8)[codes], texts)


def columns_of(index: Index) -> list[str]:
    """The columns that say what the prompts are."""
    require_texts(index, TEXTS)
    if KIND not in index.columns:
        return [TEXTS]
    require_texts(index, KIND)
    return [TEXTS, KIND]


def in_steps(index: Index) -> Iterator[Some]:
    """All prompts of an index."""
    start = 0
    for batch in index.batches(columns_of(index), most_rows=AT_ONCE):
        yield (some := prompts_in(index, start, batch))
        start += len(some)


class Different:
    """Which rows of an index are of the same prompt; what there is of each row need not be in memory."""

    def __init__(self, index: Index) -> None:
        self._index = index

    @cached_property
    def _known(self) -> Distinct:
        known = Distinct(self._index.num_rows, self._index.spill)
        for some in in_steps(self._index):
            known.add(some.digests())
        return known

    def first_rows(self) -> Ints:
        """The first row of each different prompt, ascending."""
        return self._index.spill.flatnonzero(self._known.first())

    def contradicted(self, said: npt.NDArray[Any], among: Ints | None = None) -> Iterator[tuple[Ints, Ints]]:
        """The rows of which something else is `said`, an array ``[rows]``, than of the first row of their prompt, and
        these first rows; `among`: of the prompts of these rows alone."""
        wanted = None
        if among is not None:
            wanted = self._index.spill.zeros(self._index.num_rows, bool)
            wanted[among] = True
        for rows, first in self._known.alike():
            wrong = said[rows] != said[first]
            if wanted is not None:
                wrong &= np.isin(first, first[wanted[rows]])
            if wrong.any():
                yield rows[wrong], first[wrong]

    def text(self, row: int) -> str:
        """The text of a row."""
        some = next(some for some in in_steps(self._index) if row < some.start + len(some))
        return some.texts.some(some.texts.codes[[row - some.start]])[0]


def _refuse_absent(index: Index, name: str, codes: Ints) -> None:
    if (codes < 0).any():
        count = sum(batch[name].null_count for batch in index.batches([name]))
        raise index.wrong(f"column {name!r} has no value for {count:,} prompts")
