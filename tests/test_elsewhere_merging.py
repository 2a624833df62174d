"""Merging and compacting where objects lie elsewhere: what replaces them is there before anything goes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import BackendError
from actcache.store import duplicates, given, merging
from actcache.store.backend import MemoryBackend
from actcache.store.records import LABEL
from actcache.store.store import Store
from elsewhere import Watched, found, machine, objects, two
from store_helpers import make_table, pooled, segment_files


@pytest.fixture
def backend() -> Watched:
    return Watched(MemoryBackend())


def test_compacting_uploads_before_anything_goes(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    for i in range(4):
        one.append(space, pooled([2 * i, 2 * i + 1]))
        one.flush()
    assert len(objects(backend)) == 4
    other.invalidate(space, make_table([3]))
    expected = [i != 3 for i in range(8)]

    def always_there(method: str, name: str) -> None:
        if method in ("put", "delete"):
            backend.after = lambda *_: None
            assert found(machine(backend, tmp_path / str(len(backend.calls)))[0], space, range(8)) == expected
            backend.after = always_there

    backend.after = always_there
    assert other.compact() == 4
    assert len(objects(backend)) == 1
    backend.after = lambda *_: None
    assert found(one, space, range(8)) == expected
    # What this machine made lies here: nothing is fetched.
    backend.calls.clear()
    assert found(other, space, range(8)) == expected
    assert backend.count("read") == 0


@pytest.mark.parametrize("method", ["put", "delete", "read", "list"])
@pytest.mark.parametrize("late", [False, True])
def test_a_failure_while_compacting_loses_nothing(tmp_path: Path, backend: Watched, method: str, late: bool) -> None:
    one, other, space = two(backend, tmp_path)
    for i in range(4):
        one.append(space, pooled([i]))
        one.flush()
    other.invalidate(space, make_table([3]))
    expected = [True, True, True, False]
    for at in range(30):
        calls = [0]

        def fail(called: str, name: str, at: int = at, calls: list[int] = calls) -> None:
            calls[0] += called == method
            if called == method and calls[0] == at + 1:
                raise BackendError("cut off")

        if late:
            backend.after = fail
        else:
            backend.before = fail
        try:
            other.compact()
        except BackendError:
            pass
        else:
            if calls[0] <= at:
                break
        finally:
            backend.before = backend.after = lambda *_: None
        assert found(other, space, range(4)) == expected
        assert found(machine(backend, tmp_path / f"c{at}")[0], space, range(4)) == expected
        if len(objects(backend)) == 1:
            one.append(space, pooled([at % 3]))
            one.flush()
    else:
        raise AssertionError("never done")
    assert found(one, space, range(4)) == expected


def test_two_that_compact_at_once_lose_nothing(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    for i in range(6):
        one.append(space, pooled([i]))
        one.flush()
    assert found(other, space, range(6)) == [True] * 6
    at_work = [False]

    def meanwhile(method: str, name: str) -> None:
        if method == "put" and not at_work[0]:
            at_work[0] = True
            assert other.compact() > 0

    backend.before = meanwhile
    one.compact()
    backend.before = lambda *_: None
    assert at_work[0]
    for store in (one, other, machine(backend, tmp_path / "c")[0]):
        assert found(store, space, range(6)) == [True] * 6
    one.compact()
    assert len(objects(backend)) == 1


def test_what_is_invalidated_elsewhere_while_it_is_compacted_stays_gone(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    for i in range(4):
        one.append(space, pooled([i]))
        one.flush()
    at_work = [False]

    def meanwhile(method: str, name: str) -> None:
        if method == "put" and name.endswith(".safetensors") and not at_work[0]:
            at_work[0] = True
            assert other.invalidate(space, make_table([2])) == 1

    backend.before = meanwhile
    one.compact()
    backend.before = lambda *_: None
    assert at_work[0]
    for store in (one, other, machine(backend, tmp_path / "c")[0]):
        assert found(store, space, range(4)) == [True, True, False, True]


def test_what_is_cleared_elsewhere_while_it_is_compacted_stays_gone(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    for i in range(4):
        one.append(space, pooled([i]))
        one.flush()
    for suffix in ("put", "read"):
        at_work = [False]

        def meanwhile(method: str, name: str, suffix: str = suffix, at_work: list[bool] = at_work) -> None:
            done = method == suffix and (suffix == "put" or backend.count("put", ".safetensors") > 4)
            if done and name.endswith(".safetensors") and not at_work[0]:
                at_work[0] = True
                other.clear()

        backend.after = meanwhile
        one.compact()
        backend.after = lambda *_: None
        assert at_work[0]
        assert objects(backend) == []
        assert found(one, space, range(4)) == [False] * 4
        for i in range(4):
            one.append(space, pooled([i]))
            one.flush()


def test_merging_by_itself_touches_only_what_was_never_put(tmp_path: Path, backend: Watched) -> None:
    one, _, space = two(backend, tmp_path)
    for i in range(10):
        one.append(space, pooled([i]))
        one.flush()
    assert len(objects(backend)) == 10
    backend.calls.clear()
    with one.writer(space, linger=0) as writer:
        for i in range(10, 30):
            writer.put(pooled([i]))
            writer.flush()
    assert len(objects(backend)) == 11
    assert backend.count("delete") == 0
    assert backend.count("read") == 0


def test_what_is_being_uploaded_is_not_merged_away(tmp_path: Path, backend: Watched) -> None:
    """The merge waits for the upload to end; then what it makes is put before what it was made of goes."""
    one, again, space = (*two(backend, tmp_path)[:1], *machine(backend, tmp_path / "a"))
    for i in range(3):
        one.append(space, pooled([i]))
    begun, go_on = threading.Event(), threading.Event()

    def slow(method: str, name: str) -> None:
        if method == "put" and name.endswith(".safetensors") and not begun.is_set():
            begun.set()
            go_on.wait(30)

    backend.before = slow
    path = segment_files(one, space)[0]
    uploading = threading.Thread(target=one._copy.spool.put, args=(path,))  # type: ignore[union-attr]
    uploading.start()
    assert begun.wait(30)
    merging_it = threading.Thread(target=again.merge, args=(space,))
    merging_it.start()
    time.sleep(0.1)
    assert merging_it.is_alive()
    go_on.set()
    uploading.join()
    merging_it.join()
    one.flush()
    assert found(machine(backend, tmp_path / "c")[0], space, range(3)) == [True] * 3
    assert len(objects(backend)) == 1


def test_copies_go_only_where_newer_ones_are_still_there(
    tmp_path: Path, backend: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine evicts the newer ones when both have been read."""
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.append(space, pooled(range(4, 8), sites=["embed"]))
    one.flush()
    one.append(space, pooled(range(4)))
    one.flush()
    newest = max(((info.created_ns, info.name) for _, info in one._index(space).segments()), default=None)
    assert newest is not None
    other.refresh()
    drop_duplicates = merging.drop_duplicates

    def late(sources: Any) -> None:
        backend.inner.delete(f"v1/{space}/{newest[1]}.safetensors")
        drop_duplicates(sources)

    monkeypatch.setattr(merging, "drop_duplicates", late)
    assert duplicates.drop_copies(other._index(space), other.index_dir) == 0
    assert found(machine(backend, tmp_path / "c")[0], space, range(4)) == [True] * 4
    monkeypatch.undo()
    one.append(space, pooled(range(4)))
    one.flush()
    other.refresh()
    assert duplicates.drop_copies(other._index(space), other.index_dir) == 1
    assert found(machine(backend, tmp_path / "d")[0], space, range(4)) == [True] * 4


def test_labels_of_late_machines_are_not_overtaken_by_a_merge(tmp_path: Path, backend: Watched) -> None:
    """One has changed a label and not put it yet, when another merges the one before with something later."""
    one, other, space = two(backend, tmp_path)
    table = make_table([1, 2])

    def label(store: Store, i: int, value: str) -> None:
        for records in given.records(LABEL, table.select(np.arange(2) == i), [given.encoded(value)]):
            store.append(space, records)

    label(one, 0, "first")
    one.flush()
    assert given.read(other, space, LABEL, table) == ["first", None]
    label(other, 0, "second")
    label(one, 1, "beside")
    one.flush()
    one.compact()
    other.flush()
    one.refresh()
    assert given.read(one, space, LABEL, table) == ["second", "beside"]
