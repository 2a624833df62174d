"""A store whose objects lie elsewhere, through the working copy that a host has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.store.backend import Bytes, MemoryBackend, ObjectInfo
from actcache.store.store import Store

SPACE = ac.new_space("org/model", revision="r1")
SITES = [f"resid_post.{layer}" for layer in range(4)]
WIDTH = 96


class Counting(MemoryBackend):
    """Notes every request: its kind, the object, and how many bytes came."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, str, int]] = []

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.requests.append(("list", prefix, 0))
        yield from super().list(prefix)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = super().read(name, start, stop)
        self.requests.append(("read", name, len(data)))
        return data

    def put(self, name: str, source: Bytes | Path) -> None:
        super().put(name, source)
        self.requests.append(("put", name, 0))

    def delete(self, name: str) -> None:
        super().delete(name)
        self.requests.append(("delete", name, 0))

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.requests]

    def take(self) -> list[tuple[str, str, int]]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken


def values(numbers: range, site: str) -> torch.Tensor:
    """What prompts have at a site: anyone can compute it again."""
    seeds = [torch.Generator().manual_seed(1000 * n + SITES.index(site)) for n in numbers]
    return torch.stack([torch.randn(WIDTH, generator=seed) for seed in seeds])


def prompts(numbers: range) -> list[str]:
    return [f"prompt {n}" for n in numbers]


def write(store: Store, numbers: range, sites: list[str] = SITES) -> None:
    given = {site: list(values(numbers, site)) for site in sites}
    store.write(SPACE, prompts(numbers), given, pooling="last_token")
    store.flush()


def read(store: Store, numbers: range, site: str) -> torch.Tensor:
    found: torch.Tensor = store.read(SPACE, prompts(numbers), site, pooling="last_token")
    return found


@pytest.fixture
def backend() -> Counting:
    return Counting()


@pytest.fixture
def host(tmp_path: Path, backend: Counting) -> Callable[[str], Store]:
    """A store of the same objects with an index of its own, as a machine of that name would have it."""
    return lambda name: Store(backend, index_dir=tmp_path / name)


def test_what_one_host_writes_another_reads(host: Callable[[str], Store]) -> None:
    write(host("a"), range(50))
    reader = host("b")
    for site in SITES:
        assert torch.equal(read(reader, range(50), site), values(range(50), site))
    assert torch.equal(read(reader, range(30, 10, -1), SITES[2]), values(range(30, 10, -1), SITES[2]))


def test_two_hosts_see_the_union_of_what_they_write(host: Callable[[str], Store]) -> None:
    one, other = host("a"), host("b")
    write(one, range(20))
    write(other, range(20, 50))
    for store in (one, other):
        assert torch.equal(read(store, range(50), SITES[0]), values(range(50), SITES[0]))
        assert store.info().models[0].num_prompts == 50


def test_objects_are_the_files_of_a_store_on_disk(
    host: Callable[[str], Store], backend: Counting, tmp_path: Path
) -> None:
    write(host("a"), range(40))
    for item in backend.list():
        path = tmp_path / "copied" / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(backend.read(item.name))
    copied = Store(tmp_path / "copied", index_dir=tmp_path / "index")
    assert torch.equal(read(copied, range(40), SITES[3]), values(range(40), SITES[3]))
    assert copied.verify().ok


def test_a_hit_that_is_warm_makes_no_request(host: Callable[[str], Store], backend: Counting) -> None:
    write(host("a"), range(50))
    reader = host("b")
    read(reader, range(50), SITES[1])
    backend.take()
    read(reader, range(50), SITES[1])
    read(reader, range(10, 20), SITES[1])
    reader.contains(SPACE, prompts(range(50)), SITES[3], pooling="last_token")
    assert backend.take() == []


def test_one_layer_costs_the_bytes_of_one_layer_and_the_head(host: Callable[[str], Store], backend: Counting) -> None:
    write(host("a"), range(6000))
    backend.take()
    read(host("b"), range(6000), SITES[2])
    requests = backend.take()
    assert [kind for kind, _, _ in requests].count("list") == 1
    sizes = [size for kind, name, size in requests if kind == "read" and name.endswith(".safetensors")]
    # The head was longer than could be guessed.
    heads, rows = sizes[:2], sizes[2:]
    assert 6000 * WIDTH * 4 <= sum(rows) <= 1.1 * 6000 * WIDTH * 4
    assert sum(heads) <= 1 << 20


def test_a_reader_sees_what_is_written_later_at_its_next_miss_or_after_a_refresh(
    host: Callable[[str], Store], backend: Counting
) -> None:
    writer, reader = host("a"), host("b")
    write(writer, range(10))
    assert reader.contains(SPACE, prompts(range(10))).all()
    write(writer, range(10, 20))
    assert reader.contains(SPACE, prompts(range(20)), SITES[0], pooling="last_token").all()
    write(writer, range(20, 30))
    assert len(reader.prompts(SPACE)) == 20
    reader.refresh()
    assert len(reader.prompts(SPACE)) == 30
    backend.take()
    assert not reader.contains(SPACE, ["unheard of"]).any()
    assert [kind for kind, _, _ in backend.take()] == ["list"]


def test_bytes_that_are_wrong_here_are_read_again(host: Callable[[str], Store], backend: Counting) -> None:
    write(host("a"), range(50))
    reader = host("b")
    read(reader, range(50), SITES[0])
    (mirror,) = reader.root.glob("*/*.safetensors")
    reader.close()
    data = bytearray(mirror.read_bytes())
    wanted = np.ascontiguousarray(values(range(50), SITES[0]).numpy()).tobytes()
    at = bytes(data).index(wanted)
    data[at : at + len(wanted)] = bytes(len(wanted))
    mirror.write_bytes(data)
    backend.take()
    assert torch.equal(read(reader, range(50), SITES[0]), values(range(50), SITES[0]))
    assert sum(kind == "read" for kind, _, _ in backend.take()) == 1
    reader.close()
    assert torch.equal(read(reader, range(50), SITES[0]), values(range(50), SITES[0]))
    assert "read" not in [kind for kind, _, _ in backend.take()]
