"""What the analysis of a cache works on: the stream and its parts from the cache, norms and head from the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actcache.capture.parts import Parts
from actcache.capture.tokens import TokenState, take_columns, tensor_of
from actcache.errors import AdditivityError, LayerRangeError, OptionError, UnknownKeyError
from actcache.model.anatomy import Anatomy, describe, original
from actcache.model.head import Head, find_head
from actcache.model.layout import Block, layouts
from actcache.model.norms import Norm, norm_before, norm_behind_heads
from actcache.model.sites import Site

ATTENTION = ("attn_out", "cross_attn_out", "mixer_out")


class Streams:
    """One stack of the model that a cache was captured from.

    `model` is who answers what the cache does not hold; None means the model of the capture, as long as it is there.
    `what` is the function on whose behalf all this is: errors name it.
    """

    def __init__(self, cache: Parts, what: str, *, stack: str | None, model: nn.Module | None) -> None:
        self.cache = cache
        self.what = what
        self.stack = stack
        known = cache._model() if cache._model is not None else None
        self._model = known if model is None else original(model)
        self._anatomy: Anatomy | None = None
        # A cache of modules only may come from a model whose blocks cannot be made out.
        if model is not None or cache._depths:
            self._anatomy = None if self._model is None else describe(self._model)
        stacks = self._anatomy.stacks if self._anatomy is not None else tuple(cache._depths) or (None,)
        if stack not in stacks:
            have = "write " + " or ".join(f"stack={name!r}" for name in stacks if name is not None)
            raise OptionError(
                f"{what} works on one stack of blocks: {have}"
                if stack is None
                else f"{what}: the model has no stack {stack!r}"
            )
        self.depth = self._depth()
        self._pick: _Pick = _Pick(None)

    def _depth(self) -> int:
        if self._anatomy is not None:
            return self._anatomy.depth(self.stack)
        if self.stack in self.cache._depths:
            return self.cache._depths[self.stack]
        held = [s.layer + 1 for s in self.cache._sites() if s.layer is not None and s.stack == self.stack]
        if not held:
            raise UnknownKeyError(
                f"{self.what} needs the residual stream, and the cache holds no site that has a layer"
            )
        return max(held)

    # -- what the model knows

    @property
    def anatomy(self) -> Anatomy:
        if self._anatomy is None:
            gone = "is gone" if self.cache._model is not None else "is not known to this cache"
            raise OptionError(f"{self.what} needs the model, which {gone}: give it as model=")
        return self._anatomy

    @property
    def head(self) -> Head:
        if self.stack != self.anatomy.stacks[-1]:
            raise OptionError(f"{self.what}: the logits are computed from the decoder, write stack='decoder'")
        return find_head(self.anatomy.model)

    def norm(self, layer: int, *, mlp_input: bool) -> Norm | None:
        """The norm on the way into block `layer` (its attention, or its MLP), or behind the last one."""
        if mlp_input:
            self.anatomy.require(Site("resid_mid", layer, stack=self.stack))
        return norm_before(self.anatomy, self.stack, layer, "resid_mid" if mlp_input else "resid_pre")

    def block(self, layer: int) -> Block:
        known = layouts(self._anatomy) if self._anatomy is not None else self.cache._layouts
        if self.stack not in known:
            return layouts(self.anatomy)[self.stack][layer]
        block = known[self.stack][layer]
        if not block.kind:
            # Says why nothing adds up.
            self.anatomy.require(Site("mlp_out", layer, stack=self.stack))
        return block

    def require_sums(self, layers: Iterable[int]) -> None:
        """Raise `AdditivityError` where the stream is not the sum of what blocks add to it."""
        for layer in layers:
            if self.block(layer).kind == "post-norm":
                raise AdditivityError(
                    f"{self.what}: the residual stream is not the sum of its parts on this architecture. Block {layer} "
                    "puts a norm on the stream behind each part (resid_post = norm(resid_mid + mlp_out)); look at the "
                    "stream itself with accumulated_resid"
                )

    def has(self, name: str, layer: int) -> bool:
        """Whether the cache holds the site, or the architecture has it, as far as that is known."""
        site = Site(name, layer, stack=self.stack)
        return str(site) in self.cache or (self._anatomy is not None and self._anatomy.why_not(site) is None)

    def added_by_heads(self, layer: int, heads: Tensor) -> Tensor:
        """What the heads of a block add to the stream ``[..., H, D]``, from what they add to attention's output."""
        factor = self.block(layer).head_factor
        if factor is not None:
            return heads if factor == 1.0 else heads * factor
        # Behind a norm each has its part of the sum, as the norm scaled the sum.
        norm, bias = norm_behind_heads(self.anatomy, self.stack, layer)
        total = heads.to(torch.promote_types(heads.dtype, torch.float32)).sum(-2)
        scale = norm.scale(total if bias is None else total + bias.to(total)).unsqueeze(-2)
        return norm.divide(heads, scale) * norm.weight.to(heads)

    # -- what the cache holds

    def boundary(self, layer: int | None) -> int:
        """Of the places between blocks: 0 is what enters the first, the number of blocks (None, -1) what leaves the
        last. Negative numbers count from there."""
        number = self.depth if layer is None else layer + self.depth + 1 if layer < 0 else layer
        if not 0 <= number <= self.depth:
            raise LayerRangeError(
                f"{self.what}: layer {layer} is out of range. The inputs of the blocks are 0 to {self.depth - 1}, and "
                f"{self.depth} (or None, or -1) is what leaves the last one"
            )
        return number

    def into(self, layer: int | None, *, mlp_input: bool) -> int:
        """`boundary`, from which an MLP's input may be meant instead of its block's."""
        number = self.boundary(layer)
        middle = Site("resid_mid", number, stack=self.stack)
        if mlp_input and number == self.depth:
            raise OptionError(
                f"{self.what}: mlp_input asks for the input of an MLP, and behind the last block there is none: give "
                f"layer=0 to {self.depth - 1}"
            )
        if mlp_input and str(middle) not in self.cache:
            self.anatomy.require(middle)
        return number

    @contextmanager
    def picking(self, pos_slice: Any) -> Iterator[None]:
        """Inside the block values come with these positions only."""
        before, self._pick = self._pick, _Pick(pos_slice)
        try:
            yield
        finally:
            self._pick = before

    def at_boundary(self, layer: int) -> list[Site]:
        """The sites that are the stream at a boundary: the first choice, and those that are the same."""
        found = [Site("resid_pre", layer, stack=self.stack)] if layer < self.depth else []
        if found and layer and self._anatomy is not None and self._anatomy.adds_between_blocks:
            return found
        found += [Site("resid_post", layer - 1, stack=self.stack)] if layer else [Site("embed", stack=self.stack)]
        return found

    def between(self, last: int) -> dict[str, Tensor]:
        """What joined the stream between blocks, up to what enters block `last`, by label: nothing in most models.

        Raises `UnknownKeyError` where it cannot be told, since the cache lacks one side of a place where something may.
        """
        found = {}
        for layer in range(1, min(last, self.depth - 1) + 1):
            sides = [Site("resid_post", layer - 1, stack=self.stack), Site("resid_pre", layer, stack=self.stack)]
            missing = [site for site in sides if str(site) not in self.cache]
            if missing and self._anatomy is not None and self._anatomy.adds_between_blocks:
                self._refuse(missing)
            if not missing:
                after, before = self.get(*sides)
                if not torch.equal(after, before):
                    found[f"{layer - 1}_added"] = before - after
        return found

    def get(self, *wanted: Site | Sequence[Site]) -> list[Tensor]:
        """The values of sites; of a sequence of sites the first that is held.

        Raises `SiteUnavailableError` for what the architecture lacks and `UnknownKeyError`, naming the capture that
        gets them, for what the cache does not hold.
        """
        choices = [[one] if isinstance(one, Site) else list(one) for one in wanted]
        found = [next((site for site in choice if str(site) in self.cache), None) for choice in choices]
        missing = [choice[0] for choice, site in zip(choices, found, strict=True) if site is None]
        if missing:
            self._refuse(missing)
        return [self._value(site) for site in found if site is not None]

    def _refuse(self, missing: list[Site]) -> None:
        if self._anatomy is not None:
            for site in missing:
                self._anatomy.require(site)
        shown = ", ".join(map(str, missing[:4])) + (", ..." if len(missing) > 4 else "")
        dot = f"{self.stack}." if self.stack else ""
        names = list(dict.fromkeys(f"{dot}{site.name}" for site in missing))
        raise UnknownKeyError(
            f"{self.what} needs {shown}, which the cache does not hold. Capture with sites={names!r} too, as in "
            f"ac.run_with_cache(model, inputs, sites=[..., {', '.join(map(repr, names))}])"
        )

    def _value(self, site: Site) -> Tensor:
        value = tensor_of(self.cache[str(site)])
        if value is None or value.ndim < 3:
            raise OptionError(
                f"{self.what} needs {site} as one tensor [B, S, ...], and the cache holds "
                f"{type(self.cache[str(site)]).__name__ if value is None else list(value.shape)}"
            )
        return self.picked(site, value)

    def mask(self, site: Site) -> Tensor | None:
        """Which positions of the value of a site are real; None where all are, as far as is known."""
        value = tensor_of(self.cache[str(site)])
        return None if value is None else self.cache._mask_of(str(site), value)

    def token_ids(self, site: Site) -> Tensor | None:
        """The token at each position of the value of a site, ``[B, S]``; None where they are not known."""
        value = tensor_of(self.cache[str(site)])
        table = TokenState(self.cache._tables()).table_of(str(site))
        fits = value is not None and table.ids is not None and table.ids.shape == value.shape[:2]
        return table.ids if fits else None

    def picked(self, site: Site, value: Tensor) -> Tensor:
        """The chosen positions of a value that has those of `site`."""
        return self._pick(value, self.cache._mask_of(str(site), value))


class _Pick:
    """Takes positions out of values: an int (which takes the dimension away), a pair or triple ``(start, stop, step)``,
    a slice, or a list. They count the real tokens of each prompt where these are known."""

    def __init__(self, pos_slice: Any) -> None:
        self.index = read_index(pos_slice, "pos_slice")

    def __call__(self, value: Tensor, mask: Tensor | None) -> Tensor:
        index = self.index
        if index is None:
            return value
        if mask is None or bool(mask.all()):
            return _take(value, index, 1, "position")
        columns = [_take(real.nonzero()[:, 0], index, 0, "position") for real in mask]
        if len({len(row) for row in columns if row.ndim}) > 1:
            raise OptionError(
                f"pos_slice={index!r} keeps {', '.join(str(len(row)) for row in columns)} positions of the prompts: "
                "choose as many of each, or one prompt with cache.select"
            )
        together = torch.stack(columns)
        taken = take_columns(value, together if together.ndim == 2 else together[:, None], 1)
        return taken if together.ndim == 2 else taken.squeeze(1)


Index = int | slice | list[int]


def read_index(index: Any, what: str) -> Index | None:
    """An int, a pair or triple for a slice, a slice, or a list, tensor or array of ints; None for everything."""
    if index is None or isinstance(index, slice):
        return index
    if isinstance(index, tuple) and 1 <= len(index) <= 3:
        return slice(*index)
    if isinstance(index, (Tensor, np.ndarray)) and index.ndim == 1:
        index = index.tolist()
    if isinstance(index, list) and all(hasattr(i, "__index__") for i in index):
        return [int(i) for i in index]
    if hasattr(index, "__index__") and not isinstance(index, bool):
        return int(index)
    raise OptionError(f"{what} is {index!r}: expected an int, (start, stop), a slice or a list of ints")


def take(value: Tensor, index: Index | None, axis: int, what: str) -> Tensor:
    """`value` with `index` along `axis`; None takes all. Raises `LayerRangeError`."""
    return value if index is None else _take(value, index, axis, what)


def _take(value: Tensor, index: Index, axis: int, what: str) -> Tensor:
    size = value.shape[axis]
    if isinstance(index, slice):
        return value[(slice(None),) * axis + (index,)]
    for number in [index] if isinstance(index, int) else index:
        if not -size <= number < size:
            raise LayerRangeError(f"{what} {number} is out of range: there are {size} (0 to {size - 1})")
    if isinstance(index, int):
        return value.select(axis, index)
    return value.index_select(axis, torch.tensor([i % size for i in index], dtype=torch.long, device=value.device))
