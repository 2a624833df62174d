"""Which prompts of a dataset are asked for, and their labels."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError, NotCachedError, PromptError, PromptTypeError, did_you_mean
from actcache.share.index import Index
from actcache.share.ours import KIND, KINDS
from actcache.share.rows import Ints
from actcache.share.values import Texts, codes_of, is_text, values_of
from actcache.store.prompts import IDS, TEXT
from actcache.store.tensors import kind_of

TEXTS, LABEL, _IDS_COLUMN = "text", "label", "token_ids"
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
    row_of = Different(index).find(wanted)
    row_of |= _rows_of_ids(index, [text for kind, text in wanted if kind == IDS and (kind, text) not in row_of])
    absent = [number for number, key in enumerate(wanted) if key not in row_of]
    if absent:
        text = wanted[absent[0]][1]
        few = index.num_rows <= _FEW and len(text) <= 1000
        known = [text for _, text in different_prompts(index)[1]] if few else []
        more = f", nor {len(absent) - 1:,} more of the {len(asked):,} asked for" if len(absent) > 1 else ""
        near = did_you_mean(text, known)[:300]
        raise NotCachedError(f"{index.source.name} has no prompt {asked[absent[0]]!r:.200}{more}.{near}")
    return np.array([row_of[key] for key in wanted], np.int64)


def prompts_of(index: Index) -> list[Any]:
    """The prompts of a dataset in the order of its index: texts, token ids or chats."""
    codes, there = different_prompts(index)
    values = [text if kind == TEXT else _parsed(index, kind, text) for kind, text in there]
    return [values[code] for code in codes.tolist()]


def _key(prompt: Any, number: int) -> tuple[int, str]:
    """Kind and text of a prompt, as they stand in an index."""
    kind, text = kind_of(prompt, number)
    if text is None:
        try:
            text = json.dumps([operator.index(token) for token in prompt])
        except TypeError:
            raise PromptTypeError(f"prompt {number} is no list of token ids, nor a text, nor a chat.") from None
    return kind, text


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
    import pyarrow.types as types

    if LABEL not in index.columns:
        return None
    kind = index.kind(LABEL)
    if not (types.is_integer(kind) or types.is_null(kind) or is_text(kind)):
        raise index.wrong(f"column {LABEL!r} holds {kind}, expected whole numbers or texts")
    return values_of(index, LABEL)


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
    different = Different(index)
    numbers: dict[int | str | None, int] = {}
    label = np.array([numbers.setdefault(one, len(numbers)) for one in labels], np.int64)
    _, first, which = np.unique(different.codes, return_index=True, return_inverse=True)
    wrong = label != label[first[which]]
    if selection is not None:
        wrong &= np.isin(which, which[selection])
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        before = int(first[which[row]])
        raise DatasetFormatError(
            f"{index.source.name} has prompt {different.text(row)!r:.80} with two labels, {labels[before]!r:.40} in "
            f"row {before} and {labels[row]!r:.40} in row {row}: labels cannot be told (return_labels=False)."
        )


class Different:
    """The different prompts of a dataset, which stay in the index: there may be very many.

    `codes` int64 ``[n]``: which one each row is of.
    """

    def __init__(self, index: Index) -> None:
        self._texts = Texts(index, TEXTS)
        _refuse_absent(index, TEXTS, self._texts.codes)
        self._kinds = {TEXT: 0}
        self.codes = self._texts.codes
        self._which: Ints | None = None
        if KIND in index.columns:
            self._which, self._kinds = _kinds_of(index)
            self.codes = self._texts.codes * len(self._kinds) + self._which

    def text(self, row: int) -> str:
        """The text of a row."""
        return self._texts[int(self._texts.codes[row])]

    def some(self, rows: Ints) -> tuple[list[int], list[str]]:
        """Kind and text of each of these rows."""
        names = list(self._kinds)
        kinds = [TEXT] * len(rows) if self._which is None else [names[k] for k in self._which[rows].tolist()]
        return kinds, self._texts.some(self._texts.codes[rows])

    def find(self, prompts: Sequence[tuple[int, str]]) -> dict[tuple[int, str], int]:
        """The first row of each of `prompts` (kind and text) that is there."""
        of_text = self._texts.find(text for _, text in prompts)
        code_of = {
            of_text[text] * len(self._kinds) + self._kinds[kind]: (kind, text)
            for kind, text in prompts
            if text in of_text and kind in self._kinds
        }
        found: dict[tuple[int, str], int] = {}
        rows = np.flatnonzero(np.isin(self.codes, np.array(list(code_of), np.int64)))
        for row, code in zip(rows.tolist(), self.codes[rows].tolist(), strict=True):
            found.setdefault(code_of[code], row)
        return found


def different_prompts(index: Index) -> tuple[Ints, list[tuple[int, str]]]:
    """Which of the different prompts, kind and text each, every row is of."""
    codes, texts = _codes(index, TEXTS)
    if KIND not in index.columns:
        return codes, [(TEXT, text) for text in texts]
    which, kinds = _kinds_of(index)
    pairs, found = np.unique(codes * len(kinds) + which, return_inverse=True)
    names = list(kinds)
    return found, [(names[pair % len(names)], texts[pair // len(names)]) for pair in pairs.tolist()]


def _kinds_of(index: Index) -> tuple[Ints, dict[int, int]]:
    """A number for the kind of each row, and of which kind it is the number."""
    which, names = _codes(index, KIND)
    unknown = sorted(set(names) - set(KINDS))
    if unknown:
        raise index.wrong(f"column {KIND!r} names the kind {unknown[0]!r:.60}: expected {', '.join(KINDS)}")
    return which, {KINDS.index(name): number for number, name in enumerate(names)}


def _codes(index: Index, name: str) -> tuple[Ints, list[str]]:
    codes, texts = codes_of(index, name)
    _refuse_absent(index, name, codes)
    return codes, texts


def _refuse_absent(index: Index, name: str, codes: Ints) -> None:
    absent = int((codes < 0).sum())
    if absent:
        raise index.wrong(f"column {name!r} has no value for {absent:,} prompts")
