"""Ready-made edits: what they do to a value, and what identifies them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from actcache.capture.cache import ActivationCache
from actcache.capture.positions import check_positions, each_prompt, resolve_positions
from actcache.errors import EditError, LayerRangeError, OptionError, UnknownKeyError
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.capture.prompt_positions import Chosen


@dataclass(frozen=True, eq=False)
class ReadyMade(ABC):
    """An edit whose effect can be told from another's: made by `ablate`, `steer` and `patch`.

    Attributes: `target` (a complete site name, or the path of a module, whose first tensor is edited), `positions`.
    """

    target: str
    positions: Any

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise OptionError(
                f"a ready-made edit is named by a site or a module path, such as 'attn_out.3', not "
                f"{type(self.target).__name__}"
            )
        for choice in self.positions if _listed(self.positions) else [self.positions]:
            check_positions(choice)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes this edit the same as another one, as JSON values."""

    @abstractmethod
    def snapshot(self) -> ReadyMade:
        """The same edit with tensors of its own, which nobody can change."""

    @abstractmethod
    def changed(self, value: Tensor, chosen: Chosen | None) -> Tensor:
        """A new tensor ``[B, S, D]``: `value` edited where `chosen` says (None: everywhere)."""

    def check_length(self, length: int) -> None:
        """Raise `LayerRangeError` or `OptionError` when it cannot be applied to a prompt of `length` tokens."""
        for choice in self.positions if _listed(self.positions) else [self.positions]:
            resolve_positions(choice, length)

    @property
    def everywhere(self) -> bool:
        """Whether it edits every position alike, padding too, which means nothing."""
        return self.positions is None or (isinstance(self.positions, str) and self.positions == "all")

    @property
    def of_prompts(self) -> str | None:
        """Why it belongs to certain prompts, and not to any; None when it does not."""
        return "its positions are listed for each prompt" if _listed(self.positions) else None

    def _identity(self, kind: str) -> dict[str, Any]:
        what = "site" if Site.looks_like(self.target) else "module"
        target = str(Site.parse(self.target)) if what == "site" else self.target
        return {"kind": kind, what: target, "positions": _told(self.positions)}


def ablate(target: str, *, mean: Any = None, positions: Any = "all") -> ReadyMade:
    """Replace a value by zeros, or by `mean`.

    `target`: a complete site name ("attn_out.3"), or the path of a module. `mean`: a vector ``[D]``, or ``[n, D]``, one
    row for each of the `positions`. `positions`: as in `capture`; they count real tokens of the sequence that the model
    (or `generate`) is called with.
    """
    given = torch.zeros(()) if mean is None else _numbers(mean, "mean", (1, 2, 3))
    return _Replace(target, positions, "ablate", _Vector(given) if given.ndim <= 1 else _rows(given))


def steer(target: str, vector: Any, *, scale: float = 1.0, positions: Any = "all") -> ReadyMade:
    """Add ``scale * vector`` to a value; `vector` is ``[D]``. The other arguments are those of `ablate`.

    A `vector` that requires gradients gets them.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise OptionError(f"scale is {scale!r}: expected a finite number")
    return _Steer(target, positions, _numbers(vector, "vector", (1,)), float(scale))


def patch(target: str, source: Any, *, positions: Any = "all") -> ReadyMade:
    """Replace a value by that of another pass.

    `source`: an `ActivationCache` that holds `target`, or a tensor: ``[D]`` for every position, ``[n, D]`` with a row
    for each of the `positions`, or ``[B, n, D]`` for each prompt. Of a cache the same `positions` are read as are
    replaced, real tokens counted in both, so "last" is put at "last" whatever the lengths; "all" needs prompts of equal
    lengths, and in generation leaves the new tokens alone. A source with one prompt serves every prompt.

    Raises `UnknownKeyError` or `LayerRangeError` for what the cache does not hold.
    """
    if not isinstance(source, ActivationCache):
        given = _numbers(source, "source", (1, 2, 3))
        return _Replace(target, positions, "patch", _Vector(given) if given.ndim == 1 else _rows(given))
    rows = _rows_of(source, target)
    picked = []
    for row, choice in zip(rows, each_prompt(positions, len(rows)), strict=True):
        at = resolve_positions(choice, len(row))
        # A copy: what the source becomes afterwards is its own affair.
        picked.append(row.index_select(0, torch.tensor(at, device=row.device)))
    return _Replace(target, positions, "patch", _Rows(torch.cat(picked), tuple(map(len, picked))))


@dataclass(frozen=True, eq=False)
class _Vector:
    """The same vector ``[D]`` (or number ``[]``) wherever it goes."""

    tensor: Tensor

    def at(self, chosen: Chosen, value: Tensor, target: str) -> Tensor:
        return self.like(value, target)

    def like(self, value: Tensor, target: str) -> Tensor:
        if self.tensor.ndim and self.tensor.shape[0] != value.shape[-1]:
            raise EditError(f"the edit of {target!r} is {self.tensor.shape[0]} wide, and the value {value.shape[-1]}")
        return self.tensor.to(device=value.device, dtype=value.dtype)


@dataclass(frozen=True, eq=False)
class _Rows:
    """A row for each position of each prompt, one after the other: ``[sum of counts, D]``. One prompt serves all."""

    tensor: Tensor
    counts: tuple[int, ...]

    def at(self, chosen: Chosen, value: Tensor, target: str) -> Tensor:
        rows, mine = len(chosen.counts), len(self.counts)
        # Generation has several rows for a prompt, one below the other.
        if mine not in (1, rows) and (rows % mine or not chosen.beams):
            raise EditError(f"the edit of {target!r} has values for {mine} prompts, and this pass {rows} rows")
        of = [0 if mine == 1 else row * mine // rows for row in range(rows)]
        for row, count in enumerate(chosen.counts):
            if count != self.counts[of[row]]:
                raise EditError(
                    f"the edit of {target!r} has values for {self.counts[of[row]]} positions of prompt {of[row]}, "
                    f"and this pass has {count} there: choose positions that both have, such as positions='last'"
                )
        if self.tensor.shape[-1] != value.shape[-1]:
            raise EditError(f"the edit of {target!r} is {self.tensor.shape[-1]} wide, and the value {value.shape[-1]}")
        starts = torch.tensor([sum(self.counts[:prompt]) for prompt in of])
        index = starts[chosen.prompts] + chosen.number
        return self.tensor[index.to(self.tensor.device)].to(device=value.device, dtype=value.dtype)


@dataclass(frozen=True, eq=False)
class _Replace(ReadyMade):
    kind: str
    values: _Vector | _Rows

    def identity(self) -> dict[str, Any]:
        counts = list(self.values.counts) if isinstance(self.values, _Rows) else None
        return {**self._identity(self.kind), "values": _digest(self.values.tensor), "counts": counts}

    def snapshot(self) -> ReadyMade:
        return replace(self, values=replace(self.values, tensor=_own(self.values.tensor)))

    def changed(self, value: Tensor, chosen: Chosen | None) -> Tensor:
        if chosen is None:
            assert isinstance(self.values, _Vector)
            return self.values.like(value, self.target).expand_as(value).clone()
        new = value.clone()
        new[chosen.rows.to(value.device), chosen.at.to(value.device)] = self.values.at(chosen, value, self.target)
        return new

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if isinstance(self.values, _Rows) and not _listed(self.positions):
            count = len(resolve_positions(self.positions, length))
            if any(count != mine for mine in self.values.counts):
                raise OptionError(f"it has values for {self.values.counts[0]} positions, and would need {count}")

    @property
    def everywhere(self) -> bool:
        return isinstance(self.values, _Vector) and super().everywhere

    @property
    def of_prompts(self) -> str | None:
        several = isinstance(self.values, _Rows) and len(self.values.counts) > 1
        return "it has values for each of several prompts" if several else super().of_prompts


@dataclass(frozen=True, eq=False)
class _Steer(ReadyMade):
    vector: Tensor
    scale: float

    def identity(self) -> dict[str, Any]:
        return {**self._identity("steer"), "scale": self.scale, "vector": _digest(self.vector)}

    def snapshot(self) -> ReadyMade:
        return replace(self, vector=_own(self.vector))

    def changed(self, value: Tensor, chosen: Chosen | None) -> Tensor:
        added = _Vector(self.vector * self.scale).like(value, self.target)
        if chosen is None:
            return value + added
        new = value.clone()
        rows, at = chosen.rows.to(value.device), chosen.at.to(value.device)
        new[rows, at] = value[rows, at] + added
        return new


def _numbers(given: Any, what: str, dimensions: Sequence[int]) -> Tensor:
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{what} is a {type(given).__name__}: expected a tensor ({error})") from error
    shapes = {1: "[D]", 2: "[n, D]", 3: "[B, n, D]"}
    if tensor.ndim not in dimensions or 0 in tensor.shape or tensor.dtype == torch.bool or tensor.is_complex():
        expected = " or ".join(shapes[n] for n in dimensions)
        raise OptionError(f"{what} is {tensor.dtype} of shape {list(tensor.shape)}: expected numbers {expected}")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _rows(tensor: Tensor) -> _Rows:
    prompts = tensor if tensor.ndim == 3 else tensor[None]
    return _Rows(prompts.flatten(0, 1), (prompts.shape[1],) * prompts.shape[0])


def _rows_of(source: ActivationCache, target: str) -> list[Tensor]:
    if target not in source:
        raise UnknownKeyError(f"the source holds no {target!r}: capture it there, or pass a tensor")
    rows = source.rows(target)
    if not all(row.ndim == 2 and len(row) for row in rows):
        raise LayerRangeError(f"{target!r} of the source has no rows [T, D] for each prompt")
    return rows


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _digest(tensor: Tensor) -> list[Any]:
    plain = tensor.detach().to("cpu").contiguous()
    data: Any = plain.view(-1).view(torch.uint8).numpy()
    return [str(plain.dtype), list(plain.shape), xxhash.xxh3_128_hexdigest(data)]


def _listed(positions: Any) -> bool:
    """Whether positions hold a list for each prompt."""
    return isinstance(positions, list) and bool(positions) and all(isinstance(item, list) for item in positions)


def _told(positions: Any) -> Any:
    """Positions as JSON values, the same for two ways of writing the same."""
    if isinstance(positions, tuple):
        return {"from": int(positions[0]), "to": int(positions[1])}
    if isinstance(positions, list):
        return [_told(item) for item in positions]
    if positions is None or isinstance(positions, str):
        return {"first": 0, "last": -1}.get(positions or "", "all")
    return int(positions)
