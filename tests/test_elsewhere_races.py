"""Processes of one host that share a working copy, each stopped just where another one can take a file away from it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.store import eviction, spool, trimming, working_copy
from actcache.store.asking import locate_here
from actcache.store.backend import MemoryBackend
from actcache.store.store import Store
from elsewhere import Watched, found, machine, objects
from store_helpers import SITES, check_pooled, growing_writer, make_store, make_table, pooled


class Killed(BaseException):
    """The process ends here, as far as its files and objects can tell."""


def once(method: str, suffix: str, work: Callable[[], object]) -> Callable[[str, str], None]:
    """For `Watched`: `work` at the first call of that method for a name that ends so."""
    left = [work]

    def called(what: str, name: str) -> None:
        if left and what == method and name.endswith(suffix):
            left.pop()()

    return called


def stored(store: Store, space: str, *batches: list[int]) -> None:
    for numbers in batches:
        store.append(space, pooled(numbers))
        store.flush()


class Beside:
    """Somebody at work beside, who stops at the first call of a backend that is asked for, until `done`."""

    def __init__(self, backend: Watched, method: str, suffix: str, work: Callable[[], object]) -> None:
        self._stopped, self._go_on = threading.Event(), threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work,))
        backend.before = once(method, suffix, self._stop)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._failed.append(error)
        finally:
            self._stopped.set()

    def _stop(self) -> None:
        self._stopped.set()
        assert self._go_on.wait(60)

    def begin(self) -> None:
        self._thread.start()
        assert self._stopped.wait(60)

    def done(self) -> None:
        self._go_on.set()
        self._thread.join(60)
        assert not self._failed, self._failed


def invalidate_while_it_is_evicted(objects_: MemoryBackend, folder: Path) -> None:
    """Prompts 1 and 2 of two segments: when they have gone, nothing needs the tombs that are about to be put."""
    putting, evicting = Watched(objects_), Watched(objects_)
    # One tomb after the other.
    putting.concurrency = 1
    one, space = machine(putting, folder)
    evictor, _ = machine(evicting, folder)
    beside = Beside(putting, "put", ".tomb", lambda: one.invalidate(space, make_table([1, 2])))
    evicting.before = once("delete", ".safetensors", beside.begin)
    try:
        assert evictor.evict(0).segments == 2
        assert not list((one.root / space).glob("*.tomb")), "the window that this is about"
    finally:
        beside.done()
    assert len(objects(objects_, ".tomb")) == 2


def test_a_tomb_that_another_process_clears_away_is_put_all_the_same(tmp_path: Path) -> None:
    objects_ = MemoryBackend()
    one, space = machine(objects_, tmp_path / "a")
    stored(one, space, [1], [2])
    invalidate_while_it_is_evicted(objects_, tmp_path / "a")
    assert found(one, space, range(4)) == [False] * 4
    # A tomb is for what was stored before it.
    stored(one, space, [2])
    for store in (one, machine(objects_, tmp_path / "b")[0]):
        assert found(store, space, range(4)) == [False, False, True, False]


@pytest.mark.parametrize("which", ["a", "b"])
def test_clearing_takes_tombs_of_what_is_long_gone(tmp_path: Path, which: str) -> None:
    """Also where nothing else of the space is left, neither here nor there."""
    objects_ = MemoryBackend()
    one, space = machine(objects_, tmp_path / "a")
    stored(one, space, [1], [2])
    invalidate_while_it_is_evicted(objects_, tmp_path / "a")
    one.close()
    objects_.put("v1/" + space + "/somebody.txt", b"not ours")
    assert machine(objects_, tmp_path / which)[0].clear() == 0
    assert [info.name for info in objects_.list()] == [f"v1/{space}/somebody.txt"]


def test_clearing_leaves_segments_that_nobody_can_name(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    store.invalidate(space, make_table([1]))
    (path,) = (store.root / space).glob("*.safetensors")
    (tomb,) = (store.root / space).glob("*.tomb")
    (store.root / space / "space.json").unlink()
    path.write_bytes(path.read_bytes()[:100])
    fresh = Store(store.location, index_dir=tmp_path / "other")
    assert not fresh.spaces() and fresh.clear() == 0
    assert path.exists() and tomb.exists()


def test_a_tomb_that_was_cleared_away_counts_for_a_late_merge(tmp_path: Path) -> None:
    """Another machine has read the segments before, puts what it makes of them when all is over, and is killed."""
    objects_ = MemoryBackend()
    late = Watched(objects_)
    other, space = machine(late, tmp_path / "b")
    stored(other, space, [1], [2])

    def killed() -> None:
        raise Killed

    late.before = once("put", ".safetensors", lambda: invalidate_while_it_is_evicted(objects_, tmp_path / "a"))
    late.after = once("put", ".safetensors", killed)
    with pytest.raises(Killed):
        other.compact()
    assert len(objects(objects_)) == 1, "what the late one has made, and nobody takes back"
    for name in "abc":
        assert found(machine(objects_, tmp_path / name)[0], space, range(4)) == [False] * 4


def test_a_tomb_that_was_brought_before_its_segment_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    """A process whose listing shows neither looks at the folder when another one has brought the tomb alone."""
    objects_ = MemoryBackend()
    listing, bringing = Watched(objects_), Watched(objects_)
    other, space = machine(objects_, tmp_path / "b")
    stored(other, space, [9])
    slow, _ = machine(listing, tmp_path / "a")
    quick, _ = machine(bringing, tmp_path / "a")
    assert found(slow, space, [9]) == found(quick, space, [9]) == [True]
    beside = Beside(bringing, "read", ".safetensors", quick.refresh)

    def meanwhile() -> None:
        stored(other, space, [0, 1, 2, 3])
        assert other.invalidate(space, make_table([1])) == 1
        beside.begin()
        assert list((quick.root / space).glob("*.tomb")), "the window that this is about"

    listing.after = once("list", "", meanwhile)
    try:
        slow.refresh()
    finally:
        beside.done()
    assert check_pooled(quick, space, range(4)).tolist() == [True, False, True, True]


# -- what goes while somebody is about to look at it ----------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", "space.json"])
def test_two_processes_clear_at_once(tmp_path: Path, suffix: str) -> None:
    objects_ = MemoryBackend()
    watched = Watched(objects_)
    one, space = machine(watched, tmp_path / "a")
    beside, _ = machine(objects_, tmp_path / "a")
    stored(one, space, [1], [2])
    one.invalidate(space, make_table([1]))
    found(beside, space, [1, 2])

    def clear() -> None:
        # Not by `clear`, which waits for the other one to end.
        for info in list(objects_.list()):
            objects_.delete(info.name)
        beside.refresh()

    watched.after = once("delete", suffix, clear)
    one.clear()
    assert not list(objects_.list())
    assert not one.root.exists()
    stored(one, space, [1])
    assert found(beside, space, [1, 2]) == [True, False]


def test_what_is_stored_and_invalidated_while_all_is_cleared_does_not_come_back(tmp_path: Path) -> None:
    """The process that clears is killed when it has removed a tomb: that of something new must not be the first."""
    objects_ = MemoryBackend()
    watched = Watched(objects_)
    one, space = machine(watched, tmp_path / "a")
    beside, _ = machine(objects_, tmp_path / "a")
    stored(one, space, [1])

    def meanwhile() -> None:
        beside.append(space, pooled([2, 3]))
        assert beside.invalidate(space, make_table([2])) == 1

    def killed() -> None:
        raise Killed

    def kill() -> None:
        watched.before = once("list", "", killed)

    watched.before, watched.after = once("delete", ".safetensors", meanwhile), once("delete", ".tomb", kill)
    with pytest.raises(Killed):
        one.clear()
    again, _ = machine(objects_, tmp_path / "a")
    assert not found(again, space, range(4))[2]


def test_a_space_may_go_with_what_was_just_stored_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    beside, _ = make_store(tmp_path)
    rename, left = os.rename, [1]

    def renamed(source: Any, target: Any) -> None:
        rename(source, target)
        if left and str(target).endswith(".safetensors"):
            left.pop()
            beside.clear()
            assert not (store.root / space).exists(), "the window that this is about"

    monkeypatch.setattr(os, "rename", renamed)
    store.append(space, pooled([1]))
    assert not left
    assert not found(store, space, [1])[0]
    store.append(space, pooled([1]))
    assert found(beside, space, [1]) == [True]


def test_a_file_that_grew_may_go_while_all_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([1, 2])])
    left = list((store.root / space).glob("*.open"))
    assert len(left) == 1
    clear_out = eviction._Eviction._clear_out_open

    def gone(*given: Any) -> None:
        is_ours = eviction.is_ours
        with monkeypatch.context() as patch:
            patch.setattr(eviction, "is_ours", lambda path, *kind: is_ours(path, *kind) and not left.pop().unlink())
            clear_out(*given)

    monkeypatch.setattr(eviction._Eviction, "_clear_out_open", gone)
    assert store.evict(0).bytes_kept == 0
    assert not found(store, space, [1])[0]


def test_a_space_may_go_while_mirrors_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects_ = MemoryBackend()
    writer, space = machine(objects_, tmp_path / "a")
    stored(writer, space, list(range(400)))
    reader, _ = machine(objects_, tmp_path / "b", local_gb=1)
    assert found(reader, space, [1]) == [True]
    folders = trimming.space_folders
    monkeypatch.setattr(trimming, "space_folders", lambda root: ["0" * 32, *folders(root)])
    assert reader._copy is not None
    assert trimming.trim(reader._copy, reader._catalog, {}, 0) > 0
    assert found(reader, space, [1]) == [True]


def test_a_description_may_go_while_it_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects_ = MemoryBackend()
    one, space = machine(objects_, tmp_path / "a")
    stored(one, space, [1])
    bring = working_copy.bring

    def brought(copy: Any, path: Path, size: int) -> None:
        bring(copy, path, size)
        path.unlink()

    monkeypatch.setattr(working_copy, "bring", brought)
    assert ["there is no description" in damage.reason for damage in one.verify().damaged] == [True]
    monkeypatch.undo()
    assert found(one, space, [1]) == [True]
    assert one.verify().damaged == []


def test_an_upload_that_a_listing_misses_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets its name while a folder is listed may be missing, and what is made after it listed."""
    objects_ = MemoryBackend()
    watched = Watched(objects_)
    one, space = machine(watched, tmp_path / "a")
    beside, _ = machine(objects_, tmp_path / "a")
    one.append(space, pooled([1]))
    names = spool.names_in
    monkeypatch.setattr(spool, "names_in", lambda folder: {n for n in names(folder) if not n.endswith(".safetensors")})

    def look() -> None:
        beside.refresh()
        assert list((one.root / space).glob("*.sent"))

    watched.before = once("put", ".safetensors", look)
    one.flush()
    assert not list((one.root / space).glob("*.sent"))


def test_an_older_listing_takes_away_no_mirror_that_another_process_has_just_brought(tmp_path: Path) -> None:
    objects_ = MemoryBackend()
    writer, space = machine(objects_, tmp_path / "a")
    stored(writer, space, [1])
    watched = Watched(objects_)
    slow, _ = machine(watched, tmp_path / "b")
    fast, _ = machine(objects_, tmp_path / "b")
    assert found(fast, space, [1]) == found(slow, space, [1]) == [True]

    def meanwhile() -> None:
        stored(writer, space, [2])
        assert found(fast, space, [1, 2]) == [True, True]

    watched.after = once("list", "", meanwhile)
    slow.refresh()
    assert len(list((slow.root / space).glob("*.safetensors"))) == 2
    watched.calls.clear()
    assert check_pooled(slow, space, [1, 2]).all() and check_pooled(fast, space, [1, 2]).all()
    assert not watched.count("list") and not watched.count("read", ".safetensors"), "nothing had to be looked for again"
    # What is gone before anybody lists goes, as ever.
    assert writer.evict(0).segments == 2
    assert found(slow, space, [1, 2]) == [False, False]
    assert not list((slow.root / space).glob("*.safetensors"))


def has_all(store: Store, space: str, numbers: range) -> bool:
    """Whether the host knows where they are, without listing objects."""
    table = make_table(numbers)
    return bool(locate_here(store._index(space), table, SITES[0], "last_token", check=False)[1].all())


@pytest.mark.parametrize("everything", [False, True])
def test_what_is_merged_each_time_it_is_looked_for_is_found(tmp_path: Path, everything: bool) -> None:
    """Not only what was merged before the first listing of a look: also what is merged behind it, again and again."""
    objects_ = MemoryBackend()
    writer, space = machine(objects_, tmp_path / "writer")
    stored(writer, space, [0], [1])
    watched = Watched(objects_)
    reader, _ = machine(watched, tmp_path / "reader")
    reader.refresh()
    assert has_all(reader, space, range(2))
    left = [2, 3, 4, 5]

    def merge_before_rows_are_read(method: str, name: str) -> None:
        if method == "read" and (reader.root.parent / name).exists() and left:
            stored(writer, space, [left.pop(0)])
            writer.compact()

    watched.before = merge_before_rows_are_read
    if everything:
        assert len(reader.read(space, None, SITES[0], pooling="last_token")) == 6
    else:
        assert check_pooled(reader, space, range(2)).all()
    assert not left


def test_a_mirror_goes_behind_that_of_what_its_object_was_merged_into(tmp_path: Path) -> None:
    """Other processes of the host, which look meanwhile, must find one of both."""
    objects_ = MemoryBackend()
    writer, space = machine(objects_, tmp_path / "writer")
    stored(writer, space, [0], [1])
    watched = Watched(objects_)
    reader, _ = machine(watched, tmp_path / "reader")
    beside, _ = machine(objects_, tmp_path / "reader")
    reader.refresh()
    beside.refresh()
    writer.compact()
    seen = []
    watched.after = lambda *_: seen.append(has_all(beside, space, range(2)))
    watched.before = lambda *_: seen.append(has_all(beside, space, range(2)))
    assert check_pooled(reader, space, range(2)).all()
    assert len(seen) > 4 and all(seen)
