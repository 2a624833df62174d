"""Several things at a time, until one of them fails."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from actcache.errors import BackendError, FormatError
from actcache.store.together import together


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_jobs(threads: int) -> None:
    assert together([partial(pow, n, 2) for n in range(20)], threads) == [n * n for n in range(20)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_thread_that_has_failed_begins_nothing_else(threads: int) -> None:
    begun: list[int] = []

    def fail(n: int) -> None:
        begun.append(n)
        raise BackendError(f"{n} cannot be had")

    with pytest.raises(BackendError, match="cannot be had"):
        together([partial(fail, n) for n in range(50)], threads)
    assert 1 <= len(begun) <= threads


def test_what_only_one_of_them_has_keeps_none_of_the_others_away() -> None:
    done: list[int] = []

    def work(n: int) -> None:
        if n == 3:
            raise FormatError("3 is damaged")
        done.append(n)

    with pytest.raises(FormatError, match="3 is damaged"):
        together([partial(work, n) for n in range(20)], 2, ended_by=BackendError)
    assert sorted(done) == [n for n in range(20) if n != 3]


def test_one_after_the_other_what_the_others_gave_is_undone() -> None:
    def give(n: int) -> int:
        if n == 3:
            raise BackendError("cannot be had")
        return n

    undone: list[int] = []
    with pytest.raises(BackendError):
        together([partial(give, n) for n in range(5)], 1, undo=undone.append)
    assert undone == [0, 1, 2]


def test_what_the_others_gave_is_undone() -> None:
    """Two have begun when the second fails; the first ends behind it."""
    failed = threading.Event()

    def late() -> str:
        assert failed.wait(30)
        return "late"

    def fail() -> str:
        failed.set()
        raise BackendError("cannot be had")

    undone: list[str] = []
    with pytest.raises(BackendError):
        together([late, fail, late], 2, undo=undone.append)
    assert set(undone) == {"late"}
