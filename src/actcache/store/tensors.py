"""Between torch tensors and stored arrays, for `Store.write` and `Store.read`. torch is imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from actcache.errors import LayerRangeError, OptionError, PromptError, PromptTypeError
from actcache.store.prompts import CHAT, IDS, TEXT, PromptTable, canonical_chat, text_keys
from actcache.store.records import Records

if TYPE_CHECKING:
    import torch


_BY_BITS: dict[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
"""Dtypes of torch that numpy lacks: integers of their size, and what stands for them here."""
_OF_BITS = {dtype: (name, bits) for name, (bits, dtype) in _BY_BITS.items()}


def to_array(value: Any) -> npt.NDArray[Any]:
    """A tensor or array as a numpy array; bfloat16 and float8 by their bits."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    tensor = value.detach().cpu().contiguous()
    for name, (bits, dtype) in _BY_BITS.items():
        if tensor.dtype == getattr(torch, name):
            viewed: npt.NDArray[Any] = tensor.view(getattr(torch, bits)).numpy()
            return viewed.view(dtype)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def to_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A writable tensor that shares memory with `array` where `array` is writable."""
    import torch

    flags = array.flags
    if not flags.writeable or not flags.c_contiguous:
        array = np.array(array)
    # For each of many prompts: one look, where to compare with each of them would take longer than all else.
    by_bits = _OF_BITS.get(array.dtype)
    if by_bits is None:
        return torch.from_numpy(array)
    name, bits = by_bits
    return torch.from_numpy(array.view(bits)).view(getattr(torch, name))


def own_tensors(arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
    """Tensors that share the memory of `arrays`, which are writable and contiguous."""
    import torch

    # Of many: what `to_tensor` looks at takes as long for each as making the tensor.
    if {array.dtype for array in arrays}.isdisjoint(_OF_BITS):
        return [*map(torch.from_numpy, arrays)]
    return [to_tensor(array) for array in arrays]


def prompt_table(prompts: Any, context: str, lengths: Sequence[int]) -> PromptTable:
    """Prompts from outside: token ids, texts or chats; `lengths` are the rows of each.

    Without a tokenizer the ids of a text are unknown: negative numbers made from its digest stand for them.
    """
    if isinstance(prompts, PromptTable):
        return prompts
    ids: list[Any] = []
    texts, kinds = [], []
    for i, prompt in enumerate(prompts):
        kind, text = kind_of(prompt, i)
        kinds.append(kind)
        texts.append(text)
        ids.append(prompt if text is None else stand_in(kind, text, lengths[i]))
    return PromptTable.build(ids, texts, kinds, context)


def stand_in(kind: int, text: str, length: int) -> npt.NDArray[np.int32]:
    """`length` negative numbers in place of the unknown token ids of a text."""
    words = text_keys([text], kind, "").view(np.int32).reshape(-1)
    return np.resize(words | np.int32(-(2**31)), length)


def as_list(prompts: Any) -> list[Any]:
    """Prompts as a list: a single text counts as one; PromptError when there are none."""
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise PromptError("the list of prompts is empty: expected at least one prompt.")
    return given


def kind_of(prompt: Any, position: int = 0) -> tuple[int, str | None]:
    """Kind and text of a prompt; PromptTypeError or PromptError when it is none."""
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError(f"prompt {position} is empty: remove it from the list.")
        return TEXT, prompt
    if not hasattr(prompt, "__len__") or isinstance(prompt, (bytes, Mapping)):
        raise PromptTypeError(
            f"prompt {position} is a {type(prompt).__name__}: expected text, token ids or chat messages."
        )
    if not len(prompt):
        raise PromptError(f"prompt {position} is empty: remove it from the list.")
    if isinstance(prompt[0], Mapping):
        return CHAT, canonical_chat(prompt)
    return IDS, None


def records(prompts: Any, values: Mapping[str, Sequence[Any]], pooling: str | None, context: str) -> Records:
    """Records of ``{site: [tensor [T, D] or [D], ...]}`` as `Store.write` takes them."""
    if not isinstance(prompts, PromptTable):
        prompts = as_list(prompts)
    n = len(prompts)
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    for site, given in values.items():
        if len(given) != n:
            raise ValueError(f"{site}: {len(given)} values for {n} prompts")
        arrays[site] = [to_array(v) for v in given]
    if not arrays:
        raise ValueError("nothing to write: expected {site: [tensor, ...]}")
    first = next(iter(arrays.values()))
    lengths = [4 if pooling or a.ndim == 0 else len(a) for a in first]
    table = prompt_table(prompts, context, lengths)
    for site, parts in arrays.items():
        for i, array in enumerate(parts):
            tokens = int(table.token_offset[i + 1] - table.token_offset[i])
            if array.ndim != (1 if pooling else 2) or not (pooling or len(array) == tokens):
                expected = "[D]" if pooling else f"[{tokens}, D], a row for each token"
                raise ValueError(f"{site}, prompt {i}: shape {list(array.shape)}, expected {expected}")
    if pooling:
        return Records.pooled(table, pooling, {site: np.stack(parts) for site, parts in arrays.items()})
    return Records.tokens(table, {site: np.concatenate(parts) for site, parts in arrays.items()})


def cut(rows: npt.NDArray[Any], positions: Any) -> npt.NDArray[Any]:
    """Rows of one prompt at "all", "last", "first", an int, a ``(start, stop)`` pair, or a list of these."""
    if positions is None or positions == "all":
        return rows
    if isinstance(positions, tuple):
        return rows[slice(*positions)]
    if isinstance(positions, list):
        return np.concatenate([rows[:0], *(cut(rows, p) for p in positions)])
    named = {"last": -1, "first": 0}
    chosen = named.get(positions, positions) if isinstance(positions, str) else positions
    if not isinstance(chosen, (int, np.integer)):
        raise OptionError(
            f"unknown positions {positions!r}: expected 'all', 'last', 'first', int, (start, stop) or a list."
        )
    if not -len(rows) <= chosen < len(rows):
        raise LayerRangeError(f"position {chosen} is outside a prompt of {len(rows)} tokens")
    at = chosen % len(rows)
    return rows[at : at + 1]
