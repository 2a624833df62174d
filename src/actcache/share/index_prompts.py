"""What an index says of its prompts, as a store takes it: token ids, labels, other columns, perplexities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.derive.results import PERPLEXITY, TOKEN_NLL
from actcache.share.columns import is_fixed
from actcache.share.different import AT_ONCE, Different, Some, columns_of, prompts_in
from actcache.share.format import ROUTER, TensorGroup
from actcache.share.index import Index
from actcache.share.prompts import LABEL as LABEL_COLUMN
from actcache.share.prompts import has_labels, numbered_labels
from actcache.share.rows import Ints, every_row
from actcache.share.taken import Piece
from actcache.share.values import is_plain, values_in
from actcache.store import given
from actcache.store.files import log
from actcache.store.prompts import IDS, PromptTable, offsets
from actcache.store.records import DERIVED, LABEL, METADATA, Records
from actcache.store.tensors import stand_in

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, "pa.Array"]

IDS_COLUMN, LOSSES_COLUMN = "token_ids", "token_perplexity"
PERPLEXITIES = ("perplexity_mean", "perplexity_min", "perplexity_max")
# What a pooled prompt of unknown length stands for; the number means nothing.
_SOME_TOKENS = 4
_MOST_TOKENS = 1 << 31
_LEAST_ROOM, _MAX_RATIO = 64 << 20, 100


def pieces(index: Index, rows: Ints, lengths: Ints | None, context: str) -> Iterator[Piece]:
    """The prompts of `rows` (ascending), under the text context `context`, and what the index says of them.

    A prompt of which the dataset says two labels has none. `lengths`: how many rows of vectors each prompt of the index
    has, where every token has one. Ids that are not known have negative numbers in their place.
    """
    contradicted = _contradicted(index) if has_labels(index) else None
    known = [name for name in (IDS_COLUMN, *_labels(index), *_others(index)) if name in index.columns]
    names = dict.fromkeys([*columns_of(index), *known, *_results(index)])
    room, start = _Room(index), 0
    for batch in index.batches(list(names), most_rows=AT_ONCE):
        some = prompts_in(index, start, batch)
        mine = _between(rows, start, len(some))
        at = mine - start
        start += len(some)
        if len(mine):
            part = {name: column.take(_arrow(at)) for name, column in batch.items()}
            table = _table(index, some, part, mine, lengths, context)
            said = [*_labelled(index, room, table, mine, part, contradicted), *_described(index, room, table, part)]
            yield Piece(mine, table, said, list(_results_in(index, part, table)))


def results_of(index: Index, rows: Ints, table: PromptTable) -> Iterator[Records]:
    """The perplexities of those of the prompts `rows` (ascending) that have them, as a store keeps them."""
    names, start, done = _results(index), 0, 0
    for batch in index.batches(names, most_rows=AT_ONCE) if names else ():
        mine = _between(rows, start, len(batch[names[0]]))
        if len(mine):
            part = {name: column.take(_arrow(mine - start)) for name, column in batch.items()}
            yield from _results_in(index, part, table.select(np.arange(done, done + len(mine))))
        start += len(batch[names[0]])
        done += len(mine)


def _between(rows: Ints, start: int, count: int) -> Ints:
    """Those of `rows` (ascending) from `start` on, of so many."""
    return rows[slice(*np.searchsorted(rows, [start, start + count]).tolist())]


def _table(index: Index, some: Some, part: Columns, rows: Ints, lengths: Ints | None, context: str) -> PromptTable:
    """The prompts `rows`, which are among `some`; `part`: the columns at these rows."""
    kinds = some.kinds[rows - some.start].tolist()
    texts = some.texts.some(some.texts.codes[rows - some.start])
    parsed = _parsed(index, kinds, texts)
    own, offset = _ids(index, part, len(rows))
    ids = []
    for i, (row, kind, text) in enumerate(zip(rows.tolist(), kinds, texts, strict=True)):
        found = parsed.get(i, own[offset[i] : offset[i + 1]] if offset[i + 1] > offset[i] else None)
        count = None if lengths is None else int(lengths[row])
        if count is not None and found is not None and len(found) != count:
            raise index.wrong(f"row {row} has {len(found):,} token ids and {count:,} rows of vectors")
        ids.append(stand_in(kind, text, _SOME_TOKENS if count is None else count) if found is None else found)
    plain = [None if kind == IDS else text for kind, text in zip(kinds, texts, strict=True)]
    return PromptTable.build(ids, plain, kinds, context)


def _parsed(index: Index, kinds: Sequence[int], texts: Sequence[str]) -> dict[int, npt.NDArray[np.int32]]:
    """The prompts that are token ids, which the column of texts has as JSON."""
    found = {}
    for i, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
        if kind == IDS:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, list) or not value or not all(type(t) is int and 0 <= t < 2**31 for t in value):
                raise index.wrong(f"{text!r:.80} is no list of token ids")
            found[i] = np.array(value, np.int32)
    return found


def _ids(index: Index, part: Columns, count: int) -> tuple[npt.NDArray[np.int32], Ints]:
    """The token ids of `count` rows, row after row, and where each begins and ends; none where they are not known."""
    if IDS_COLUMN not in part:
        return np.empty(0, np.int32), np.zeros(count + 1, np.int64)
    _, offset, values = _lists(index, IDS_COLUMN, part[IDS_COLUMN], whole=True)
    if len(values) and (values.min() < 0 or values.max() >= _MOST_TOKENS):
        raise index.wrong(f"column {IDS_COLUMN!r} holds a number that is no token id")
    return values.astype(np.int32), offset


def _lists(
    index: Index, name: str, lists: pa.Array, *, whole: bool
) -> tuple[npt.NDArray[np.bool_], Ints, npt.NDArray[Any]]:
    """Lists of numbers: whether there is one, where each begins, and all numbers."""
    import pyarrow.types as types

    kind = index.kind(name)
    fits = types.is_integer if whole else types.is_floating
    # Where the first list is empty lmprobe writes the numbers of the others as texts.
    texts = types.is_list(kind) and not whole and types.is_string(kind.value_type)
    if not types.is_list(kind) or not (texts or fits(kind.value_type)):
        raise index.wrong(f"column {name!r} holds {kind}, expected lists of {'whole ' if whole else ''}numbers")
    values = _numbers(index, name, lists.flatten()) if texts else lists.flatten()
    if values.null_count:
        raise index.wrong(f"column {name!r} has no value for some tokens")
    has = np.asarray(lists.is_valid().to_numpy(zero_copy_only=False))
    lengths = np.asarray(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
    return has, offsets(lengths), np.asarray(values.to_numpy(zero_copy_only=False))


def _numbers(index: Index, name: str, texts: pa.Array) -> pa.Array:
    import pyarrow as pa

    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        raise index.wrong(f"column {name!r} holds a text that is no number") from None


def _arrow(numbers: Ints) -> Any:
    import pyarrow as pa

    return pa.array(numbers)


def lengths_of(index: Index, group: TensorGroup | None) -> Ints | None:
    """How many rows of vectors each prompt has in a `group` of full sequences; None where there is no such group."""
    if group is None or group.pooling is not None or group.name == ROUTER:
        return None
    return every_row(index, group).row_counts(index.spill)


def _labels(index: Index) -> list[str]:
    return [LABEL_COLUMN] if has_labels(index) else []


def _others(index: Index) -> list[str]:
    """The columns of metadata."""
    return [name for name in index.columns if not is_fixed(name) and is_plain(index.kind(name))]


def _labelled(
    index: Index,
    room: _Room,
    table: PromptTable,
    rows: Ints,
    part: Columns,
    contradicted: npt.NDArray[np.bool_] | None,
) -> list[Records]:
    """Labels, as a store keeps them."""
    if LABEL_COLUMN not in part:
        return []
    labels = values_in(index, LABEL_COLUMN, part[LABEL_COLUMN])
    has = np.array([label is not None for label in labels])
    if contradicted is not None:
        has &= ~contradicted[rows]
    chosen = np.flatnonzero(has)
    values = [room.take(given.encoded(labels[i])) for i in chosen.tolist()]
    return given.records(LABEL, table.select(chosen), values) if values else []


def _described(index: Index, room: _Room, table: PromptTable, part: Columns) -> list[Records]:
    """Other columns, as a store keeps them."""
    columns = {name: values_in(index, name, part[name]) for name in _others(index)}
    if not columns:
        return []
    values = [
        room.take(given.encoded({name: _finite(value) for name, value in zip(columns, row, strict=True)}))
        for row in zip(*columns.values(), strict=True)
    ]
    return given.records(METADATA, table, values)


class _Room:
    """Counts what is said of prompts: a text that recurs is in an index once, and would be stored with each of them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._left = _LEAST_ROOM + _MAX_RATIO * index.nbytes

    def take(self, value: bytes) -> bytes:
        """`value`, where there is room for it."""
        self._left -= len(value)
        if self._left < 0:
            raise self._index.wrong("its labels and columns would take more room than so many bytes can hold")
        return value


def _finite(value: Any) -> Any:
    """Numbers that JSON has no word for count as none."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _contradicted(index: Index) -> npt.NDArray[np.bool_] | None:
    """Of which rows the prompt has two labels, bool ``[rows]``, as far as they are the first of it; None of none."""
    numbers = numbered_labels(index)
    if numbers is None:
        return None
    different = Different(index)
    found = index.spill.zeros(index.num_rows, bool)
    for _, first in different.contradicted(numbers):
        found[first] = True
    count = int(np.count_nonzero(found))
    if not count:
        return None
    row = int(np.argmax(found))
    log.warning(
        "%s has %d prompts with two labels each, which count as having none; the first is %.80r (row %d)",
        index.source.name, count, different.text(row), row,
    )  # fmt: skip
    return found


def _results(index: Index) -> list[str]:
    """The columns of perplexities."""
    import pyarrow.types as types

    found = list(PERPLEXITIES) if set(PERPLEXITIES) <= set(index.columns) else []
    for name in found:
        if not types.is_floating(index.kind(name)):
            raise index.wrong(f"column {name!r} holds {index.kind(name)}, expected floating numbers")
    return [*found, *([LOSSES_COLUMN] if LOSSES_COLUMN in index.columns else [])]


def _results_in(index: Index, part: Columns, table: PromptTable) -> Iterator[Records]:
    """The perplexities of the prompts of `table`, which the columns `part` are of."""
    if set(PERPLEXITIES) <= part.keys():
        columns = [np.asarray(part[n].to_numpy(zero_copy_only=False), np.float64) for n in PERPLEXITIES]
        values = np.stack(columns, axis=1)
        has = np.isfinite(values).all(axis=1)
        if has.any():
            limit = float(np.finfo(np.float32).max)
            data = {PERPLEXITY: np.minimum(values[has], limit).astype(np.float32)}
            made = Records.pooled(table.select(has), DERIVED, data)
            made.screened = True
            yield made
    if LOSSES_COLUMN in part:
        has, offset, values = _lists(index, LOSSES_COLUMN, part[LOSSES_COLUMN], whole=False)
        parts, chosen = [], []
        for i in np.flatnonzero(has).tolist():
            each = values[offset[i] : offset[i + 1]]
            # Of a prompt of unknown length it cannot be said which token is which.
            known = table.token_ids[table.token_offset[i]] >= 0 and len(each) == table.lengths[i] - 1
            if known and np.isfinite(each).all() and (each > 0).all():
                chosen.append(i)
                parts.append(np.append(np.log(each), 0.0).astype(np.float32))
        if chosen:
            made = Records.tokens(table.select(chosen), {TOKEN_NLL: np.concatenate(parts)[:, None]})
            made.screened = True
            yield made
