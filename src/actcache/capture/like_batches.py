"""Batches of one form on their way into a join: by far the most frequent case, so that a batch costs little here.

Thousands of small copies, each of them an object of its own, cost more time than the copying. Copies of batches of one
form therefore share memory, batch behind batch in slabs of some megabytes, and are taken apart when they are joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from actcache.capture.tokens import TokenState

# Of the memory that is asked for at once: much less costs calls, much more is memory that may stay unused.
SLAB_BYTES = 4 << 20


class Form:
    """What a batch is of which every value is a tensor: its keys in order, with shapes, dtypes and devices."""

    def __init__(self, items: Mapping[str, Tensor]) -> None:
        self._keys = list(items)
        self._plain = [Tensor] * len(items)
        self._shapes = [value.shape for value in items.values()]
        self._dtypes = [value.dtype for value in items.values()]
        self._devices = [value.device for value in items.values()]
        self.places = {key: place for place, key in enumerate(self._keys)}
        self.parts = list(zip(self._shapes, self._dtypes, self._devices, strict=True))

    @classmethod
    def of(cls, items: Mapping[str, Any]) -> Form | None:
        """The form of a batch; None where a value is no tensor with rows, or one of a class or layout of its own."""
        plain = all(
            type(value) is Tensor and value.ndim > 0 and value.layout is torch.strided for value in items.values()
        )
        return cls(items) if plain and items else None

    def fits(self, items: Mapping[str, Any]) -> bool:
        """Whether a batch has this form."""
        values = items.values()
        return (
            list(items) == self._keys
            and list(map(type, values)) == self._plain
            and [value.shape for value in values] == self._shapes
            and [value.dtype for value in values] == self._dtypes
            and [value.device for value in values] == self._devices
            and all(value.layout is torch.strided for value in values)
        )


class Held:
    """Batches of one form, value by value as they came or as copies."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.states: list[TokenState] = []
        self._batches: list[list[Tensor]] = []

    def add(self, values: list[Tensor], state: TokenState, *, copy: bool) -> None:
        """Add a batch of this form, in memory of our own with `copy`. An error changes nothing."""
        self._batches.append([value.clone() for value in values] if copy else values)
        self.states.append(state)

    def each(self, key: str) -> list[Tensor]:
        """The values of `key`, one per batch."""
        index = self.form.places[key]
        return [values[index] for values in self._batches]

    def stacked(self, key: str) -> list[Tensor]:
        """The same as tensors that have the batches on a dimension before all others."""
        return [value[None] for value in self.each(key)]


class Copied:
    """Batches of one form, copied behind each other."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.states: list[TokenState] = []
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, part in enumerate(form.parts):
            alike.setdefault(part, []).append(index)
        self._slabs = [_Slabs(indices, *part) for part, indices in alike.items()]
        self._places = {index: (slabs, place) for slabs in self._slabs for place, index in enumerate(slabs.indices)}

    def add(self, values: list[Tensor], state: TokenState, *, copy: bool = True) -> None:
        """Add a copy of a batch of this form, without its graph. An error changes nothing."""
        number = len(self.states)
        for slabs in self._slabs:
            slabs.write(values if len(self._slabs) == 1 else [values[index] for index in slabs.indices], number)
        self.states.append(state)

    def each(self, key: str) -> list[Tensor]:
        """The values of `key`, one per batch: views."""
        return [value for stacked in self.stacked(key) for value in stacked.unbind()]

    def stacked(self, key: str) -> list[Tensor]:
        """The same as tensors that have the batches on a dimension before all others."""
        slabs, place = self._places[self.form.places[key]]
        return slabs.read(place, len(self.states))


class _Slabs:
    """The values of those keys of each batch that have one shape, dtype and device."""

    def __init__(self, indices: list[int], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.indices = indices
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._batch_bytes = max(len(indices) * shape.numel() * dtype.itemsize, 1)
        # With the number of the batch that comes first in each.
        self._slabs: list[tuple[int, Tensor]] = []
        self._first = self._stop = 0

    def write(self, values: list[Tensor], number: int) -> None:
        """Copy the values of batch `number`, the next one (or again the one that was written last)."""
        if number >= self._stop:
            room = max(1, min(self._stop, SLAB_BYTES // self._batch_bytes))
            # A tensor that is made in inference mode cannot be written to outside of it.
            with torch.inference_mode(False):
                size = room, len(values) * self._shape[0], *self._shape[1:]
                slab = torch.empty(size, dtype=self._dtype, device=self._device)
            self._slabs.append((number, slab))
            self._first, self._stop = number, number + room
        torch.cat(values, out=self._slabs[-1][1][number - self._first])

    def read(self, place: int, batches: int) -> list[Tensor]:
        """The values of one key in the first `batches`, slab by slab."""
        rows = self._shape[0]
        return [
            slab[: batches - first, place * rows : (place + 1) * rows] for first, slab in self._slabs if first < batches
        ]


Like = Held | Copied


def cat(parts: Sequence[Tensor | Like], key: str) -> Tensor:
    """Tensors and the values of `key`, all of one form, joined on dim 0."""
    if not any(isinstance(part, Copied) for part in parts):
        return torch.cat([one for part in parts for one in ([part] if isinstance(part, Tensor) else part.each(key))])
    stacked = [one for part in parts for one in ([part[None]] if isinstance(part, Tensor) else part.stacked(key))]
    return torch.cat(stacked).flatten(0, 1)


def in_graph(values: list[Tensor]) -> bool:
    """Whether a copy of these is to have a gradient."""
    return torch.is_grad_enabled() and True in [value.requires_grad for value in values]
