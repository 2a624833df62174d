"""Which prompts of a dataset are asked for, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError, NotCachedError, PromptError, PromptTypeError, did_you_mean
from actcache.share.index import Index
from actcache.share.rows import Ints

if TYPE_CHECKING:
    import pyarrow as pa

TEXT, LABEL = "text", "label"
_FEW = 5_000
_LONG = 1 << 28


def find_prompts(index: Index, prompts: Sequence[str] | str | None) -> Ints | None:
    """The row in the index of each of `prompts`, the first where a text is there several times; None for all rows.

    Raises `NotCachedError` when one is not in the dataset.
    """
    if prompts is None:
        return None
    import pyarrow as pa
    import pyarrow.compute as pc

    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    if not asked:
        raise PromptError("the list of prompts is empty: expected at least one, or None for all of the dataset.")
    for number, prompt in enumerate(asked):
        if not isinstance(prompt, str):
            raise PromptTypeError(f"prompt {number} is a {type(prompt).__name__}: a dataset is asked for texts.")
    codes, texts = _codes(index, TEXT)
    try:
        found = pc.index_in(pa.array(asked, pa.string()), value_set=texts)
    except (UnicodeError, pa.ArrowException):
        raise PromptError("a prompt is no valid Unicode text, and no dataset can hold it.") from None
    numbers = np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False)).astype(np.int64)
    # A dictionary may hold texts that no row has.
    first = np.full(max(1, len(texts)), -1, np.int64)
    different, rows = np.unique(codes, return_index=True)
    first[different] = rows
    rows = np.where(numbers >= 0, first[numbers], -1)
    absent = np.flatnonzero(rows < 0)
    if len(absent):
        text = asked[int(absent[0])]
        near = did_you_mean(text, texts.to_pylist()) if len(texts) <= _FEW and len(text) <= 1000 else ""
        more = f", nor {len(absent) - 1:,} more of the {len(asked):,} asked for" if len(absent) > 1 else ""
        raise NotCachedError(f"{index.source.name} has no prompt {text!r:.200}{more}.{near[:300]}")
    return rows


def texts_of(index: Index) -> list[str]:
    """The prompts of a dataset in the order of its index."""
    codes, texts = _codes(index, TEXT)
    try:
        values = texts.to_pylist()
    except UnicodeDecodeError:
        raise index.wrong(f"column {TEXT!r} holds bytes that are no text") from None
    return [values[code] for code in codes.tolist()]


def labels_of(index: Index) -> list[int | str | None] | None:
    """The label of each row, None where it has none; None when the dataset has no labels."""
    import pyarrow.types as types

    if LABEL not in index.columns:
        return None
    kind = index.kind(LABEL)
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_null(kind)):
        raise index.wrong(f"column {LABEL!r} holds {kind}, expected whole numbers or texts")
    values: list[int | str | None] = index.read([LABEL])[LABEL].to_pylist()
    return values


def label_values(index: Index, selection: Ints | None) -> npt.NDArray[Any] | None:
    """Labels as an array, in the dtype that they have in common; objects where some are None, None where all are."""
    every = labels_of(index)
    if every is None:
        return None
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


def refuse_contradictions(index: Index, selection: Ints | None) -> None:
    """`DatasetFormatError` when a text that is asked for is in the dataset with two labels."""
    labels = labels_of(index)
    if labels is None:
        return
    codes, texts = _codes(index, TEXT)
    asked = None if selection is None else set(codes[selection].tolist())
    first: dict[int, int] = {}
    for row, code in enumerate(codes.tolist()):
        before = first.setdefault(code, row)
        if labels[before] != labels[row] and (asked is None or code in asked):
            raise DatasetFormatError(
                f"{index.source.name} has prompt {texts[code].as_py()!r:.80} with two labels, {labels[before]!r:.40} "
                f"in row {before} and {labels[row]!r:.40} in row {row}: labels cannot be told (return_labels=False)."
            )


def _codes(index: Index, name: str) -> tuple[Ints, pa.Array]:
    """A column of texts as numbers, and the different texts that they stand for."""
    import pyarrow.types as types

    if not types.is_string(index.kind(name)):
        raise index.wrong(f"column {name!r} holds {index.kind(name)}, expected texts")
    column = index.read([name])[name].unify_dictionaries().combine_chunks()
    if column.null_count:
        raise index.wrong(f"column {name!r} has no value for {column.null_count:,} prompts")
    codes = np.asarray(column.indices.to_numpy(zero_copy_only=False)).astype(np.int64)
    # Parts of a dictionary that were joined may hold a text twice.
    unique = column.dictionary.dictionary_encode()
    return np.asarray(unique.indices.to_numpy()).astype(np.int64)[codes], unique.dictionary
