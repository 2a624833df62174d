"""A store whose every row is known, written where a test can change what lies there and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import actcache as ac
from actcache.store.backend import Bytes, MemoryBackend, ObjectInfo
from actcache.store.store import Store

SPACE = ac.new_space("org/model", revision="r1")
SITES = [f"resid_post.{layer}" for layer in range(3)]
WIDTH, ROWS = 160, 1200
EVERYTHING = range(ROWS)


def value(site: str) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(SITES.index(site)))


VALUES = {site: value(site) for site in SITES}


def prompts(numbers: range) -> list[str]:
    return [f"prompt {n}" for n in numbers]


def write(store: Store, numbers: range = EVERYTHING) -> None:
    store.write(SPACE, prompts(numbers), {s: list(v[numbers]) for s, v in VALUES.items()}, pooling="last_token")
    store.close()


def check(store: Store, numbers: range = EVERYTHING, site: str = SITES[1]) -> None:
    found = store.read(SPACE, prompts(numbers), site, pooling="last_token")
    assert torch.equal(found, VALUES[site][numbers])


def segment_names(backend: MemoryBackend) -> list[str]:
    return [item.name for item in MemoryBackend.list(backend) if item.name.endswith(".safetensors")]


def mirrors(store: Store) -> list[Path]:
    return sorted(store.root.glob("*/*.safetensors"))


def rows_at(data: bytes, site: str) -> int:
    """Where in a segment of all prompts the rows of a site begin."""
    at = data.index(VALUES[site].numpy().tobytes())
    assert data.count(VALUES[site].numpy().tobytes()) == 1
    return at


class Strange(MemoryBackend):
    """Does what a test tells it to, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []
        self.lists = 0
        self.on_read: Callable[[str, int, int, Bytes], Bytes] | None = None
        self.on_list: Callable[[list[ObjectInfo]], list[ObjectInfo]] | None = None
        self._guard = threading.Lock()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.lists += 1
        found = list(super().list(prefix))
        yield from found if self.on_list is None else self.on_list(found)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = super().read(name, start, stop)
        with self._guard:
            self.reads.append((name, start, len(data)))
        return data if self.on_read is None else self.on_read(name, start, len(data), data)

    def change(self, name: str, at: int, data: bytes) -> None:
        whole = bytearray(super().read(name))
        whole[at : at + len(data)] = data
        self._objects[name] = bytes(whole)


def on_disk(store: Store) -> int:
    return sum(512 * path.stat().st_blocks for path in mirrors(store))


def other_host(backend: Strange, folder: Path) -> Store:
    """A store on another host than the one that has written everything."""
    write(Store(backend, index_dir=folder / "writer"))
    backend.reads.clear()
    return Store(backend, index_dir=folder / "reader")
