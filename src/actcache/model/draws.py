"""Random numbers that a module draws, drawn once more: a part of it is then computed with the dropout of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def draws_numbers(module: nn.Module) -> bool:
    """Whether `module` drops values at random as it is now."""
    return any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in module.modules())


class Draws:
    """What is drawn from now on, on the CPU and on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = [device] if device.type == "cuda" else []
        self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(one) for one in self._cuda)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw it again in this block, and behind it go on as if nothing had been drawn in it."""
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._cuda, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
