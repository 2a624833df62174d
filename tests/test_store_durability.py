"""Kills, full disks, other processes: what was reported stored stays, and nothing wrong is ever read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import StoreAccessError
from actcache.store import files, segment
from actcache.store.store import Store
from mounts import on_a_read_only_disk
from store_helpers import SITES, check_pooled, in_child, kill, make_store, pooled, segment_files, text, wait_for

BATCH = 4


def write_batches(folder: Path, start: int, count: int, report: int) -> None:
    """Append batches one by one and tell `report` the number of each finished one; merge now and then."""
    store, space = make_store(folder)
    for k in range(start, start + count):
        store.append(space, pooled(range(k * BATCH, (k + 1) * BATCH)))
        os.write(report, k.to_bytes(4, "little"))
        if k % 5 == 4:
            store.merge(space)


def finished(pipe: int) -> list[int]:
    os.set_blocking(pipe, False)
    data = b""
    try:
        while part := os.read(pipe, 65536):
            data += part
    except BlockingIOError:
        pass
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data) - 3, 4)]


def kills(folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, writers: int) -> None:
    # Only this machine is at work here, wherever the files lie.
    monkeypatch.setattr(files, "_is_local", lambda fd: True)
    rng = np.random.default_rng(rounds)
    stored: set[int] = set()
    for turn in range(rounds):
        read, write = os.pipe()
        pids = [in_child(partial(write_batches, folder, 10_000 * turn + 1000 * w, 900, write)) for w in range(writers)]
        os.close(write)
        if turn % 4:
            # However long it takes to begin. Every fourth dies while it begins.
            first = os.read(read, 4)
            assert first, "the writers ended by themselves"
            stored.add(int.from_bytes(first, "little"))
        time.sleep(float(rng.uniform(0.01, 0.12)))
        for pid in pids:
            kill(pid)
        stored |= set(finished(read))
        os.close(read)
        # A fresh index sees only what is on disk; the surviving one must agree.
        for store in (make_store(folder)[0], Store(folder / "store", index_dir=folder / f"new {turn}")):
            space = store.open_space(
                {"weights": "abc"}, {"model_name": "org/model", "revision": "r1", "dtype": "float32"}
            )
            asked = [i for k in sorted(stored) for i in range(k * BATCH, (k + 1) * BATCH)]
            assert check_pooled(store, space, asked).all()
            store.close()
    assert stored
    store, space = make_store(folder)
    for path in segment_files(store, space):
        assert segment.validate(path) == []
    assert not list((store.root / space).glob("*.tmp")), "unfinished files are litter until someone opens the store"


def test_kill_at_random_instants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills(tmp_path, monkeypatch, 12, 1)


@pytest.mark.slow
def test_kill_three_writers_at_random_instants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills(tmp_path, monkeypatch, 60, 3)


@pytest.mark.parametrize("call", ["pwritev", "fsync", "rename", "unlink"])
def test_killed_at_every_single_call(tmp_path: Path, call: str) -> None:
    """The writer dies before its k-th write, sync, rename or removal, for every k of an append and a merge."""
    for k in range(1, 40):
        folder = tmp_path / str(k)
        store, space = make_store(folder)
        store.append(space, pooled([1, 2]))
        store.append(space, pooled([2, 3]))
        store.close()

        def work(folder: Path = folder, k: int = k) -> None:
            original, left = getattr(os, call), [k]

            def dying(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            setattr(os, call, dying)
            if call == "unlink":
                Path.unlink = lambda self, missing_ok=False: dying(self)  # type: ignore[method-assign]
            store, space = make_store(folder)
            store.append(space, pooled([4]))
            store.merge(space)

        status = wait_for(in_child(work))
        again, space = make_store(folder)
        assert check_pooled(again, space, [1, 2, 3]).all()
        if status == 0:
            assert check_pooled(again, space, [4]).all()
            return
        assert status == -signal.SIGKILL
    pytest.fail("the work never ended")


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    pids = []
    for w in range(2):

        def work(w: int = w) -> None:
            store, space = make_store(tmp_path)
            with store.writer(space, linger=0) as writer:
                for k in range(15):
                    writer.put(pooled([10 * k + i for i in range(10 - 3 * w)]))
                    if k % 4 == 0:
                        writer.flush()
                        store.merge(space)

        pids.append(in_child(work))
    assert [wait_for(p) for p in pids] == [0, 0]
    store, space = make_store(tmp_path)
    assert check_pooled(store, space, range(150)).all()
    assert store.spaces()[0].num_prompts == 150
    store.merge(space)
    assert len(segment_files(store, space)) == 1
    assert segment.open(segment_files(store, space)[0]).info.prompts == 150


def test_two_processes_merge_at_once(tmp_path: Path) -> None:
    """With index folders of their own no lock keeps them apart, as on two machines."""
    store, space = make_store(tmp_path)
    for i in range(30):
        store.append(space, pooled([i]))

    def work(host: int) -> None:
        mine = Store(tmp_path / "store", index_dir=tmp_path / f"host {host}")
        mine.merge(space)

    pids = [in_child(lambda h=h: work(h)) for h in range(3)]
    for _ in range(20):
        assert check_pooled(store, space, range(30)).all()
    assert [wait_for(p) for p in pids] == [0, 0, 0]
    assert check_pooled(store, space, range(30)).all()
    store.merge(space)
    assert len(segment_files(store, space)) == 1


def test_a_spawned_process_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from actcache.store.store import Store; s = Store(sys.argv[1]); s.info();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    assert subprocess.run([sys.executable, "-c", code, str(store.location)], check=False).returncode == 0


def test_a_forked_reader_works_while_a_thread_writes(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(10)))
    check_pooled(store, space, [1])
    with store._index(space).lock:
        # The child inherits a lock that is held, as when it is forked from a process whose writer is busy.
        pid = in_child(lambda: os._exit(0 if check_pooled(store, space, range(10)).all() else 3))
        deadline = time.monotonic() + 30
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, "the child waits for a lock that nobody releases"
            time.sleep(0.01)
    assert wait_for(pid) == 0


def test_a_forked_reader_does_not_use_what_a_thread_was_changing(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(10)))
    check_pooled(store, space, [1])
    index, changing, done = store._index(space), threading.Event(), threading.Event()

    def change() -> None:
        with index.lock:
            held = dict(index._groups)
            index._groups.clear()
            changing.set()
            assert done.wait(60)
            index._groups.update(held)

    thread = threading.Thread(target=change)
    thread.start()
    assert changing.wait(60)
    status = wait_for(in_child(lambda: os._exit(0 if check_pooled(store, space, range(10)).all() else 3)))
    done.set()
    thread.join()
    assert status == 0
    assert check_pooled(store, space, range(10)).all()


def test_new_folders_are_as_durable_as_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A synced file in a folder whose own entry is lost with the power is lost, too."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    store = Store(tmp_path / "a" / "store", index_dir=tmp_path / "index")
    space = store.open_space({}, {"model_name": "m"})
    store.append(space, pooled([1]))
    made = {tmp_path, tmp_path / "a", store.location, store.root, store.root / space}
    assert set(synced) == made
    synced.clear()
    store.append(space, pooled([2]))
    assert synced == [store.root / space]


# -- others who clear at the same moment -----------------------------------------------------------------


def test_a_file_taken_for_litter_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    original, removed = files.fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not removed:
            (litter,) = (store.root / space).glob("*.tmp")
            removed.append(litter)
            litter.unlink()
        original(fd, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    store.append(space, pooled([2]))
    assert removed
    assert check_pooled(store, space, [1, 2]).all()
    assert not list((store.root / space).glob("*.tmp"))


@pytest.mark.parametrize("opened", [True, False])
def test_a_space_cleared_while_a_batch_is_written_stays_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """Otherwise nothing would list what is stored there, and `clear` would never delete it."""
    first, space = make_store(tmp_path)
    first.append(space, pooled([1]))
    store = first if opened else Store(first.location, index_dir=tmp_path / "i2")
    other = Store(store.location, index_dir=tmp_path / "i3")
    write = segment.write

    def late(*args: Any, **options: Any) -> Any:
        other.clear()
        return write(*args, **options)

    monkeypatch.setattr(segment, "write", late)
    store.append(space, pooled([2]))
    monkeypatch.undo()
    assert [(s.model_name, s.num_prompts) for s in other.spaces()] == [("org/model", 1)]
    assert other.clear() == 1
    assert not store.root.exists()


# -- forbidden folders -----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store", index_dir=tmp_path / "i")
    space = store.open_space({}, {"model_name": "m"})
    for attempt in (store.check_writable, lambda: store.append(space, pooled([1]))):
        with pytest.raises(StoreAccessError, match=r"cannot write to the store folder .*file/store.*: choose a folder"):
            attempt()
    with pytest.raises(StoreAccessError), store.writer(space) as writer:
        writer.put(pooled([1]))
    assert not check_pooled(store, space, [1]).any()
    assert store.info().models == []
    assert store.clear() == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_store_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Tests may run as root, whom no permission stops, so the kernel's answer is imitated."""
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    original = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number))
        return original(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    reader = Store(store.location, index_dir=tmp_path / "elsewhere")
    assert check_pooled(reader, space, [1]).all()
    assert reader.discover("org/model", text(1)) is not None
    with pytest.raises(StoreAccessError, match="choose a folder"):
        store.append(space, pooled([2]))
    with pytest.raises(StoreAccessError):
        store.invalidate(space, [text(1)])


def test_a_real_disk_that_may_only_be_read(tmp_path: Path) -> None:
    """The index of this host lies there, too: it is kept in memory."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(6)))
    store.append(space, pooled(range(6, 12)))
    store.invalidate(space, [text(3)])
    store.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    there = [i != 3 for i in range(12)]

    def work() -> None:
        for index in ("index", "nowhere"):
            reader = Store(store.location, index_dir=tmp_path / index)
            assert check_pooled(reader, space, range(12)).tolist() == there
            assert reader.contains(space, [text(i) for i in range(12)]).tolist() == there
            assert [s.num_prompts for s in reader.spaces()] == [11]
            assert len(reader.prompts(space)) == 11
            assert reader.discover("org/model", text(3)) is None
            assert reader.statistics(space, SITES[0], pooling="last_token").count == 11
            assert reader.verify().ok
            assert reader.evict(1).bytes_freed == 0
            reader.open_space({"weights": "abc"}, {"model_name": "org/model"})
            for change in (
                reader.check_writable,
                lambda reader=reader: reader.append(space, pooled([20])),
                lambda reader=reader: reader.invalidate(space, [text(1)]),
                lambda reader=reader: reader.merge(space),
                lambda reader=reader: reader.compact(),
                lambda reader=reader: reader.evict(0),
                lambda reader=reader: reader.clear(),
            ):
                with pytest.raises(StoreAccessError, match="choose a folder you may write to"):
                    change()
            assert check_pooled(reader, space, range(12)).tolist() == there
            reader.close()

    on_a_read_only_disk(tmp_path, work)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_nothing_is_created_before_the_first_write(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    assert not check_pooled(store, space, [1]).any()
    assert store.spaces() == []
    store.writer(space).close()
    assert not store.location.exists()
    store.check_writable()
    assert store.root.is_dir()
