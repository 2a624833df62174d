"""Prompts that stay where they are stored: read some at a time, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.store.distinct import Distinct
from actcache.store.prompts import CHAT, IDS, TEXT, PromptTable
from actcache.store.spill import Spill

if TYPE_CHECKING:
    from actcache.store.asking import Located
    from actcache.store.placement import Placement

Ints = npt.NDArray[np.int64]
_AT_ONCE = 8192


class StoredPrompts(Sequence[Any]):
    """All prompts of a space, each once: as texts and chats where these are known, as token ids otherwise."""

    def __init__(self, places: Placement, spill: Spill) -> None:
        self._places, self._spill = places, spill
        # The same text under two tokenizers is one.
        known = Distinct(len(places), spill)
        for start in range(0, len(places), _AT_ONCE):
            table = places.prompts(np.arange(start, min(start + _AT_ONCE, len(places))))
            digests = b"".join(xxhash.xxh3_128_digest(_identity(table, i)) for i in range(len(table)))
            known.add(np.frombuffer(digests, np.uint8).reshape(-1, 16))
        numbers = spill.flatnonzero(known.first())
        self._count = len(numbers)
        # None: all of them.
        self._numbers: Ints | None = None if self._count == len(places) else numbers

    def __len__(self) -> int:
        return self._count

    def chosen(self, at: Ints) -> StoredPrompts:
        """Those at `at`, in that order."""
        other = copy(self)
        other._count, other._numbers = len(at), at if self._numbers is None else self._spill.keep(self._numbers[at])
        return other

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if not isinstance(at, slice):
            at = range(self._count)[at]
            return self[at : at + 1][0]
        numbers = np.arange(*at.indices(self._count)) if self._numbers is None else self._numbers[at]
        return _given(self._places.prompts(numbers))


class StoredTable:
    """What is stored of located prompts themselves, in an order of their own.

    `all_texts`, `any_ids`: whether all are texts, and whether the token ids of some are known; `text_context` as in
    `PromptTable`, "" where there are several.
    """

    def __init__(self, located: Located, bare: npt.NDArray[np.bool_] | None = None) -> None:
        """`bare`: which of the prompts were given as token ids, and are no texts, whatever is stored of them."""
        self._placements = located.placements
        self._owner, self._local, self._bare = located.owner, located.local, bare
        self._order: npt.NDArray[np.integer[Any]] | None = None
        self.all_texts, self.any_ids = True, False
        contexts = set()
        for _, table in self.parts():
            self.all_texts = self.all_texts and bool((table.kind == TEXT).all())
            self.any_ids = self.any_ids or any(ids is not None for ids in table.ids)
            if table.kind.any():
                contexts.add(table.text_context)
        self.text_context = contexts.pop() if len(contexts) == 1 else ""

    def __len__(self) -> int:
        return len(self._owner)

    def in_order(self, order: npt.NDArray[np.integer[Any]]) -> StoredTable:
        """The same prompts in another order."""
        other = copy(self)
        other._order = order
        return other

    def part(self, start: int, stop: int) -> PromptTable:
        """The prompts `start` to `stop`."""
        at = slice(start, stop) if self._order is None else self._order[start:stop]
        table = _prompts_at(self._placements, self._owner[at], self._local[at])
        return table if self._bare is None else table.by_ids(self._bare[at])

    def digest(self) -> bytes:
        """Of which prompts were given as token ids: the same rows are published with other prompts then."""
        return b"" if self._bare is None or not self._bare.any() else np.packbits(self._bare).tobytes()

    def parts(self) -> Iterator[tuple[int, PromptTable]]:
        """All of them, some at a time, with the number of the first."""
        for start in range(0, len(self), _AT_ONCE):
            yield start, self.part(start, min(start + _AT_ONCE, len(self)))


def of_other_tokens(one: Located, other: Located, *, whole: bool) -> npt.NDArray[np.bool_]:
    """Which prompts `other` knows with other token ids than `one`, as a text is that two tokenizers have read.

    Ids that are not known may be the same, unless `whole` sequences of both have another number of them.
    """
    apart = np.zeros(len(one.owner), bool)
    for start in range(0, len(apart), _AT_ONCE):
        at = start + np.flatnonzero(other.found[start : start + _AT_ONCE].all(axis=1))
        a, b = (_prompts_at(located.placements, located.owner[at], located.local[at]) for located in (one, other))
        known = [x is not None and y is not None for x, y in zip(a.ids, b.ids, strict=True)]
        differ = np.array(known, bool) | ((a.lengths != b.lengths) & whole)
        apart[at] = differ & (a.token_key != b.token_key).any(axis=1)
    return apart


def _prompts_at(placements: Sequence[Placement], owner: npt.NDArray[Any], numbers: npt.NDArray[Any]) -> PromptTable:
    """The prompts `numbers` of the placements `owner`."""
    tables, order = [], []
    for number, placement in enumerate(placements):
        members = np.flatnonzero(owner == number)
        if len(members):
            local = numbers[members]
            # As they lie; one that is there twice is so here.
            ascending = np.argsort(local, kind="stable")
            tables.append(placement.prompts(local[ascending]))
            order.append(members[ascending])
    if not tables:
        return PromptTable.build([])
    return PromptTable.concatenate(tables, mixed=True).select(np.argsort(np.concatenate(order), kind="stable"))


def _given(table: PromptTable) -> list[Any]:
    """The prompts of a table as people give them."""
    ends, found = table.token_offset.tolist(), []
    for i, (kind, text) in enumerate(zip(table.kind.tolist(), table.texts, strict=True)):
        if kind == IDS or text is None:
            found.append(table.token_ids[ends[i] : ends[i + 1]].tolist())
        else:
            found.append(json.loads(text) if kind == CHAT else text)
    return found


def _identity(table: PromptTable, i: int) -> bytes:
    """What makes a prompt another one than others, whatever became of it."""
    kind = int(table.kind[i])
    if kind == IDS:
        return bytes([kind]) + table.tokens(i).tobytes()
    return bytes([kind]) + table.text[table.text_offset[i] : table.text_offset[i + 1]].tobytes()
