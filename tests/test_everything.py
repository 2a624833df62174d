"""All that has a site: what is kept from one site to the next is what would be found anew."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.errors import NotCachedError
from actcache.store import everything
from actcache.store.backend import MemoryBackend
from actcache.store.index import SpaceIndex
from actcache.store.records import Records
from actcache.store.store import Store
from bucket_helpers import opened
from store_helpers import make_store, make_table, segment_files

LAYOUT = "last_token"


def values(numbers: list[int], sites: str) -> Records:
    data = {site: np.array([[n, ord(site)] for n in numbers], np.float32) for site in sites}
    return Records.pooled(make_table(numbers), LAYOUT, data)


def read(store: Store, space: str, site: str) -> list[int]:
    """The prompts that are read, of whom each row says that it is one of `site`."""
    found = store.read(space, None, site, pooling=LAYOUT)
    assert (found[:, 1] == ord(site)).all()
    return found[:, 0].int().tolist()


def test_sites_that_not_all_have(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, values([1, 2], "ab"))
    store.append(space, values([3, 4], "a"))
    store.append(space, values([5], "b"))
    for _ in range(2):
        assert read(store, space, "a") == [1, 2, 3, 4]
        assert read(store, space, "b") == [1, 2, 5]
    store.append(space, values([6], "a"))
    assert read(store, space, "b") == [1, 2, 5]
    assert read(store, space, "a") == [1, 2, 3, 4, 6]


def test_what_comes_and_goes_between_two_sites(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    other = Store(store.location, index_dir=tmp_path / "other")
    store.append(space, values([1, 2, 3], "ab"))
    assert read(store, space, "a") == [1, 2, 3]
    other.append(space, values([4], "ab"))
    assert read(store, space, "b") == [1, 2, 3, 4]
    other.invalidate(space, make_table([2]))
    assert read(store, space, "a") == [1, 3, 4]
    store.append(space, values([4], "ab"))
    assert read(store, space, "b") == [1, 3, 4], "two copies of one prompt are one"
    store.merge(space)
    assert sorted(read(store, space, "a")) == [1, 3, 4]
    other.invalidate(space, make_table([1, 3, 4]))
    with pytest.raises(NotCachedError):
        read(store, space, "b")


def test_damage_that_the_other_site_has_not(tmp_path: Path) -> None:
    """What is damaged at one site is left out of the next one's answer only where it is damaged there, too."""
    store, space = make_store(tmp_path)
    wide = {
        site: np.full((4, 70_000), ord(site), np.float32) + np.arange(4, dtype=np.float32)[:, None] for site in "abc"
    }
    store.append(space, Records.pooled(make_table(range(4)), LAYOUT, wide))
    path = segment_files(store, space)[0]
    raw = bytearray(path.read_bytes())
    # The last number of the last site in the file.
    raw[-1] ^= 1
    path.write_bytes(raw)
    fresh = Store(store.location, index_dir=tmp_path / "fresh")
    for site in "ab":
        assert torch.equal(fresh.read(space, None, site, pooling=LAYOUT), torch.from_numpy(wide[site]))
    with pytest.raises(NotCachedError, match="1 of 4 prompts"):
        fresh.read(space, None, "c", pooling=LAYOUT)
    assert len(fresh.read(space, None, "c", pooling=LAYOUT)) == 3
    for site in "ab":
        assert torch.equal(
            fresh.read(space, None, site, pooling=LAYOUT).sort(dim=0).values, torch.from_numpy(wide[site])
        )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps, which tells what is mapped")
def test_what_is_gone_keeps_no_room_on_the_disk(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for n in range(3):
        store.append(space, values([n], "ab"))
    assert read(store, space, "a") == [0, 1, 2]
    store.clear()
    store.refresh()
    gc.collect()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert not [line for line in mapped if ".safetensors" in line or ".open" in line], "removed, and still mapped"


def test_what_takes_the_place_of_what_vanishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process opens its segments, another one of the same host takes notice of a merge and of what is new."""
    backend = MemoryBackend()
    writer, space = opened(backend, tmp_path / "writer")
    for numbers in ([0, 1], [2, 3]):
        writer.append(space, values(numbers, "ab"))
        writer.flush()
    reader, _ = opened(backend, tmp_path / "host")
    other, _ = opened(backend, tmp_path / "host")
    assert reader.contains(space, make_table([1]), "a", pooling=LAYOUT).all()
    index, real, left = reader._index(space), SpaceIndex.open, [1]

    def open_late(self: SpaceIndex, number: int) -> object:
        if self is index and left:
            left.pop()
            writer.merge(space)
            writer.append(space, values([4], "a"))
            writer.flush()
            other.refresh()
            assert sorted(read(other, space, "a")) == [0, 1, 2, 3, 4]
        return real(self, number)

    monkeypatch.setattr(SpaceIndex, "open", open_late)
    index._open.clear()
    assert sorted(read(reader, space, "a")) == [0, 1, 2, 3, 4]
    assert not left
    assert sorted(read(reader, space, "b")) == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", ["KEEP_OPEN", "_MOST_KEPT"])
def test_much_is_looked_for_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    store, space = make_store(tmp_path)
    for n in range(3):
        store.append(space, values([n], "ab"))
    for most, kept in ((2, False), (3, True)):
        monkeypatch.setattr(everything, limit, most)
        assert read(store, space, "a") == read(store, space, "b") == [0, 1, 2]
        assert (store._index(space).everything is not None) == kept
