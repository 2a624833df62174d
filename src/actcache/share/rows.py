"""Which rows of which shards are those of each prompt, as an index says in any version of the format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError
from actcache.share.format import INDEX, LOGITS, ROUTER, TensorGroup
from actcache.share.index import Index
from actcache.store.spill import Spill

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
    def of_each(shard: Ints, start: Ints, length: Ints, spill: Spill | None = None) -> Runs:
        """One run for each prompt."""
        return Runs(_counted(len(shard) + 1, spill or Spill(None)), shard, start, length)

    def take(self, prompts: Ints) -> Runs:
        """Those of some prompts, in their order."""
        counts = self.offset[prompts + 1] - self.offset[prompts]
        chosen = np.repeat(self.offset[prompts], counts) + _within(counts)
        return Runs(_offsets(counts), self.shard[chosen], self.start[chosen], self.length[chosen])

    @property
    def row_offset(self) -> Ints:
        """Prompt `i` has rows ``row_offset[i]:row_offset[i + 1]`` of all of them, one after the other."""
        return _offsets(self.length)[self.offset]

    def row_counts(self, spill: Spill) -> Ints:
        """How many rows each prompt has."""
        found = spill.empty(len(self), np.int64)
        for first in range(0, len(self), _AT_ONCE):
            bounds = self.offset[first : first + _AT_ONCE + 1]
            ends = _offsets(self.length[bounds[0] : bounds[-1]])[bounds - bounds[0]]
            found[first : first + _AT_ONCE] = np.diff(ends)
        return found

    def shards(self) -> list[int]:
        """The shards that any of them is in."""
        pieces = (self.shard[first : first + _AT_ONCE] for first in range(0, len(self.shard), _AT_ONCE))
        return sorted({number for piece in pieces for number in np.unique(piece).tolist()})

    def rows(self) -> tuple[Ints, Ints]:
        """Shard, and row in it, of every row."""
        if self.length.strides == (0,) and len(self.shard) and self.length[0] == 1:
            return self.shard, self.start
        return np.repeat(self.shard, self.length), np.repeat(self.start, self.length) + _within(self.length)


def one_row(index: Index, group: TensorGroup, *, first: bool = False) -> Runs:
    """The one row of each prompt: the pooled one, or of full sequences that of its last token, or of its `first`."""
    if group.pooling is None and (first or not _is_split(index, group)):
        every = every_row(index, group)
        shard, start = (index.spill.empty(len(every), np.int64) for _ in range(2))
        for begin in range(0, len(every), _AT_ONCE):
            to = slice(begin, begin + _AT_ONCE)
            at = every.offset[:-1][to] if first else every.offset[1:][to] - 1
            shard[to] = every.shard[at]
            start[to] = every.start[at] + (0 if first else every.length[at] - 1)
        return Runs.of_each(shard, start, _all(1, shard), index.spill)
    if group.name == ROUTER:
        # No column says where these are: they lie in the order of the index.
        counts = np.array([shard.prompts for shard in group.shards], np.int64)
        return Runs.of_each(np.repeat(np.arange(len(counts)), counts), _within(counts), np.ones(counts.sum(), np.int64))
    shard, row = _columns(index, _place_columns(index, group))
    _check(group, shard, row, _all(1, row), len(group.placed))
    return Runs.of_each(shard, row, _all(1, row), index.spill)


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
    _check(group, shard, _all(0, shard), _all(1, shard), len(group.shards))
    if not _are_local(index, shard, start):
        # Counted through all shards: without those before.
        before = _offsets(np.array([s.rows for s in group.shards], np.int64))
        for first in range(0, len(start), _AT_ONCE):
            start[first : first + _AT_ONCE] -= before[shard[first : first + _AT_ONCE]]
    _check(group, shard, start, length, len(group.shards))
    return Runs.of_each(shard, start, length, index.spill)


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
    for begin in range(0, len(shard), _AT_ONCE):
        some = shard[begin : begin + _AT_ONCE]
        first = np.flatnonzero(np.diff(some, prepend=shard[begin - 1] if begin else -1) != 0)
        if (start[begin + first] != 0).any():
            return False
    return True


def _columns(index: Index, names: Sequence[str]) -> list[Ints]:
    """Columns of whole numbers, int64 ``[rows]`` each; they may lie in files, and may be written to."""
    import pyarrow.types as types

    for name in names:
        if not types.is_integer(index.kind(name)):
            raise index.wrong(f"column {name!r} holds {index.kind(name)}, expected whole numbers")
    found = [index.spill.empty(index.num_rows, np.int64) for _ in names]
    at, absent = 0, np.zeros(len(names), np.int64)
    for batch in index.batches(names, most_rows=_AT_ONCE):
        absent += [batch[name].null_count for name in names]
        stop = at + len(batch[names[0]])
        for name, numbers in zip(names, found, strict=True):
            numbers[at:stop] = np.asarray(batch[name].fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
        at = stop
    for name, count in zip(names, absent.tolist(), strict=True):
        if count:
            raise index.wrong(f"column {name!r} has no value for {count:,} prompts")
    return found


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
    counts, parts, keep = [], [], index.spill.keep
    for batch in index.batches(names):
        lengths, shard = _flat(index, names[0], batch[names[0]])
        others, row = _flat(index, names[1], batch[names[1]])
        if not np.array_equal(lengths, others) or (lengths < 1).any():
            raise index.wrong("a prompt has no tokens, or not as many shards as rows of its tokens")
        _check(group, shard, row, _all(1, row), len(group.shards))
        begins = np.ones(len(shard), bool)
        begins[1:] = (shard[1:] != shard[:-1]) | (row[1:] != row[:-1] + 1)
        begins[_offsets(lengths)[:-1]] = True
        at = np.flatnonzero(begins)
        counts.append(keep(np.add.reduceat(begins.astype(np.int64), _offsets(lengths)[:-1])))
        parts.append((keep(shard[at]), keep(row[at]), keep(np.diff(at, append=len(shard)))))
    if not parts:
        none = np.zeros(0, np.int64)
        return Runs.of_each(none, none, none)
    shard, start, length = (_joined(columns, index.spill) for columns in zip(*parts, strict=True))
    offset = index.spill.zeros(sum(map(len, counts)) + 1, np.int64)
    done = 0
    for some in counts:
        offset[done + 1 : done + len(some) + 1] = offset[done] + np.cumsum(some)
        done += len(some)
    return Runs(offset, shard, start, length)


def _joined(parts: Sequence[Ints], spill: Spill) -> Ints:
    return np.concatenate(parts, out=spill.empty(sum(map(len, parts)), np.int64))


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


def _all(value: int, like: Ints) -> Ints:
    """An array as long as another one, of one value, that takes no memory."""
    return np.broadcast_to(np.int64(value), len(like))


def _counted(count: int, spill: Spill) -> Ints:
    """0, 1, ..."""
    found = spill.empty(count, np.int64)
    for first in range(0, count, _AT_ONCE):
        found[first : first + _AT_ONCE] = np.arange(first, min(first + _AT_ONCE, count))
    return found
