"""Other libraries beside this one: the same work on the same models, is it right, and how long does it take?

    python benchmarks/peers.py [--quick] [--json] [--peer NAME ...] [--environment NAME=FOLDER ...]

Each library runs in a process and an environment of its own: the one that ``--environment`` names, or one that pip
fills below ``--environments``. The models are made here, of a config and a seed: a tiny one of Llama's shape and one
of GPT-2's with 12 blocks of width 768; nothing but the libraries is downloaded.

The work: the last token of all layers, every token of one layer, the same read back from disk, perplexity, and, of a
library that keeps things, every token again after the model's weights have changed where they lie, by a new process.
Peers take the prompts in the order given, in batches. Beside lmprobe, which keeps what it computes on disk, ours writes
everything to its store; beside libraries that keep it in memory, ours does too, but for perplexity, which is always
stored. Rounds of both alternate, and each process times itself with one thread: import and load stand apart.

Outcomes, against the bare model with one prompt at a time: right; wrong (a value is off by more than the tolerance, or
the shape is another); refused (it says that it does not do this); crashed (another error, or the process ended); not
offered; not installed. A ratio above 1 says that ours took less time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from _measure import Ratio, _seconds
from _peer_models import LARGE, TINY, change_model, make_model, make_prompts
from _peer_process import BARE, OURS, PEERS, WORKERS, Library, Worker, interpreter

TASKS = {
    "last_tokens": "last token, all layers",
    "every_token": "every token, one layer",
    "read_back": "the same, read back",
    "perplexity": "perplexity",
}
CHANGED = "weights changed in place"
# Of the largest value: batches and padding change the order of float32 sums, and nothing else.
TOLERANCE = 1e-4
ANSWERED = ("right", "wrong")
BATCH = 8
LIMIT = 600.0


def judge(values: np.ndarray, expected: np.ndarray) -> tuple[str, float | None]:
    """``right`` or ``wrong``, and the largest error as a part of the largest value (None where shapes differ)."""
    if values.shape != expected.shape:
        return "wrong", None
    off = np.abs(values.astype(np.float64) - expected.astype(np.float64)).max() / np.abs(expected).max()
    # A NaN compares as false: it is wrong.
    return ("right" if off <= TOLERANCE else "wrong"), float(off)


class Side:
    """A worker and what has come of one task with it."""

    def __init__(self, worker: Worker, scratch: Path, expected: np.ndarray) -> None:
        self._worker, self._scratch, self._expected = worker, scratch, expected
        self.outcome, self.why = "", ""
        self.error: float | None = None
        self.seconds: list[float] = []

    def run(self, task: str, job: dict[str, Any], store: Path | None = None) -> None:
        """Do it once, with an empty store unless one is given, and look at the values."""
        place = store or Path(tempfile.mkdtemp(dir=self._scratch))
        out = self._scratch / "values.npy"
        out.unlink(missing_ok=True)
        said = self._worker.ask(task, **job, store=str(place), out=str(out))
        if store is None:
            shutil.rmtree(place, ignore_errors=True)
        if said["outcome"] != "ran":
            self.outcome, self.why, self.error = said["outcome"], said.get("why", ""), None
            return
        self.seconds.append(said["seconds"])
        outcome, off = judge(np.load(out), self._expected)
        # One wrong answer is enough, and the worst is told.
        if outcome == "wrong" or not self.outcome:
            self.outcome = outcome
        self.error = off if self.error is None or off is None else max(self.error, off)

    @property
    def goes_on(self) -> bool:
        """Whether there is anything more to see: not of what has been refused, or has crashed."""
        return self.outcome in ("", *ANSWERED)


def beside(task: str, theirs: Side, ours: Side, job: dict[str, Any], rounds: int, scratch: Path) -> dict[str, Any]:
    """One row: both sides in turn, the first time untimed."""
    stores: dict[int, Path | None] = {id(theirs): None, id(ours): None}
    if task == "read_back" and job["keep"]:
        for side in (theirs, ours):
            stores[id(side)] = Path(tempfile.mkdtemp(dir=scratch))
            side.run("every_token", job, stores[id(side)])
    for turn in range(rounds + 1):
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            if theirs.goes_on and side.goes_on:
                side.run(task, job, stores[id(side)])
        if turn == 0:
            theirs.seconds.clear()
            ours.seconds.clear()
    for store in stores.values():
        if store is not None:
            shutil.rmtree(store, ignore_errors=True)
    return row_of(theirs, ours)


def row_of(theirs: Side, ours: Side) -> dict[str, Any]:
    row: dict[str, Any] = {
        "outcome": theirs.outcome, "why": theirs.why, "error": theirs.error,
        "ours": ours.outcome, "our_why": ours.why, "our_error": ours.error,
    }  # fmt: skip
    if theirs.seconds and theirs.outcome in ANSWERED and ours.outcome in ANSWERED:
        ratio = Ratio.of([a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)])
        row |= {
            "rounds": len(ours.seconds),
            "seconds": statistics.median(theirs.seconds),
            "our_seconds": statistics.median(ours.seconds),
            "ratio": ratio.median,
            "ratio_95": [ratio.low, ratio.high],
        }
    return row


class Bench:
    """Models, references and workers of one run, in one folder."""

    def __init__(self, scratch: Path, quick: bool, rounds: int) -> None:
        self.scratch, self.rounds = scratch, rounds
        self.starts: list[dict[str, Any]] = []
        self._models = {name: scratch / f"model-{i}" for i, name in enumerate([TINY] if quick else [TINY, LARGE])}
        self._prompts = {TINY: 16 if quick else 128, LARGE: 48}
        self._layers = {name: make_model(name, folder) for name, folder in self._models.items()}
        self._expected = {name: self._reference(folder, self._job(name)) for name, folder in self._models.items()}

    def _job(self, model: str) -> dict[str, Any]:
        prompts = make_prompts(model, self._prompts[model])
        return {"prompts": prompts, "layer": self._layers[model] // 2 - 1, "batch": BATCH}

    def _worker(self, library: Library, python: Path) -> Worker:
        # Only ours may be found where the caller says that code is: others have what their environment has.
        here = library.script in (OURS.script, BARE.script)
        return Worker(python, WORKERS / library.script, self.scratch, limit=LIMIT, keep_path=here)

    def _reference(self, folder: Path, job: dict[str, Any]) -> dict[str, np.ndarray]:
        with self._worker(BARE, Path(sys.executable)) as bare:
            for said in (bare.started, bare.ask("open", model=str(folder))):
                if said["outcome"] != "ran":
                    raise SystemExit(f"the bare model does not run: {said.get('why')}")
            found = {}
            for task in TASKS:
                out = self.scratch / f"bare-{task}.npy"
                said = bare.ask(task, **job, store="", out=str(out))
                if said["outcome"] != "ran":
                    raise SystemExit(f"the bare model does not do {task}: {said.get('why')}")
                found[task] = np.load(out)
            return found

    def _open(self, library: Library, worker: Worker, model: str, folder: Path) -> dict[str, Any]:
        """The answer of the first step that did not run, else of the last; what they took is written down."""
        opened = worker.started
        if opened["outcome"] == "ran":
            opened = worker.ask("open", model=str(folder))
            if opened["outcome"] == "ran":
                self.starts.append(
                    {
                        "library": library.name,
                        "version": worker.started["version"],
                        "model": model,
                        "import_s": worker.started["seconds"],
                        "load_s": opened["seconds"],
                    }
                )
        return opened

    def rows(self, library: Library, python: Path) -> Iterator[dict[str, Any]]:
        for model, folder in self._models.items():
            with self._worker(library, python) as theirs, self._worker(OURS, Path(sys.executable)) as ours:
                said = self._open(library, theirs, model, folder)
                mine = self._open(OURS, ours, model, folder)
                if mine["outcome"] != "ran":
                    raise SystemExit(f"actcache does not run: {mine.get('why')}")
                about = {"library": library.name, "version": theirs.started.get("version", ""), "model": model}
                for task, title in TASKS.items():
                    row = {**about, "task": title}
                    if said["outcome"] != "ran":
                        yield {**row, "outcome": said["outcome"], "why": said.get("why", "")}
                        continue
                    expected = self._expected[model][task]
                    sides = Side(theirs, self.scratch, expected), Side(ours, self.scratch, expected)
                    job = {**self._job(model), "keep": library.keeps}
                    yield {**row, **beside(task, *sides, job, self.rounds, self.scratch)}
            if model == TINY and library.keeps and said["outcome"] == "ran":
                yield {**about, "task": CHANGED, **self._changed(library, python)}

    def _changed(self, library: Library, python: Path) -> dict[str, Any]:
        """The tiny model, its weights changed where they lie, asked again by new processes with the old stores."""
        folder = self.scratch / "changing"
        shutil.copytree(self._models[TINY], folder)
        job, before = {**self._job(TINY), "keep": True}, self._expected[TINY]["every_token"]
        both = ((library, python), (OURS, Path(sys.executable)))
        stores = [Path(tempfile.mkdtemp(dir=self.scratch)) for _ in both]
        expected = before
        sides: list[Side] = []
        try:
            for change in (False, True):
                if change:
                    change_model(folder)
                    expected = self._reference(folder, job)["every_token"]
                    assert judge(before, expected)[0] == "wrong", "the change changed nothing"
                sides = []
                for (which, runs), store in zip(both, stores, strict=True):
                    with self._worker(which, runs) as worker:
                        worker.ask("open", model=str(folder))
                        sides.append(Side(worker, self.scratch, expected))
                        sides[-1].run("every_token", job, store)
        finally:
            for place in (folder, *stores):
                shutil.rmtree(place, ignore_errors=True)
        for side in sides:
            # One of the two computes, the other does not: their times say nothing about each other.
            side.seconds.clear()
        return row_of(*sides)


def print_rows(rows: list[dict[str, Any]], starts: list[dict[str, Any]]) -> None:
    head = f"{'library':24} {'model':12} {'work':25} {'outcome':13} {'error':>8}  {'ours':7} {'theirs':>9} {'ours':>9}"
    print(f"\n{head} {'theirs / ours':>14} {'interval':>16}")
    for row in rows:
        error = f"{row['error']:.0e}" if row.get("error") is not None else ""
        line = f"{row['library'] + ' ' + row['version']:24} {row['model']:12} {row['task']:25}"
        line += f" {row['outcome']:13} {error:>8}  {row.get('ours', ''):7}"
        if "ratio" in row:
            low, high = row["ratio_95"]
            line += f" {_seconds(row['seconds']):>9} {_seconds(row['our_seconds']):>9} {row['ratio']:14.2f}"
            line += f" {f'[{low:.2f}, {high:.2f}]':>16}"
        print(line.rstrip())
        for why in filter(None, (row.get("why"), row.get("our_why"))):
            print(f"    {why}")
    print(f"\n{'library':24} {'model':12} {'import':>9} {'load':>9}")
    for start in starts:
        name = f"{start['library']} {start['version']}"
        print(f"{name:24} {start['model']:12} {_seconds(start['import_s']):>9} {_seconds(start['load_s']):>9}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [library.name for library in PEERS]
    parser.add_argument("--peer", action="append", choices=names, help="this library alone (may be repeated)")
    parser.add_argument(
        "--environment", action="append", default=[], type=_environment, metavar="NAME=FOLDER",
        help="the virtual environment that has library NAME (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--environments", type=Path, default=Path("build/peers"), help="where environments are made (build/peers)"
    )
    parser.add_argument(
        "--torch", default=f"torch=={version('torch').split('+')[0]}",
        help="what pip is asked for first: a requirement, or arguments (the torch that runs here)",
    )  # fmt: skip
    parser.add_argument("--no-install", action="store_true", help="leave out what is not installed")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (7; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="the tiny model and few prompts: a look")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    return parser


def _environment(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    names = [library.name for library in PEERS]
    if name not in names or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with one of {', '.join(names)} as NAME")
    return name, Path(folder).absolute()


def main() -> int:
    options = arguments().parse_args()
    given, torch = dict(options.environment), None if options.no_install else options.torch
    rows: list[dict[str, Any]] = []
    scratch = Path(tempfile.mkdtemp(prefix="actcache-benchmark-", dir=options.folder))
    try:
        pythons = {
            library: interpreter(library, given.get(library.name), options.environments.absolute(), torch)
            for library in PEERS
            if not options.peer or library.name in options.peer
        }
        bench = Bench(scratch, options.quick, options.rounds or (3 if options.quick else 7))
        for library, (python, why) in pythons.items():
            print(f"{library.name} ...", file=sys.stderr, flush=True)
            if python is None:
                about = {"library": library.name, "version": "", "model": "", "task": ""}
                rows.append({**about, "outcome": "not installed", "why": why})
            else:
                rows += bench.rows(library, python)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json:
        print(json.dumps({"rows": rows, "starts": bench.starts}, indent=1))
    else:
        print_rows(rows, bench.starts)
    # What other libraries do is no fault of ours.
    return 0 if all(row.get("ours", "") in ("", "right") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
