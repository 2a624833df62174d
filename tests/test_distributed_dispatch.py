"""Handing out units: whatever workers do, every prompt is counted once, and only what cannot be done is given up."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.distributed import actors
from actcache.distributed.actors import Actors, _Said
from actcache.distributed.dispatch import Event, Trouble, dispatch
from actcache.distributed.inputs import Input
from actcache.distributed.ledger import KEPT, Ledger
from actcache.distributed.notes import Notes
from actcache.distributed.units import Unit
from actcache.distributed.worker import Answer, Lost, Task
from actcache.errors import BackendError, OptionError, StoreAccessError, WorkersError
from actcache.extract.stats import WarmupStats

Behaviour = Callable[[Task], Answer | Trouble | None]
"""What becomes of a task; None ends the worker."""


class Scripted:
    """Workers of which one at a time says something, the one that has waited longest last where `late`."""

    def __init__(self, size: int, behave: Behaviour, *, starts: bool = True, late: bool = False) -> None:
        self.size, self.behave, self.starts, self.late = size, behave, starts, late
        self.tasks: dict[int, Task | None] = {}
        self.order: list[int] = []
        self.given = self.replaced = 0

    def start(self) -> None:
        self.new = list(range(self.size))

    def idle(self) -> list[int]:
        return [worker for worker, task in self.tasks.items() if task is None]

    def busy(self) -> bool:
        return any(self.tasks.values())

    def give(self, worker: int, task: Task) -> None:
        assert self.tasks[worker] is None
        self.tasks[worker] = task
        self.order.append(worker)
        self.given += 1

    def wait(self) -> list[Event]:
        if self.new:
            worker = self.new.pop()
            if not self.starts:
                return [Event(worker, ended="ended with status 1 (no such module)")]
            self.tasks[worker] = None
            return [Event(worker)]
        worker = self.order.pop(-1 if self.late else 0)
        task = self.tasks[worker]
        assert task is not None
        answer = self.behave(task)
        if answer is None:
            del self.tasks[worker]
            return [Event(worker, task, ended="was ended by SIGKILL")]
        self.tasks[worker] = None
        return [Event(worker, task, answer)]

    def replace(self, worker: int) -> None:
        assert worker not in self.tasks
        self.replaced += 1
        self.new.append(worker)

    def close(self) -> None:
        pass


def units(count: int, folder: Path | None = None, rows: list[int] | None = None) -> Iterator[Unit]:
    for number in range(count):
        path = (folder or Path("nowhere")) / f"{number}.txt"
        if rows is not None:
            path.write_text("x\n" * rows[number])
        status = path.stat() if path.exists() else None
        one = Input(str(path), *((status.st_size, f"{status.st_mtime_ns:x}") if status else (0, "")), "text")
        yield Unit(number, one, 0, one.size, f"{number:032x}")


def answer(task: Task, rows: int, lost: tuple[Lost, ...] = ()) -> Answer:
    count = len(range(task.first, rows, task.step))
    return Answer(count, rows, WarmupStats(count, activations_extracted=count - len(lost)), lost)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_what_ends_workers_is_given_up_alone(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    fatal = {
        k: data.draw(st.integers(0, rows[k] - 1))
        for k in data.draw(st.sets(st.sampled_from(range(len(rows))), max_size=2))
        if rows[k]
    }
    seen: list[tuple[int, int]] = []

    def behave(task: Task) -> Answer | None:
        mine = range(task.first, rows[task.unit.number], task.step)
        if fatal.get(task.unit.number) in mine:
            return None
        seen.extend((task.unit.number, i) for i in mine)
        return answer(task, rows[task.unit.number])

    with tempfile.TemporaryDirectory() as folder, Ledger(max_failed=1.0) as ledger:
        crew = Scripted(data.draw(st.integers(1, 4)), behave, late=data.draw(st.booleans()))
        done: list[int] = []
        assert dispatch(units(len(rows), Path(folder), rows), crew, ledger, done.append)
    everything = [(k, i) for k, n in enumerate(rows) for i in range(n)]
    assert sorted([*seen, *fatal.items()]) == everything
    assert ledger.stats.total_prompts == len(everything) and sum(done) == len(rows)
    assert [number for number, _ in ledger.failed] == sorted(everything.index(pair) for pair in fatal.items())
    assert all("whatever worker takes it was ended by SIGKILL" in reason for _, reason in ledger.failed)


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("size", [1, 3])
def test_several_such_prompts_of_a_unit_are_given_up_alone(tmp_path: Path, size: int, count: int) -> None:
    """As the longest ones, which take too much memory: though many workers end before one finishes anything."""
    rows, fatal = 1024, set(range(5, 1024, 1024 // count))

    def behave(task: Task) -> Answer | None:
        mine = range(task.first, rows, task.step)
        return None if fatal.intersection(mine) else answer(task, rows)

    with Ledger(max_failed=0.1) as ledger:
        assert dispatch(units(2, tmp_path, [rows] * 2), Scripted(size, behave), ledger, lambda n: None)
    assert [number for number, _ in ledger.failed] == sorted([*fatal, *(rows + i for i in fatal)])
    assert ledger.stats.total_prompts == 2 * rows


def test_a_worker_that_ends_once_costs_its_unit_once_more() -> None:
    died: list[Task] = []

    def behave(task: Task) -> Answer | None:
        if not died and task.unit.number == 2:
            died.append(task)
            return None
        assert task.tries == (task.unit.number == 2)
        return answer(task, 5)

    with Ledger(max_failed=0) as ledger:
        crew = Scripted(2, behave)
        assert dispatch(units(6), crew, ledger, lambda n: None)
    assert (crew.given, crew.replaced, ledger.stats.total_prompts, ledger.failed) == (7, 1, 30, [])


def test_failed_prompts_have_their_places_in_the_input(tmp_path: Path) -> None:
    """In the order of the input, whichever unit was done first."""

    def behave(task: Task) -> Answer:
        return answer(task, 10, (Lost(task.unit.number, f"byte {task.unit.number}", "PromptError: no"),))

    file = tmp_path / "failed.jsonl"
    with Ledger(max_failed=1, failed_file=file) as ledger:
        assert dispatch(units(5), Scripted(3, behave, late=True), ledger, lambda n: None)
    assert [number for number, _ in ledger.failed] == [0, 11, 22, 33, 44]
    assert ledger.failed[2][1] == "nowhere/2.txt, byte 2: PromptError: no"
    said = [json.loads(line) for line in file.read_text().splitlines()]
    assert said[3] == {
        "prompt": 33, "file": "nowhere/3.txt", "at": "byte 3", "unit": f"{3:032x}", "reason": "PromptError: no",
    }  # fmt: skip


def test_memory_does_not_grow_with_units_or_failures() -> None:
    lost = tuple(Lost(i, "", "no") for i in range(2))
    most = 0

    def behave(task: Task) -> Answer:
        nonlocal most
        most = max(most, len(ledger._open))
        return answer(task, 10, lost)

    with Ledger(max_failed=1) as ledger:
        assert dispatch(units(3000), Scripted(4, behave), ledger, lambda n: None)
    assert ledger.lost == 6000 and len(ledger.failed) == KEPT
    assert most <= 4


def test_too_many_failed_prompts_end_the_run() -> None:
    def behave(task: Task) -> Answer:
        return answer(task, 100, tuple(Lost(i, "", "no") for i in range(20)))

    for share, whole in ((0.1, False), (0.2, True)):
        with Ledger(max_failed=share) as ledger:
            crew = Scripted(1, behave)
            assert dispatch(units(40), crew, ledger, lambda n: None) is whole
            # Of a thousand at least: what came first may be the worst of it.
            assert ledger.lost == (800 if whole else 120) and crew.given == ledger.lost // 20
            assert ledger.stats.total_prompts == ledger.lost * 5
    for wrong in (-0.1, 1.5, True, "half"):
        with pytest.raises(OptionError, match="max_failed"):
            Ledger(max_failed=wrong)  # type: ignore[arg-type]


def test_passing_trouble_is_tried_again_and_lasting_trouble_is_raised() -> None:
    for error, times in ((BackendError("away"), 3), (RuntimeError("odd"), 3), (StoreAccessError("no"), 1)):
        crew = Scripted(1, lambda task, error=error: Trouble.of(error))  # type: ignore[misc]
        with Ledger(max_failed=0) as ledger, pytest.raises(type(error), match=str(error)):
            dispatch(units(1), crew, ledger, lambda n: None)
        assert crew.given == times
    left = [BackendError("away"), BackendError("away")]
    crew = Scripted(1, lambda task: Trouble.of(left.pop()) if left else answer(task, 3))
    with Ledger(max_failed=0) as ledger:
        assert dispatch(units(1), crew, ledger, lambda n: None)
    assert ledger.stats.total_prompts == 3


def test_workers_that_cannot_start_or_all_end_are_an_error(tmp_path: Path) -> None:
    with Ledger(max_failed=0) as ledger:
        with pytest.raises(WorkersError, match=r"before they are ready: one ended with status 1 \(no such module\)"):
            dispatch(units(1), Scripted(2, lambda task: None, starts=False), ledger, lambda n: None)
        crew = Scripted(2, lambda task: None)
        with pytest.raises(WorkersError, match=r"36 workers ended in turn .* ended by SIGKILL"):
            dispatch(units(100, tmp_path, [200] * 100), crew, ledger, lambda n: None)
    assert crew.replaced == 35


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    told = Trouble.of(Odd(1, 2)).error
    assert type(told) is RuntimeError and str(told) == "Odd: 1 and 2"
    kept = BackendError("away")
    assert Trouble.of(kept).error is kept


class FakeRay:
    """A cluster whose calls end when they are told to, on a clock of its own: a second for every look."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.come: dict[str, Any] = {}
        self.exceptions = SimpleNamespace(RayError=LookupError)
        self.kill = lambda actor: None
        self.cluster_resources = self.available_resources = lambda: {"CPU": 0.0}

    def remote(self) -> Any:
        def call(*_: Any) -> str:
            self.calls.append(f"call {len(self.calls)}")
            return self.calls[-1]

        return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name in ("here", "begin", "run")})

    def wait(self, refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        self.now += timeout
        return [ref for ref in refs if ref in self.come], []

    def get(self, ref: str) -> Any:
        value = self.come.pop(ref)
        if isinstance(value, Exception):
            raise value
        return value


def test_a_cluster_that_lost_all_it_had_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setattr(actors, "time", SimpleNamespace(monotonic=lambda: ray.now))
    crew = Actors.__new__(Actors)
    vars(crew).update(
        _ray=ray,
        _class=ray,
        _job=None,
        _needs={"CPU": 1},
        _timeout=60.0,
        _members={},
        _warned=False,
        size=1,
        _notes=Notes(),
    )
    crew.start()
    for said in (None, _Said(None)):
        ray.come[ray.calls[-1]] = said
        crew.wait()
    assert crew.idle() == [0]
    crew.give(0, Task(next(units(1))))
    # Whoever has something to do may take as long as it likes.
    assert not any(crew.wait() for _ in range(300))
    ray.come[ray.calls[-1]] = LookupError("its node is gone")
    (event,) = crew.wait()
    assert event.ended == "ended (its node is gone)"
    crew.replace(0)
    lost = ray.now
    with pytest.raises(WorkersError, match=r"no worker could be started in 60 s: each needs 1 CPU, and Ray has 0 CPU"):
        any(crew.wait() for _ in range(100))
    assert 60 <= ray.now - lost <= 63
