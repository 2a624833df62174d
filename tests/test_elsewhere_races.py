"""Processes of one host that share a working copy, each stopped just where another one can take a file away from it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.store.backend import MemoryBackend
from actcache.store.store import Store
from elsewhere import Watched, machine, objects
from store_helpers import check_pooled, make_table, pooled


class Killed(BaseException):
    """The process ends here, as far as its files and objects can tell."""


def once(method: str, suffix: str, work: Callable[[], object]) -> Callable[[str, str], None]:
    """For `Watched`: `work` at the first call of that method for a name that ends so."""
    left = [work]

    def called(what: str, name: str) -> None:
        if left and what == method and name.endswith(suffix):
            left.pop()()

    return called


def found(store: Store, space: str, numbers: Any) -> list[bool]:
    store.refresh()
    answer: list[bool] = check_pooled(store, space, numbers).tolist()
    return answer


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
