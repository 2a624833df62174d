"""Full disks: a clear error, nothing lost that was there, evicting works, and then it goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import DiskFullError
from actcache.store import merging
from actcache.store.store import Store
from mounts import on_a_small_disk
from store_helpers import SITES, check_pooled, in_child, make_store, make_table, pooled, wait_for

GB = 2**30


def held(store: Store, space: str) -> list[int]:
    place = store.locate(space, table=make_table(range(1000)), sites=SITES, layout="last_token", check=False)
    return np.flatnonzero(place.found).tolist()


# -- imitated, so that it is full at a byte of our choice --------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`left[0]` bytes can still be written."""
    left = [0]
    original = os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int) -> int:
        size = sum(map(len, buffers))
        if size > left[0]:
            if left[0]:
                # As the kernel does: first a short write, then the error.
                written = original(fd, [memoryview(b"".join(bytes(b) for b in buffers))[: left[0]]], offset)
                left[0] = 0
                return written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= size
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    return left


@pytest.mark.parametrize("room", [0, 1000, 2500])
def test_disk_full_in_mid_batch(tmp_path: Path, full_disk: list[int], room: int) -> None:
    store, space = make_store(tmp_path)
    full_disk[0] = 10**9
    store.append(space, pooled([1]))
    full_disk[0] = room
    with pytest.raises(DiskFullError, match=r"no room in .*store.* for [\d,]+ more bytes.*: free space"):
        store.append(space, pooled(range(2, 40)))
    assert not list((store.root / space).glob("*.tmp"))
    assert check_pooled(store, space, [1, 2]).tolist() == [True, False]
    full_disk[0] = 10**9
    store.append(space, pooled([2]))
    assert check_pooled(store, space, [1, 2]).all()


def test_disk_full_in_the_writer_thread_reaches_the_caller(tmp_path: Path, full_disk: list[int]) -> None:
    store, space = make_store(tmp_path)
    full_disk[0] = 20_000
    writer = store.writer(space, linger=0)

    def work() -> None:
        for i in range(200):
            writer.put(pooled([i]))
            writer.flush()

    with pytest.raises(DiskFullError, match="free space"):
        work()
    stored = check_pooled(store, space, range(200))
    assert 0 < stored.sum() < 200
    full_disk[0] = 10**9
    with store.writer(space) as again:
        again.put(pooled(range(200)))
    assert check_pooled(store, space, range(200)).all()


def test_disk_full_while_merging_costs_nothing(
    tmp_path: Path, full_disk: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    store, space = make_store(tmp_path)
    full_disk[0] = 10**9
    for i in range(merging.FEW):
        store.append(space, pooled([i]))
    writer = store.writer(space)
    writer.put(pooled([99]))
    writer.flush()
    full_disk[0] = 0
    writer.close()
    assert "merging small segments failed" in caplog.text
    assert check_pooled(store, space, [*range(merging.FEW), 99]).all()
    with pytest.raises(DiskFullError):
        store.merge(space)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A disk of so many bytes below the test's folder. Removing files makes room again."""
    size = [1 << 40]
    real = os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int) -> int:
        # Files that grow are mostly holes, which take no room.
        taken = sum(
            min(f.stat().st_size, 512 * f.stat().st_blocks) for f in (tmp_path / "store").rglob("*") if f.is_file()
        )
        grows = sum(map(len, buffers))
        if taken + grows > size[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    return size


def test_a_disk_that_fills_up_is_used_again_after_evicting(tmp_path: Path, small_disk: list[int]) -> None:
    store, space = make_store(tmp_path)
    size = store.append(space, pooled(range(20), dim=256)).size
    small_disk[0] = int(6.5 * size)
    for stored in range(20, 120, 20):
        store.append(space, pooled(range(stored, stored + 20), dim=256))
    with pytest.raises(DiskFullError, match="free space there"):
        store.append(space, pooled(range(120, 140), dim=256))

    assert held(store, space) == list(range(120))
    assert store.verify().ok
    # The few that were read last are copied out of full segments, on a disk that has just been full.
    hot = [1, 25]
    small_disk[0] = sum(f.stat().st_size for f in store.location.rglob("*") if f.is_file())
    assert store.locate(space, table=make_table(hot), sites=SITES, layout="last_token").found.all()
    report = store.evict(3.5 * size / GB)
    left = held(store, space)
    assert report.bytes_kept <= 3.5 * size
    assert set(hot) <= set(left)
    assert set(range(100, 120)) <= set(left)
    assert report.segments_rewritten >= 1
    store.append(space, pooled(range(120, 140), dim=256))
    assert held(store, space) == [*left, *range(120, 140)]
    assert store.verify().ok
    assert not list(store.root.rglob("*.tmp"))


def test_the_writer_goes_on_after_room_was_made(tmp_path: Path, small_disk: list[int]) -> None:
    store, space = make_store(tmp_path)
    size = store.append(space, pooled(range(20), dim=256)).size
    small_disk[0] = int(3.2 * size)
    writer = store.writer(space, linger=0)
    stored = [20]

    def put() -> None:
        while stored[0] < 200:
            writer.put(pooled(range(stored[0], stored[0] + 20), dim=256))
            writer.flush()
            stored[0] += 20

    with pytest.raises(DiskFullError):
        put()
    assert stored[0] > 20
    assert store.contains(space, make_table(range(stored[0]))).all()
    store.evict(1.1 * size / GB)
    with store.writer(space) as again:
        again.put(pooled(range(60, 80), dim=256))
    assert store.contains(space, make_table(range(60, 80))).all()
    assert store.verify().ok


# -- as the kernel does it -------------------------------------------------------------------------------


def test_file_size_limit(tmp_path: Path) -> None:
    """A real limit of the kernel, in a child."""

    def work() -> None:
        store, space = make_store(tmp_path)
        store.append(space, pooled([1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(DiskFullError):
            store.append(space, pooled(range(2, 40), dim=512))
        store.append(space, pooled([2]))

    assert wait_for(in_child(work)) == 0
    store, space = make_store(tmp_path)
    assert check_pooled(store, space, [1, 2]).all()
    assert not list((store.root / space).glob("*.tmp"))


def test_evicting_below_a_file_size_limit(tmp_path: Path) -> None:
    """What was read lately is copied out where that fits, and goes where it does not."""

    def work() -> None:
        store, space = make_store(tmp_path)
        size = store.append(space, pooled(range(20), dim=256)).size
        for start in range(20, 100, 20):
            store.append(space, pooled(range(start, start + 20), dim=256))
        hot = [*range(9), 25]
        assert store.locate(space, table=make_table(hot), sites=SITES, layout="last_token").found.all()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, resource.RLIM_INFINITY))
        with pytest.raises(DiskFullError, match="free space there"):
            store.append(space, pooled(range(100, 120), dim=256))
        report = store.evict(2.1 * size / GB)
        assert report.bytes_kept <= 2.1 * size
        assert held(store, space) == [25, *range(80, 100)]
        store.append(space, pooled([200], dim=256))
        assert store.verify().ok
        assert not list(store.root.rglob("*.tmp"))

    assert wait_for(in_child(work)) == 0


def test_a_real_disk_fills_up_and_is_used_again(tmp_path: Path) -> None:
    """The index of this host lies on the same disk, and somebody else takes what is left of it."""

    def work() -> None:
        store, space = make_store(tmp_path)
        stored: list[int] = []

        def append() -> None:
            while True:
                numbers = range(len(stored), len(stored) + 20)
                store.append(space, pooled(numbers, dim=256))
                stored.extend(numbers)

        with pytest.raises(DiskFullError, match=r"no room in .*: free space there"):
            append()
        assert len(stored) >= 100
        other = Store(store.location, index_dir=tmp_path / "i2")
        for reader in (other, store):
            assert held(reader, space) == stored
            assert reader.verify().ok
        # What is mapped keeps its room on the disk.
        other.close()
        assert not list(store.root.rglob("*.tmp"))
        hot = [1, 25]
        assert store.locate(space, table=make_table(hot), sites=SITES, layout="last_token").found.all()
        rest = os.open(tmp_path / "of others", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while os.write(rest, bytes(1024)):
                pass
        with pytest.raises(DiskFullError):
            store.merge(space)
        assert held(store, space) == stored
        size = sum(file.stat().st_size for file in store.root.rglob("*") if file.is_file())
        report = store.evict(0.5 * size / GB)
        assert report.bytes_kept <= 0.5 * size
        left = held(store, space)
        assert set(hot) <= set(left)
        assert set(stored[-20:]) <= set(left)
        with store.writer(space) as writer:
            writer.put(pooled(range(500, 520), dim=256))
        assert held(store, space) == [*left, *range(500, 520)]
        assert store.verify().ok
        assert not list(store.root.rglob("*.tmp"))

    on_a_small_disk(tmp_path, 1 << 20, work)
