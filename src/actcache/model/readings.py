"""How one value inside a block is read: its place, and the way from what is there to the site's tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from actcache.model.attention_calls import AttentionCalls
from actcache.model.columns import Columns
from actcache.model.forms import Place, first_input, first_tensor
from actcache.model.head_outputs import HeadOutputs
from actcache.model.read_points import ReadPoint, Unflatten
from actcache.model.runs import tensors_of
from actcache.model.sites import Site


@dataclass(frozen=True)
class Reading:
    """One site of a block: what is at a place, as it is.

    Attributes:
        place: the module it is read at (relative to the block), its side, and whether rows come otherwise than as
            ``[B, S, D]``.
        item: which of the tensors the module returns, in order, tuples taken apart.
    """

    place: Place
    item: int = 0

    @property
    def heads(self) -> int | None:
        """How many heads there are, where one of them can be asked for."""
        return None

    def point(self, module: nn.Module, path: str, block: nn.Module, site: Site) -> ReadPoint:
        """Where `site` is read on `block`, which may be one head of it; `module` is the one at its place, `path` its
        path."""
        extract, around = self._rows(block, site, self._taken())
        return ReadPoint(module, path, self.place.side, extract, around)

    def _taken(self) -> Callable[[Any], Tensor]:
        if self.place.side == "input":
            return first_input
        return _Item(self.item) if self.item else first_tensor

    def _rows(
        self, block: nn.Module, site: Site, extract: Callable[[Any], Tensor], own: int = 1
    ) -> tuple[Callable[[Any], Tensor], Any]:
        """`extract` with its rows by prompt, and what has to be noted for that; a row has `own` dimensions."""
        if not self.place.flat:
            return extract, ()
        unflatten = Unflatten(site, extract, own)
        return unflatten, ((block, unflatten.note),)


@dataclass(frozen=True, kw_only=True)
class Given(Reading):
    """The input of a branch, read at a module that is given it; `beside` are others of the branch, outside of that."""

    beside: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeadReading(Reading):
    """Queries, keys, values or weighted values: columns of what is at a place, ``[B, S, heads, columns]``."""

    columns: Columns

    def point(self, module: nn.Module, path: str, block: nn.Module, site: Site) -> ReadPoint:
        rows, around = self._rows(block, site, self._taken())
        columns = self.columns

        def extract(value: Any) -> Tensor:
            return columns.read(rows(value))

        return ReadPoint(module, path, self.place.side, extract, around)


@dataclass(frozen=True, kw_only=True)
class HeadOutReading(Reading):
    """What each head adds to attention's output: ``[B, S, heads, D]``, of one head ``[B, S, D]``. The place is the
    output projection's output, `outputs` what is shared by all who look at it."""

    outputs: HeadOutputs

    @property
    def heads(self) -> int | None:
        return self.outputs.columns.heads

    def point(self, module: nn.Module, path: str, block: nn.Module, site: Site) -> ReadPoint:
        outputs, head = self.outputs, site.head
        noted = ((module, outputs.note),)
        extract, around = self._rows(block, site, lambda _: outputs.read(module, head), 2 if head is None else 1)
        return ReadPoint(module, path, "output", extract, (*noted, *around), ((module, outputs.guard(module)),))


@dataclass(frozen=True, kw_only=True)
class PatternReading(Reading):
    """Attention probabilities ``[B, heads, queries, keys]``, of one head ``[B, queries, keys]``. The place is the
    module in whose call they are made, `calls` what is shared by all who look at it."""

    calls: AttentionCalls

    @property
    def heads(self) -> int | None:
        return self.calls.heads

    def point(self, module: nn.Module, path: str, block: nn.Module, site: Site) -> ReadPoint:
        calls, head = self.calls, site.head
        noted = ((module, calls.note),)
        return ReadPoint(
            module, path, "output", lambda _: calls.pattern(head), noted, calls.guards(module, block), True
        )


class _Item:
    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, output: Any) -> Tensor:
        return next(islice(tensors_of(output), self._number, None))


@dataclass
class Found:
    """What a block has, and of the other sites why it has them not."""

    readings: dict[str, Reading]
    absent: dict[str, str]
