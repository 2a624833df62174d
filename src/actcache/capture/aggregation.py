"""Joining caches: what must agree, and one join for any number of batches.

What `cat` adds is checked at once and joined when somebody reads, so that many batches cost one join.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.capture.like_batches import Copied, Form, Held, Like, cat, in_graph
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
        # The form of the last batch, when it was all tensors joined by default, and what those after it that have the
        # same went to: one part, the last, of all keys.
        self._form: Form | None = None
        self._like: Like | None = None
        self._states: list[TokenState] = []
        self._columns: dict[str, list[Any]] = {}
        self._tokens: list[list[str]] | None = None
        self._metadata = base.metadata
        self._rows = self.batches = 0
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
        like = self._form is not None and self._form.fits(batch.items)
        if not like and not first and self._parts.keys() != batch.items.keys():
            late = [key for key in batch.items if key not in self._parts]
            lacking = [key for key in self._parts if key not in batch.items]
            _settle_keys(missing, "keys", lacking, late, bool(self._parts.keys() & batch.items.keys()))
        columns = self._with_columns(batch, missing, first)
        if self._metadata and batch.metadata and not same_content(self._metadata, batch.metadata):
            raise JoinError(_other_metadata(self._metadata, batch.metadata))
        if like:
            # As the batch before, which was checked: by far the most frequent case.
            self._add_like(list(batch.items.values()), batch.state, copy)
            self._commit(batch, columns)
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
        # What is joined without a copy gets one by the join.
        own = copy or first or not self.pad
        parts = {k: v if not own and isinstance(v, (Tensor, np.ndarray)) else copied(v) for k, v in parts.items()}
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
        for key, value in parts.items():
            self._parts.setdefault(key, []).append((value, states[key]))
        default = not folded and len(batch.items) == len(parts) == len(self._parts)
        self._form, self._like = Form.of(batch.items) if default else None, None
        self._commit(batch, columns)

    def _add_like(self, values: list[Tensor], state: TokenState, copy: bool) -> None:
        """Add the values of a batch that has the form of the one before."""
        assert self._form is not None
        own = copy or not self.pad
        kind = Copied if own and self.pad and not in_graph(values) else Held
        like = self._like if type(self._like) is kind else kind(self._form)
        like.add(values, state, copy=own)
        if like is not self._like:
            self._like = like
            for parts in self._parts.values():
                parts.append((like, state))

    def _commit(self, batch: Batch, columns: dict[str, list[Any]]) -> None:
        first = not self._states
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
        for key, found in self._parts.items():
            if blank and len(found) > 1 and _all_alike([value for value, _ in found], key):
                items[key] = cat([value for value, _ in found], key)
                continue
            parts = list(_one_by_one(found, key))
            values = [value for value, _ in parts]
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


def _one_by_one(parts: Sequence[tuple[Any, TokenState]], key: str) -> Iterator[tuple[Any, TokenState]]:
    """The value of each batch, also of those that are one part."""
    for value, state in parts:
        if isinstance(value, Like):
            yield from zip(value.each(key), value.states, strict=True)
        else:
            yield value, state


def _all_alike(values: list[Any], key: str) -> bool:
    """Whether these are tensors of one form, which join as they are."""
    forms = set()
    for value in values:
        if isinstance(value, Like):
            forms.add(value.form.parts[value.form.places[key]])
        elif type(value) is Tensor and value.ndim and value.layout is torch.strided:
            forms.add((value.shape, value.dtype, value.device))
        else:
            return False
    return len(forms) == 1


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
