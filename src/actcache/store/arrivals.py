"""What several threads bring, looked at by one of them at a time: mostly by the one that brought it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Arrivals(Generic[T, R]):
    """Things that come, `number` of them, and what `look` finds of each.

    To hand each to a thread that waits for it takes longer than to look at it; and threads that looked at the same time
    would take the interpreter from one another. So whoever brings something looks at it, and at what others bring
    meanwhile, unless somebody is at it.
    """

    def __init__(self, number: int, look: Callable[[T], R]) -> None:
        self._number, self._look = number, look
        self._come: deque[T] = deque()
        self._looking = threading.Lock()
        self._looking.acquire()
        self._ended = threading.Event()
        self._found: list[R | BaseException] = []
        self.are_over = False
        """Set when one has failed: what has not begun need not."""

    def begin(self) -> None:
        """Nothing is looked at before this."""
        self._looking.release()
        self._see()

    def come(self, one: T) -> None:
        """One of them is here."""
        self._come.append(one)
        self._see()

    def end(self, found: R | BaseException) -> None:
        """What was found of one of them, or why it does not come."""
        self._found.append(found)
        if isinstance(found, BaseException):
            self.are_over = True
        if self.are_over or len(self._found) >= self._number:
            self._ended.set()

    def wait(self) -> bool:
        """Return when all have ended, or one has failed; whether none has."""
        self._ended.wait()
        return not self.are_over

    @property
    def found(self) -> list[R]:
        """What was found so far."""
        return [found for found in self._found if not isinstance(found, BaseException)]

    @property
    def failure(self) -> BaseException | None:
        """What the first failed with that did."""
        return next((found for found in self._found if isinstance(found, BaseException)), None)

    def _see(self) -> None:
        # Looked for once more behind the release: what came just before it was left to whoever was at it.
        while self._come and self._looking.acquire(blocking=False):
            try:
                while self._come:
                    self._see_one(self._come.popleft())
            finally:
                self._looking.release()

    def _see_one(self, one: T) -> None:
        try:
            found: R | BaseException = self._look(one)
        except BaseException as error:
            found = error
        self.end(found)
