"""What several threads bring, looked at by few of them at a time: mostly by the one that brought it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Arrivals(Generic[T, R]):
    """Things that come, `number` of them, and what `look` finds of each.

    To hand each to a thread that waits for it takes longer than to look at it; and threads that looked at the same time
    would take the interpreter, and memory, from those that bring. So whoever brings something looks at it, and at what
    others bring meanwhile, unless somebody is at it; whoever brings the last of them helps with what is left.
    """

    def __init__(self, number: int, look: Callable[[T], R]) -> None:
        self._number, self._look = number, look
        self._coming = [None] * number
        self._come: deque[T] = deque()
        self._begun = False
        self._turns: deque[None] = deque()
        """Whoever looks takes one, and puts it back."""
        self._last_turn: deque[None] = deque([None])
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._found: list[R | BaseException] = []
        self.are_over = False
        """Set when one has failed: what has not begun need not."""

    def begin(self) -> None:
        """Nothing is looked at before this."""
        self._begun = True
        self._turns.append(None)
        self._see()

    def come(self, one: T) -> None:
        """One of them is here."""
        self._come.append(one)
        del self._coming[-1:]
        self._see()

    def end(self, found: R | BaseException) -> None:
        """What was found of one of them that does not come, or why it does not."""
        del self._coming[-1:]
        self._note(found)
        self._see()

    def wait(self) -> bool:
        """Return when all have ended, or one has failed; whether none has."""
        # Of the standard library what wakes somebody in the fewest steps.
        self._ended.get()
        self._ended.put(None)
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
        if not self._coming and self._begun:
            # By whoever is first.
            with contextlib.suppress(IndexError):
                self._turns.append(self._last_turn.pop())
        # Looked for once more behind the end of a turn: what came just before it was left to whoever had it.
        while self._come:
            try:
                turn = self._turns.pop()
            except IndexError:
                return
            try:
                self._see_all()
            finally:
                self._turns.append(turn)

    def _see_all(self) -> None:
        while True:
            try:
                one = self._come.popleft()
            except IndexError:
                return
            try:
                found: R | BaseException = self._look(one)
            except BaseException as error:
                found = error
            self._note(found)

    def _note(self, found: R | BaseException) -> None:
        self._found.append(found)
        if isinstance(found, BaseException):
            self.are_over = True
        if self.are_over or len(self._found) >= self._number:
            self._ended.put(None)
