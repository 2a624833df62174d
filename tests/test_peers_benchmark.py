"""The comparison with other libraries: what workers and their driver say to each other, and what becomes of it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

TOY = """
import os, sys, time
sys.path.insert(0, WORKERS)
import numpy as np
from _worker import Peer, serve

class Toy(Peer):
    distribution = "numpy"
    def load(self, folder):
        print("a library talks while it loads")
        os.write(1, b"and below Python, too")
    def last_tokens(self, job):
        return lambda: np.arange(len(job["prompts"]))
    def every_token(self, job):
        def work():
            raise ValueError("no prompts\\nof that kind")
        return work
    def read_back(self, job):
        raise KeyError("layer")
    def perplexity(self, job):
        return {"ends": lambda: os._exit(9), "hangs": lambda: time.sleep(10_000)}[job["how"]]

serve(Toy if MAKES else lambda: [][0])
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("peers")


@pytest.fixture(scope="module")
def process(bench: ModuleType) -> ModuleType:
    return importlib.import_module("_peer_process")


def toy(process: ModuleType, folder: Path, *, makes: bool = True) -> Any:
    script = folder / "toy.py"
    script.write_text(TOY.replace("WORKERS", repr(str(process.WORKERS))).replace("MAKES", str(makes)))
    return process.Worker(Path(sys.executable), script, folder, limit=300.0)


def test_a_worker_answers_with_values_and_outcomes(process: ModuleType, tmp_path: Path) -> None:
    with toy(process, tmp_path) as worker:
        assert worker.started["version"] == np.__version__
        assert worker.started["outcome"] == worker.ask("open", model="m")["outcome"] == "ran"
        out = tmp_path / "values.npy"
        said = worker.ask("last_tokens", prompts=["a", "b"], out=str(out))
        assert said["outcome"] == "ran"
        assert said["seconds"] >= 0
        assert np.load(out).tolist() == [0, 1]
        refused = worker.ask("every_token", out=str(out))
        assert refused == {"outcome": "refused", "why": "ValueError: no prompts of that kind"}
        assert worker.ask("read_back", out=str(out)) == {"outcome": "crashed", "why": "KeyError: 'layer'"}
        # Nothing of that is the end of the process.
        assert worker.ask("last_tokens", prompts=[], out=str(out))["outcome"] == "ran"


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_process_that_ends_or_says_nothing_has_crashed(how: str, process: ModuleType, tmp_path: Path) -> None:
    with toy(process, tmp_path) as worker:
        if how == "hangs":
            worker._limit = 0.1
        said = worker.ask("perplexity", how=how, out="")
        assert said["outcome"] == "crashed"
        assert said["why"].endswith("with 9" if how == "ends" else "with -9")
        assert worker.ask("last_tokens", prompts=[], out="")["outcome"] == "crashed"


def test_the_last_words_of_a_process_are_told(process: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "no_worker.py"
    script.write_text("import a_module_that_is_not_there")
    with process.Worker(Path(sys.executable), script, tmp_path, limit=300.0) as worker:
        assert worker.started["outcome"] == "crashed"
        assert worker.started["why"].endswith("No module named 'a_module_that_is_not_there'")


def test_a_library_that_cannot_be_imported_has_crashed(process: ModuleType, tmp_path: Path) -> None:
    with toy(process, tmp_path, makes=False) as worker:
        assert worker.started == {"outcome": "crashed", "why": "IndexError: list index out of range"}
        assert worker.ask("open", model="m")["outcome"] == "crashed"


def test_what_is_right(bench: ModuleType) -> None:
    expected = np.array([[1.0, -20.0], [3.0, 4.0]], np.float32)
    assert bench.judge(expected, expected) == ("right", 0.0)
    assert bench.judge(expected + np.float32(1e-3), expected)[0] == "right"
    outcome, off = bench.judge(expected + np.float32(0.02), expected)
    assert outcome == "wrong"
    assert off == pytest.approx(1e-3, rel=1e-3)
    assert bench.judge(expected[:1], expected) == ("wrong", None)
    broken = expected.copy()
    broken[0, 0] = np.nan
    assert bench.judge(broken, expected)[0] == "wrong"


class Scripted:
    """A worker that says what it was told to; `asked` holds the task and store of each question."""

    def __init__(self, *answers: tuple[float, list[float]] | dict[str, str]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    def ask(self, do: str, *, store: str, out: str, **job: Any) -> dict[str, Any]:
        assert Path(store).is_dir()
        self.asked.append((do, store))
        answer = self._answers.pop(0)
        if isinstance(answer, dict):
            return answer
        np.save(out, np.array(answer[1]))
        return {"outcome": "ran", "seconds": answer[0]}


def row(bench: ModuleType, folder: Path, theirs: Scripted, ours: Scripted, **how: Any) -> dict[str, Any]:
    sides = [bench.Side(worker, folder, np.array([1.0, 2.0])) for worker in (theirs, ours)]
    job = {"keep": True}
    found: dict[str, Any] = bench.beside(how.get("task", "last_tokens"), *sides, job, how.get("rounds", 3), folder)
    left = [path for path in folder.iterdir() if path.is_dir()]
    assert not left, left
    return found


def test_a_row_is_of_paired_rounds_without_the_first(bench: ModuleType, tmp_path: Path) -> None:
    theirs = Scripted(*((seconds, [1.0, 2.0]) for seconds in (100.0, 2.0, 12.0, 9.0)))
    ours = Scripted(*((seconds, [1.0, 2.0]) for seconds in (1.0, 1.0, 4.0, 3.0)))
    found = row(bench, tmp_path, theirs, ours)
    assert (found["outcome"], found["ours"]) == ("right", "right")
    assert (found["rounds"], found["ratio"], found["ratio_95"]) == (3, 3.0, [2.0, 3.0])
    assert (found["seconds"], found["our_seconds"]) == (9.0, 3.0)
    stores = [store for _, store in theirs.asked + ours.asked]
    assert len(set(stores)) == len(stores) == 8


def test_one_wrong_round_is_enough(bench: ModuleType, tmp_path: Path) -> None:
    theirs = Scripted((1.0, [1.0, 2.0]), (1.0, [1.0, 2.5]), (1.0, [1.0, 2.0]))
    ours = Scripted(*[(1.0, [1.0, 2.0])] * 3)
    found = row(bench, tmp_path, theirs, ours, rounds=2)
    assert (found["outcome"], found["error"], found["ours"], found["our_error"]) == ("wrong", 0.25, "right", 0.0)


@pytest.mark.parametrize("outcome", ["refused", "crashed", "not offered"])
def test_what_gives_no_values_is_not_timed(outcome: str, bench: ModuleType, tmp_path: Path) -> None:
    found = row(bench, tmp_path, Scripted({"outcome": outcome, "why": "so"}), Scripted())
    assert (found["outcome"], found["why"], found["error"], found["ours"]) == (outcome, "so", None, "")
    assert "ratio" not in found


def test_a_crash_in_a_later_round_is_a_crash(bench: ModuleType, tmp_path: Path) -> None:
    theirs = Scripted(*[(1.0, [1.0, 2.0])] * 2, {"outcome": "crashed", "why": "so"})
    found = row(bench, tmp_path, theirs, Scripted(*[(1.0, [1.0, 2.0])] * 3))
    assert (found["outcome"], found["why"], found["error"], found["ours"]) == ("crashed", "so", None, "right")
    assert "ratio" not in found


def test_our_own_failure_is_told_beside_their_answer(bench: ModuleType, tmp_path: Path) -> None:
    found = row(bench, tmp_path, Scripted(*[(1.0, [1.0, 2.0])] * 4), Scripted({"outcome": "crashed", "why": "so"}))
    assert (found["outcome"], found["ours"], found["our_why"]) == ("right", "crashed", "so")
    assert "ratio" not in found


def test_what_is_read_back_was_written_by_the_same_side(bench: ModuleType, tmp_path: Path) -> None:
    theirs, ours = (Scripted(*[(1.0, [1.0, 2.0])] * 3) for _ in range(2))
    row(bench, tmp_path, theirs, ours, task="read_back", rounds=1)
    for side in (theirs, ours):
        assert [task for task, _ in side.asked] == ["every_token", "read_back", "read_back"]
        assert len({store for _, store in side.asked}) == 1
    assert theirs.asked[0][1] != ours.asked[0][1]


def test_the_table_prints_every_row(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"library": "lib", "version": "1.2", "model": "tiny", "task": "a task"}
    timed = {"seconds": 0.5, "our_seconds": 0.25, "ratio": 2.0, "ratio_95": [1.5, 2.5], "error": 1e-6}
    rows = [
        {**about, **timed, "outcome": "right", "why": "", "ours": "right"},
        {**about, "outcome": "refused", "why": "not this model"},
        {**about, "version": "", "model": "", "task": "", "outcome": "not installed", "why": "no pip"},
    ]
    bench.print_rows(rows, [{"library": "lib", "version": "1.2", "model": "tiny", "import_s": 1.0, "load_s": 0.002}])
    said = capsys.readouterr().out
    assert "500 ms" in said
    assert "[1.50, 2.50]" in said
    assert "2 ms" in said
    assert all(word in said for word in ("right", "refused", "not this model", "not installed", "no pip"))


def test_environments_that_are_not_there(process: ModuleType, tmp_path: Path) -> None:
    library = process.PEERS[0]
    python, why = process.interpreter(library, tmp_path, tmp_path, None)
    assert python is None
    assert str(tmp_path) in why
    assert process.interpreter(library, None, tmp_path, None) == (None, "not installed")
    place = tmp_path / library.name
    place.mkdir()
    # Half of an installation, or one of another version, is none.
    (place / "installed-for-peers").write_text("nnsight==0.1")
    assert process.interpreter(library, None, tmp_path, None) == (None, "not installed")
    (place / "installed-for-peers").write_text(library.requirements[0])
    assert process.interpreter(library, None, tmp_path, None)[0].is_relative_to(place)


def test_workers_of_others_import_nothing_of_ours(process: ModuleType) -> None:
    scripts = {path.name: path for path in process.WORKERS.glob("*.py")}
    assert {library.script for library in (*process.PEERS, process.OURS, process.BARE)} < set(scripts)
    for name, path in scripts.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        assert ("actcache" in imported) == (name == process.OURS.script), name


def test_an_environment_of_a_library_that_is_not_compared_is_refused(bench: ModuleType) -> None:
    with pytest.raises(SystemExit):
        bench.arguments().parse_args(["--environment", "numpy=somewhere"])
    given = bench.arguments().parse_args(["--environment", "lmprobe=a=b"]).environment
    assert given == [("lmprobe", Path("a=b").absolute())]


@pytest.mark.slow
def test_our_own_worker_beside_itself_is_right(bench: ModuleType, process: ModuleType, tmp_path: Path) -> None:
    run = bench.Bench(tmp_path, True, 1)
    for keeps in (True, False):
        rows = list(run.rows(dataclasses.replace(process.OURS, keeps=keeps), Path(sys.executable)))
        assert [row["task"] for row in rows] == [*bench.TASKS.values(), *([bench.CHANGED] if keeps else [])]
        assert {(row["outcome"], row["ours"]) for row in rows} == {("right", "right")}, rows
    assert [start["library"] for start in run.starts] == ["actcache"] * 4


@pytest.mark.slow
def test_without_any_other_library_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--quick", "--no-install", "--json"]
    options = ["--environments", str(tmp_path / "none"), "--folder", str(tmp_path)]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert {row["outcome"] for row in said["rows"]} == {"not installed"}
    assert len(said["rows"]) == 4
    assert not list(tmp_path.iterdir())
