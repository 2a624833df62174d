"""Between torch tensors and the arrays the store keeps, without copying; bfloat16 included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from actcache.capture.positions import each_prompt, resolve_positions
from actcache.store.dtypes import common_dtype
from actcache.store.records import TOKENS, Records

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.store.prompts import PromptTable

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A CPU tensor as an array that shares its memory."""
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.contiguous().numpy()


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """A writable array as a tensor that shares its memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def at_positions(rows: list[list[npt.NDArray[Any]]], positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(values [B, S, D], mask [B, S])` at `positions` of each prompt, right-padded with zeros.

    `rows`: for each prompt arrays ``[T, D]``, which are put side by side.
    """
    asked = each_prompt(positions, len(rows))
    chosen = [resolve_positions(where, len(parts[0])) for where, parts in zip(asked, rows, strict=True)]
    longest = max(len(c) for c in chosen)
    dtype = common_dtype(p.dtype for parts in rows for p in parts)
    values: npt.NDArray[Any] = np.zeros((len(rows), longest, sum(p.shape[1] for p in rows[0])), dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (parts, where) in enumerate(zip(rows, chosen, strict=True)):
        values[i, : len(where)] = np.concatenate([p[where] for p in parts], axis=1)
        mask[i, : len(where)] = True
    return to_torch(values), mask


def records_of(prompts: PromptTable, layout: str, rows: Mapping[str, torch.Tensor]) -> Records:
    """What a store keeps of the rows of a batch, by site."""
    offset = prompts.token_offset if layout == TOKENS else np.arange(len(prompts) + 1, dtype=np.int64)
    return Records(prompts, layout, offset, {name: to_numpy(tensor) for name, tensor in rows.items()})
