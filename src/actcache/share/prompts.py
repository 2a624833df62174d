"""Which prompts of a dataset are asked for, and their labels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError, NotCachedError, PromptError, PromptTypeError, did_you_mean
from actcache.share.different import AT_ONCE, Different, in_steps
from actcache.share.index import Index
from actcache.share.ours import KINDS
from actcache.share.rows import Ints
from actcache.share.values import is_text, values_in, values_of
from actcache.store import given
from actcache.store.prompts import IDS, TEXT
from actcache.store.tensors import kind_of

LABEL, _IDS_COLUMN = "label", "token_ids"
_FEW = 5_000
_LONG = 1 << 28
_INT64 = 1 << 63


def find_prompts(index: Index, prompts: Sequence[Any] | str | None) -> Ints | None:
    """The row in the index of each of `prompts`, the first where a text is there several times; None for all rows.

    Raises `NotCachedError` when one is not in the dataset.
    """
    if prompts is None:
        return None
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    if not asked:
        raise PromptError("the list of prompts is empty: expected at least one, or None for all of the dataset.")
    wanted = [_key(prompt, number) for number, prompt in enumerate(asked)]
    row_of = _rows_of(index, wanted)
    row_of |= _rows_of_ids(index, [text for kind, text in wanted if kind == IDS and (kind, text) not in row_of])
    absent = [number for number, key in enumerate(wanted) if key not in row_of]
    if absent:
        text = wanted[absent[0]][1]
        few = index.num_rows <= _FEW and len(text) <= 1000
        known = [prompt for some in in_steps(index) for prompt in some.texts.all()] if few else []
        more = f", nor {len(absent) - 1:,} more of the {len(asked):,} asked for" if len(absent) > 1 else ""
        near = did_you_mean(text, known)[:300]
        raise NotCachedError(f"{index.source.name} has no prompt {asked[absent[0]]!r:.200}{more}.{near}")
    return np.array([row_of[key] for key in wanted], np.int64)


def prompts_of(index: Index) -> list[Any]:
    """The prompts of a dataset in the order of its index: texts, token ids or chats. One that recurs is one object."""
    known: dict[tuple[int, str], Any] = {}
    found = []
    for some in in_steps(index):
        texts = some.texts.all()
        for kind, code in zip(some.kinds.tolist(), some.texts.codes.tolist(), strict=True):
            text = texts[code]
            if (kind, text) not in known:
                known[kind, text] = text if kind == TEXT else _parsed(index, kind, text)
            found.append(known[kind, text])
    return found


def _key(prompt: Any, number: int) -> tuple[int, str]:
    """Kind and text of a prompt, as they stand in an index."""
    kind, text = kind_of(prompt, number)
    if text is None:
        try:
            text = json.dumps([operator.index(token) for token in prompt])
        except TypeError:
            raise PromptTypeError(f"prompt {number} is no list of token ids, nor a text, nor a chat.") from None
    return kind, text


def _rows_of(index: Index, wanted: Sequence[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """The first row of each of some prompts that is there."""
    asked = {}
    for kind, text in wanted:
        with contextlib.suppress(UnicodeEncodeError):
            asked[kind, text.encode()] = kind, text
    found: dict[tuple[int, str], int] = {}
    for some in in_steps(index):
        for row, key in enumerate(some.keys(), some.start):
            if key in asked:
                found.setdefault(asked[key], row)
    return found


def _rows_of_ids(index: Index, wanted: Sequence[str]) -> dict[tuple[int, str], int]:
    """The first row of each of some prompts as ids whose tokens are those of a text: a prompt that was published as a
    text is found by its ids, too."""
    import pyarrow.types as types

    if not wanted or not index.ours or _IDS_COLUMN not in index.columns:
        return {}
    kind = index.kind(_IDS_COLUMN)
    if not types.is_list(kind) or not types.is_integer(kind.value_type):
        return {}
    asked = {}
    for text in wanted:
        ids = json.loads(text)
        if all(0 <= token < 2**31 for token in ids):
            asked[np.array(ids, np.int64).tobytes()] = IDS, text
    found: dict[tuple[int, str], int] = {}
    start, lengths_asked = 0, np.array([len(ids) // 8 for ids in asked])
    for batch in index.batches((_IDS_COLUMN,)):
        lists = batch[_IDS_COLUMN]
        ends = np.asarray(lists.offsets.to_numpy()).astype(np.int64)
        values = np.asarray(lists.values.cast("int64", safe=False).fill_null(-1).to_numpy(zero_copy_only=False))
        told = np.asarray(lists.is_valid().to_numpy(zero_copy_only=False))
        for row in np.flatnonzero(told & np.isin(np.diff(ends), lengths_asked)).tolist():
            key = asked.get(values[ends[row] : ends[row + 1]].tobytes())
            if key is not None:
                found.setdefault(key, start + row)
        start += len(lists)
    return found


def _parsed(index: Index, kind: int, text: str) -> Any:
    try:
        value = json.loads(text)
        if (kind_of(value)[0], _key(value, 0)[1]) == (kind, text):
            return value
    except (ValueError, TypeError, RecursionError):
        pass
    raise index.wrong(f"{text!r:.80} is no prompt of the kind {KINDS[kind]!r}")


def labels_of(index: Index) -> list[int | str | None] | None:
    """The label of each row, None where it has none; None when the dataset has no labels."""
    return values_of(index, LABEL) if has_labels(index) else None


def has_labels(index: Index) -> bool:
    """Whether a dataset has a column of labels; `DatasetFormatError` where it holds something else."""
    import pyarrow.types as types

    if LABEL not in index.columns:
        return False
    kind = index.kind(LABEL)
    if not (types.is_integer(kind) or types.is_null(kind) or is_text(kind)):
        raise index.wrong(f"column {LABEL!r} holds {kind}, expected whole numbers or texts")
    return True


def numbered_labels(index: Index) -> Ints | None:
    """A number for the label of each row, the same for what is the same; None where no row has one."""
    numbers: dict[Any, int] = {}
    found = index.spill.empty(index.num_rows, np.int64)
    start, none = 0, _number(None)
    for batch in index.batches([LABEL], most_rows=AT_ONCE):
        labels = values_in(index, LABEL, batch[LABEL])
        if len(numbers) > AT_ONCE:
            numbers = {}
        for label in set(labels) - numbers.keys():
            numbers[label] = _number(label)
        found[start : start + len(labels)] = [numbers[label] for label in labels]
        start += len(labels)
    return None if not start or (found == none).all() else found


def _number(label: int | str | None) -> int:
    digest = hashlib.blake2b(given.encoded(label), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def label_values(index: Index, selection: Ints | None) -> npt.NDArray[Any] | None:
    """Labels as an array, in the dtype that they have in common; objects where some are None, None where all are.

    Raises `DatasetFormatError` when a text that is asked for is in the dataset with two labels.
    """
    every = labels_of(index)
    if every is None:
        return None
    _refuse_contradictions(index, every, selection)
    chosen = every if selection is None else [every[row] for row in selection.tolist()]
    kinds = {type(label) for label in chosen}
    if kinds <= {type(None)}:
        return None
    if kinds == {int} and all(-_INT64 <= label < _INT64 for label in chosen if isinstance(label, int)):
        return np.array(chosen, np.int64)
    if kinds == {str} and _fit_array([label for label in chosen if isinstance(label, str)]):
        return np.array(chosen, np.str_)
    values = np.empty(len(chosen), object)
    values[:] = chosen
    return values


def _fit_array(texts: list[str]) -> bool:
    """Whether texts can be an array of str: each takes the room of the longest there, and loses zeros at its end."""
    return 4 * max(map(len, texts)) * len(texts) <= _LONG and not any(text.endswith("\0") for text in texts)


def _refuse_contradictions(index: Index, labels: list[int | str | None], selection: Ints | None) -> None:
    numbers = numbered_labels(index)
    different = Different(index)
    wrong = (
        []
        if numbers is None
        else [
            min(zip(rows.tolist(), first.tolist(), strict=True))
            for rows, first in different.contradicted(numbers, selection)
        ]
    )
    if wrong:
        row, before = min(wrong)
        raise DatasetFormatError(
            f"{index.source.name} has prompt {different.text(row)!r:.80} with two labels, {labels[before]!r:.40} in "
            f"row {before} and {labels[row]!r:.40} in row {row}: labels cannot be told (return_labels=False)."
        )
