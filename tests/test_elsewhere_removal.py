"""Taking out of stores that lie elsewhere: objects first, everywhere, and never more than was asked for."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import BackendError
from actcache.store import duplicates, given, merging
from actcache.store.backend import MemoryBackend
from actcache.store.files import SEGMENT_NAME
from actcache.store.records import LABEL
from actcache.store.store import Store
from elsewhere import Watched, failing, machine, objects
from store_helpers import check_pooled, every_token, growing_writer, make_table, pooled, segment_files

GB = 2**30


@pytest.fixture
def backend() -> Watched:
    return Watched(MemoryBackend())


def two(backend: Watched, folder: Path) -> tuple[Store, Store, str]:
    (one, space), (other, _) = machine(backend, folder / "a"), machine(backend, folder / "b")
    return one, other, space


def found(store: Store, space: str, numbers: Any) -> list[bool]:
    store.refresh()
    answer: list[bool] = check_pooled(store, space, numbers).tolist()
    return answer


def names(backend: Watched) -> set[str]:
    return {info.name for info in backend.inner.list()}


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


# -- merging -------------------------------------------------------------------------------------------


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


# -- repair --------------------------------------------------------------------------------------------


def test_repairing_rewrites_damaged_objects(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(200), dim=512))
    one.append(space, every_token(range(3)))
    one.flush()
    for name in objects(backend):
        data = bytearray(backend.read(name))
        if len(data) > 100_000:
            data[-5] ^= 1
            backend.inner._objects[name] = bytes(data)  # type: ignore[attr-defined]
    report = other.verify(repair=True)
    assert report.damaged
    assert report.ok
    assert report.lost > 0
    fresh, _ = machine(backend, tmp_path / "c")
    assert fresh.verify().damaged == []
    place = fresh.locate(space, table=make_table(range(200)), sites=["resid_post.0"], layout="last_token")
    assert place.found.all()
    place = fresh.locate(space, table=make_table(range(200)), sites=["resid_post.1"], layout="last_token")
    assert place.found.any()
    assert not place.found.all()
    one.refresh()
    assert one.verify().ok


def test_repairing_takes_what_this_host_has_of_a_damaged_object(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(200), dim=512))
    one.flush()
    before = one.locate(
        space, table=make_table(range(200)), sites=["resid_post.0", "resid_post.1"], layout="last_token"
    )
    (name,) = objects(backend)
    data = bytearray(backend.read(name))
    data[-5] ^= 1
    backend.inner._objects[name] = bytes(data)  # type: ignore[attr-defined]
    assert other.verify().lost > 0, "it has read nothing of it"
    for repair in (False, True):
        report = one.verify(repair=repair)
        assert report.damaged
        assert report.ok == repair
        assert (report.lost, report.lost_prompts, report.lost_sites) == (0, 0, {})
    fresh, _ = machine(backend, tmp_path / "c")
    assert fresh.verify().damaged == []
    place = fresh.locate(
        space, table=make_table(range(200)), sites=["resid_post.0", "resid_post.1"], layout="last_token"
    )
    assert place.found.all()
    assert np.array_equal(place.take(), before.take())


def test_repairing_removes_what_nobody_can_read(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(3)))
    one.flush()
    one.append(space, pooled(range(3, 6)))
    one.flush()
    name = objects(backend)[0]
    data = bytearray(backend.read(name))
    data[400] ^= 0xFF
    backend.inner._objects[name] = bytes(data)  # type: ignore[attr-defined]
    report = other.verify(repair=True)
    assert report.ok
    assert name not in names(backend)
    assert sum(found(machine(backend, tmp_path / "c")[0], space, range(6))) == 3
    assert all(SEGMENT_NAME.fullmatch(n.rpartition("/")[2]) for n in objects(backend))
