"""Rows on their way from the device to the CPU.

On CUDA a copy goes into pinned memory, behind the pass on its own stream, and an event per device and batch says when
it is there: the next pass is under way meanwhile. Elsewhere `Tensor.to` has copied when it returns. What is special
about CUDA is in the three functions at the end, so that the order of things can be tested without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class Event(Protocol):
    """Something that happens on a device behind all that was begun there."""

    def query(self) -> bool:
        """Whether it has happened."""

    def synchronize(self) -> None:
        """Wait until it has."""


class CopiedRows:
    """Rows of one batch by site: `add` begins to copy some, `mark` closes what was added."""

    def __init__(self, rows: Mapping[str, torch.Tensor] | None = None) -> None:
        self._rows: dict[str, torch.Tensor] = {}
        self._events: list[Event] = []
        self._unmarked: set[torch.device] = set()
        if rows is not None:
            for site, tensor in rows.items():
                self.add(site, tensor)
            self.mark()

    def add(self, site: str, tensor: torch.Tensor) -> None:
        """Begin to copy the rows of `site`, which nobody changes any more."""
        if copies_behind(tensor):
            self._rows[site] = begin_copy(tensor)
            self._unmarked.add(tensor.device)
        else:
            self._rows[site] = tensor.to("cpu")

    def mark(self) -> None:
        """Everything was added."""
        self._events += [event_behind(device) for device in self._unmarked]
        self._unmarked.clear()

    @property
    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return all(event.query() for event in self._events)

    def wait(self) -> Mapping[str, torch.Tensor]:
        """The rows, on the CPU."""
        for event in self._events:
            event.synchronize()
        self._events.clear()
        return self._rows


def copies_behind(tensor: torch.Tensor) -> bool:
    """Whether a copy of `tensor` goes on while its device computes."""
    return tensor.device.type == "cuda"


def begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A pinned tensor that will hold what `tensor` holds."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def event_behind(device: torch.device) -> Event:
    """What happens on `device` when the copies that were begun from it are done."""
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event
