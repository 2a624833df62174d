"""Prompts that stay where they are stored: read some at a time, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.store.prompts import CHAT, IDS, PromptTable

if TYPE_CHECKING:
    from actcache.store.asking import Located
    from actcache.store.placement import Placement

Ints = npt.NDArray[np.int64]
_AT_ONCE = 8192


class StoredPrompts(Sequence[Any]):
    """All prompts of a space, each once: as texts and chats where these are known, as token ids otherwise."""

    def __init__(self, places: Placement) -> None:
        self._places = places
        # The same text under two tokenizers is one.
        keys = [np.empty((0, 2), np.uint64)]
        for start in range(0, len(places), _AT_ONCE):
            table = places.prompts(np.arange(start, min(start + _AT_ONCE, len(places))))
            digests = b"".join(xxhash.xxh3_128_digest(_identity(table, i)) for i in range(len(table)))
            keys.append(np.frombuffer(digests, np.uint64).reshape(-1, 2))
        words = np.concatenate(keys)
        order = np.lexsort((words[:, 1], words[:, 0]))
        first = np.ones(len(order), bool)
        first[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
        self._numbers: Ints = np.sort(order[first])

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return _given(self._places.prompts(self._numbers[at]))
        return _given(self._places.prompts(self._numbers[[at]]))[0]


class StoredTable:
    """What is stored of located prompts themselves, in an order of their own.

    `kind` uint8 ``[n]``, `lengths` int32 ``[n]`` (tokens), `known` bool ``[n]``: whether these are known;
    `text_context` as in `PromptTable`, "" where there are several.
    """

    def __init__(self, located: Located, bare: npt.NDArray[np.bool_] | None = None) -> None:
        """`bare`: which of the prompts were given as token ids, and are no texts, whatever is stored of them."""
        self._placements = located.placements
        self._owner, self._local, self._bare = located.owner, located.local, bare
        count = len(self._owner)
        self.kind = np.zeros(count, np.uint8)
        self.lengths = np.zeros(count, np.int32)
        self.known = np.zeros(count, bool)
        contexts = set()
        for start, table in self.parts():
            stop = start + len(table)
            self.kind[start:stop] = table.kind
            self.lengths[start:stop] = table.lengths
            first = table.token_ids[np.minimum(table.token_offset[:-1], max(0, len(table.token_ids) - 1))]
            self.known[start:stop] = (table.lengths == 0) | (first >= 0) if len(table.token_ids) else True
            if table.kind.any():
                contexts.add(table.text_context)
        self.text_context = contexts.pop() if len(contexts) == 1 else ""

    def __len__(self) -> int:
        return len(self._owner)

    def select(self, order: Ints) -> StoredTable:
        """The prompts at `order`."""
        other = object.__new__(StoredTable)
        other._placements, other.text_context = self._placements, self.text_context
        other._owner, other._local = self._owner[order], self._local[order]
        other._bare = None if self._bare is None else self._bare[order]
        other.kind, other.lengths, other.known = self.kind[order], self.lengths[order], self.known[order]
        return other

    def part(self, start: int, stop: int) -> PromptTable:
        """The prompts `start` to `stop`."""
        tables, order = [], []
        for number, placement in enumerate(self._placements):
            members = np.flatnonzero(self._owner[start:stop] == number)
            if len(members):
                local = self._local[start:stop][members]
                # As they lie; one that is there twice is so here.
                ascending = np.argsort(local, kind="stable")
                tables.append(placement.prompts(local[ascending]))
                order.append(members[ascending])
        if not tables:
            return PromptTable.build([])
        table = PromptTable.concatenate(tables, mixed=True).select(np.argsort(np.concatenate(order), kind="stable"))
        return table if self._bare is None else table.by_ids(self._bare[start:stop])

    def parts(self) -> Iterator[tuple[int, PromptTable]]:
        """All of them, some at a time, with the number of the first."""
        for start in range(0, len(self), _AT_ONCE):
            yield start, self.part(start, min(start + _AT_ONCE, len(self)))


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
