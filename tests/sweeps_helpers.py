"""Models with offloaded weights, whose reads are counted, and prompts for several batches of them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

import zoo
from actcache.extract.backends.local import LocalSession
from actcache.model.offload import stored_weights
from actcache.testing.tiny import tiny_model

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
FLOAT32 = 5e-6
PROMPTS = zoo.prompts_of(3, [1, 2, 5, 5, 9, 9, 14, 17, 20, 20, 23, 30])
# A few prompts in each batch, so that there are several.
BUDGET = {"max_batch_tokens": 40}


class Counting(collections.UserDict[str, Tensor]):
    """A state dict that counts how often each weight is read."""

    reads: collections.Counter[str]

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return super().__getitem__(name)


def offloaded(family: str = "llama", seed: int = 0, **values: Any) -> tuple[Any, Counting]:
    model = tiny_model(family, seed=seed, **values)
    state = Counting({name: tensor.clone() for name, tensor in model.state_dict().items()})
    state.reads = collections.Counter()
    accelerate.cpu_offload(model, "cpu", state_dict=state)
    return model, state


def in_memory(model: nn.Module) -> set[str]:
    names = stored_weights(model.named_modules())
    assert names
    return {name for name, p in model.named_parameters(remove_duplicate=False) if name in names and not p.is_meta}


@contextmanager
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    # Threads of other tests may have ended meanwhile.
    assert threading.active_count() <= before


def swept_batches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From now on, for each batch of a sweep whether its rows came out of it."""
    seen: list[bool] = []
    plain = LocalSession.sweep

    def sweep(self: LocalSession, batches: Any) -> Iterator[Any]:
        for rows in plain(self, batches):
            seen.append(rows is not None)
            yield rows

    monkeypatch.setattr(LocalSession, "sweep", sweep)
    return seen
