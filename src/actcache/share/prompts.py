"""Which prompts of a dataset are asked for, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError, NotCachedError, PromptError, PromptTypeError, did_you_mean
from actcache.share.index import Index
from actcache.share.rows import Ints
from actcache.share.values import codes_of, is_text, values_of

TEXT, LABEL = "text", "label"
_FEW = 5_000
_LONG = 1 << 28


def find_prompts(index: Index, prompts: Sequence[Any] | str | None) -> Ints | None:
    """The row in the index of each of `prompts`, the first where a text is there several times; None for all rows.

    Raises `NotCachedError` when one is not in the dataset.
    """
    if prompts is None:
        return None
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    if not asked:
        raise PromptError("the list of prompts is empty: expected at least one, or None for all of the dataset.")
    for number, prompt in enumerate(asked):
        if not isinstance(prompt, str):
            raise PromptTypeError(f"prompt {number} is a {type(prompt).__name__}: a dataset is asked for texts.")
    codes, texts = _texts(index)
    different, first = np.unique(codes, return_index=True)
    row_of = {texts[code]: row for code, row in zip(different.tolist(), first.tolist(), strict=True)}
    absent = [text for text in asked if text not in row_of]
    if absent:
        near = did_you_mean(absent[0], row_of) if len(row_of) <= _FEW and len(absent[0]) <= 1000 else ""
        more = f", nor {len(absent) - 1:,} more of the {len(asked):,} asked for" if len(absent) > 1 else ""
        raise NotCachedError(f"{index.source.name} has no prompt {absent[0]!r:.200}{more}.{near[:300]}")
    return np.array([row_of[text] for text in asked], np.int64)


def texts_of(index: Index) -> list[str]:
    """The prompts of a dataset in the order of its index."""
    codes, texts = _texts(index)
    return [texts[code] for code in codes.tolist()]


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
    if kinds == {int}:
        return np.array(chosen, np.int64)
    longest = max(len(label) for label in chosen if isinstance(label, str)) if str in kinds else 0
    # As an array of str each label would take the room of the longest one.
    if kinds == {str} and 4 * longest * len(chosen) <= _LONG:
        return np.array(chosen, np.str_)
    values = np.empty(len(chosen), object)
    values[:] = chosen
    return values


def _refuse_contradictions(index: Index, labels: list[int | str | None], selection: Ints | None) -> None:
    codes, texts = _texts(index)
    asked = None if selection is None else set(codes[selection].tolist())
    first: dict[int, int] = {}
    for row, code in enumerate(codes.tolist()):
        before = first.setdefault(code, row)
        if labels[before] != labels[row] and (asked is None or code in asked):
            raise DatasetFormatError(
                f"{index.source.name} has prompt {texts[code]!r:.80} with two labels, {labels[before]!r:.40} in row "
                f"{before} and {labels[row]!r:.40} in row {row}: labels cannot be told (return_labels=False)."
            )


def _texts(index: Index) -> tuple[Ints, list[str]]:
    codes, texts = codes_of(index, TEXT)
    absent = int((codes < 0).sum())
    if absent:
        raise index.wrong(f"column {TEXT!r} has no value for {absent:,} prompts")
    return codes, texts
