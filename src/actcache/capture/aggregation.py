"""Joining caches: what must agree, and one join for any number of batches.

What `cat` adds is checked at once and joined when somebody reads, so that many batches cost one join.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.capture.merging import Axes, absent, check, copied, merge, signature
from actcache.capture.strategies import Strategies, Strategy
from actcache.capture.tokens import Mask, TokenState, join_tables, joined_mask, position_axes, tensor_of
from actcache.capture.values import same_content
from actcache.errors import AggregationError, JoinError


@dataclass
class Batch:
    """All that a cache holds, for joining."""

    items: dict[str, Any]
    state: TokenState
    rows: int
    batches: int
    columns: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens: list[list[str]] | None = None


class Join:
    """Batches on their way into one cache: added one by one, joined once."""

    def __init__(self, base: Batch, strategies: Strategies, *, pad: bool) -> None:
        self.pad = pad
        self._strategies = strategies
        # What the first value of a key decided: its strategy, position axes and signature.
        self._plans: dict[str, tuple[Strategy | None, Axes, Hashable]] = {}
        self._parts: dict[str, list[tuple[Any, TokenState]]] = {}
        self._states: list[TokenState] = []
        self._columns: dict[str, list[Any]] = {}
        self._tokens: list[list[str]] | None = None
        self._metadata = base.metadata
        self._rows = self.batches = 0
        # Keys, shapes, dtypes and devices of the last batch, when it was all tensors joined by default.
        self._form: list[tuple[Any, ...]] | None = None
        self._alike = False
        # Whether some prompts lack values that others have.
        self._padded = False
        if base.items or base.columns:
            self._parts = {key: [(value, base.state)] for key, value in base.items.items()}
            self._states = [base.state]
            self._columns = {name: [column] for name, column in base.columns.items()}
            self._tokens = base.tokens
            self._rows, self.batches = base.rows, base.batches

    @property
    def keys(self) -> Mapping[str, Any]:
        """The keys of the result."""
        return self._parts

    def add(self, batch: Batch, *, missing: str, copy: bool) -> None:
        """Add a batch, in memory of our own with `copy`. All checks come first: an error changes nothing."""
        if self._strategies.new:
            self._strategies.prove([*self._parts, *batch.items])
        first = not self._states
        late: list[str] = []
        lacking: list[str] = []
        if not first and self._parts.keys() != batch.items.keys():
            late = [key for key in batch.items if key not in self._parts]
            lacking = [key for key in self._parts if key not in batch.items]
            _settle_keys(missing, "keys", lacking, late, bool(self._parts.keys() & batch.items.keys()))
        columns = self._with_columns(batch, missing, first)
        if self._metadata and batch.metadata and not same_content(self._metadata, batch.metadata):
            raise JoinError(_other_metadata(self._metadata, batch.metadata))
        form = [(k, v.shape, v.dtype, v.device) for k, v in batch.items.items() if type(v) is Tensor]
        if form == self._form and len(form) == len(batch.items):
            # As the batch before, which was checked: by far the most frequent case.
            self._commit(batch, self._kept(batch.items, copy, self._alike), columns)
            return
        parts: dict[str, Any] = {}
        padding: dict[str, tuple[Any, TokenState]] = {}
        folded: dict[str, Any] = {}
        plans: dict[str, tuple[Strategy | None, Axes, Hashable]] = {}
        for key, value in batch.items.items():
            if missing == "drop" and key in late:
                continue
            strategy, axes, known = self._plans.get(key) or self._plan(key, value)
            if strategy is not None:
                folded[key] = _apply(strategy, key, self._parts[key][0][0] if key in self._parts else None, value)
                continue
            found = signature(value, axes)
            if known != found:
                check(known, found, key)
                found = "list" if "list" in (known, found) else known
            if known != found or key not in self._plans:
                plans[key] = None, axes, found
            if key in late:
                padding[key] = _padding(key, value, self._rows, self.batches)
            parts[key] = value
        parts = self._kept(parts, copy or first, alike=False)
        states = dict.fromkeys(parts, batch.state)
        if missing == "pad":
            for key in lacking:
                if self._plan(key)[0] is None:
                    parts[key], states[key] = _padding(key, self._parts[key][0][0], batch.rows, batch.batches)
        # From here on nothing fails.
        for key in lacking if missing == "drop" else ():
            del self._parts[key]
        for key, before in padding.items():
            self._parts[key] = [before]
        for key, value in folded.items():
            self._parts[key] = [(value, batch.state)]
        self._plans.update(plans)
        self._padded |= missing == "pad" and bool(late or lacking)
        self._form = form if len(form) == len(parts) == len(self._parts) else None
        self._alike = len(form) > 1 and _all_alike(list(batch.items.values()))
        self._commit(batch, parts, columns, states)

    def _commit(
        self,
        batch: Batch,
        parts: dict[str, Any],
        columns: dict[str, list[Any]],
        states: dict[str, TokenState] | None = None,
    ) -> None:
        first = not self._states
        for key, value in parts.items():
            part = value, batch.state if states is None else states[key]
            if key in self._parts:
                self._parts[key].append(part)
            else:
                self._parts[key] = [part]
        self._columns = columns
        self._tokens = _add_tokens(self._tokens, batch.tokens, first)
        self._metadata = self._metadata or dict(batch.metadata)
        self._states.append(batch.state)
        self._rows += batch.rows
        self.batches += batch.batches
        self._strategies.new.clear()

    def result(self) -> Batch:
        """Everything added, joined."""
        states = self._states
        tables = states[0].tables if len(states) == 1 else join_tables(states)
        blank = not self._padded and all(state.blank for state in states)
        items: dict[str, Any] = {}
        masks: dict[str, Mask] = {}
        for key, parts in self._parts.items():
            values = [value for value, _ in parts]
            if blank and len(parts) > 1 and _all_alike(values):
                items[key] = torch.cat(values)
                continue
            items[key] = merge(values, position_axes(key), pad=self.pad)
            if len(parts) == 1:
                if len(states) == 1 and key in parts[0][1].masks:
                    masks[key] = parts[0][1].masks[key]
                continue
            tensors = [tensor for value in values if (tensor := tensor_of(value)) is not None]
            if len(tensors) == len(values):
                mask = joined_mask(key, tensors, [] if blank else [state for _, state in parts], tables)
                if mask is not None:
                    masks[key] = mask
        columns = {name: _join_column(column) for name, column in self._columns.items()}
        state = TokenState(tables, masks)
        return Batch(items, state, self._rows, self.batches, columns, self._metadata, self._tokens)

    def _plan(self, key: str, value: Any = None) -> tuple[Strategy | None, Axes, Hashable]:
        """How `key` is joined, by what there is of it, else by `value`."""
        known = self._parts[key][0][0] if key in self._parts else value
        axes = position_axes(key)
        return self._strategies.of(key), axes, signature(known, axes)

    def _kept(self, values: dict[str, Any], copy: bool, alike: bool) -> dict[str, Any]:
        """Values in memory of our own. What is joined without a copy gets it by the join."""
        if not copy and self.pad:
            return {k: v if isinstance(v, (Tensor, np.ndarray)) else copied(v) for k, v in values.items()}
        if not alike or not self.pad:
            return {key: copied(value) for key, value in values.items()}
        # One copy of them all costs less than one of each.
        tensors = list(values.values())
        together = torch.cat(tensors).view(len(tensors), *tensors[0].shape)
        return dict(zip(values, together.unbind(), strict=True))

    def _with_columns(self, batch: Batch, missing: str, first: bool) -> dict[str, list[Any]]:
        if not batch.columns and not self._columns:
            return {}
        for name, column in batch.columns.items():
            if not hasattr(column, "__len__") or isinstance(column, (str, dict)) or len(column) != batch.rows:
                raise JoinError(
                    f"column {name!r} does not have one value for each of the {batch.rows} prompts: expected a list, "
                    "an array or a tensor of that length"
                )
        if first:
            return {name: [copied(column)] for name, column in batch.columns.items()}
        late = [name for name in batch.columns if name not in self._columns]
        lacking = [name for name in self._columns if name not in batch.columns]
        _settle_keys(missing, "columns", lacking, late, True)
        if missing == "drop":
            names = [name for name in self._columns if name in batch.columns]
        else:
            names = [*self._columns, *late]
        return {
            name: [
                *self._columns.get(name, [[None] * self._rows]),
                copied(batch.columns[name]) if name in batch.columns else [None] * batch.rows,
            ]
            for name in names
        }


def overlay(left: Batch, right: Batch) -> Batch:
    """Both together; of what both hold, the right one's. Every value keeps the mask it had."""
    items = {**left.items, **right.items}
    mine = all(table.mask is None for table in right.state.tables.values())
    tables = left.state.tables if mine else right.state.tables
    masks = {}
    for key, value in items.items():
        tensor = tensor_of(value)
        if tensor is not None:
            state, shown = (right if key in right.items else left).state, TokenState(tables)
            own, keys = state.mask_of(key, tensor), state.keys_of(key, tensor)
            told = shown.mask_of(key, tensor), shown.keys_of(key, tensor)
            if own is not None and not same_content((own, keys), told):
                masks[key] = Mask(own, keys)
    return Batch(
        items,
        TokenState(tables, masks),
        rows=left.rows,
        batches=max(left.batches, right.batches),
        columns={**left.columns, **right.columns},
        metadata={**left.metadata, **right.metadata},
        tokens=left.tokens if mine else right.tokens,
    )


def _all_alike(values: list[Any]) -> bool:
    """Whether these are tensors of one form, which join as they are."""
    first = values[0]
    if type(first) is not Tensor or first.ndim == 0:
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    return all(type(v) is Tensor and v.shape == shape and v.dtype == dtype and v.device == device for v in values)


def _apply(strategy: Strategy, key: str, old: Any, new: Any) -> Any:
    if isinstance(old, (list, dict, set)):
        # A strategy that changes what there was, and then fails, must leave the cache as it was.
        old = copy.copy(old)
    try:
        return strategy(old, copied(new))
    except Exception as error:
        name = getattr(strategy, "name", getattr(strategy, "__qualname__", repr(strategy)))
        raise AggregationError(f"the strategy {name} failed for {key!r}: {type(error).__name__}: {error}") from error


def _padding(key: str, template: Any, rows: int, batches: int) -> tuple[Any, TokenState]:
    value = absent(template, rows, batches)
    tensor, axis = tensor_of(value), position_axes(key)[0]
    if tensor is None or tensor.ndim <= axis:
        return value, TokenState()
    return value, TokenState({}, {key: Mask(torch.zeros(rows, tensor.shape[axis], dtype=torch.bool))})


def _settle_keys(missing: str, what: str, lacking: list[str], late: list[str], common: bool) -> None:
    if (not lacking and not late) or (missing != "error" and common):
        return
    sides = [
        f"{', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''} only in {where}"
        for names, where in ((lacking, "what there is"), (late, "what is added"))
        if names
    ]
    remedy = (
        "missing='pad' fills with zeros (or None), missing='drop' keeps what all have" if common else "none is shared"
    )
    raise JoinError(f"the caches hold different {what}: {'; '.join(sides)}. {remedy}")


def _other_metadata(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    names = [
        name
        for name in {**one, **other}
        if name not in one or name not in other or not same_content(one[name], other[name])
    ]
    shown = "; ".join(f"{name}: {one.get(name)!r} and {other.get(name)!r}" for name in names[:4])
    return (
        f"the caches were made differently, by their metadata ({shown}). If they belong together all the same, make "
        "them agree with add_metadata, or clear those of one (cache.metadata.clear())"
    )


def _add_tokens(mine: list[list[str]] | None, theirs: list[list[str]] | None, first: bool) -> list[list[str]] | None:
    if first:
        return None if theirs is None else list(theirs)
    return None if mine is None or theirs is None else [*mine, *theirs]


def _join_column(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts) or all(isinstance(part, np.ndarray) for part in parts):
        return merge(parts)
    return [item for part in parts for item in part]
