"""Hands units out, and looks after what becomes of them: whoever the workers are."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from actcache.distributed.ledger import Ledger
from actcache.distributed.units import Reader, Unit
from actcache.distributed.worker import Answer, Task
from actcache.errors import ActCacheError, BackendError, DatasetAccessError, WorkersError
from actcache.progress import aside
from actcache.store.files import log

_TRIES = 3
# In turn, of each worker and of the task that is next: what several prompts of a unit cost is below it.
_DEATHS = 12
_STARTS = 3


@dataclass(frozen=True)
class Trouble:
    """What a worker could not do, for a reason beyond single prompts."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        """`error` as it can travel."""
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error)


@dataclass(frozen=True)
class Event:
    """Something that happened to a worker: it is ready (no task), has an answer, is in trouble, or has ended.

    `task`: what it had in hand. `ended`: why it is no more.
    """

    worker: int
    task: Task | None = None
    answer: Answer | Trouble | None = None
    ended: str = ""


class Crew(Protocol):
    """Workers."""

    size: int

    def start(self) -> None:
        """Begin to start the workers."""

    def idle(self) -> list[int]:
        """Those that are ready, and have nothing in hand."""

    def busy(self) -> bool:
        """Whether any has something in hand."""

    def give(self, worker: int, task: Task) -> None:
        """Let a worker that is idle do a task."""

    def wait(self) -> list[Event]:
        """What has happened since, some time after which it may be nothing. Raises `WorkersError`."""

    def replace(self, worker: int) -> None:
        """Start another one in the place of one that has ended."""

    def close(self) -> None:
        """End them all."""


def dispatch(units: Iterable[Unit], crew: Crew, ledger: Ledger, done: Callable[[int], object]) -> bool:
    """Let `crew` do `units`; whether they were gone through. Not so where too many prompts have failed.

    Whatever ends a worker, what it had in hand is done again; what has ended two is taken apart until it is one
    prompt, and that is given up. `done` is told how many units are complete since.

    Raises:
        WorkersError: no worker can be started, or they end one after the other.
        ActCacheError: what concerns all: the store, the model, the input.
    """
    return _Run(iter(units), crew, ledger, done).go()


class _Run:
    def __init__(self, units: Iterator[Unit], crew: Crew, ledger: Ledger, done: Callable[[int], object]) -> None:
        self._units, self._crew, self._ledger, self._done = units, crew, ledger, done
        self._again: deque[Task] = deque()
        self._deaths = self._failed_starts = 0

    def go(self) -> bool:
        ahead = self._next()
        if ahead is None:
            return True
        self._crew.start()
        while True:
            for worker in self._crew.idle():
                if ahead is None:
                    break
                self._crew.give(worker, ahead)
                ahead = self._next()
            if ahead is None and not self._crew.busy():
                return True
            for event in self._crew.wait():
                before = self._ledger.units
                self._heed(event)
                self._done(self._ledger.units - before)
                if self._ledger.too_many:
                    return False
            ahead = ahead or self._next()

    def _next(self) -> Task | None:
        if self._again:
            return self._again.popleft()
        unit = next(self._units, None)
        return None if unit is None else Task(unit)

    def _heed(self, event: Event) -> None:
        task = event.task
        if event.ended:
            self._bury(event.worker, task, event.ended)
        elif isinstance(event.answer, Trouble):
            self._try_again(task, event.answer.error)
        elif task is None:
            self._failed_starts = 0
        elif event.answer is not None:
            self._deaths = 0
            self._ledger.add(task, event.answer)

    def _try_again(self, task: Task | None, error: Exception) -> None:
        passing = isinstance(error, BackendError | DatasetAccessError) or not isinstance(error, ActCacheError)
        if task is None or not passing or task.tries + 1 >= _TRIES:
            raise error
        with aside():
            log.warning("a unit is done again, since it met with %s: %s", type(error).__name__, error)
        self._again.append(replace(task, tries=task.tries + 1))

    def _bury(self, worker: int, task: Task | None, why: str) -> None:
        with aside():
            log.warning("a worker %s; another one takes its place", why)
        if task is None:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise WorkersError(f"workers end before they are ready: one {why}.")
        else:
            self._deaths += 1
            if self._deaths >= _DEATHS * (self._crew.size + 1):
                raise WorkersError(
                    f"{self._deaths} workers ended in turn and none finished anything, the last one {why}. What they "
                    "stored stays: mend the cause and run again."
                )
            self._retry(task, why)
        self._crew.replace(worker)

    def _retry(self, task: Task, why: str) -> None:
        if not task.tries:
            self._again.append(replace(task, tries=1))
            return
        rows = self._ledger.rows(task.unit, lambda: _count(task.unit))
        parts = task.parts(rows)
        self._again.extend(parts)
        if not parts:
            self._ledger.lose(task, rows, f"WorkersError: whatever worker takes it {why}")


def _count(unit: Unit) -> int:
    reader = Reader()
    try:
        return len(reader.rows(unit))
    finally:
        reader.close()
