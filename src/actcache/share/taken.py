"""What is taken from a dataset: prompts and what its index says of them, some at a time, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from actcache.share.rows import Ints
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.spill import Spill


@dataclass(frozen=True)
class Piece:
    """Prompts as a store takes them: their `rows` in the index (ascending), and what it says of some of them."""

    rows: Ints
    table: PromptTable
    said: list[Records]
    results: list[Records]

    def kept(self, spill: Spill) -> Piece:
        """The same in files."""
        return Piece(
            self.rows, _kept(self.table, spill), [_kept_records(one, spill) for one in self.said],
            [_kept_records(one, spill) for one in self.results],
        )  # fmt: skip


class Taken:
    """All `pieces`, read and found to be right before anything is stored; they lie in files of `spill`."""

    def __init__(self, pieces: Iterable[Piece], spill: Spill) -> None:
        self._pieces = [piece.kept(spill) for piece in pieces]
        self._ends = np.cumsum([len(piece.rows) for piece in self._pieces], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._pieces else 0

    def together(self, most: int) -> Iterator[Piece]:
        """All of them, so many prompts together at most, or one piece."""
        some: list[Piece] = []
        for piece in self._pieces:
            if some and sum(len(one.rows) for one in some) + len(piece.rows) > most:
                yield _joined(some)
                some = []
            some.append(piece)
        if some:
            yield _joined(some)

    def select(self, members: Ints) -> PromptTable:
        """Some of the prompts, by their numbers, in that order."""
        owner = np.searchsorted(self._ends, members, side="right")
        tables, order = [], []
        for number in np.unique(owner).tolist():
            mine = np.flatnonzero(owner == number)
            piece = self._pieces[number]
            tables.append(piece.table.select(members[mine] - (self._ends[number] - len(piece.rows))))
            order.append(mine)
        if not tables:
            return PromptTable.build([])
        return PromptTable.concatenate(tables).select(np.argsort(np.concatenate(order), kind="stable"))


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        np.concatenate([piece.rows for piece in pieces]), PromptTable.concatenate([piece.table for piece in pieces]),
        [one for piece in pieces for one in piece.said], [one for piece in pieces for one in piece.results],
    )  # fmt: skip


def _kept_records(records: Records, spill: Spill) -> Records:
    prompts = _kept(records.prompts, spill)
    data = {site: spill.keep(rows) for site, rows in records.data.items()}
    return replace(records, prompts=prompts, row_offset=spill.keep(records.row_offset), data=data)


def _kept(table: PromptTable, spill: Spill) -> PromptTable:
    keep = spill.keep
    return PromptTable(
        keep(table.token_ids), keep(table.token_offset), keep(table.kind), keep(table.text), keep(table.text_offset),
        table.text_context, keep(table.token_key), keep(table.text_key),
    )  # fmt: skip
