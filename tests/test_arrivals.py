"""Things that several threads bring: each is looked at once, one at a time, and the first failure ends it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from actcache.store.arrivals import Arrivals


def test_each_is_looked_at_once_and_by_one_thread_at_a_time() -> None:
    number, inside, most, seen = 400, 0, 0, []

    def look(one: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
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
    assert most == 1
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

    arrivals = Arrivals[int, None](2, look)
    arrivals.begin()
    thread = threading.Thread(target=arrivals.come, args=(0,), name="first")
    thread.start()
    assert looking.wait(10)
    arrivals.come(1)
    assert by == {0: "first"}, "it does not wait for its turn"
    go_on.set()
    assert arrivals.wait()
    thread.join()
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


def test_what_comes_just_before_somebody_stops_looking_is_looked_at() -> None:
    seen: list[int] = []
    arrivals = Arrivals[int, None](2, seen.append)

    class Late:
        """A lock before whose release something comes, which finds it taken."""

        def __init__(self, lock: threading.Lock) -> None:
            self.acquire, self._release, self.late = lock.acquire, lock.release, [1]

        def release(self) -> None:
            while self.late:
                arrivals.come(self.late.pop())
            self._release()

    arrivals.begin()
    arrivals._looking = Late(arrivals._looking)  # type: ignore[assignment]
    arrivals.come(0)
    assert seen == [0, 1]
