"""Taking out of stores that lie elsewhere: objects first, everywhere, and never more than was asked for."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from actcache.errors import BackendError
from actcache.store.backend import MemoryBackend
from elsewhere import Watched, failing, found, machine, names, objects, two
from store_helpers import every_token, growing_writer, make_table, pooled

GB = 2**30


@pytest.fixture
def backend() -> Watched:
    return Watched(MemoryBackend())


# -- single prompts ------------------------------------------------------------------------------------


def test_what_is_invalidated_is_gone_everywhere(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.flush()
    assert found(other, space, range(4)) == [True] * 4
    assert other.invalidate(space, make_table([1, 2])) == 2
    assert found(one, space, range(4)) == [True, False, False, True]
    assert one.invalidate(space, None) == 2
    assert found(other, space, range(4)) == [False] * 4


def test_what_others_have_put_since_is_found_by_invalidation(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled([1]))
    one.flush()
    assert found(other, space, [1]) == [True]
    one.append(space, pooled([2]))
    one.flush()
    assert other.invalidate(space, make_table([2])) == 1
    assert found(one, space, [1, 2]) == [True, False]


@pytest.mark.parametrize("grown", [False, True])
def test_what_was_invalidated_before_its_upload_stays_gone(tmp_path: Path, backend: Watched, grown: bool) -> None:
    """Also where somebody, who knew nothing that the tomb could be for, has removed it meanwhile."""
    one, other, space = two(backend, tmp_path)
    if grown:
        writer = growing_writer(one, space)
        writer.append([pooled(range(4))])
    else:
        one.append(space, pooled(range(4)))
    assert one.invalidate(space, make_table([1])) == 1
    other.refresh()
    for tomb in (other.root / space).glob("*.tomb"):
        os.utime(tomb, (time.time() - 7200,) * 2)
    other.compact()
    assert objects(backend, ".tomb") == []
    if grown:
        writer.finish(merge=False)
    appeared = []
    backend.after = lambda method, name: appeared.append(name) if method == "put" else None
    one.flush()
    kinds = [name.rpartition(".")[2] for name in appeared]
    assert "tomb" not in kinds or kinds.index("tomb") < kinds.index("safetensors")
    assert found(machine(backend, tmp_path / "c")[0], space, range(4)) == [True, False, True, True]
    assert found(one, space, range(4)) == [True, False, True, True]


def test_an_invalidation_that_failed_is_completed_by_the_next_one(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.flush()
    assert found(other, space, range(4)) == [True] * 4
    backend.before = failing("put")
    with pytest.raises(BackendError):
        one.invalidate(space, make_table([1]))
    with pytest.raises(BackendError):
        one.invalidate(space, make_table([1]))
    backend.before = lambda *_: None
    one.invalidate(space, make_table([1]))
    assert found(other, space, range(4)) == [True, False, True, True]


def test_an_invalidation_that_failed_is_completed_by_the_next_pull(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.flush()
    backend.before = failing("put")
    with pytest.raises(BackendError):
        one.invalidate(space, make_table([1]))
    backend.before = lambda *_: None
    again, _ = machine(backend, tmp_path / "a")
    again.refresh()
    assert found(other, space, range(4)) == [True, False, True, True]


def test_reading_goes_on_where_a_tomb_cannot_be_put(tmp_path: Path, backend: Watched) -> None:
    one, _, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.flush()
    backend.before = failing("put")
    with pytest.raises(BackendError):
        one.invalidate(space, make_table([1]))
    assert found(one, space, range(4)) == [True, False, True, True]


# -- everything ----------------------------------------------------------------------------------------


def test_clearing_leaves_what_is_not_ours(tmp_path: Path, backend: Watched, caplog: pytest.LogCaptureFixture) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.append(space, every_token(range(4)))
    one.flush()
    other.invalidate(space, make_table([2]))
    one.append(space, pooled([7]))
    foreign = {
        f"v1/{space}/notes.txt": b"mine", f"v1/{space}/{'0' * 32}.safetensors": b"\0" * 500, "elsewhere/x": b"y",
        f"v1/{space}/{'0' * 32}-{'0' * 16}.tomb": b"not a tomb", "v1/readme": b"z",
    }  # fmt: skip
    for name, data in foreign.items():
        backend.put(name, data)
    with caplog.at_level(logging.INFO, "actcache.store"):
        assert one.clear() == 4
    assert names(backend) - {f"v1/{space}/space.json"} == foreign.keys()
    assert "notes.txt" in caplog.text
    assert f"{'0' * 32}.safetensors" in caplog.text
    assert found(one, space, range(8)) == found(other, space, range(8)) == [False] * 8
    one.append(space, pooled([1]))
    one.flush()
    assert found(other, space, [1]) == [True]


def test_clearing_leaves_nothing_of_ours(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.flush()
    one.invalidate(space, make_table([2]))
    assert other.clear() == 3
    assert names(backend) == set()
    one.refresh()
    assert one.spaces() == other.spaces() == []
    assert not [f for f in one.root.rglob("*") if f.is_file()]


@pytest.mark.parametrize("way", ["clear", "evict"])
def test_a_space_that_another_host_has_emptied_is_none_for_whoever_comes_later(
    tmp_path: Path, backend: Watched, way: str
) -> None:
    """Also for processes that have not seen it themselves, on hosts that wrote it, read it, or only listed it."""
    hosts = ("writer", "reader", "lister", "other")
    writer, reader, lister, other = (machine(backend, tmp_path / host)[0] for host in hosts)
    space = machine(backend, tmp_path / "writer")[1]
    writer.append(space, pooled(range(4)))
    writer.flush()
    assert all(found(reader, space, range(4)))
    assert [known.num_prompts for known in lister.spaces()] == [4]
    other.clear() if way == "clear" else other.evict(0)
    assert not names(backend)
    for host in hosts:
        store = machine(backend, tmp_path / host)[0]
        assert store.spaces() == [] and store.info().models == []
        assert not list((tmp_path / host).rglob("space*"))
    # What comes after is there for everybody, as a space of these prompts alone.
    other.append(space, pooled(range(4, 6)))
    other.flush()
    for host in hosts:
        store = machine(backend, tmp_path / host)[0]
        assert [known.num_prompts for known in store.spaces()] == [2]
        assert found(store, space, range(6)) == [False] * 4 + [True] * 2


def test_a_space_that_is_about_to_get_its_first_segment_is_left_alone(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one._ensure(space)
    other.refresh()
    again = machine(backend, tmp_path / "a")[0]
    again.refresh()
    assert [folder.name for folder in (again.root / space).iterdir()] == ["space.json"]
    one.append(space, pooled(range(3)))
    one.flush()
    assert found(other, space, range(3)) == [True] * 3


def test_clearing_waits_for_an_upload(tmp_path: Path, backend: Watched) -> None:
    """Otherwise what is uploaded would be there afterwards."""
    one, again, space = (*two(backend, tmp_path)[:1], *machine(backend, tmp_path / "a"))
    one.append(space, pooled([1]))
    begun, go_on = threading.Event(), threading.Event()

    def slow(method: str, name: str) -> None:
        if method == "put" and name.endswith(".safetensors"):
            begun.set()
            go_on.wait(30)

    backend.before = slow
    uploading = threading.Thread(target=one.flush)
    uploading.start()
    assert begun.wait(30)
    clearing = threading.Thread(target=again.clear)
    clearing.start()
    time.sleep(0.1)
    assert clearing.is_alive()
    go_on.set()
    clearing.join()
    uploading.join()
    assert names(backend) == set()
    assert found(one, space, [1]) == [False]


# -- by size -------------------------------------------------------------------------------------------


def test_eviction_counts_objects_and_takes_the_coldest(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    for i in range(6):
        one.append(space, pooled(range(100 * i, 100 * i + 100)))
        one.flush()
    total = sum(info.size for info in backend.list())
    assert found(other, space, range(500, 600)) == [True] * 100
    report = other.evict(0.5 * total / GB)
    left = sum(info.size for info in backend.list())
    assert left == report.bytes_kept <= 0.5 * total
    assert report.bytes_freed == total - left
    assert found(one, space, range(500, 600)) == [True] * 100
    assert sum(found(one, space, range(600))) == 600 - report.prompts


def test_what_was_read_lately_is_uploaded_before_its_segment_goes(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(400)))
    one.flush()
    one.append(space, pooled(range(400, 500)))
    one.flush()
    total = sum(info.size for info in backend.list())
    assert found(other, space, range(50)) == [True] * 50

    def there(method: str, name: str) -> None:
        if method in ("put", "delete"):
            backend.after = lambda *_: None
            reader = machine(backend, tmp_path / str(len(backend.calls)))[0]
            assert found(reader, space, range(50)) == [True] * 50
            backend.after = there

    backend.after = there
    report = other.evict(0.4 * total / GB)
    backend.after = lambda *_: None
    assert report.segments_rewritten == 1
    assert found(one, space, range(50)) == [True] * 50
    assert sum(info.size for info in backend.list()) == report.bytes_kept <= 0.4 * total


def test_what_is_spooled_counts_and_goes_too(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(100)))
    one.flush()
    one.append(space, pooled(range(100, 200)))
    writer = growing_writer(one, space)
    writer.append([pooled(range(200, 300))])
    report = one.evict(0)
    assert report.prompts == 300
    assert report.bytes_kept == 0
    assert names(backend) == set()
    assert found(one, space, range(300)) == found(other, space, range(300)) == [False] * 300
    writer.append([pooled([5])])
    writer.finish(merge=True)
    one.flush()
    assert found(other, space, [5]) == [True]


def test_a_delete_that_fails_is_told_and_nothing_is_forgotten(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(4)))
    one.flush()
    backend.before = failing("delete")
    for work in (lambda: one.evict(0), one.clear):
        with pytest.raises(BackendError, match="cut off"):
            work()
        assert found(one, space, range(4)) == [True] * 4
    backend.before = lambda *_: None
    assert one.clear() == 4
    assert found(other, space, range(4)) == [False] * 4
