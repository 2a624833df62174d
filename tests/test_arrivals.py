"""Things that several threads bring: each is looked at once, by few at a time, and the first failure ends it."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from actcache.store.arrivals import Arrivals


def test_each_is_looked_at_once_and_by_one_thread_at_a_time_while_more_is_to_come() -> None:
    number, inside, most, seen = 400, 0, {True: 0, False: 0}, []

    def look(one: int) -> int:
        nonlocal inside
        inside += 1
        more = bool(arrivals._coming)
        most[more] = max(most[more], inside)
        # Lets the others run, as a copy does.
        time.sleep(0)
        seen.append(one)
        inside -= 1
        return -one

    arrivals = Arrivals[int, int](number, look)
    with ThreadPoolExecutor(8) as pool:
        for one in range(number):
            pool.submit(arrivals.come, one)
        arrivals.begin()
        assert arrivals.wait()
    assert most[True] <= 1 and most[False] <= 2
    assert sorted(seen) == list(range(number))
    assert sorted(arrivals.found) == sorted(-one for one in range(number)) and arrivals.failure is None


def test_whoever_brings_something_looks_at_it() -> None:
    by: list[str] = []
    arrivals = Arrivals[int, None](2, lambda _: by.append(threading.current_thread().name))
    arrivals.come(0)
    assert not by, "nothing is looked at before it begins"
    arrivals.begin()
    thread = threading.Thread(target=arrivals.come, args=(1,), name="brings")
    thread.start()
    assert arrivals.wait()
    thread.join()
    assert by == [threading.main_thread().name, "brings"]


def test_what_comes_while_somebody_looks_is_left_to_them() -> None:
    looking, go_on = threading.Event(), threading.Event()
    by: dict[int, str] = {}

    def look(one: int) -> None:
        by[one] = threading.current_thread().name
        looking.set()
        assert go_on.wait(10)

    arrivals = Arrivals[int, None](3, look)
    arrivals.begin()
    thread = threading.Thread(target=arrivals.come, args=(0,), name="first")
    thread.start()
    assert looking.wait(10)
    arrivals.come(1)
    assert by == {0: "first"}, "it does not wait for its turn"
    go_on.set()
    thread.join()
    arrivals.end(None)
    assert arrivals.wait()
    assert by == {0: "first", 1: "first"}


@pytest.mark.parametrize("where", ["looking", "bringing"])
def test_one_that_fails_ends_the_waiting(where: str) -> None:
    def look(one: int) -> int:
        if one:
            raise ValueError(f"wrong: {one}")
        return one

    arrivals = Arrivals[int, int](5, look)
    arrivals.begin()
    arrivals.come(0)
    assert not arrivals.are_over
    if where == "looking":
        arrivals.come(3)
    else:
        arrivals.end(ValueError("wrong: 3"))
    assert arrivals.are_over and not arrivals.wait()
    arrivals.come(4)
    assert str(arrivals.failure) == "wrong: 3", "the first of them"
    assert arrivals.found == [0]


def test_two_look_at_what_is_left_when_nothing_more_is_to_come() -> None:
    go_on = threading.Event()
    by: dict[int, str] = {}

    def look(one: int) -> None:
        by[one] = threading.current_thread().name
        assert not one or go_on.wait(30)

    arrivals = Arrivals[int, None](4, look)
    arrivals.begin()
    first = threading.Thread(target=arrivals.come, args=(1,), name="first")
    first.start()
    while 1 not in by:
        time.sleep(0.001)
    arrivals.come(0)
    assert by == {1: "first"}, "one looks while others are to come"
    arrivals.end(None)
    last = threading.Thread(target=arrivals.come, args=(2,), name="last")
    last.start()
    while 2 not in by:
        time.sleep(0.001)
    assert by == {1: "first", 0: "last", 2: "last"}
    go_on.set()
    assert arrivals.wait()
    first.join()
    last.join()


def test_all_may_be_here_before_it_begins() -> None:
    seen: list[int] = []
    arrivals = Arrivals[int, None](2, seen.append)
    arrivals.come(0)
    arrivals.come(1)
    assert not seen
    arrivals.begin()
    assert arrivals.wait() and arrivals.wait() and seen == [0, 1]


def test_what_comes_just_before_somebody_stops_looking_is_looked_at() -> None:
    seen: list[int] = []
    arrivals = Arrivals[int, None](3, seen.append)

    class Late(deque[None]):
        """Turns, before one of which is given back something comes, which finds none."""

        late: ClassVar = [1]

        def append(self, turn: None) -> None:
            while self.late:
                arrivals.come(self.late.pop())
            super().append(turn)

    arrivals.begin()
    arrivals._turns = Late(arrivals._turns)
    arrivals.come(0)
    assert seen == [0, 1]
