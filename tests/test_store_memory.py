"""Memory for answers: nobody's but theirs, kept for the next ones, and given back."""

from __future__ import annotations

import gc
import mmap
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.store import memory
from actcache.store.memory import HUGE, empty, return_free_memory

MB = 1 << 20

_elsewhere = 0
needs_huge_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    global _elsewhere
    gc.collect()
    return_free_memory()
    # Answers that somebody else still holds.
    _elsewhere = sum(memory._mapped.length.values())
    yield
    gc.collect()
    return_free_memory()


def address(array: npt.NDArray[np.generic]) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def mapped() -> int:
    """How many bytes are mapped for answers of this test, in use or kept."""
    return sum(memory._mapped.length.values()) - _elsewhere


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float64", ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (7, 3), (513, 2, 1024), (MB,), (5, 1_000_003)])
def test_it_is_an_array_as_numpy_gives(shape: tuple[int, ...], dtype: str) -> None:
    array, other = empty(shape, dtype), np.empty(shape, dtype)
    assert (array.shape, array.dtype, array.strides) == (other.shape, other.dtype, other.strides)
    assert array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
    array[...] = 3
    assert (array == 3).all()


@needs_huge_pages
@pytest.mark.parametrize("size", [3 * MB // 2, HUGE, HUGE + 1, 3 * MB, 3 * MB + 4097, 9 * MB - 1])
def test_what_is_large_begins_with_a_huge_page(size: int) -> None:
    array = empty((size,), np.uint8)
    assert address(array) % HUGE == 0
    assert size <= mapped() < size + HUGE


def test_what_is_small_is_numpys() -> None:
    array = empty((3 * MB // 2 - 1,), np.uint8)
    assert array.base is None and not mapped()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([MB, HUGE - 5, HUGE + 3, 5 * MB // 2, 5 * MB])), max_size=40)
)
def test_no_two_share_memory(steps: list[tuple[int, int]]) -> None:
    held: dict[int, tuple[npt.NDArray[np.int32], int]] = {}
    for k, (place, size) in enumerate(steps):
        if place in held:
            array, value = held.pop(place)
            assert array[0] == array[-1] == value and (array[:: mmap.PAGESIZE // 4] == value).all()
        array = empty((size // 4,), np.int32)
        array[:] = k
        held[place] = array, k
    for array, value in held.values():
        assert (array == value).all()


@needs_huge_pages
def test_a_view_keeps_it_and_the_last_one_lets_go() -> None:
    array = empty((4, MB), np.uint8)
    array[:] = 7
    part, before = array[2, 10:20], address(array)
    del array
    others = [empty((4, MB), np.uint8) for _ in range(3)]
    for other in others:
        other[:] = 1
    assert (part == 7).all() and before not in map(address, others)
    del part
    assert address(empty((4, MB), np.uint8)) == before


@needs_huge_pages
def test_no_more_is_kept_than_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT", 5 * HUGE)
    held = [empty((HUGE,), np.uint8) for _ in range(9)]
    assert mapped() == 9 * HUGE
    del held
    assert mapped() == 5 * HUGE
    return_free_memory()
    assert not mapped()


@needs_huge_pages
def test_what_is_asked_for_now_takes_the_place_of_other_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT", 8 * HUGE)
    held = [empty((k * HUGE,), np.uint8) for k in (1, 2, 4)]
    del held
    assert mapped() == 7 * HUGE
    array = empty((5 * HUGE - 7,), np.uint8)
    array[:] = 3
    del array
    assert 5 * HUGE <= mapped() <= 8 * HUGE
    again = empty((5 * HUGE - 9,), np.uint8)
    assert again[0] == again[-1] == 3, "what is kept is used again, and nearly as long is long enough"


class _Cycle:
    """What only a collection finds."""

    def __init__(self, held: npt.NDArray[Any]) -> None:
        self.me, self.held = self, held


@needs_huge_pages
def test_a_collection_may_let_go_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    threshold = gc.get_threshold()
    pairs: list[list[tuple[int, int]]] = []
    for k in range(1, 40):
        empty((k * HUGE,), np.uint8)
    try:
        for k in range(80):
            gc.disable()
            # The interpreter has none of these left over: from now on each new one may begin a collection.
            pairs.append([(k, i) for i in range(2500)])
            one = empty((HUGE,), np.uint8)
            # Of a length that was never let go of.
            other = empty(((40 + k) * HUGE,), np.uint8)
            gc.collect()
            _Cycle(other)
            del other
            gc.set_threshold(1 + k % 60)
            gc.enable()
            del one
            if k % 10 == 0:
                del pairs[:-1]
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
    gc.collect()
    return_free_memory()
    assert not [(f.exc_type, f.exc_value, f.object) for f in failed]
    assert not mapped()


@needs_huge_pages
def test_what_is_in_use_is_not_given_back() -> None:
    array = empty((HUGE,), np.uint8)
    array[:] = 5
    return_free_memory()
    assert mapped() == HUGE and (array == 5).all()


@needs_huge_pages
def test_beyond_so_many_mappings_it_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST_MAPPED", 2 + len(memory._mapped.length))
    first, second, third = (empty((HUGE,), np.uint8) for _ in range(3))
    assert mapped() == 2 * HUGE
    assert third.base is None
    del first
    assert empty((HUGE,), np.uint8).base is not None, "what is kept is used again"
    assert not np.shares_memory(second, third)


def test_a_system_without_huge_pages_has_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty((3, MB), np.uint8).base is None and not mapped()


@needs_huge_pages
def test_no_room_is_left_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_map", lambda *_: memory._FAILED)
    assert empty((HUGE,), np.uint8).base is None and not mapped()


def test_threads_have_memory_of_their_own() -> None:
    def work(number: int) -> bool:
        chance, held, right = random.Random(number), list[tuple[npt.NDArray[np.int64], int]](), True
        for k in range(60):
            array = empty((chance.choice([MB, HUGE, 3 * MB]) // 8,), np.int64)
            array[:] = number * 1000 + k
            held.append((array, number * 1000 + k))
            if len(held) > 3:
                array, value = held.pop(chance.randrange(4))
                right &= bool((array == value).all())
        return right and all(bool((array == value).all()) for array, value in held)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_forked_child_has_its_own() -> None:
    array = empty((3 * MB,), np.uint8)
    array[:] = 1
    kept = empty((HUGE,), np.uint8)
    kept[:] = 2
    del kept
    child = os.fork()
    if not child:
        mine = empty((HUGE,), np.uint8)
        mine[:] = 9
        array[:] = 9
        os._exit(0 if (mine == 9).all() and (array == 9).all() else 1)
    mine = empty((HUGE,), np.uint8)
    mine[:] = 4
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (array == 1).all() and (mine == 4).all()
