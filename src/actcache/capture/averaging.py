"""Means over examples, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actcache.capture.cache import ActivationCache
from actcache.capture.notes import ValueWithInfo
from actcache.capture.positions import has_fixed_size, is_single
from actcache.capture.tokens import position_axes
from actcache.errors import JoinError

_REMEDY = (
    "Choose positions of which every example has as many ('last', (0, 4)), or a list for each prompt, whose tokens are "
    "averaged first; for attention patterns, whose keys are all of an example's tokens, average blocks of named "
    "positions (attention=ac.AttentionBlocks(...)), or examples of one length."
)


class Means:
    """Running means of the values of caches, one value per example; sums are in float64.

    What an example's value is follows from how positions were chosen, never from the data: position by position where
    the choice names as many tokens of any prompt, else the mean over the example's chosen tokens. Means come out in
    `dtype`, or in that of their values and float32 at least.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._means: dict[str, dict[str | None, _Mean]] = {}
        self._notes: dict[str, Any] = {}

    def add_sites(self, cache: ActivationCache, positions: Any) -> None:
        """Add the values of a cache that holds the tokens at `positions` only: sites ``[B, n, ...]``, and patterns
        ``[B, ..., n, K]``, whose keys all stay."""
        for name, choice in _named(positions):
            part = cache if name is None else cache.at(name)
            for key, value in part.items():
                if len(position_axes(key)) > 1:
                    for row in part.rows(key):
                        self._add(key, name, _of_queries(row, choice)[None], value.dtype)
                else:
                    self._add(key, name, _of_tokens(value, part._mask_of(key, value), choice), value.dtype)

    def add_blocks(self, blocks: Mapping[str, ValueWithInfo]) -> None:
        """Add blocks of attention ``[B, ...]``; one that is nan for an example leaves that example out."""
        for key, value in blocks.items():
            self._notes[key] = value.info()
            self._add(key, None, value.value(), value.value().dtype, skip_nan=True)

    def result(self) -> ActivationCache:
        """A tensor by key, or a dict of tensors by the names of positions."""
        cache = ActivationCache()
        for key, means in self._means.items():
            if None in means:
                mean = means[None].result()
                cache[key] = ValueWithInfo(mean, self._notes[key]) if key in self._notes else mean
            else:
                cache[key] = {name: mean.result() for name, mean in means.items()}
        return cache

    def _add(self, key: str, name: str | None, values: Tensor, dtype: torch.dtype, *, skip_nan: bool = False) -> None:
        means = self._means.setdefault(key, {})
        if name not in means:
            result = torch.promote_types(dtype, torch.float32) if self._dtype is None else self._dtype
            means[name] = _Mean(key if name is None else f"{key} at {name!r}", result, skip_nan=skip_nan)
        means[name].add(values)


class _Mean:
    def __init__(self, what: str, dtype: torch.dtype, *, skip_nan: bool) -> None:
        self._what = what
        self._skip_nan = skip_nan
        self._dtype = dtype
        self._sum: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, values: Tensor) -> None:
        wide = values.to(torch.float64)
        present = ~wide.isnan() if self._skip_nan else torch.ones_like(wide, dtype=torch.bool)
        total, counts = wide.where(present, 0).sum(0), present.sum(0)
        if self._sum is None or self._counts is None:
            self._sum, self._counts = total, counts
        elif self._sum.shape == total.shape:
            self._sum += total
            self._counts += counts
        else:
            raise JoinError(
                f"{self._what!r} cannot be averaged over examples: it is {list(self._sum.shape)} in some and "
                f"{list(total.shape)} in others. {_REMEDY}"
            )

    def result(self) -> Tensor:
        assert self._sum is not None and self._counts is not None
        return (self._sum / self._counts).to(self._dtype)


def _named(positions: Any) -> list[tuple[str | None, Any]]:
    return list(positions.items()) if isinstance(positions, dict) else [(None, positions)]


def _of_queries(pattern: Tensor, choice: Any) -> Tensor:
    """The same for the pattern of one example, ``[..., n, K]``: all queries stay where all were chosen."""
    if is_single(choice):
        return pattern[..., 0, :]
    if has_fixed_size(choice) or (isinstance(choice, str) and choice == "all"):
        return pattern
    return pattern.mean(-2, dtype=torch.float64)


def _of_tokens(value: Tensor, mask: Tensor | None, choice: Any) -> Tensor:
    """Of each example what is averaged: ``[B, D]``, or ``[B, n, D]`` where `choice` names ``n`` tokens of any prompt.

    `value` ``[B, n, ...]`` holds what was chosen; `mask` ``[B, n]`` leaves out what a prompt has fewer of.
    """
    if is_single(choice):
        return value[:, 0]
    if has_fixed_size(choice):
        return value
    real = torch.ones(value.shape[:2], dtype=torch.bool) if mask is None else mask
    real = real.to(value.device).view(*real.shape, *[1] * (value.ndim - 2))
    return value.to(torch.float64).where(real, 0).sum(1) / real.sum(1)
