"""The writer thread: groups, bounds, order and errors."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import FormatError
from actcache.store import adoption, segment
from actcache.store.records import Records
from actcache.store.store import SegmentWriter, Store
from store_helpers import check_pooled, every_token, make_store, pooled, segment_files


def test_what_waits_and_agrees_becomes_one_segment(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space, linger=60) as writer:
        for i in range(6):
            writer.put(pooled([i]))
        writer.put(every_token([1]))
        writer.put(pooled([7], dtype=np.float16))
        writer.put(pooled([8], dtype=np.float16))
        assert not store.location.exists()
        writer.flush()
        assert check_pooled(store, space, range(7)).tolist() == [True] * 6 + [False]
        assert sorted(segment.open(p).info.prompts for p in segment_files(store, space)) == [1, 2, 6]
    assert writer.bytes_written > 0


def test_batches_are_stored_while_the_caller_works(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space, linger=0.05) as writer:
        writer.put(pooled([1]))
        deadline = time.monotonic() + 20
        while not check_pooled(store, space, [1]).any():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_put_blocks_while_too_much_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    gate, held = threading.Event(), []
    append = Store.append

    def slow(self: Store, space: str, records: list[Records]) -> object:
        assert gate.wait(30)
        held.append(sum(r.nbytes for r in records))
        return append(self, space, records)

    monkeypatch.setattr(Store, "append", slow)
    size = pooled([1]).nbytes
    put: list[int] = []

    def work() -> None:
        with store.writer(space, max_bytes=3 * size + 10, linger=0) as writer:
            for i in range(12):
                writer.put(pooled([i]))
                put.append(i)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 20
    while len(put) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(put) == 3
    gate.set()
    thread.join(30)
    assert len(put) == 12
    assert max(held) <= 3 * size + 10
    assert check_pooled(store, space, range(12)).all()


def test_what_is_durable_is_not_held_until_more_comes(tmp_path: Path) -> None:
    """Records may be large, and what comes next is made in the room of those before them."""
    store, space = make_store(tmp_path)
    with store.writer(space, linger=0) as writer:
        for i in range(3):
            given = pooled([i])
            held = [weakref.ref(rows) for rows in given.data.values()]
            writer.put(given)
            del given
            writer.flush()
            deadline = time.monotonic() + 20
            while any(one() is not None for one in held):
                assert time.monotonic() < deadline, "records that are stored are still in memory"
                time.sleep(0.01)
    assert check_pooled(store, space, range(3)).all()


def test_the_thread_ends_where_finishing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    finish = adoption.finish

    def fail(*given: Any) -> None:
        finish(*given)
        raise FormatError("what was finished is damaged")

    monkeypatch.setattr(adoption, "finish", fail)
    before = threading.enumerate()
    writer = store.writer(space)
    for start in (0, 3, 6):
        writer.put(pooled(range(start, start + 3)))
        writer.flush()
    with pytest.raises(FormatError, match="what was finished"):
        writer.close()
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - set(before)


def test_all_files_that_grow_wait_for_the_disk_in_one_thread(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    before = set(threading.enumerate())
    with store.writer(space, linger=0) as writer:
        for i in range(4):
            writer.put(pooled([i]))
            writer.flush()
            writer.put(every_token([i]))
            writer.flush()
        begun = [thread.name for thread in set(threading.enumerate()) - before]
        assert sorted(begun) == ["actcache-disk", "actcache-writer"]
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "a thread outlives its writer"
        time.sleep(0.01)
    assert check_pooled(store, space, range(4)).all()


@pytest.mark.parametrize("fails", [False, True])
def test_behind_a_flushed_block_everything_is_durable(tmp_path: Path, fails: bool) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space, linger=60) as writer:
        with contextlib.suppress(KeyError), writer.flushed() as same:
            same.put(pooled([1]))
            if fails:
                raise KeyError("the caller's own trouble")
        assert check_pooled(store, space, [1]).all()
        writer.put(pooled([2]))
    assert check_pooled(store, space, [1, 2]).all()


def test_of_two_errors_of_a_flushed_block_the_first_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)

    def failing(self: Store, space: str, records: list[Records]) -> object:
        raise RuntimeError("trouble")

    monkeypatch.setattr(Store, "append", failing)

    def work(writer: SegmentWriter, *, fails: bool) -> None:
        with writer.flushed():
            writer.put(pooled([1]) if fails else every_token([1]))
            if fails:
                raise KeyError("the caller's own trouble")

    with store.writer(space, linger=60) as writer:
        with pytest.raises(KeyError, match="own"):
            work(writer, fails=True)
        with pytest.raises(RuntimeError, match="trouble"):
            work(writer, fails=False)


def test_one_batch_larger_than_the_queue_passes(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space, max_bytes=10) as writer:
        writer.put(pooled(range(20)))
        writer.put(pooled(range(20, 30)))
    assert check_pooled(store, space, range(30)).all()


def test_finished_batches_are_kept_when_the_block_raises(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)

    def work() -> None:
        with store.writer(space, linger=60) as writer:
            writer.put(pooled([1, 2]))
            raise KeyError("the caller's own trouble")

    with pytest.raises(KeyError):
        work()
    assert check_pooled(store, space, [1, 2]).all()


def test_an_error_of_the_thread_is_raised_once_and_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    trouble = [True]
    append = Store.append

    def failing(self: Store, space: str, records: list[Records]) -> object:
        if trouble[0]:
            raise RuntimeError("trouble")
        return append(self, space, records)

    monkeypatch.setattr(Store, "append", failing)
    writer = store.writer(space, linger=0)
    writer.put(pooled([1]))
    with pytest.raises(RuntimeError, match="trouble"):
        writer.close()
    writer = store.writer(space, linger=0)
    writer.put(pooled([1]))
    with pytest.raises(RuntimeError, match="trouble"):
        writer.flush()
    trouble[0] = False
    writer.put(pooled([2]))
    writer.close()
    assert check_pooled(store, space, [1, 2]).tolist() == [False, True]


def test_an_error_while_closing_is_raised_as_it_is() -> None:
    """The thread may end at any moment of `close`, also between two looks at it."""

    class Watched(SegmentWriter):
        _held: threading.Thread | None = None

        @property
        def _thread(self) -> threading.Thread | None:  # type: ignore[override]
            held = self._held
            if held is not None and self._closing and threading.current_thread() is not held:
                gate.set()
                held.join(0.5)
            return held

        @_thread.setter
        def _thread(self, value: threading.Thread | None) -> None:
            self._held = value

    gate = threading.Event()

    def failing(group: list[Records]) -> None:
        assert gate.wait(30)
        raise RuntimeError("trouble")

    writer = Watched(failing, lambda final: None, max_bytes=10, linger=0)
    writer.put(pooled([1]))
    with pytest.raises(RuntimeError, match="trouble"):
        writer.close()


def test_where_no_thread_can_be_started_nothing_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []
    writer = SegmentWriter(
        lambda g: stored.extend(r.prompts.tokens(0)[0] for r in g), lambda m: None, max_bytes=1 << 20, linger=0
    )

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            writer.put(pooled([1]))
    flushed = threading.Thread(target=writer.flush, daemon=True)
    flushed.start()
    flushed.join(10)
    assert not flushed.is_alive()
    assert writer.put(pooled([2])).wait()
    writer.close()
    # The first was refused, and whoever put it was told so.
    assert stored == [2]


def test_everyone_who_waits_is_let_go_when_the_thread_fails() -> None:
    gate = threading.Event()

    def failing(group: list[Records]) -> None:
        assert gate.wait(30)
        raise RuntimeError("trouble")

    writer = SegmentWriter(failing, lambda final: None, max_bytes=10, linger=0)
    writer.put(pooled([1]))
    outcome: list[Any] = []

    def wait() -> None:
        try:
            writer.flush()
            outcome.append("flushed")
        except RuntimeError as error:
            outcome.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(30)
    assert sorted(outcome) == ["flushed", "flushed", "trouble"]


class Kept:
    """What a writer was given, in order; nothing of it lies anywhere."""

    def __init__(self, gate: threading.Event | None = None, error: Exception | None = None) -> None:
        self.held: list[int] = []
        self._gate, self._error = gate, error

    def append(self, group: list[Records]) -> None:
        if self._gate is not None:
            assert self._gate.wait(30)
        if self._error is not None:
            raise self._error
        self.held += [int(records.prompts.tokens(0)[0]) for records in group]

    def writer(self, linger: float = 0) -> SegmentWriter:
        return SegmentWriter(self.append, lambda merge: None, max_bytes=1 << 20, linger=linger)


def test_what_is_computed_from_records_waits_for_them() -> None:
    gate = threading.Event()
    sources, results = Kept(gate), Kept()
    with sources.writer() as first, results.writer() as second:
        for i in range(3):
            second.put(pooled([i]), after=first.put(pooled([i])))
        time.sleep(0.3)
        assert (sources.held, results.held) == ([], [])
        gate.set()
        second.flush()
        assert sources.held == [0, 1, 2] == results.held
    assert second.bytes_written == sum(pooled([i]).nbytes for i in range(3))


def test_what_is_computed_from_lost_records_is_left_out() -> None:
    sources, results = Kept(error=RuntimeError("trouble")), Kept()
    with results.writer(linger=60) as second:
        first = sources.writer()
        second.put(pooled([1]), after=first.put(pooled([1])))
        with pytest.raises(RuntimeError, match="trouble"):
            first.flush()
        second.put(pooled([2]))
        ticket = second.put(pooled([3]))
        second.flush()
        assert ticket.wait()
    assert results.held == [2, 3]
    assert second.bytes_written == pooled([2]).nbytes + pooled([3]).nbytes


def test_bad_records_are_refused_by_put(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space) as writer:
        records = pooled([1])
        records.data["x"] = np.zeros((2, 3), np.float32)
        with pytest.raises(ValueError, match="shape"):
            writer.put(records)
    with pytest.raises(ValueError, match="closed"):
        writer.put(pooled([1]))


def test_threads_share_one_store(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    errors: list[BaseException] = []

    def write(k: int) -> None:
        try:
            with store.writer(space, linger=0) as writer:
                for i in range(10):
                    writer.put(pooled([100 * k + i]))
                    check_pooled(store, space, range(100 * k, 100 * k + 10))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert check_pooled(store, space, [100 * k + i for k in range(4) for i in range(10)]).all()
