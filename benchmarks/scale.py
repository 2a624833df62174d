"""Many workers against bare processes and a plain loop of the same run, and what the driver keeps in memory.

    python benchmarks/scale.py [--quick] [--part ray|local|memory] [--rounds N] [--json FILE] [--folder DIR]

`ray`, `local`: prompts through one and two workers of one thread each, of that engine. Bare forward processes, one and
two, say what scaling this machine has; a plain loop over the same units in one process says what a worker adds.
Start-up is told apart: from the call to the first unit that is done, and for the others until their model is loaded.
A round takes two to three minutes. `memory`: anonymous memory of the process that hands units out, at two sizes of the
input; its workers answer at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from _measure import Ratio, Report, arguments, reporting

SCALING, LOOP, MEMORY = 0.8, 1.1, 8.0
"""Ray's share of the bare processes' scaling at least, one worker's time of the loop's at most, and MB at most."""
UNIT, UNITS, LENGTH = 256, 10, 48
OPTIONS: dict[str, Any] = {"layers": [5], "compute_perplexity": False, "device": "cpu", "batch_size": None}

_BARE = """
import json, sys, time, torch
torch.set_num_threads(1)
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1]).eval()
prompts = torch.tensor([json.loads(line) for line in open(sys.argv[2])])
with torch.no_grad():
    model(prompts[:8])
    print("ready", flush=True)
    sys.stdin.readline()
    for batch in prompts.split(10):
        model(batch)
print("done", flush=True)
"""
_LOOP = """
import sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
import actcache as ac
from actcache.distributed.inputs import find_inputs
from actcache.distributed.units import Reader, Units
sys.path.insert(0, sys.argv[4])
from scale import OPTIONS, UNIT
cache, reader = ac.UnifiedCache(sys.argv[1], store=sys.argv[3], **OPTIONS), Reader()
units = list(Units(find_inputs(sys.argv[2]), prompts=UNIT))
for number, unit in enumerate(units):
    cache.warmup([row.prompt for row in reader.rows(unit)], verify_cache=False)
    print(time.perf_counter(), flush=True)
"""


def make_input(folder: Path, units: int) -> tuple[Path, Path]:
    from actcache.testing.tiny import tiny_model

    model = folder / "model"
    tiny_model("gpt2", seed=0, n_layer=6, n_embd=256, n_head=4, n_positions=64).save_pretrained(model)
    rng = np.random.default_rng(0)
    # Lines of one length, so that each unit has exactly `UNIT` of them.
    lines = [json.dumps(rng.integers(100, 250, LENGTH).tolist()) + "\n" for _ in range(UNIT * units)]
    path = folder / "prompts.jsonl"
    path.write_text("".join(lines))
    return model, path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def bare(model: Path, prompts: Path, processes: int) -> tuple[float, float]:
    """Seconds until all are ready, and for all prompts, shared out evenly."""
    lines = prompts.read_text().splitlines(keepends=True)
    parts = []
    for k in range(processes):
        parts.append(prompts.with_suffix(f".{k}"))
        parts[-1].write_text("".join(lines[k::processes]))
    start = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _BARE, model, part], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment(), text=True,
        )
        for part in parts
    ]  # fmt: skip
    try:
        for one in running:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        ready = time.perf_counter()
        for one in running:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        for one in running:
            assert one.stdout is not None and one.stdout.readline() == "done\n"
        return ready - start, time.perf_counter() - ready
    finally:
        for one in running:
            one.kill()
            one.communicate()


def per_unit(times: list[float], workers: int) -> float:
    """Seconds a unit takes, of the times at which units were done: behind the first of each worker, which waits for a
    model, and before the last, when a worker may have nothing left."""
    first, last = times[workers], times[-workers]
    return (last - first) / (len(times) - 2 * workers)


def loop(model: Path, prompts: Path, store: Path) -> tuple[float, float]:
    """Seconds until the first unit is done, and for each other."""
    start = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", _LOOP, model, prompts, store, Path(__file__).parent], env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    times = list(map(float, ran.stdout.split()))
    return times[0] - start, per_unit(times, 1)


def engine(name: str, model: Path, prompts: Path, store: Path, workers: int) -> tuple[float, float]:
    """Seconds until every worker has done a unit, and for each other unit."""
    from actcache.distributed import warmup

    times: list[float] = []

    class Bar:
        def update(self, n: int = 1) -> None:
            times.extend([time.perf_counter()] * n)

    class Shown:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Bar:
            return Bar()

        def __exit__(self, *_: object) -> None: ...

    shown, warmup.progress = warmup.progress, Shown  # type: ignore[assignment,attr-defined]
    start = time.perf_counter()
    try:
        warmup.warmup_distributed(
            prompts, model, engine=name, num_workers=workers, store=store, unit_prompts=UNIT, **OPTIONS
        )
    finally:
        warmup.progress = shown  # type: ignore[attr-defined]
    return times[workers - 1] - start, per_unit(times, workers)


def scaling(report: Report, kind: str, rounds: int) -> None:
    model, prompts = make_input(report.folder, UNITS)
    names = ("bare 1", "bare 2", "loop", f"{kind} 1", f"{kind} 2")
    starts: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            what, _, count = name.partition(" ")
            place = report.folder / f"{name} {turn}"
            if what == "bare":
                begun, took = bare(model, prompts, int(count))
                took /= UNITS
            elif what == "loop":
                begun, took = loop(model, prompts, place)
            else:
                begun, took = engine(kind, model, prompts, place, int(count))
            starts[name].append(begun)
            seconds[name].append(took)
            print(f"round {turn + 1}: {name:8}  start {begun:6.2f}   a unit {took:7.3f}", flush=True)
    print(f"\nSeconds ({rounds} rounds, medians), {UNITS} units of {UNIT} prompts of {LENGTH} tokens")
    for name in names:
        print(f"{name:8}  start {np.median(starts[name]):6.2f}   a unit {np.median(seconds[name]):7.3f}")

    def paired(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]

    of_bare = paired("bare 1", "bare 2")
    print(f"scaling of two bare processes  {Ratio.of(of_bare).median:.3f}")
    rows = []
    own = [a / b for a, b in zip(paired(f"{kind} 1", f"{kind} 2"), of_bare, strict=True)]
    one = paired(f"{kind} 1", "loop")
    for what, values, bound in ((f"{kind}: scaling, of theirs", own, SCALING), (f"{kind} 1, of the loop", one, LOOP)):
        ratio = Ratio.of(values)
        held = ratio.high >= bound if bound < 1 else ratio.low <= bound
        report.held &= held
        verdict = f"{'>=' if bound < 1 else '<='} {bound:g} {'ok' if held else 'MISSED'}"
        print(f"{what:28}  {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  {verdict}", flush=True)
        rows.append({"name": what, "rounds": rounds, "ratio": ratio.median, "ratio_95": [ratio.low, ratio.high]})
    report.record.append({"title": "Workers", "rows": rows, "starts": starts, "seconds_per_unit": seconds})


_DRIVER = """
import sys
import test_distributed_dispatch as scripted
from actcache.distributed.dispatch import dispatch
from actcache.distributed.inputs import find_inputs
from actcache.distributed.ledger import Ledger
from actcache.distributed.units import Units
from actcache.distributed.worker import Lost
from actcache.testing.memory import anonymous

units, most = Units(find_inputs(sys.argv[1]), prompts=64), 0

def behave(task):
    global most
    if task.unit.number % 50 == 0:
        most = max(most, anonymous())
    return scripted.answer(task, 64, (Lost(3, "", "no"),))

start = anonymous()
with Ledger(max_failed=1) as ledger:
    assert dispatch(units, scripted.Scripted(4, behave), ledger, lambda n: None)
print(ledger.stats.total_prompts, start / 2**20, max(most, anonymous()) / 2**20)
"""


def memory(report: Report, quick: bool) -> None:
    """Each size in a process of its own, whose workers are those of the tests."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    variables = environment()
    variables["PYTHONPATH"] += os.pathsep + str(tests)
    print("\nAnonymous memory of the driver")
    grown = []
    for size in (100_000, 400_000) if quick else (250_000, 2_500_000):
        path = report.folder / "many.jsonl"
        with path.open("w") as file:
            file.writelines(lines(size))
        ran = subprocess.run(
            [sys.executable, "-c", _DRIVER, path], env=variables, capture_output=True, text=True, check=True
        )
        prompts, start, most = map(float, ran.stdout.split())
        grown.append(most - start)
        print(f"{int(prompts):>10,} prompts, {path.stat().st_size >> 20} MB: {start:.1f} MB before, {most:.1f} at most")
    held = grown[1] - grown[0] <= MEMORY
    report.held &= held
    print(f"more for the larger one: {grown[1] - grown[0]:.1f} MB  <= {MEMORY:g} {'ok' if held else 'MISSED'}")
    report.record.append({"title": "Memory of the driver", "rows": [{"name": "grown_mb", "values": grown}]})


def lines(size: int) -> Iterator[str]:
    for number in range(size):
        yield f'"prompt {number} {"x" * 60}"\n'


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("ray", "local", "memory"), help="only this (default: ray, then memory)")
    parser.add_argument("--rounds", type=int, help="of the workers (default: 5, with --quick 1)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with reporting(options) as report:
        if options.part != "memory":
            scaling(report, options.part or "ray", options.rounds or (1 if options.quick else 5))
        if options.part in (None, "memory"):
            memory(report, options.quick)
    return 0 if report.held else 1


if __name__ == "__main__":
    raise SystemExit(main())
