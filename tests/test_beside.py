"""What is computed in a second thread while rows are written: waited for, told of, and the same."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store import growing
from actcache.store import segment as segments
from actcache.store.batches import OpenFile
from actcache.store.beside import Background, Beside
from actcache.store.growing import GrowingFile, _Column
from actcache.store.records import Records
from store_helpers import make_table

SITES = ["a", "b"]


def parts(seed: int, sizes: tuple[int, ...] = (3, 1, 40), dtype: str = "float16") -> list[Records]:
    rng = np.random.default_rng(seed)
    first, made = 0, []
    for n in sizes:
        data = {s: (rng.standard_normal((n, 32)) * 50 + k).astype(dtype) for k, s in enumerate(SITES)}
        made.append(Records.pooled(make_table(range(first, first + n)), "mean", data))
        first += n
    return made


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_moments_of_many_small_parts_are_those_of_the_rows(tmp_path: Path, dtype: str) -> None:
    given = parts(0, dtype=dtype)
    info = segments.write(tmp_path, given, space="0" * 32)
    found = segments.open(tmp_path / f"{info.name}.safetensors")
    for site in SITES:
        rows = np.concatenate([part.data[site] for part in given]).astype(np.float64)
        moments, error = found.moments(site), found.error(site)
        assert moments is not None and moments.count == len(rows) == error.rows
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.m2, ((rows - rows.mean(0)) ** 2).sum(0), rtol=1e-9)
        np.testing.assert_allclose(moments.norms, np.linalg.norm(rows, axis=1).sum(), rtol=1e-12)
        assert error.max == error.squares == 0 and error.given == pytest.approx((rows**2).sum(), rel=1e-9)
        np.testing.assert_array_equal(found.matrix(site), np.concatenate([part.data[site] for part in given]))
    assert segments.validate(found.path) == []


def test_parts_of_which_one_must_be_cast_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    given = parts(1)
    for part in given:
        part.data["a"] = part.data["a"].astype(np.float32) + np.float32(1e-3)
    given = [replace(part, storage="float16") for part in given]
    found = segments.open(tmp_path / f"{segments.write(tmp_path, given, space='0' * 32).name}.safetensors")
    for site in SITES:
        stored = np.concatenate([p.data[site] for p in given]).astype(np.float16).astype(np.float64)
        moments, error = found.moments(site), found.error(site)
        assert moments is not None and error.rows == len(stored)
        np.testing.assert_allclose(moments.mean, stored.mean(0), rtol=1e-6)
        assert (error.max > 0) == (site == "a")


@pytest.mark.parametrize("fails", ["measuring", "writing", "both"])
def test_a_batch_that_fails_waits_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    given = parts(2)
    file = GrowingFile(tmp_path, "0" * 32, given, 1 << 20)
    file.add(given)
    journal, begun, looked, handed_over = file._at, threading.Event(), threading.Event(), threading.Event()
    real_look, real_write = _Column.hash_given, growing.write_all

    def look(*arguments: Any) -> list[int]:
        assert begun.wait(10), "rows are written beside it"
        found = real_look(*arguments)
        looked.set()
        if fails != "writing":
            raise MemoryError("measuring")
        return found

    def write(*arguments: Any) -> int:
        begun.set()
        assert looked.wait(10), "rows are looked at beside it"
        if fails != "measuring":
            raise ValueError("writing")
        stop = real_write(*arguments)
        if arguments[2] > file._columns[1].start:
            handed_over.set()
        return stop

    monkeypatch.setattr(_Column, "hash_given", look)
    monkeypatch.setattr(growing, "write_all", write)
    with pytest.raises(ValueError if fails == "writing" else MemoryError):
        file.add(parts(3))
    assert handed_over.is_set() == (fails == "measuring"), "nothing uses what was given any more"
    assert file._at == journal and len(file.batches) == 1, "without its rows, or their checksums, no batch is there"
    file.close()
    assert len(OpenFile(file.path).poll()) == 1


def test_what_a_thread_raises_is_raised_at_the_end_of_the_block() -> None:
    def work() -> None:
        raise KeyError("work")

    with pytest.raises(KeyError, match="work"), Beside(work):
        pass
    with pytest.raises(ValueError, match="block"), Beside(work):
        raise ValueError("block")
    beside = Beside(work)
    for _ in range(2):
        with pytest.raises(KeyError):
            beside.wait()


def test_where_no_thread_can_be_started_it_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    done = []
    monkeypatch.setattr(threading.Thread, "start", start)
    with Beside(lambda: done.append(1)):
        assert done == [1]


def test_one_thing_after_another_is_done_until_one_fails() -> None:
    disk, done = Background("test"), list[Any]()

    def fail() -> None:
        raise KeyError("second")

    with disk.waited_for():
        for k in range(3):
            disk.do(partial(done.append, k))
    assert done == [0, 1, 2]
    for work in (partial(done.append, 3), fail, partial(done.append, 4), fail):
        disk.do(work)
    with pytest.raises(KeyError, match="second"), disk.waited_for():
        pass
    assert done == [0, 1, 2, 3]
    # It is told of once, and what comes then is done.
    disk.do(partial(done.append, 5))
    disk.wait()
    disk.wait()
    assert done == [0, 1, 2, 3, 5]
    disk.stop()
    disk.do(lambda: done.append(threading.current_thread().name))
    disk.wait()
    assert done[-1] == "test"
    disk.stop()


def test_what_ends_the_block_waits_and_says_more() -> None:
    disk, go, done = Background("test"), threading.Event(), list[int]()

    def late() -> None:
        assert go.wait(10)
        done.append(1)
        raise KeyError("late")

    disk.do(late)
    threading.Timer(0.05, go.set).start()
    with pytest.raises(ValueError, match="block"), disk.waited_for():
        raise ValueError("block")
    assert done == [1]
    disk.wait()
    disk.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child_a_background_is_another_thread() -> None:
    disk, done = Background("test"), list[int]()
    disk.do(partial(done.append, 1))
    disk.wait()
    child = os.fork()
    if not child:
        try:
            signal.alarm(10)
            disk.wait()
            disk.do(partial(done.append, 2))
            disk.wait()
            os._exit(0 if done == [1, 2] else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    disk.do(partial(done.append, 3))
    disk.wait()
    disk.stop()
    assert done == [1, 3]


def test_a_background_without_a_thread_does_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    def fail() -> None:
        raise KeyError("work")

    monkeypatch.setattr(threading.Thread, "start", start)
    disk, done = Background("test"), list[int]()
    for work in (partial(done.append, 1), fail, partial(done.append, 2)):
        disk.do(work)
    with pytest.raises(KeyError, match="work"), disk.waited_for():
        pass
    assert done == [1]
    with disk.waited_for():
        disk.do(partial(done.append, 3))
        assert done == [1, 3]


def fail_to_start() -> None:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_starts_late_does_nothing_behind_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("work")

    disk, done = Background("test"), list[int]()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _: fail_to_start())
        disk.do(fail)
    disk.do(partial(done.append, 1))
    with pytest.raises(KeyError, match="work"):
        disk.wait()
    assert done == []
    disk.do(partial(done.append, 2))
    disk.wait()
    disk.stop()
    assert done == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_and_never_waits(tmp_path: Path) -> None:
    """The thread that writes is the parent's, as the file and its lock are."""
    given = parts(4)
    file = GrowingFile(tmp_path, "0" * 32, given, 1 << 20)
    file.add(given)
    child = os.fork()
    if not child:
        try:
            signal.alarm(10)
            file.add(given)
        except OSError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    file.add(given)
    file.close()
    assert len(OpenFile(file.path).poll()) == 2
