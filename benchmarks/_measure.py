"""One way to time things: interleaved, paired, with an interval.

Machines differ and drift, so a single time says little. `compare` runs a reference and its candidates in
turn, round after round, and looks at the ratio of two runs of the *same* round; `Row` holds the median of
those ratios and its 95 % interval, for wall time and for CPU time. A bound counts as missed only when the
whole interval lies past it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Show = Literal["time", "speed"]
Tables = list[tuple[str, list["Row"], dict[str, Any]]]
"""Titles, rows, and what `print_table` is to know of them."""


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and the 95 % interval of that median."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        ordered = sorted(values)
        n = len(ordered)
        # Order statistics around the median: no assumption about the distribution of the times.
        half = 1.96 * math.sqrt(n) / 2
        low = max(0, math.floor(n / 2 - half))
        high = min(n - 1, math.ceil(n / 2 + half))
        return cls(statistics.median(ordered), ordered[low], ordered[high])

    @property
    def inverse(self) -> Ratio:
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low)


@dataclass(frozen=True)
class Row:
    """One candidate against the reference. Times are medians in seconds per call."""

    name: str
    rounds: int
    wall: float
    cpu: float
    wall_ratio: Ratio
    """Candidate's wall time / reference's wall time."""
    cpu_ratio: Ratio
    """Candidate's CPU time (whole process, all threads) / reference's CPU time."""

    @property
    def ratio(self) -> float:
        """Median time ratio: 1.05 means 5 % slower than the reference."""
        return self.wall_ratio.median

    @property
    def speed(self) -> Ratio:
        """Reference's wall time / candidate's: 0.4 means 0.4 times the reference's speed."""
        return self.wall_ratio.inverse

    def at_most(self, bound: float) -> bool:
        """Whether the time ratio keeps to `bound` (only a whole interval past it breaks it)."""
        return self.wall_ratio.low <= bound

    def at_least(self, bound: float) -> bool:
        """Whether the speed ratio reaches `bound` (only a whole interval below it breaks it)."""
        return self.speed.high >= bound

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "rounds": self.rounds, "wall_s": self.wall, "cpu_s": self.cpu,
            "time_ratio": self.wall_ratio.median, "time_ratio_95": [self.wall_ratio.low, self.wall_ratio.high],
            "cpu_ratio": self.cpu_ratio.median, "cpu_ratio_95": [self.cpu_ratio.low, self.cpu_ratio.high],
        }  # fmt: skip


def compare(
    reference: Callable[[], object],
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 31,
    *,
    reference_name: str = "reference",
    warmup: int = 2,
    inner: int = 1,
    before: Callable[[str], object] | None = None,
) -> list[Row]:
    """Time `reference` and every candidate `rounds` times in turn; rows, the reference first.

    `inner` calls make one timing (for calls of microseconds). `before(name)` runs untimed before each
    timing, to undo what the last one left (files, caches). The order rotates from round to round.
    """
    runs: list[tuple[str, Callable[[], object]]] = [(reference_name, reference), *candidates.items()]
    wall: dict[str, list[float]] = {name: [] for name, _ in runs}
    cpu: dict[str, list[float]] = {name: [] for name, _ in runs}
    collecting = gc.isenabled()
    for turn in range(-warmup, rounds):
        shift = turn % len(runs)
        for name, run in runs[shift:] + runs[:shift]:
            if before is not None:
                before(name)
            gc.collect(0)
            gc.disable()
            try:
                cpu_start, start = time.process_time(), time.perf_counter()
                for _ in range(inner):
                    run()
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            finally:
                if collecting:
                    gc.enable()
            if turn >= 0:
                wall[name].append(seconds / inner)
                cpu[name].append(max(cpu_seconds, 1e-9) / inner)
    rows = []
    for name, _ in runs:
        walls = [a / b for a, b in zip(wall[name], wall[reference_name], strict=True)]
        cpus = [a / b for a, b in zip(cpu[name], cpu[reference_name], strict=True)]
        rows.append(
            Row(
                name,
                rounds,
                statistics.median(wall[name]),
                statistics.median(cpu[name]),
                Ratio.of(walls),
                Ratio.of(cpus),
            )
        )
    return rows


def print_table(
    title: str,
    rows: Sequence[Row],
    *,
    show: Show = "time",
    bounds: Mapping[str, float] | None = None,
    nbytes: int | None = None,
) -> bool:
    """Print `rows`; True when every bound holds.

    `show="time"`: ratios of time, bounds are upper limits. `show="speed"`: ratios of speed, bounds are
    floors. `nbytes` per call adds a column of GB/s.
    """
    ok = True
    width = max([len(r.name) for r in rows] + [12])
    unit = "x time" if show == "time" else "x speed"
    print(f"\n{title}  ({rows[0].rounds} rounds, median [95 % interval of the paired ratio])")
    rates = "      GB/s" if nbytes else ""
    print(f"{'':{width}}  {unit:>7} {'interval':>17}  {'x cpu':>7}  {'wall':>10}  {'cpu':>10}{rates}  bound")
    for row in rows:
        ratio = row.wall_ratio if show == "time" else row.speed
        verdict = ""
        if bounds and row.name in bounds:
            bound = bounds[row.name]
            held = row.at_most(bound) if show == "time" else row.at_least(bound)
            verdict = f"{'<=' if show == 'time' else '>='} {bound:g} {'ok' if held else 'MISSED'}"
            ok &= held
        rate = f"  {nbytes / row.wall / 1e9:8.2f}" if nbytes else ""
        interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        print(
            f"{row.name:{width}}  {ratio.median:7.3f} {interval:>17}  {row.cpu_ratio.median:7.3f}"
            f"  {_seconds(row.wall):>10}  {_seconds(row.cpu):>10}{rate}  {verdict}"
        )
    sys.stdout.flush()
    return ok


@dataclass
class Report:
    """The tables of one run: printed as they come, and kept. `folder` is theirs; `held` tells of their bounds."""

    folder: Path
    held: bool = True
    record: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tables: Tables, *, show: Show = "time") -> None:
        """Print `tables` and keep their rows."""
        for title, rows, how in tables:
            self.held &= print_table(title, rows, **{"show": show, **how})
            self.record.append({"title": title, "rows": [row.as_dict() for row in rows]})


def in_rounds(description: str | None, rounds: int = 31) -> argparse.ArgumentParser:
    """The options of a benchmark that prints one thing, measured so many times."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", action="store_true")
    return parser


def run_parts(
    description: str | None,
    names: Sequence[str],
    parts: Callable[[argparse.Namespace], Mapping[str, Callable[[], bool]]],
) -> int:
    """Read the command line of a benchmark that extracts, and run the parts that it names, all where it names none.

    `parts` makes of the options what runs for each of `names`, and whether its bounds held. Returns the exit status.
    """
    import torch

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*names, []], default=[])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runs = parts(options)
    torch.set_num_threads(options.threads)
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds}))
    held = [runs[name]() for name in names if name in (options.parts or names)]
    return 0 if all(held) else 1


def arguments(
    description: str | None, quick: str = "fewer rounds: a look, not a measurement"
) -> argparse.ArgumentParser:
    """The options of a benchmark that works in a folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    return parser


@contextmanager
def reporting(options: argparse.Namespace) -> Iterator[Report]:
    """A report in a new folder that goes when the block ends; what was measured is written where `options` say."""
    report = Report(Path(tempfile.mkdtemp(prefix="actcache-benchmark-", dir=options.folder)))
    try:
        yield report
    finally:
        shutil.rmtree(report.folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(report.record, indent=1))


def _seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"
