"""Where the sites inside attention and MLP are written."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.columns import Columns
from actcache.model.forms import Side, first_input, first_tensor
from actcache.model.head_outputs import HeadOutputs, moved_by_others
from actcache.model.read_points import Inputs
from actcache.model.readings import HeadReading, Reading
from actcache.model.replacing import with_first_input, with_first_tensor, with_tensor
from actcache.model.runs import tensors_of
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy


def reading_of(anatomy: Anatomy, site: Site) -> Reading:
    """How a site inside a block, which the model has, is read."""
    return anatomy.inner.blocks[site.stack, (site.layer or 0) % anatomy.depth(site.stack)].readings[site.name]


def head_count(anatomy: Anatomy, site: Site) -> int | None:
    """How many heads the value of a site has; None for one that has none, or is of one head."""
    if site.head is not None:
        return None
    reading = reading_of(anatomy, site)
    return reading.columns.heads if isinstance(reading, HeadReading) else reading.heads


def put_input(call: Inputs, new: Tensor, old: Tensor) -> Inputs:
    """A call with other rows, in the arrangement of the old ones."""
    return with_first_input(call, new.reshape(first_input(call).shape))


class PutItem:
    """Writes one of the tensors that a module returns, in the arrangement of the old one."""

    def __init__(self, item: int) -> None:
        self._item = item

    def __call__(self, output: Any, new: Tensor, old: Tensor) -> Any:
        there = next(islice(tensors_of(output), self._item, None))
        return with_tensor(output, self._item, new.reshape(there.shape))


class PutColumns:
    """Writes the columns of heads in what a module is given or returns; other columns stay as they are."""

    def __init__(self, columns: Columns, side: Side) -> None:
        self._columns = columns
        self._side = side

    def __call__(self, raw: Any, new: Tensor, old: Tensor) -> Any:
        whole = first_input(raw) if self._side == "input" else first_tensor(raw)
        rows = new.reshape(*whole.shape[:-1], *new.shape[-2:])
        changed = self._columns.write(whole, rows)
        return with_first_input(raw, changed) if self._side == "input" else with_first_tensor(raw, changed)


class PutHeadOutputs:
    """Writes what heads add to the output of attention: of those heads only whose new value is another one."""

    def __init__(self, outputs: HeadOutputs, module: nn.Module, head: int | None) -> None:
        self._outputs = outputs
        self._module = module
        self._head = head

    def __call__(self, output: Any, new: Tensor, old: Tensor) -> Any:
        there = first_tensor(output)
        heads = [self._head] if self._head is not None else range(self._outputs.columns.heads)
        news = [new] if self._head is not None else list(new.unbind(-2))
        olds = [old] if self._head is not None else list(old.unbind(-2))
        changed, beside = {}, []
        for head, one, before in zip(heads, news, olds, strict=True):
            if not torch.equal(one, before):
                changed[head] = one.reshape(there.shape)
            elif one.requires_grad:
                # Numbers that are the same may still be others for the gradient.
                beside.append((one - before).reshape(there.shape))
        if changed:
            itself = self._outputs.made(self._module) if moved_by_others(self._module) else None
            self._outputs.replace(changed)
            made = self._outputs.made(self._module)
            # What others did to the output stays.
            there = made if itself is None or torch.equal(itself, there) else there + (made - itself)
        for nothing in beside:
            there = there + nothing
        return with_first_tensor(output, there)


class OneOfHeads:
    """Takes one head out of probabilities ``[B, H, queries, keys]``, and puts it back."""

    def __init__(self, head: int) -> None:
        self._head = head

    def take(self, pattern: Tensor) -> Tensor:
        return pattern[:, self._head]

    def put(self, pattern: Tensor, new: Tensor, old: Tensor) -> Tensor:
        changed = pattern.clone()
        changed[:, self._head] = new
        return changed


def whole_pattern(pattern: Tensor) -> Tensor:
    return pattern


def put_pattern(pattern: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return new
