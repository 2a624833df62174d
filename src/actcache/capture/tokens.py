"""What each position of a cache's values is: token ids, mask and named positions, for every stack of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actcache.capture.entry import Entry, hidden_of
from actcache.capture.notes import ValueWithInfo
from actcache.capture.padding import pad_axis
from actcache.capture.values import same_content
from actcache.model.sites import Site


class Tokens(NamedTuple):
    """Of one stack: token ids and mask ``[B, S]``, and the columns of each name, ``[B, w]`` with -1 where a prompt has
    fewer (``[B]`` for the name of a single position); `keys` is the mask ``[B, K]`` of the positions that attention
    looks at where these are others than `mask` tells of. Of a decoder `prompts` says which row of the encoder's table
    each row was decoded from, ``[B]``; None where it is the same row. All on the CPU; None where not known."""

    ids: Tensor | None = None
    mask: Tensor | None = None
    names: Mapping[str, Tensor] = {}
    keys: Tensor | None = None
    prompts: Tensor | None = None


class Mask(NamedTuple):
    """Which positions of one value are real, ``[B, n]``, and for patterns which keys, ``[B, K]`` (None: the same)."""

    positions: Tensor
    keys: Tensor | None = None


# By the stack's name; first the one that stands for the cache as a whole.
Tables = dict[str | None, Tokens]


@dataclass(frozen=True)
class TokenState:
    """The tables of a cache, and the masks of values that they do not describe."""

    tables: Tables = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)

    @property
    def blank(self) -> bool:
        return not self.masks and (not self.tables or all(table.mask is None for table in self.tables.values()))

    def table_of(self, key: str) -> Tokens:
        """The table that describes the value of `key`; an empty one where there is none."""
        tables = list(self.tables.values())
        if len(tables) > 1 and Site.looks_like(key):
            # Logits have no stack, and are the decoder's.
            return self.tables.get(Site.parse(key).stack or "decoder", Tokens())
        return next((table for table in tables if table.mask is not None), Tokens())

    def mask_of(self, key: str, value: Tensor) -> Tensor | None:
        """Which positions of the value of `key` are real, ``[B, n]``; None when not known."""
        own = self.own_mask(key)
        axis = position_axes(key)[0]
        if own is not None:
            return own.positions
        if value.ndim <= axis:
            return None
        several = len(self.tables) > 1 and not Site.looks_like(key)
        tables: Iterable[Tokens] = self.tables.values() if several else [self.table_of(key)]
        for mask in (table.mask for table in tables):
            # The logits of generation exist for the last positions only.
            if mask is not None and mask.shape[0] == value.shape[0] and mask.shape[1] >= value.shape[axis]:
                return mask[:, mask.shape[1] - value.shape[axis] :]
        return None

    def keys_of(self, key: str, value: Tensor) -> Tensor | None:
        """Which keys of the pattern that is the value of `key` are real, ``[B, K]``; None when not known, or when the
        value is no pattern."""
        axes, own, table = position_axes(key), self.own_mask(key), self.table_of(key)
        if len(axes) < 2 or value.ndim <= axes[1]:
            return None
        if own is not None:
            mask: Tensor | None = own.positions if own.keys is None else own.keys
        else:
            mask = _keys(table)
        return mask if mask is not None and mask.shape == (value.shape[0], value.shape[axes[1]]) else None

    def own_mask(self, key: str) -> Mask | None:
        """The mask that the value of `key` has for itself, if any."""
        own = self.masks.get(key)
        if own is None and self.masks and Site.looks_like(key):
            # One head of a value has the mask of all.
            own = self.masks.get(str(replace(Site.parse(key), head=None)))
        return own


# What the blocks of an attention pattern are called; they have groups of tokens where it has tokens.
BLOCKS = "attention_blocks"
# A dimension that no value has.
_NONE = 1 << 30


def position_axes(key: str) -> tuple[int, ...]:
    """Which dimensions of the value of `key` are positions: dim 1, and of attention patterns queries and keys."""
    if BLOCKS in key:
        return (_NONE,)
    if "pattern" not in key or not Site.looks_like(key):
        return (1,)
    site = Site.parse(key)
    if site.name != "pattern":
        return (1,)
    return (2, 3) if site.head is None else (1, 2)


def real_rows(key: str, value: Tensor, mask: Tensor | None, keys: Tensor | None = None) -> list[Tensor]:
    """The value prompt by prompt, without its padding: views where the real positions lie together."""
    rows = list(value.unbind(0))
    for axis, real in zip(position_axes(key), (mask, keys), strict=False):
        if real is not None:
            rows = [_take(row, at.nonzero()[:, 0], axis - 1) for row, at in zip(rows, real, strict=True)]
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


def join_tables(states: Sequence[TokenState]) -> Tables:
    """The tables of batches joined along the prompts; a stack whose mask one of them does not know is not known."""
    stacks = dict.fromkeys(name for state in states for name in state.tables)
    joined = {name: _join_tokens([state.tables.get(name, Tokens()) for state in states]) for name in stacks}
    if joined.get("decoder", Tokens()).mask is not None:
        joined["decoder"] = joined["decoder"]._replace(prompts=_join_prompts(states))
    return joined


def _join_prompts(states: Sequence[TokenState]) -> Tensor | None:
    found, start = [], 0
    for state in states:
        encoder, decoder = (state.tables.get(name, Tokens()) for name in ("encoder", "decoder"))
        if encoder.mask is None or decoder.mask is None:
            return None
        prompts = torch.arange(decoder.mask.shape[0]) if decoder.prompts is None else decoder.prompts
        if decoder.prompts is None and decoder.mask.shape[0] != encoder.mask.shape[0]:
            return None
        found.append(prompts + start)
        start += encoder.mask.shape[0]
    return unless_alike(torch.cat(found))


def unless_alike(prompts: Tensor) -> Tensor | None:
    """The prompts of rows; None where row by row they are the same."""
    return None if torch.equal(prompts, torch.arange(len(prompts))) else prompts


def joined_mask(key: str, tensors: Sequence[Tensor], states: Sequence[TokenState], joined: Tables) -> Mask | None:
    """The mask of the value that `tensors` (of one batch each) make up, when `joined` does not tell it already.

    None too when nothing was known and nothing is padded. `states` is empty when none of them knows anything."""
    if not states and len({tensor.shape for tensor in tensors}) == 1:
        return None
    axes = position_axes(key)
    if any(tensor.ndim <= axes[-1] for tensor in tensors):
        return None
    if states and TokenState(joined).table_of(key).mask is not None:
        tables = [state.table_of(key) for state in states]
        widths = [(tensor.shape[axes[0]], tensor.shape[axes[-1]]) for tensor in tensors]
        if all(key not in state.masks for state in states) and all(
            table.mask is not None and (table.mask.shape[1], _width(table, axes)) == width
            for table, width in zip(tables, widths, strict=True)
        ):
            return None
    none: list[Tensor | None] = [None] * len(tensors)
    known = [state.mask_of(key, tensor) for state, tensor in zip(states, tensors, strict=True)] if states else none
    positions = _joined_side(tensors, known, axes[0])
    if len(axes) == 1:
        return None if positions is None else Mask(positions)
    known = [state.keys_of(key, tensor) for state, tensor in zip(states, tensors, strict=True)] if states else none
    keys = _joined_side(tensors, known, axes[1])
    if keys is None or positions is None:
        # Of the two, one is known: all of the other are real.
        rows = sum(tensor.shape[0] for tensor in tensors)
        if keys is None and positions is None:
            return None
        if positions is None:
            positions = torch.ones(rows, tensors[0].shape[axes[0]], dtype=torch.bool)
        else:
            keys = torch.ones(rows, tensors[0].shape[axes[1]], dtype=torch.bool)
    return Mask(positions, None if same_content(positions, keys) else keys)


def _joined_side(tensors: Sequence[Tensor], known: Sequence[Tensor | None], axis: int) -> Tensor | None:
    """The masks along one axis of the values of several batches, as one."""
    widths = [tensor.shape[axis] for tensor in tensors]
    if all(mask is None for mask in known) and len(set(widths)) == 1:
        return None
    masks = [
        mask if mask is not None else torch.ones(tensor.shape[0], width, dtype=torch.bool)
        for mask, tensor, width in zip(known, tensors, widths, strict=True)
    ]
    return torch.cat([pad_axis(mask, 1, max(widths)) for mask in masks])


def _width(table: Tokens, axes: tuple[int, ...]) -> int:
    """The size of the last of the axes that are positions, as the table tells it."""
    mask = table.mask if len(axes) == 1 else _keys(table)
    return -1 if mask is None else mask.shape[1]


def _keys(table: Tokens) -> Tensor | None:
    return table.mask if table.keys is None else table.keys


def cut_tables(tables: Tables, name: str) -> Tables:
    """The tables of a cache that holds only the positions called `name`."""
    return {stack: _cut_tokens(tokens, name) for stack, tokens in tables.items() if name in tokens.names}


def take_columns(value: Tensor, columns: Tensor, axis: int) -> Tensor:
    """The chosen positions of every prompt along `axis`: columns ``[B, w]``, zero where they are -1."""
    index = columns.to(value.device)
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    taken = value.movedim(axis, 1)[rows, index.clamp_min(0)]
    absent = index < 0
    if bool(absent.any()):
        taken[absent] = 0
    return taken.movedim(1, axis)


def columns_of(index: Tensor) -> Tensor:
    """The columns of a name as ``[B, w]``."""
    return index[:, None] if index.ndim == 1 else index


def _cut_tokens(tokens: Tokens, name: str) -> Tokens:
    columns = columns_of(tokens.names[name])
    ids = tokens.ids
    if ids is not None:
        ids = ids.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, 0)
    here = torch.arange(columns.shape[1]).expand_as(columns).where(columns >= 0, -1)
    kept = {name: here[:, 0] if tokens.names[name].ndim == 1 else here}
    return Tokens(ids, columns >= 0, kept, _keys(tokens), tokens.prompts)


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
    keys = None
    if any(part.keys is not None for part in parts):
        found = [mask for part in parts if (mask := _keys(part)) is not None]
        widest = max(mask.shape[1] for mask in found)
        keys = torch.cat([pad_axis(mask, 1, widest) for mask in found])
    return Tokens(
        torch.cat(ids) if len(ids) == len(parts) else None,
        torch.cat([pad_axis(mask, 1, width) for mask in masks]),
        names,
        keys,
    )
