"""What an index says of its prompts, as a store takes it: token ids, labels, other columns, perplexities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.derive.results import PERPLEXITY, TOKEN_NLL
from actcache.share.columns import is_fixed
from actcache.share.format import ROUTER, TensorGroup
from actcache.share.index import Index
from actcache.share.prompts import Different, labels_of
from actcache.share.rows import Ints, every_row
from actcache.share.values import is_plain, values_of
from actcache.store import given
from actcache.store.files import log
from actcache.store.prompts import IDS, PromptTable, offsets
from actcache.store.records import DERIVED, LABEL, METADATA, Records
from actcache.store.tensors import stand_in

if TYPE_CHECKING:
    import pyarrow as pa

IDS_COLUMN, LOSSES_COLUMN = "token_ids", "token_perplexity"
PERPLEXITIES = ("perplexity_mean", "perplexity_min", "perplexity_max")
# What a pooled prompt of unknown length stands for; the number means nothing.
_SOME_TOKENS = 4
_MOST_TOKENS = 1 << 31
_AT_ONCE = 1 << 13
_LEAST_ROOM, _MAX_RATIO = 64 << 20, 100


def first_rows(index: Index) -> Ints:
    """The first row of each different prompt, ascending."""
    return np.sort(np.unique(Different(index).codes, return_index=True)[1])


def table_of(index: Index, rows: Ints, lengths: Ints | None, context: str) -> PromptTable:
    """The prompts of `rows` (ascending), under the text context `context`.

    `lengths`: how many rows of vectors each prompt of the index has, where every token has one. Ids that are not known
    have negative numbers in their place.
    """
    different, (own, offset) = Different(index), _ids(index, rows)
    tables = []
    # Python's own texts and lists take many times the room of what becomes of them.
    for start in range(0, len(rows), _AT_ONCE):
        kinds, texts = different.some(rows[start : start + _AT_ONCE])
        parsed = _parsed(index, kinds, texts)
        ids = []
        for i, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
            at = start + i
            found = parsed.get(i, own[offset[at] : offset[at + 1]] if offset[at + 1] > offset[at] else None)
            count = None if lengths is None else int(lengths[rows[at]])
            if count is not None and found is not None and len(found) != count:
                raise index.wrong(f"row {int(rows[at])} has {len(found):,} token ids and {count:,} rows of vectors")
            ids.append(stand_in(kind, text, _SOME_TOKENS if count is None else count) if found is None else found)
        plain = [None if kind == IDS else text for kind, text in zip(kinds, texts, strict=True)]
        tables.append(PromptTable.build(ids, plain, kinds, context))
    return PromptTable.concatenate(tables)


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


def _ids(index: Index, rows: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
    """The column of token ids, row after row, and where each row begins and ends; none where they are not known."""
    parts, lengths = [np.empty(0, np.int32)], np.zeros(len(rows), np.int64)
    if IDS_COLUMN in index.columns:
        for mine, _, offset, values in _lists(index, IDS_COLUMN, rows, whole=True):
            if len(values) and (values.min() < 0 or values.max() >= _MOST_TOKENS):
                raise index.wrong(f"column {IDS_COLUMN!r} holds a number that is no token id")
            parts.append(values.astype(np.int32))
            lengths[mine] = np.diff(offset)
    return np.concatenate(parts), offsets(lengths)


def _lists(
    index: Index, name: str, rows: Ints, *, whole: bool
) -> Iterator[tuple[Ints, npt.NDArray[np.bool_], Ints, npt.NDArray[Any]]]:
    """A column of lists of numbers at `rows` (ascending), some at a time: which of `rows`, whether there is a list,
    where each begins, and all numbers."""
    import pyarrow.types as types

    kind = index.kind(name)
    fits = types.is_integer if whole else types.is_floating
    # Where the first list is empty lmprobe writes the numbers of the others as texts.
    texts = types.is_list(kind) and not whole and types.is_string(kind.value_type)
    if not types.is_list(kind) or not (texts or fits(kind.value_type)):
        raise index.wrong(f"column {name!r} holds {kind}, expected lists of {'whole ' if whole else ''}numbers")
    before = 0
    for batch in index.batches([name]):
        lists: pa.Array = batch[name]
        mine = np.arange(*np.searchsorted(rows, [before, before + len(lists)]))
        chosen = lists.take(_arrow(rows[mine] - before))
        before += len(lists)
        values = _numbers(index, name, chosen.flatten()) if texts else chosen.flatten()
        if values.null_count:
            raise index.wrong(f"column {name!r} has no value for some tokens")
        has = np.asarray(chosen.is_valid().to_numpy(zero_copy_only=False))
        lengths = np.asarray(chosen.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
        offset = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        yield mine, has, offset, np.asarray(values.to_numpy(zero_copy_only=False))


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
    return np.diff(every_row(index, group).row_offset)


def said_of(index: Index, rows: Ints, table: PromptTable) -> list[Records]:
    """Labels and other columns of the prompts `rows`, as a store keeps them. A prompt that the dataset says two things
    of has no label."""
    made: list[Records] = []
    room = _Room(index)
    labels = labels_of(index)
    if labels is not None:
        contradicted = _contradicted(index, labels)
        chosen = [i for i, row in enumerate(rows.tolist()) if labels[row] is not None and row not in contradicted]
        if chosen:
            values = [room.take(given.encoded(labels[rows[i]])) for i in chosen]
            made += given.records(LABEL, table.select(chosen), values)
    names = [name for name in index.columns if not is_fixed(name) and is_plain(index.kind(name))]
    if names:
        columns = {name: values_of(index, name) for name in names}
        values = []
        for row in rows.tolist():
            values.append(room.take(given.encoded({name: _finite(columns[name][row]) for name in names})))
        made += given.records(METADATA, table, values)
    return made


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


def _contradicted(index: Index, labels: Sequence[Any]) -> set[int]:
    if all(label is None for label in labels):
        return set()
    different = Different(index)
    numbers: dict[int | str | None, int] = {}
    label = np.fromiter((numbers.setdefault(one, len(numbers)) for one in labels), np.int64, len(labels))
    _, first, which = np.unique(different.codes, return_index=True, return_inverse=True)
    found = set(first[which[label != label[first[which]]]].tolist())
    if found:
        row = min(found)
        log.warning(
            "%s has %d prompts with two labels each, which count as having none; the first is %.80r (row %d)",
            index.source.name, len(found), different.text(row), row,
        )  # fmt: skip
    return found


def results_of(index: Index, rows: Ints, table: PromptTable) -> list[Records]:
    """The perplexities of those of the prompts `rows` (ascending) that have them, as a store keeps them."""
    import pyarrow.types as types

    made = []
    if set(PERPLEXITIES) <= set(index.columns):
        columns = index.read(PERPLEXITIES)
        for name in PERPLEXITIES:
            if not types.is_floating(columns[name].type):
                raise index.wrong(f"column {name!r} holds {columns[name].type}, expected floating numbers")
        values = np.stack([np.asarray(columns[name].to_numpy(), np.float64)[rows] for name in PERPLEXITIES], axis=1)
        has = np.isfinite(values).all(axis=1)
        if has.any():
            limit = float(np.finfo(np.float32).max)
            data = {PERPLEXITY: np.minimum(values[has], limit).astype(np.float32)}
            made.append(Records.pooled(table.select(has), DERIVED, data))
    if LOSSES_COLUMN in index.columns:
        parts, chosen = [], []
        for mine, has, offset, values in _lists(index, LOSSES_COLUMN, rows, whole=False):
            for k, i in enumerate(mine.tolist()):
                each = values[offset[k] : offset[k + 1]]
                # Of a prompt of unknown length it cannot be said which token is which.
                known = table.token_ids[table.token_offset[i]] >= 0 and len(each) == table.lengths[i] - 1
                if has[k] and known and np.isfinite(each).all() and (each > 0).all():
                    chosen.append(i)
                    parts.append(np.append(np.log(each), 0.0).astype(np.float32))
        if chosen:
            losses = {TOKEN_NLL: np.concatenate(parts)[:, None]}
            made.append(Records.tokens(table.select(chosen), losses))
    for records in made:
        records.screened = True
    return made
