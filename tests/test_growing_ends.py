"""Writers of growing files that die, fork, fail to sync or run out of room: what they committed is kept."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import DiskFullError
from actcache.store import files
from actcache.store.batches import OpenFile
from actcache.store.growing import GrowingFile
from actcache.store.store import Store
from store_helpers import (
    check_pooled,
    fresh,
    growing_writer,
    in_child,
    kill,
    make_store,
    open_files,
    pooled,
    segment_files,
    wait_for,
)


def test_a_dead_writer_leaves_what_it_committed(tmp_path: Path) -> None:
    def work() -> None:
        store, space = make_store(tmp_path)
        writer = growing_writer(store, space)
        for i in range(5):
            writer.append([pooled([i])])
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait_for(in_child(work)) == -signal.SIGKILL
    store, space = make_store(tmp_path)
    assert len(open_files(store, space)) == 1
    assert check_pooled(store, space, range(5)).all()
    assert store.verify().ok
    with store.writer(space) as writer:
        writer.put(pooled([5]))
    assert not open_files(store, space)
    assert check_pooled(store, space, range(6)).all()


def test_what_the_dead_left_does_not_pile_up(tmp_path: Path) -> None:
    """Also where every run is killed before its end: the next one begins with it."""

    def work(start: int) -> None:
        store, space = make_store(tmp_path)
        writer = growing_writer(store, space)
        for i in range(start, start + 3):
            writer.append([pooled([i])])
        os.kill(os.getpid(), signal.SIGKILL)

    for life in range(3):
        assert wait_for(in_child(lambda life=life: work(10 * life))) == -signal.SIGKILL  # type: ignore[misc]
    store, space = make_store(tmp_path)
    assert len(open_files(store, space)) == 1
    assert check_pooled(store, space, [10 * life + i for life in range(3) for i in range(3)]).all()


def test_a_living_writer_keeps_its_file(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    read, write = os.pipe()
    go_read, go_write = os.pipe()

    def work() -> None:
        mine, _ = make_store(tmp_path)
        writer = growing_writer(mine, space)
        for i in range(3):
            writer.append([pooled([i])])
        os.write(write, b"x")
        os.read(go_read, 1)
        writer.append([pooled([3])])
        writer.finish(False)

    pid = in_child(work)
    assert os.read(read, 1) == b"x"
    store.merge(space)
    store.compact()
    assert len(open_files(store, space)) == 1
    assert check_pooled(store, space, range(4)).tolist() == [True, True, True, False]
    os.write(go_write, b"x")
    assert wait_for(pid) == 0
    assert not open_files(store, space)
    assert check_pooled(store, space, range(4)).all()


def test_a_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A child that outlives the writer would else keep others from what it left."""
    store, space = make_store(tmp_path)
    read, write = os.pipe()
    idle_read, idle_write = os.pipe()

    def work() -> None:
        mine, _ = make_store(tmp_path)
        growing_writer_held.append(growing_writer(mine, space))
        growing_writer_held[0].append([pooled([1])])
        if not os.fork():
            # Only here is it sure that what a fork has to let go of has been let go.
            os.write(write, b"x")
            os.close(idle_write)
            os.read(idle_read, 1)
            os._exit(0)
        signal.pause()

    growing_writer_held: list[Any] = []
    pid = in_child(work)
    assert os.read(read, 1) == b"x"
    kill(pid)
    store.merge(space)
    assert not open_files(store, space)
    assert check_pooled(store, space, [1]).all()
    os.close(idle_write)


@pytest.mark.parametrize(
    "call", ["fdatasync", "rename", *(pytest.param(c, marks=pytest.mark.slow) for c in ("pwritev", "fsync", "open"))]
)
def test_killed_at_every_single_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The writer dies before its k-th call, for every k of making a file, growing, and finishing it both ways."""
    for k in range(1, 80):
        folder = tmp_path / str(k)
        store, space = make_store(folder)
        store.append(space, pooled([90]))
        store.close()
        done_read, done_write = os.pipe()

        def work(folder: Path = folder, k: int = k, report: int = done_write) -> None:
            original, left = getattr(os, call), [k]

            def dying(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            mine, space = make_store(folder)
            setattr(os, call, dying)
            for in_place in (True, False):
                GrowingFile.is_well_filled = in_place  # type: ignore[method-assign, assignment]
                writer = growing_writer(mine, space)
                for i in range(2):
                    number = 10 * in_place + i
                    writer.append([pooled([number])])
                    os.write(report, bytes([number]))
                writer.finish(False)

        status = wait_for(in_child(work))
        os.close(done_write)
        stored = list(os.read(done_read, 100))
        os.close(done_read)
        for again in (make_store(folder)[0], Store(folder / "store", index_dir=folder / "fresh")):
            assert check_pooled(again, space, [90, *stored]).all(), k
            check_pooled(again, space, [10, 11, 0, 1])
            report = again.verify()
            assert report.ok, (k, report.damaged)
        again.merge(space)
        assert not open_files(again, space), k
        assert check_pooled(again, space, [90, *stored]).all(), k
        if status == 0:
            assert stored == [10, 11, 0, 1]
            return
        assert status == -signal.SIGKILL
    pytest.fail("the work never ended")


def test_a_sync_that_fails_is_an_error_and_its_batch_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([0])])
    (path,) = open_files(store, space)

    def failing(number: int) -> Any:
        def sync(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        return sync

    for number, expected in ((errno.EIO, OSError), (errno.ENOSPC, DiskFullError)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", failing(number))
            with pytest.raises(expected):
                writer.append([pooled([number])])
    # No mark says of the batch that it was synced.
    file = OpenFile(path)
    file.poll()
    assert path.read_bytes()[file._at :][:16] == bytes(16)
    writer.append([pooled([3])])
    writer.finish(True)
    assert check_pooled(fresh(store, tmp_path), space, [0, 3]).all()


@pytest.mark.parametrize("room", [0, 300, 3000, 6000])
def test_disk_full_in_mid_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([1])])
    original, left = os.pwritev, [room]

    def pwritev(fd: int, buffers: Any, offset: int) -> int:
        size = sum(map(len, buffers))
        if size > left[0]:
            raise OSError(28, os.strerror(28))
        left[0] -= size
        return original(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)

        def fill() -> None:
            for i in range(2, 40):
                writer.append([pooled([i])])

        with pytest.raises(DiskFullError, match="free space"):
            fill()
    found = check_pooled(store, space, range(1, 40))
    count = int(found.sum())
    assert found[0]
    assert found[:count].all()
    writer.append([pooled([50])])
    writer.finish(True)
    assert not open_files(store, space)
    assert check_pooled(store, space, [*range(1, count + 1), 50]).all()


def test_without_locks_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for i in range(3):
        writer.append([pooled([i])])
    assert len(segment_files(store, space)) == 3
    assert not [f for f in (store.root / space).iterdir() if f.suffix in (".tmp", ".open")]
    assert check_pooled(store, space, range(3)).all()
