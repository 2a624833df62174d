"""Many at one store: killed, writing the same, reading, evicting, on two hosts, in threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import StoreAccessError
from actcache.store.store import Store
from store_helpers import (
    CONTEXT,
    SITES,
    check_pooled,
    every_token,
    in_child,
    make_store,
    make_table,
    pooled,
    text,
    vector,
    wait_for,
)

GB = 2**30
WRITERS, READERS = 4, 2
OLD, PROMPTS = range(1000, 1200), range(240)
WIDE, OLD_BYTES, ROOM = 2048, 200 * 2 * 4 * 2048, 2_500_000
"""How wide old prompts are, what they take, and more than all that is written here ever takes beside them."""


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    """In a process that never imports torch, since forking one that has is another matter."""
    worker = Path(__file__).with_name("kill_worker.py")
    paths = os.pathsep.join(map(str, (worker.parent, worker.parents[1] / "src")))
    ran = subprocess.run(
        [sys.executable, worker, tmp_path, "200", "7"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.startswith("200 kills, ")


def old_ones(store: Store, space: str) -> None:
    """What is stored before and never read: of another width, so that it is not merged with the rest."""
    for start in range(OLD.start, OLD.stop, 10):
        store.append(space, pooled(range(start, start + 10), dim=WIDE))


def old_left(store: Store, space: str) -> int:
    place = store.locate(space, table=make_table(OLD), sites=SITES, layout="last_token", check=False)
    for k in np.flatnonzero(place.found)[::37].tolist():
        np.testing.assert_array_equal(place.rows(k)[0][0], vector(OLD[k], SITES[0], WIDE))
    return int(place.found.sum())


def write(store: Store, space: str, seed: int) -> None:
    """Overlapping prompts in an order of one's own, pooled and whole, merged now and then; each is there at once."""
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, len(PROMPTS), 6))
    for k, start in enumerate(starts.tolist()):
        numbers = range(start, min(start + 10, len(PROMPTS)))
        store.append(space, pooled(numbers))
        assert check_pooled(store, space, numbers).all(), "what was reported stored is there"
        if k % 3 == 0:
            store.append(space, every_token(numbers, dim=6))
        if k % 7 == seed % 7:
            store.merge(space)


def read(store: Store, space: str, seed: int, done: Callable[[], bool]) -> None:
    """Whatever is found is right, and nothing that was found is lost."""
    rng = np.random.default_rng(seed)
    seen: set[int] = set()
    while not done():
        numbers = sorted({*rng.choice(len(PROMPTS), 20).tolist(), *list(seen)[:20]})
        found = check_pooled(store, space, numbers)
        now = {i for i, f in zip(numbers, found, strict=True) if f}
        assert seen & set(numbers) <= now
        seen |= now
        place = store.locate(space, table=make_table(numbers), sites=SITES, layout="tokens")
        for k in np.flatnonzero(place.found).tolist():
            expected = vector(numbers[k], SITES[1], 6) + np.arange(1 + numbers[k] % 7, dtype=np.float32)[:, None]
            np.testing.assert_array_equal(place.rows(k)[1], expected)


def evict(store: Store, space: str, done: Callable[[], bool]) -> None:
    """Takes old prompts a few at a time, until others have `done` their work or there is nothing old to take.

    Every limit has room for all that is written, whenever that happens: an eviction takes what was read longest ago, so
    nothing that is written here need go. (One to "a little less than is there now" may find much more when its turn
    comes, and rightly goes on until the limit is kept.)
    """
    for limit in range(OLD_BYTES - 50_000, ROOM, -50_000):
        store.evict(limit / GB)
        old_left(store, space)
        if done():
            break


def everything_is_there(store: Store, space: str) -> None:
    assert check_pooled(store, space, PROMPTS).all()
    assert old_left(store, space) < len(OLD)
    written = [info.size for _, info in store._index(space).segments() if info.columns[0][2] != WIDE]
    assert sum(written) < ROOM / 2, "merging takes as much again"
    assert store.verify().ok
    store.compact()
    assert check_pooled(store, space, PROMPTS).all()
    assert store.verify().ok


def test_processes_write_read_and_evict_at_once(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    old_ones(store, space)
    flag = tmp_path / "done"

    def run(work: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        def child() -> None:
            own, _ = make_store(tmp_path)
            work(own, space, *arguments)

        return child

    writers = [in_child(run(write, seed)) for seed in range(WRITERS)]
    others = [in_child(run(read, 10 + seed, flag.exists)) for seed in range(READERS)]
    others.append(in_child(run(evict, flag.exists)))
    statuses = [wait_for(pid) for pid in writers]
    flag.touch()
    statuses += [wait_for(pid) for pid in others]
    assert statuses == [0] * len(statuses)
    everything_is_there(store, space)
    everything_is_there(Store(store.location, index_dir=tmp_path / "new"), space)


def test_threads_write_read_and_evict_at_once(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    old_ones(store, space)
    done = threading.Event()
    errors: list[BaseException] = []

    def run(work: Callable[..., None], *arguments: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                work(store, space, *arguments)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    writers = [run(write, seed) for seed in range(WRITERS)]
    others = [run(read, 10 + seed, done.is_set) for seed in range(READERS)]
    others.append(run(evict, done.is_set))
    for thread in writers:
        thread.join()
    done.set()
    for thread in others:
        thread.join()
    assert errors == []
    everything_is_there(store, space)


def test_two_hosts_agree_after_every_change(tmp_path: Path) -> None:
    """Two indexes of one store: each sees at once what the other has written, merged, invalidated, evicted."""
    hosts = []
    for name in ("one", "two"):
        host = Store(tmp_path / "store", index_dir=tmp_path / name)
        space = host.open_space({"weights": "abc"}, {"model_name": "org/model"})
        hosts.append(host)
    rng = np.random.default_rng(0)
    numbers = list(range(60))
    there: set[int] = set()
    for turn in range(40):
        mine = hosts[turn % 2]
        some = sorted(set(rng.choice(60, 8).tolist()))
        change = turn % 5
        if change in (0, 1, 2):
            mine.append(space, pooled(some, dim=8))
            there |= set(some)
        elif change == 3:
            mine.invalidate(space, make_table(some))
            there -= set(some)
        elif turn % 10 == 4:
            mine.compact()
        else:
            size = sum(f.stat().st_size for f in mine.root.rglob("*") if f.is_file())
            mine.evict(0.8 * size / GB)
            place = mine.locate(space, table=make_table(numbers), sites=SITES, layout="last_token", check=False)
            now = set(np.flatnonzero(place.found).tolist())
            assert now < there
            there = now
        for host in hosts:
            assert set(np.flatnonzero(check_pooled(host, space, numbers)).tolist()) == there
            assert host.spaces()[0].num_prompts == len(there)
            assert host.contains(space, [text(i) for i in numbers]).sum() == len(there)
    assert there
    assert hosts[0].verify().ok


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would change it says so; the rest works."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(10)))
    store.close()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    real = os.open

    def reading(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse()
        return real(path, flags, *args, **options)

    for call in ("unlink", "rename", "mkdir", "rmdir"):
        monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(os, "open", reading)
    again = Store(store.location, index_dir=tmp_path / "no index")
    assert check_pooled(again, space, range(10)).all()
    assert again.verify().ok
    assert again.evict(1).bytes_freed == 0
    for change in (
        lambda: again.evict(0),
        lambda: again.append(space, pooled([11])),
        lambda: again.invalidate(space, make_table([1])),
    ):
        with pytest.raises(StoreAccessError, match="Read-only file system"):
            change()
    assert check_pooled(again, space, range(10)).all()
    assert again.contains(space, [text(3)], SITES[0], pooling="last_token").all()
    assert again._index(space).contexts() == [CONTEXT]
