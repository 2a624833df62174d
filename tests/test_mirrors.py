"""What a host has of objects is never believed over checksums, whoever works with it at the same time."""

from __future__ import annotations

import itertools
import os
import random
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from actcache.store import mirror
from actcache.store import segment as segments
from actcache.store.store import Store
from elsewhere import Folder
from mirrors_helpers import ROWS, SITES, SPACE, VALUES, WIDTH, Strange, check, mirrors, other_host, write
from store_helpers import in_child, wait_for


@pytest.fixture
def backend() -> Strange:
    return Strange()


@pytest.fixture
def reader(backend: Strange, tmp_path: Path) -> Store:
    return other_host(backend, tmp_path)


# -- what is here is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 100, 256, 257, 260, 10_000])
def test_a_sidecar_of_any_length_does(reader: Store, length: int) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    os.truncate(mirror.sidecar_of(path), length)
    check(reader)
    check(reader, range(5, 600, 7), SITES[2])


@pytest.mark.parametrize("content", [b"", b"\1" * 5000, b"\xff" * 5000, b"{}", b'{"__metadata__":{"size":"x"}}'])
def test_a_sidecar_of_any_content_does(reader: Store, content: bytes) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    mirror.sidecar_of(path).write_bytes(content)
    check(reader)
    check(reader, site=SITES[0])


def test_marks_over_holes_are_not_believed(reader: Store, backend: Strange) -> None:
    check(reader, range(10))
    (path,) = mirrors(reader)
    said = mirror.read_sidecar(path)
    assert said is not None and said.blocks == 3 * -(-ROWS * WIDTH * 4 // segments.BLOCK)
    reader.close()
    mirror.write_sidecar(path, said, whole=True)
    for site in SITES:
        check(reader, site=site)
    reader.close()
    backend.reads.clear()
    check(reader)
    assert backend.reads == []


def test_bytes_that_rot_here_are_read_again_whatever_they_are(reader: Store, backend: Strange) -> None:
    rng = random.Random(0)
    for _ in range(12):
        for site in SITES:
            check(reader, site=site)
        (path,) = mirrors(reader)
        reader.close()
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(8, len(data))
            size = rng.choice([1, 500, 200_000])
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        path.write_bytes(data)
        for site in rng.sample(SITES, 3):
            check(reader, site=site)
    assert reader.verify().ok


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_a_mirror_that_was_cut_is_made_anew(reader: Store, size: int) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    os.truncate(path, size)
    check(reader)


def test_a_mirror_that_somebody_deletes_is_made_anew(reader: Store) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    path.unlink()
    check(reader)
    reader.close()
    mirror.sidecar_of(path).unlink()
    path.unlink()
    check(reader)


# -- several at once ---------------------------------------------------------------------------------------


def test_threads_share_a_store(reader: Store) -> None:
    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            start = rng.randrange(ROWS)
            check(reader, range(start, rng.randrange(start + 1, ROWS + 1)), rng.choice(SITES))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result()


def test_processes_share_a_working_copy(tmp_path: Path) -> None:
    for part in range(4):
        write(Store(Folder(tmp_path / "bucket"), index_dir=tmp_path / "writer"), range(300 * part, 300 * part + 300))

    def work(seed: int) -> None:
        rng = random.Random(seed)
        # Little, so that they take from each other what they read.
        store = Store(Folder(tmp_path / "bucket"), index_dir=tmp_path / "reader", local_gb=1 / 1024)
        for _ in range(25):
            start = rng.randrange(ROWS)
            check(store, range(start, rng.randrange(start + 1, ROWS + 1)), rng.choice(SITES))
            if rng.random() < 0.2:
                store.close()

    children = [in_child(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
    assert [wait_for(pid) for pid in children] == [0] * 4


def test_there_may_be_more_segments_than_files_can_be_open(tmp_path: Path) -> None:
    # A store on files, copied to a bucket, is a store.
    local = Store(tmp_path / "bucket", index_dir=tmp_path / "index")
    for n in range(300):
        local.write(SPACE, [f"prompt {n}"], {SITES[0]: [VALUES[SITES[0]][n]]}, pooling="last_token")
    local.close()

    def work() -> None:
        # Beside those that are open: what tests before this one have left open is theirs.
        used = set(map(int, os.listdir("/dev/fd")))
        limit = next(itertools.islice((fd + 1 for fd in itertools.count() if fd not in used), 199, None))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        store = Store(Folder(tmp_path / "bucket"), index_dir=tmp_path / "reader")
        check(store, range(300), SITES[0])
        assert torch.equal(store.read(SPACE, None, SITES[0], pooling="last_token"), VALUES[SITES[0]][:300])
        assert store.verify().ok

    assert wait_for(in_child(work)) == 0


def test_a_forked_child_reads_on(tmp_path: Path) -> None:
    write(Store(Folder(tmp_path / "bucket"), index_dir=tmp_path / "writer"))
    store = Store(Folder(tmp_path / "bucket"), index_dir=tmp_path / "reader")
    check(store, site=SITES[0])
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            store.refresh()
            check(store, site=SITES[1])

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(go_on) for _ in range(2)]
        try:
            for _ in range(10):
                assert wait_for(in_child(lambda: check(store, site=SITES[2]))) == 0
        finally:
            stop.set()
        for done in busy:
            done.result()
