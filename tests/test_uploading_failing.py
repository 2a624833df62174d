"""Uploads that fail, or whose outcome is not known: told, tried again, and nothing is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from actcache.errors import BackendError
from actcache.store import spool, uploading
from actcache.store.backend import MemoryBackend
from actcache.store.store import Store
from elsewhere import Watched, failing, large, machine, objects, seen, soon
from store_helpers import check_pooled, make_table, pooled, segment_files


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_end() -> Iterator[None]:
    """Threads of stores that are broken on purpose end with the test."""
    yield
    uploading._at_work.clear()


def put_without_answer(backend: Watched, store: Store) -> None:
    """An upload arrives, but nobody could be told, and nobody can look."""

    def gone(method: str, name: str) -> None:
        failing("put", ".safetensors")(method, name)
        if backend.count("put", ".safetensors"):
            failing("read")(method, name)

    backend.after = gone
    with pytest.raises(BackendError):
        store.flush()
    backend.after = lambda *_: None


def test_an_error_of_an_upload_is_told_and_loses_nothing(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    backend.before = failing("put", ".safetensors")
    with pytest.raises(BackendError, match="cut off"):
        store.flush()
    assert check_pooled(store, space, [1]).all()
    with pytest.raises(BackendError):
        store.close()
    backend.before = lambda *_: None
    assert objects(backend) == []
    again, _ = machine(backend, tmp_path / "a")
    assert check_pooled(again, space, [1]).all()
    again.flush()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_an_error_of_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploading, "LINGER_S", 0.01)
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    backend.before = failing("put", ".safetensors")
    with caplog.at_level(logging.WARNING, "actcache.store"):
        store.append(space, pooled([1]))
        assert soon(lambda: "cut off" in caplog.text)

    def raised() -> bool:
        try:
            store.append(space, pooled([2]))
        except BackendError:
            return True
        return False

    assert soon(raised)
    # Reading goes on.
    assert check_pooled(store, space, [1]).all()
    backend.before = lambda *_: None
    store.flush()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_the_thread_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "LINGER_S", 0.01)
    monkeypatch.setattr(uploading, "_AGAIN_S", 0.05)
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    backend.before = failing("put", ".safetensors")
    store.append(space, pooled([1]))
    assert soon(lambda: backend.count("put", ".safetensors") > 1)
    backend.before = lambda *_: None
    assert soon(lambda: objects(backend))
    assert soon(lambda: not store._uploader._errors)  # type: ignore[union-attr]
    # It is there after all.
    store.append(space, pooled([2]))


def test_an_error_that_comes_when_all_is_done_is_none(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    backend.after = failing("put", ".safetensors")
    store.flush()
    assert backend.count("put", ".safetensors") == 1
    store.close()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_an_upload_of_unknown_outcome_is_looked_for_before_it_is_done_again(tmp_path: Path) -> None:
    """The object is there, but nobody could be told."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    put_without_answer(backend, store)
    store.flush()
    assert backend.count("put", ".safetensors") == 1
    assert len(objects(backend)) == 1
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_an_upload_of_unknown_outcome_does_not_bring_back_what_others_have_dropped(tmp_path: Path) -> None:
    """It had been there; somebody else invalidated a prompt of it, and has made another segment of what is left."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    other, _ = machine(backend, tmp_path / "b")
    store.append(space, pooled([1, 2]))
    put_without_answer(backend, store)
    assert other.invalidate(space, make_table([1])) == 1
    assert other.compact() == 1
    for tomb in objects(backend, ".tomb"):
        backend.delete(tomb)
    store.refresh()
    store.flush()
    assert seen(backend, tmp_path / "c", [1, 2]) == [False, True]


def test_an_error_surfaces_where_the_writer_closes(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    writer = store.writer(space)
    writer.put(pooled([1]))
    backend.before = failing("put")
    with pytest.raises(BackendError):
        writer.close()
    backend.before = lambda *_: None
    assert check_pooled(store, space, [1]).all()
    store.close()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_what_cannot_be_uploaded_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "_MOST_SPOOLED", 1 << 20)
    monkeypatch.setattr(uploading, "_LEAST", 1 << 10)
    monkeypatch.setattr("actcache.store.appending._SIZES", (1 << 18, 1 << 19))
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    backend.before = failing("put", ".safetensors")
    writer = store.writer(space, linger=0)

    def run() -> None:
        for i in range(1000):
            writer.put(large(range(16 * i, 16 * i + 16)))
            writer.flush()

    with pytest.raises(BackendError):
        run()
    writer.close(merge=False)
    assert 1 << 20 < sum(f.stat().st_size for f in segment_files(store, space)) < 3 << 20


def test_that_an_upload_has_begun_is_durable_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would know after a loss of power that there may be an object, which others may have removed."""
    synced: list[set[str]] = []
    monkeypatch.setattr(spool, "sync_folder", lambda folder: synced.append({f.suffix for f in folder.iterdir()}))
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    seen: list[bool] = []
    backend.before = lambda method, name: seen.append(any(".sent" in names for names in synced))
    store.flush()
    assert seen
    assert all(seen)
