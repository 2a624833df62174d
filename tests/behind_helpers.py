"""Two matrices of known rows where reads are counted, and what is on its way into files held back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actcache.store import behind, bringing
from actcache.store.backend import Bytes, MemoryBackend
from actcache.store.placement import Placement
from actcache.store.records import Records
from actcache.store.store import Store
from bucket_helpers import opened
from store_helpers import make_table

# Rows that do not divide blocks, and several blocks of them.
WIDTH, ROWS = 500, 400
SITES = ["a", "b"]
_RNG = np.random.default_rng(0)
VALUES = {site: _RNG.standard_normal((ROWS, WIDTH), np.float32) for site in SITES}
NUMBERS = range(ROWS)
TABLE = make_table(NUMBERS)


class Counting(MemoryBackend):
    """Counts reads of rows, gives bytes that begin at odd addresses, and does what a test tells it to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.on_read: Callable[[bytearray, int], object] = lambda data, start: None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = bytearray(b"x") + super().read(name, start, stop)
        if start and name.endswith(".safetensors"):
            self.reads += 1
            self.on_read(data, start)
        return memoryview(data)[1:]


def place(reader: tuple[Store, str], sites: list[str] = SITES[1:], check: bool = False) -> Placement:
    store, space = reader
    return store.locate(space, table=TABLE, sites=sites, layout="mean", check=check)


def equal(got: npt.NDArray[Any], site: str = "b") -> bool:
    return np.array_equal(got[:, 0], VALUES[site])


def waits() -> bool:
    return bool(behind._state.waiting)


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the size, and not before a test waits for it."""
    monkeypatch.setattr(bringing, "_LEAST_BEHIND", 0)
    monkeypatch.setattr(behind, "_LINGER_S", 30.0)
    yield
    behind.settle()


def written(folder: Path) -> Counting:
    """One object with both matrices, put there by a machine that keeps what is its own in `folder`."""
    backend = Counting()
    store, space = opened(backend, folder)
    with store:
        store.append(space, Records.pooled(TABLE, "mean", VALUES))
    return backend
