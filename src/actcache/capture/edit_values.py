"""The values that ready-made edits put in place of others, and the forms in which they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from actcache.errors import EditError, LayerRangeError, OptionError
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.capture.prompt_positions import Chosen

# Sites at which a token has a vector for each head.
HEADED = ("q", "k", "v", "z", "head_out", "pattern")


def headed(target: str) -> bool:
    """Whether `target` names a site at which a token has a vector for each head."""
    site = Site.parse(target) if Site.looks_like(target) else None
    return site is not None and site.name in HEADED and site.head is None


def read_heads(heads: Any) -> tuple[int, ...] | None:
    """Heads as a tuple: None (all), an int, or a list of ints. Raises `OptionError`."""
    if heads is None:
        return None
    listed = [heads] if hasattr(heads, "__index__") and getattr(heads, "shape", ()) == () else heads
    try:
        found = tuple(int(index(head)) for head in listed if not isinstance(head, bool))
    except TypeError:
        found = ()
    if not found or len(found) != len(listed):
        raise OptionError(f"heads is {heads!r}: expected an int, a list of ints, or None for all of them")
    return tuple(dict.fromkeys(found))


def resolve_heads(heads: Sequence[int], n_heads: int, target: str) -> list[int]:
    """Head numbers from 0; negative ones count from the end. Raises `LayerRangeError`."""
    for head in heads:
        if not -n_heads <= head < n_heads:
            raise LayerRangeError(
                f"head {head} of {target!r} is out of range: it has {n_heads} heads (0 to {n_heads - 1})"
            )
    return [head % n_heads for head in heads]


def is_pattern(target: str) -> bool:
    """Whether `target` names attention probabilities."""
    return Site.looks_like(target) and Site.parse(target).name == "pattern"


def read_numbers(given: Any, what: str, target: str) -> Tensor:
    """What was given as the "vector", "mean" or "source" of an edit, as a tensor. Raises `OptionError`."""
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{what} is a {type(given).__name__}: expected a tensor ({error})") from error
    if is_pattern(target):
        # A vector over the keys would mean another one in each prompt.
        if what != "source":
            raise OptionError(f"{target!r} takes no {what}: use a function, or ac.patch with a row for each query")
        shapes = ["[heads, n, keys]", "[B, heads, n, keys]"] if headed(target) else ["[n, keys]", "[B, n, keys]"]
    elif headed(target):
        shapes = ["[hd]", "[heads, hd]", "[n, heads, hd]", "[B, n, heads, hd]"]
    else:
        shapes = ["[D]", "[n, D]", "[B, n, D]"]
    if what == "vector":
        shapes = shapes[:-2]
    fits = any(tensor.ndim == shape.count(",") + 1 for shape in shapes)
    if not fits or 0 in tensor.shape or tensor.dtype == torch.bool or tensor.is_complex():
        expected = " or ".join(shapes)
        raise OptionError(f"{what} is {tensor.dtype} of shape {list(tensor.shape)}: expected numbers {expected}")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def read_values(tensor: Tensor, target: str) -> Vector | Rows:
    """A vector for every position, or rows for some, told by the number of dimensions."""
    token = 2 if headed(target) else 1
    if is_pattern(target) and tensor.ndim > token == 2:
        tensor = tensor.transpose(-3, -2)
    if tensor.ndim <= token:
        return Vector(tensor)
    prompts = tensor if tensor.ndim == token + 2 else tensor[None]
    return Rows(prompts.flatten(0, 1), (prompts.shape[1],) * prompts.shape[0])


class _Edit(Protocol):
    """What an edit says of where its values go."""

    @property
    def target(self) -> str: ...

    @property
    def heads(self) -> tuple[int, ...] | None: ...


@dataclass(frozen=True, eq=False)
class Vector:
    """The same vector ``[D]``, ``[heads, hd]`` (or number ``[]``) wherever it goes."""

    tensor: Tensor

    def at(self, chosen: Chosen, value: Tensor, edit: _Edit) -> Tensor:
        return self.like(value, edit)

    def like(self, value: Tensor, edit: _Edit) -> Tensor:
        if self.tensor.ndim:
            _check_form(self.tensor.shape, value, edit)
        return self.tensor.to(device=value.device, dtype=value.dtype)


@dataclass(frozen=True, eq=False)
class Rows:
    """A row for each position of each prompt, one after the other: ``[sum of counts, D]``, with heads
    ``[sum of counts, heads, hd]``. One prompt serves all."""

    tensor: Tensor
    counts: tuple[int, ...]

    def at(self, chosen: Chosen, value: Tensor, edit: _Edit) -> Tensor:
        rows, mine = len(chosen.counts), len(self.counts)
        # Generation has several rows for a prompt, one below the other.
        if mine not in (1, rows) and (rows % mine or not chosen.beams):
            raise EditError(f"the edit of {edit.target!r} has values for {mine} prompts, and this pass {rows} rows")
        of = [0 if mine == 1 else row * mine // rows for row in range(rows)]
        for row, count in enumerate(chosen.counts):
            if count != self.counts[of[row]]:
                raise EditError(
                    f"the edit of {edit.target!r} has values for {self.counts[of[row]]} positions of prompt {of[row]}, "
                    f"and this pass has {count} there: choose positions that both have, such as positions='last'"
                )
        starts = torch.tensor([sum(self.counts[:prompt]) for prompt in of])
        of_each = starts[chosen.prompts] + chosen.number
        picked = self.tensor[of_each.to(self.tensor.device)].to(device=value.device, dtype=value.dtype)
        if is_pattern(edit.target):
            picked = _over_keys(picked, chosen, value, edit)
        _check_form(picked.shape[1:], value, edit)
        return picked


def _over_keys(rows: Tensor, chosen: Chosen, value: Tensor, edit: _Edit) -> Tensor:
    """Rows over the real tokens of their prompts, as rows over the keys of this pass."""
    spread = rows.new_zeros(*rows.shape[:-1], value.shape[-1])
    for row, keys in enumerate(chosen.keys):
        mine = (chosen.rows == row).nonzero()[:, 0].to(rows.device)
        part = rows[mine]
        if part.shape[-1] > len(keys) and bool(part[..., len(keys) :].any()):
            raise EditError(
                f"the edit of {edit.target!r} has values for {part.shape[-1]} keys, and row {row} of this pass has "
                f"{len(keys)} real tokens: patch a prompt that is as long, or a position that both have"
            )
        width = min(part.shape[-1], len(keys))
        columns = chosen.key_columns(keys[:width], value.shape[-1])
        there = (columns >= 0).nonzero()[:, 0]
        filled = spread[mine]
        filled[..., columns[there].to(rows.device)] = part[..., there.to(rows.device)]
        spread[mine] = filled
    return spread


def _check_form(given: Sequence[int], value: Tensor, edit: _Edit) -> None:
    """Raise `EditError` unless a token's value may be `given` wide, and have as many heads."""
    if given[-1] != value.shape[-1]:
        raise EditError(f"the edit of {edit.target!r} is {given[-1]} wide, and the value {value.shape[-1]}")
    if headed(edit.target) and len(given) > 1:
        heads = value.shape[2] if edit.heads is None else len(edit.heads)
        if given[-2] != heads:
            raise EditError(f"the edit of {edit.target!r} has vectors for {given[-2]} heads, and {heads} are edited")
