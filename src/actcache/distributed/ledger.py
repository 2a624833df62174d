"""What has become of the units so far, in memory that does not grow with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from actcache.distributed.units import Unit
from actcache.distributed.worker import Answer, Lost, Task, joined
from actcache.errors import OptionError
from actcache.extract.stats import WarmupStats

KEPT, CONSIDERED = 1000, 1000
"""How many failed prompts are kept in memory, and of how many prompts at least a share is taken."""


@dataclass
class _Open:
    """A unit of which something is not done yet, or one behind such a unit."""

    unit: Unit
    rows: int | None = None
    done: int = 0
    lost: list[Lost] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.rows is not None and self.done >= self.rows


class Ledger:
    """Adds up answers; a context manager.

    Args:
        max_failed: the share of failed prompts above which the run is to end.
        failed_file: where to write every failed prompt, one JSON object a line.
        first, step: the number of the first unit, and from one to the next.

    Attributes:
        failed: the first `KEPT` failed prompts: their places in the input (of these units) and reasons.
        lost: how many there are.
    """

    def __init__(
        self, *, max_failed: float, failed_file: str | Path | None = None, first: int = 0, step: int = 1
    ) -> None:
        if isinstance(max_failed, bool) or not isinstance(max_failed, int | float) or not 0 <= max_failed <= 1:
            raise OptionError(f"max_failed is {max_failed!r}: expected a share of the prompts, from 0 to 1.")
        self.max_failed = max_failed
        self.stats = WarmupStats(0)
        self.failed: list[tuple[int, str]] = []
        self.lost = 0
        self.units = 0
        self._next, self._step = first, step
        self._before = 0
        self._open: dict[int, _Open] = {}
        self._path = None if failed_file is None else Path(failed_file)
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as error:
                raise OptionError(f"failed_file {str(self._path)!r} cannot be written: {error.strerror}.") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle(everything=True)
        if self._file is not None:
            self._file.close()

    @property
    def too_many(self) -> bool:
        """Whether more than the allowed share of prompts has failed."""
        return self.lost > self.max_failed * max(self.stats.total_prompts, CONSIDERED)

    def rows(self, unit: Unit, count: Callable[[], int]) -> int:
        """How many prompts a unit has, by `count` where no worker has said so."""
        one = self._of(unit)
        if one.rows is None:
            one.rows = count()
        return one.rows

    def add(self, task: Task, answer: Answer) -> None:
        self.stats = joined(self.stats, answer.stats)
        one = self._of(task.unit)
        one.rows = answer.rows
        one.done += answer.prompts
        one.lost += answer.lost
        self.lost += len(answer.lost)
        self._settle()

    def lose(self, task: Task, rows: int, reason: str) -> None:
        """Note the only prompt of `task` as failed."""
        lost = (Lost(task.first, f"prompt {task.first} of its unit", reason),)
        self.add(task, Answer(1, rows, WarmupStats(1), lost))

    def _of(self, unit: Unit) -> _Open:
        return self._open.setdefault(unit.number, _Open(unit))

    def _settle(self, *, everything: bool = False) -> None:
        """Number the failed prompts of units before which all are known; at the end as well as can be."""
        while self._open:
            if everything and self._next not in self._open:
                self._next = min(self._open)
            one = self._open.get(self._next)
            if one is None or not (everything or one.is_complete):
                return
            for lost in sorted(one.lost, key=lambda each: each.index):
                self._note(self._before + lost.index, one.unit, lost)
            self._before += one.rows or 0
            self.units += one.is_complete
            del self._open[self._next]
            self._next += self._step

    def _note(self, number: int, unit: Unit, lost: Lost) -> None:
        if len(self.failed) < KEPT:
            self.failed.append((number, f"{unit.input.path}, {lost.at}: {lost.reason}"))
        if self._file is not None:
            said = {"prompt": number, "file": unit.input.path, "at": lost.at, "unit": unit.id, "reason": lost.reason}
            self._file.write(json.dumps(said) + "\n")
