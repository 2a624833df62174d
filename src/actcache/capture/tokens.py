"""What each position of a cache's values is: token ids, mask and named positions, for every stack of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actcache.capture.entry import Entry, hidden_of
from actcache.capture.notes import ValueWithInfo
from actcache.model.sites import Site


class Tokens(NamedTuple):
    """Of one stack: token ids and mask ``[B, S]``, and the columns of each name, ``[B, w]`` with -1 where a prompt has
    fewer (``[B]`` for the name of a single position). All on the CPU; None where not known."""

    ids: Tensor | None = None
    mask: Tensor | None = None
    names: Mapping[str, Tensor] = {}


# By the stack's name; first the one that stands for the cache as a whole.
Tables = dict[str | None, Tokens]


@dataclass(frozen=True)
class TokenState:
    """The tables of a cache, and the masks of values that they do not describe."""

    tables: Tables = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def blank(self) -> bool:
        return not self.masks and all(table.mask is None for table in self.tables.values())

    def table_of(self, key: str) -> Tokens:
        """The table that describes the value of `key`; an empty one where there is none."""
        tables = list(self.tables.values())
        if len(tables) > 1 and Site.looks_like(key):
            # Logits have no stack, and are the decoder's.
            return self.tables.get(Site.parse(key).stack or "decoder", Tokens())
        return next((table for table in tables if table.mask is not None), Tokens())

    def mask_of(self, key: str, value: Tensor) -> Tensor | None:
        """Which positions of the value of `key` are real, ``[B, n]``; None when not known."""
        own = self.masks.get(key)
        axis = position_axes(key)[0]
        if own is not None or value.ndim <= axis:
            return own
        several = len(self.tables) > 1 and not Site.looks_like(key)
        tables: Iterable[Tokens] = self.tables.values() if several else [self.table_of(key)]
        for mask in (table.mask for table in tables):
            # The logits of generation exist for the last positions only.
            if mask is not None and mask.shape[0] == value.shape[0] and mask.shape[1] >= value.shape[axis]:
                return mask[:, mask.shape[1] - value.shape[axis] :]
        return None


def position_axes(key: str) -> tuple[int, ...]:
    """Which dimensions of the value of `key` are positions: dim 1, and of attention patterns queries and keys."""
    if "pattern" not in key or not Site.looks_like(key):
        return (1,)
    site = Site.parse(key)
    if site.name != "pattern":
        return (1,)
    return (2, 3) if site.head is None else (1, 2)


def real_rows(key: str, value: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The value prompt by prompt, without its padding: views where the real positions lie together."""
    if mask is None:
        return list(value.unbind(0))
    rows = []
    for row, real in zip(value, mask, strict=True):
        at = real.nonzero()[:, 0]
        for axis in position_axes(key):
            row = _take(row, at, axis - 1)
        rows.append(row)
    return rows


def _take(row: Tensor, at: Tensor, axis: int) -> Tensor:
    together = len(at) > 0 and int(at[-1] - at[0]) + 1 == len(at)
    return row.narrow(axis, int(at[0]), len(at)) if together else row.index_select(axis, at.to(row.device))


def tensor_of(value: Any) -> Tensor | None:
    """The tensor that stands for a value: itself, what it notes, or the hidden states of a module."""
    if isinstance(value, ValueWithInfo):
        value = value.value()
    if isinstance(value, Entry):
        return hidden_of(value.output)
    return value if isinstance(value, Tensor) else None


def pad_axis(tensor: Tensor, axis: int, size: int, fill: float = 0) -> Tensor:
    """`tensor` made `size` long along `axis` by values `fill` behind its end."""
    missing = size - tensor.shape[axis]
    if missing == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (0, missing), value=fill)


def join_tables(states: Sequence[TokenState]) -> Tables:
    """The tables of batches joined along the prompts; a stack whose mask one of them does not know is not known."""
    stacks = dict.fromkeys(name for state in states for name in state.tables)
    return {name: _join_tokens([state.tables.get(name, Tokens()) for state in states]) for name in stacks}


def joined_mask(key: str, tensors: Sequence[Tensor], states: Sequence[TokenState], joined: Tables) -> Tensor | None:
    """The mask of the value that `tensors` (of one batch each) make up, when `joined` does not tell it already.

    None too when nothing was known and nothing is padded. `states` is empty when none of them knows anything."""
    axis = position_axes(key)[0]
    if not states and len({tensor.shape for tensor in tensors}) == 1:
        return None
    if any(tensor.ndim <= axis for tensor in tensors):
        return None
    widths = [tensor.shape[axis] for tensor in tensors]
    if not states and len(set(widths)) == 1:
        return None
    known: list[Tensor | None] = [None] * len(tensors)
    if states:
        tables = [state.table_of(key) for state in states]
        told = TokenState(joined).table_of(key).mask is not None and all(
            key not in state.masks and table.mask is not None and table.mask.shape[1] == width
            for state, table, width in zip(states, tables, widths, strict=True)
        )
        if told:
            return None
        known = [state.mask_of(key, tensor) for state, tensor in zip(states, tensors, strict=True)]
    if all(mask is None for mask in known) and len(set(widths)) == 1:
        return None
    masks = [
        mask if mask is not None else torch.ones(tensor.shape[0], width, dtype=torch.bool)
        for mask, tensor, width in zip(known, tensors, widths, strict=True)
    ]
    return torch.cat([pad_axis(mask, 1, max(widths)) for mask in masks])


def cut_tables(tables: Tables, name: str) -> Tables:
    """The tables of a cache that holds only the positions called `name`."""
    return {stack: _cut_tokens(tokens, name) for stack, tokens in tables.items() if name in tokens.names}


def take_columns(value: Tensor, columns: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The chosen positions of every prompt along each of `axes`: columns ``[B, w]``, zero where they are -1."""
    for axis in axes:
        shape = [columns.shape[0], *[1] * (value.ndim - 1)]
        shape[axis] = columns.shape[1]
        sizes = list(value.shape)
        sizes[axis] = columns.shape[1]
        index = columns.to(value.device).view(shape)
        value = value.gather(axis, index.clamp_min(0).expand(sizes)).masked_fill(index < 0, 0)
    return value


def columns_of(index: Tensor) -> Tensor:
    """The columns of a name as ``[B, w]``."""
    return index[:, None] if index.ndim == 1 else index


def _cut_tokens(tokens: Tokens, name: str) -> Tokens:
    columns = columns_of(tokens.names[name])
    ids = tokens.ids
    if ids is not None:
        ids = ids.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, 0)
    here = torch.arange(columns.shape[1]).expand_as(columns).where(columns >= 0, -1)
    return Tokens(ids, columns >= 0, {name: here[:, 0] if tokens.names[name].ndim == 1 else here})


def _join_tokens(parts: Sequence[Tokens]) -> Tokens:
    masks = [part.mask for part in parts if part.mask is not None]
    if len(masks) < len(parts):
        return Tokens()
    width = max(mask.shape[1] for mask in masks)
    ids = [pad_axis(part.ids, 1, width) for part in parts if part.ids is not None]
    names = {}
    for name in parts[0].names:
        if all(name in part.names for part in parts):
            found = [part.names[name] for part in parts]
            if any(columns.ndim > 1 for columns in found):
                found = [columns_of(columns) for columns in found]
                widest = max(columns.shape[1] for columns in found)
                found = [pad_axis(columns, 1, widest, -1) for columns in found]
            names[name] = torch.cat(found)
    return Tokens(
        torch.cat(ids) if len(ids) == len(parts) else None,
        torch.cat([pad_axis(mask, 1, width) for mask in masks]),
        names,
    )
