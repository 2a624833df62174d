"""Which rows of which shards are those of each prompt, as an index says in any version of the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError
from actcache.share.format import INDEX, LOGITS, ROUTER, TensorGroup
from actcache.share.index import Index

if TYPE_CHECKING:
    import pyarrow as pa

Ints = npt.NDArray[np.int64]
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Runs:
    """Rows of prompts as runs of neighbours: prompt `i` owns runs ``offset[i]:offset[i + 1]``, in the order of its
    tokens, and a run is `length` rows from `start` of a shard."""

    offset: Ints
    shard: Ints
    start: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.offset) - 1

    @staticmethod
    def of_each(shard: Ints, start: Ints, length: Ints) -> Runs:
        """One run for each prompt."""
        return Runs(np.arange(len(shard) + 1), shard, start, length)

    def take(self, prompts: Ints) -> Runs:
        """Those of some prompts, in their order."""
        counts = self.offset[prompts + 1] - self.offset[prompts]
        chosen = np.repeat(self.offset[prompts], counts) + _within(counts)
        return Runs(_offsets(counts), self.shard[chosen], self.start[chosen], self.length[chosen])

    @property
    def row_offset(self) -> Ints:
        """Prompt `i` has rows ``row_offset[i]:row_offset[i + 1]`` of all of them, one after the other."""
        return _offsets(self.length)[self.offset]

    def rows(self) -> tuple[Ints, Ints]:
        """Shard, and row in it, of every row."""
        if self.length.strides == (0,) and len(self.shard) and self.length[0] == 1:
            return self.shard, self.start
        return np.repeat(self.shard, self.length), np.repeat(self.start, self.length) + _within(self.length)


def one_row(index: Index, group: TensorGroup, *, first: bool = False) -> Runs:
    """The one row of each prompt: the pooled one, or of full sequences that of its last token, or of its `first`."""
    if group.pooling is None and (first or not _is_split(index, group)):
        every = every_row(index, group)
        at = every.offset[:-1] if first else every.offset[1:] - 1
        start = every.start[at] + (0 if first else every.length[at] - 1)
        return Runs.of_each(every.shard[at], start, np.ones(len(at), np.int64))
    if group.name == ROUTER:
        # No column says where these are: they lie in the order of the index.
        counts = np.array([shard.prompts for shard in group.shards], np.int64)
        return Runs.of_each(np.repeat(np.arange(len(counts)), counts), _within(counts), np.ones(counts.sum(), np.int64))
    shard, row = _columns(index, _place_columns(index, group))
    one = np.broadcast_to(np.int64(1), len(row))
    _check(group, shard, row, one, len(group.placed))
    return Runs.of_each(shard, row, one)


def every_row(index: Index, group: TensorGroup) -> Runs:
    """The rows of all tokens of each prompt, of a dataset of full sequences."""
    runs = _split(index, group) if _is_split(index, group) else _together(index, group)
    # Numbers as large as a dataset may say add up to more than 64 bits.
    wanted, held = int(runs.length.sum(dtype=np.float64)), sum(shard.rows for shard in group.shards)
    if wanted > held:
        # Each token has a row of its own; shared, a few rows could become any number.
        raise index.wrong(f"its prompts have {wanted:,} tokens, and the shards of {group.name} {held:,} rows")
    return runs


def _together(index: Index, group: TensorGroup) -> Runs:
    """Full sequences whose tokens lie together."""
    shard_column, _ = _place_columns(index, group)
    shard, start, length = _columns(index, (shard_column, "token_offset", "num_tokens"))
    _check(group, shard, np.zeros_like(shard), np.ones_like(shard), len(group.shards))
    if not _are_local(index, shard, start):
        # Counted through all shards: without those before.
        start = start - _offsets(np.array([s.rows for s in group.shards], np.int64))[shard]
    _check(group, shard, start, length, len(group.shards))
    return Runs.of_each(shard, start, length)


def _is_split(index: Index, group: TensorGroup) -> bool:
    return group.last_token_shards > 0 or "token_shard_ids" in index.columns


def _place_columns(index: Index, group: TensorGroup) -> tuple[str, str]:
    """The columns with shard and row: those of this tensor, or where it has none those of all."""
    name = "logits" if group.name == LOGITS else group.name
    own = f"shard_index_{name}", f"row_offset_{name}"
    return own if set(own) <= set(index.columns) else ("shard_index", "row_offset")


def _are_local(index: Index, shard: Ints, start: Ints) -> bool:
    """Whether token offsets count from the beginning of each shard. A dataset that was brought to 2.0 no longer says
    which version they were of: they are where they begin again in each shard."""
    said = index.description.token_offsets_are_local
    if said is not None:
        return said
    first = np.flatnonzero(np.diff(shard, prepend=-1) != 0)
    return bool((start[first] == 0).all())


def _columns(index: Index, names: tuple[str, ...]) -> list[Ints]:
    read = index.read(names)
    return [_whole_numbers(index, name, read[name]) for name in names]


def _whole_numbers(index: Index, name: str, column: Any) -> Ints:
    import pyarrow.types as types

    if not types.is_integer(column.type):
        raise index.wrong(f"column {name!r} holds {column.type}, expected whole numbers")
    if column.null_count:
        raise index.wrong(f"column {name!r} has no value for {column.null_count:,} prompts")
    return np.asarray(column.to_numpy()).astype(np.int64)


def _check(group: TensorGroup, shard: Ints, start: Ints, length: Ints, shards: int) -> None:
    """Refuse places outside the shards."""
    rows = np.array([s.rows for s in group.shards] or [0], np.int64)
    for first in range(0, len(shard), _AT_ONCE):
        which, at, many = (column[first : first + _AT_ONCE] for column in (shard, start, length))
        inside = (which >= 0) & (which < shards)
        have = rows[np.where(inside, which, 0)]
        fits = inside & (many >= 1) & (at >= 0) & (at < have) & (many <= have - at)
        if not fits.all():
            bad = int(np.flatnonzero(~fits)[0])
            raise DatasetFormatError(
                f"{INDEX}: prompt {first + bad} has {many[bad]:,} rows at {at[bad]:,} of shard {which[bad]} of "
                f"{group.name}, which has {shards} shards"
                + (f", this one with {have[bad]:,} rows." if inside[bad] else ".")
            )


def _split(index: Index, group: TensorGroup) -> Runs:
    """Full sequences whose last tokens lie apart: a list of shards and one of rows for each prompt."""
    names = ("token_shard_ids", "token_shard_offsets")
    for name in names:
        _check_list(index, name)
    counts, parts = [], []
    for batch in index.batches(names):
        lengths, shard = _flat(index, names[0], batch[names[0]])
        others, row = _flat(index, names[1], batch[names[1]])
        if not np.array_equal(lengths, others) or (lengths < 1).any():
            raise index.wrong("a prompt has no tokens, or not as many shards as rows of its tokens")
        _check(group, shard, row, np.ones_like(row), len(group.shards))
        begins = np.ones(len(shard), bool)
        begins[1:] = (shard[1:] != shard[:-1]) | (row[1:] != row[:-1] + 1)
        begins[_offsets(lengths)[:-1]] = True
        at = np.flatnonzero(begins)
        counts.append(np.add.reduceat(begins.astype(np.int64), _offsets(lengths)[:-1]))
        parts.append((shard[at], row[at], np.diff(at, append=len(shard))))
    if not parts:
        return Runs.of_each(*(np.zeros(0, np.int64) for _ in range(3)))
    shard, start, length = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Runs(_offsets(np.concatenate(counts)), shard, start, length)


def _check_list(index: Index, name: str) -> None:
    import pyarrow.types as types

    kind = index.kind(name)
    if not types.is_list(kind) or not types.is_integer(kind.value_type):
        raise index.wrong(f"column {name!r} holds {kind}, expected lists of whole numbers")


def _flat(index: Index, name: str, lists: pa.Array) -> tuple[Ints, Ints]:
    """Length of each list, and all their numbers."""
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise index.wrong(f"column {name!r} has no value for some prompts or tokens")
    offsets = np.asarray(lists.offsets.to_numpy()).astype(np.int64)
    return np.diff(offsets), np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.int64)


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _within(counts: Ints) -> Ints:
    """0, 1, ... up to each count."""
    total = _offsets(counts)
    return np.arange(total[-1]) - np.repeat(total[:-1], counts)
