"""Ready-made edits: what they do to a value, and what identifies them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from actcache.capture.cache import ActivationCache
from actcache.capture.edit_values import (
    HEADED,
    Rows,
    Vector,
    headed,
    is_pattern,
    read_heads,
    read_numbers,
    read_values,
    resolve_heads,
)
from actcache.capture.media import told_in_cache
from actcache.capture.positions import (
    check_positions,
    each_prompt,
    is_per_prompt,
    resolve_positions,
    told_positions,
)
from actcache.errors import LayerRangeError, OptionError, UnknownKeyError
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.capture.prompt_positions import Chosen


@dataclass(frozen=True, eq=False)
class ReadyMade(ABC):
    """An edit whose effect can be told from another's: made by `ablate`, `steer`, `patch` and `knockout`.

    Attributes: `target` (what it is named by in messages; of all but a knockout a complete site name, or the path of a
    module, whose first tensor is edited), `positions`, `heads` (None: all of them, or the value has none).
    """

    target: str
    positions: Any
    heads: tuple[int, ...] | None

    def __post_init__(self) -> None:
        _check_target(self.target)
        for choice in self.positions if is_per_prompt(self.positions) else [self.positions]:
            check_positions(choice, ids=True)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes this edit the same as another one, as JSON values."""

    @abstractmethod
    def snapshot(self) -> ReadyMade:
        """The same edit with tensors of its own, which nobody can change."""

    def check_length(self, length: int) -> None:
        """Raise `LayerRangeError` or `OptionError` when it cannot be applied to a prompt of `length` tokens."""
        for choice in self.positions if is_per_prompt(self.positions) else [self.positions]:
            resolve_positions(choice, length)

    @property
    def everywhere(self) -> bool:
        """Whether it edits every position alike, padding too, which means nothing."""
        return self.positions is None or (isinstance(self.positions, str) and self.positions == "all")

    @property
    def needs_probabilities(self) -> bool:
        """Whether it changes attention probabilities, which some implementations of attention never hold."""
        return is_pattern(self.target)

    @property
    def of_prompts(self) -> str | None:
        """Why it belongs to certain prompts, and not to any; None when it does not."""
        return "its positions are listed for each prompt" if is_per_prompt(self.positions) else None


@dataclass(frozen=True, eq=False)
class OfValue(ReadyMade):
    """A ready-made edit of the value of one target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and not headed(self.target):
            raise OptionError(
                f"{self.target!r} has no vector for each head, so that heads= means nothing there: it goes with "
                f"{', '.join(HEADED)}"
            )

    @abstractmethod
    def changed(self, value: Tensor, chosen: Chosen | None) -> Tensor:
        """A new tensor ``[B, S, D]``, or ``[B, S, H, hd]``: `value` edited where `chosen` says (None: everywhere)."""

    def _identity(self, kind: str) -> dict[str, Any]:
        what = "site" if Site.looks_like(self.target) else "module"
        target = str(Site.parse(self.target)) if what == "site" else self.target
        found = {"kind": kind, what: target, "positions": told_positions(self.positions)}
        return found if self.heads is None else {**found, "heads": list(self.heads)}

    def _index(self, value: Tensor, chosen: Chosen | None) -> tuple[Any, ...]:
        """Which elements of `value` are edited, as an index."""
        if chosen is None:
            return (...,) if self.heads is None else (slice(None), slice(None), self._heads_of(value))
        rows, at = chosen.rows.to(value.device), chosen.at.to(value.device)
        if self.heads is None:
            return rows, at
        return rows[:, None], at[:, None], self._heads_of(value)

    def _heads_of(self, value: Tensor) -> Tensor:
        assert self.heads is not None
        return torch.tensor(resolve_heads(self.heads, value.shape[2], self.target), device=value.device)


def _check_target(target: Any) -> None:
    if not isinstance(target, str):
        raise OptionError(
            f"a ready-made edit is named by a site or a module path, such as 'attn_out.3', not {type(target).__name__}"
        )


def ablate(target: str, *, mean: Any = None, positions: Any = "all", heads: Any = None) -> ReadyMade:
    """Replace a value by zeros, or by `mean`.

    `target`: a complete site name ("attn_out.3", "head_out.3.7"), or the path of a module. `mean`: an
    `ActivationCache` that holds `target`: of one of prompts the mean over all their real tokens is taken, whatever the
    `positions`, and one of means (`extract_batches` with ``reduce="mean"``) gives its own; or a vector ``[D]``, or
    ``[n, D]``, one row for each of the `positions`. `positions`: as in `capture`; they count real tokens of
    the sequence that the model (or `generate`) is called with. `heads`: which ones of a value that has a vector for
    each head (`q`, `k`, `v`, `z`, `head_out`, `pattern`), an int or a list; there `mean` is ``[hd]``, the same for each
    of them, ``[heads, hd]`` or ``[n, heads, hd]``.

        ac.ablate("z.3", heads=[0, 7], mean=reference)          # reference: a cache of other prompts
        ac.ablate("attn_out.3", mean=ac.extract_batches(model, batches, sites="attn_out", reduce="mean"))
        ac.ablate("attn_out.3", mean=reference.get_position(3, -1, site="attn_out").mean(0), positions="last")

    Raises `OptionError` for arguments that cannot be, `UnknownKeyError` for a cache that does not hold `target`; what
    the model does not have is told by `ac.edit`.
    """
    _check_target(target)
    chosen = read_heads(heads)
    if isinstance(mean, ActivationCache):
        mean = _mean_of(mean, target, chosen)
    given = torch.zeros(()) if mean is None else read_numbers(mean, "mean", target)
    return _Replace(target, positions, chosen, "ablate", read_values(given, target))


def steer(target: str, vector: Any, *, scale: float = 1.0, positions: Any = "all", heads: Any = None) -> ReadyMade:
    """Add ``scale * vector`` to a value; `vector` is ``[D]``, or with heads ``[hd]`` or ``[heads, hd]``. The other
    arguments are those of `ablate`.

    A `vector` that requires gradients gets them. Raises `OptionError` for a scale that is no finite number, or what
    `ablate` refuses.
    """
    _check_target(target)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise OptionError(f"scale is {scale!r}: expected a finite number")
    return _Steer(target, positions, read_heads(heads), read_numbers(vector, "vector", target), float(scale))


def patch(target: str, source: Any, *, positions: Any = "all", heads: Any = None) -> ReadyMade:
    """Replace a value by that of another pass.

    `source`: an `ActivationCache` that holds `target`, or a tensor: ``[D]`` for every position, ``[n, D]`` with a row
    for each of the `positions`, or ``[B, n, D]`` for each prompt; with heads, ``[..., heads, hd]`` in place of ``D``.
    Of a cache the same `positions` and `heads` are read as are replaced, real tokens counted in both, so "last" is put
    at "last" whatever the lengths; "all" needs prompts of equal lengths, and in generation leaves the new tokens alone.
    A source with one prompt serves every prompt. Of a `pattern` rows are queries, and the keys are the prompt's real
    tokens from the first one on; keys behind those that the source has get zeros.

    Raises `UnknownKeyError` or `LayerRangeError` for what the cache does not hold.
    """
    _check_target(target)
    chosen = read_heads(heads)
    if not isinstance(source, ActivationCache):
        return _Replace(target, positions, chosen, "patch", read_values(read_numbers(source, "source", target), target))
    rows = _rows_of(source, target, chosen)
    picked = []
    for row, choice in zip(rows, each_prompt(told_in_cache(positions, source), len(rows)), strict=True):
        at = resolve_positions(choice, len(row))
        # A copy: what the source becomes afterwards is its own affair.
        picked.append(row.index_select(0, torch.tensor(at, device=row.device)))
    width = max(part.shape[-1] for part in picked)
    # Queries of a longer prompt have more keys.
    picked = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in picked]
    return _Replace(target, positions, chosen, "patch", Rows(torch.cat(picked), tuple(map(len, picked))))


@dataclass(frozen=True, eq=False)
class _Replace(OfValue):
    kind: str
    values: Vector | Rows

    def identity(self) -> dict[str, Any]:
        counts = list(self.values.counts) if isinstance(self.values, Rows) else None
        return {**self._identity(self.kind), "values": _digest(self.values.tensor), "counts": counts}

    def snapshot(self) -> ReadyMade:
        return replace(self, values=replace(self.values, tensor=_own(self.values.tensor)))

    def changed(self, value: Tensor, chosen: Chosen | None) -> Tensor:
        if chosen is None:
            assert isinstance(self.values, Vector)
            put = self.values.like(value, self)
            if self.heads is None:
                return put.expand_as(value).clone()
        else:
            put = self.values.at(chosen, value, self)
        new = value.clone()
        new[self._index(value, chosen)] = put
        return new

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if isinstance(self.values, Rows) and not is_per_prompt(self.positions):
            count = len(resolve_positions(self.positions, length))
            if any(count != mine for mine in self.values.counts):
                raise OptionError(f"it has values for {self.values.counts[0]} positions, and would need {count}")

    @property
    def everywhere(self) -> bool:
        return isinstance(self.values, Vector) and super().everywhere

    @property
    def of_prompts(self) -> str | None:
        several = isinstance(self.values, Rows) and len(self.values.counts) > 1
        return "it has values for each of several prompts" if several else super().of_prompts


@dataclass(frozen=True, eq=False)
class _Steer(OfValue):
    vector: Tensor
    scale: float

    def identity(self) -> dict[str, Any]:
        return {**self._identity("steer"), "scale": self.scale, "vector": _digest(self.vector)}

    def snapshot(self) -> ReadyMade:
        return replace(self, vector=_own(self.vector))

    def changed(self, value: Tensor, chosen: Chosen | None) -> Tensor:
        added = Vector(self.vector * self.scale).like(value, self)
        if chosen is None and self.heads is None:
            return value + added
        new = value.clone()
        there = self._index(value, chosen)
        new[there] = value[there] + added
        return new


def _held_as(source: ActivationCache, target: str) -> tuple[str, int | None]:
    """The key that has the value of `target`, and which of its heads that is; None for all that there is."""
    whole, one = target, None
    if target not in source and Site.looks_like(target) and (site := Site.parse(target)).head is not None:
        whole, one = str(replace(site, head=None)), site.head
    if whole not in source:
        raise UnknownKeyError(f"the source holds no {target!r}: capture it there, or pass a tensor")
    return whole, one


def _rows_of(source: ActivationCache, target: str, heads: tuple[int, ...] | None) -> list[Tensor]:
    """The value of `target` prompt by prompt, one row for each token."""
    whole, one = _held_as(source, target)
    rows = source.rows(whole)
    if is_pattern(whole) and headed(whole):
        rows = [row.transpose(0, 1) if row.ndim == 3 else row for row in rows]
    dimensions = 3 if headed(whole) else 2
    if not all(row.ndim == dimensions and len(row) for row in rows):
        raise LayerRangeError(
            f"{target!r} of the source has no rows [T, ...] for each prompt: pass the tensor that is meant, made of "
            f"source[{whole!r}]"
        )
    if one is not None:
        return [row[:, resolve_heads([one], row.shape[1], whole)[0]] for row in rows]
    if heads is None:
        return rows
    return [row[:, resolve_heads(heads, row.shape[1], target)] for row in rows]


def _mean_of(source: ActivationCache, target: str, heads: tuple[int, ...] | None) -> Tensor:
    if is_pattern(target):
        raise OptionError(f"the mean of {target!r} over tokens means nothing, since each has keys of its own")
    ready = _ready_mean(source, target, heads)
    if ready is not None:
        return ready
    rows = torch.cat(_rows_of(source, target, heads))
    return rows.mean(0, dtype=torch.promote_types(rows.dtype, torch.float32))


def _ready_mean(source: ActivationCache, target: str, heads: tuple[int, ...] | None) -> Tensor | None:
    """What a cache of means has for `target`, ``[D]`` or ``[heads, hd]``; None where the cache is one of prompts."""
    whole, one = _held_as(source, target)
    value, dimensions = source[whole], 2 if headed(whole) else 1
    if isinstance(value, dict) and all(isinstance(part, Tensor) for part in value.values()):
        names = list(value)
        raise OptionError(
            f"the source has a mean of {whole!r} at each of the positions {', '.join(map(repr, names))}: choose one, "
            f"mean=source[{whole!r}][{names[0]!r}]"
        )
    if not isinstance(value, Tensor) or value.ndim > dimensions + 1:
        return None
    if value.ndim != dimensions:
        raise OptionError(
            f"{whole!r} of the source is {list(value.shape)}, neither rows of prompts nor one mean. Of a mean position "
            f"by position pass the tensor, mean=source[{whole!r}], with the same positions"
        )
    if one is not None:
        return value[resolve_heads([one], len(value), whole)[0]]
    return value if heads is None else value[resolve_heads(heads, len(value), target)]


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _digest(tensor: Tensor) -> list[Any]:
    plain = tensor.detach().to("cpu").contiguous()
    data: Any = plain.view(-1).view(torch.uint8).numpy()
    return [str(plain.dtype), list(plain.shape), xxhash.xxh3_128_hexdigest(data)]
