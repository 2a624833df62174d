"""What it costs to import actcache and to ask its command for help, beyond Python's own start.

    python benchmarks/imports.py [--rounds 31] [--json]

Every round starts each command once, in turn; the difference is taken within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from _measure import Ratio, in_rounds

BASE = "python -c pass"
COMMANDS = {
    BASE: ["-c", "pass"],
    "import actcache": ["-c", "import actcache"],
    "ac.cache_info()": ["-c", "import actcache; actcache.cache_info()"],
    "actcache --help": ["-m", "actcache", "--help"],
    "import numpy": ["-c", "import numpy"],
    "import torch": ["-c", "import torch"],
}
# Seconds: (beyond Python's own start?, bound)
BOUNDS = {"import actcache": (True, 0.060), "actcache --help": (False, 0.400)}


def seconds(arguments: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each command in each round; the store is an empty folder."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ACTCACHE_DIR": folder}
        for turn in range(-1, rounds):
            for name, arguments in COMMANDS.items():
                spent = seconds(arguments, environment)
                # The first round fills Python's caches of compiled files.
                if turn >= 0:
                    taken[name].append(spent)
    return taken


def main() -> int:
    options = in_rounds(__doc__).parse_args()

    taken = measure(options.rounds)
    results = []
    ok = True
    for name, times in taken.items():
        beyond = Ratio.of([a - b for a, b in zip(times, taken[BASE], strict=True)])
        whole = Ratio.of(times)
        row = {"name": name, "rounds": options.rounds, "total_s": whole.median, "beyond_s": beyond.median}
        row["beyond_95"] = [beyond.low, beyond.high]
        row["ratio"] = statistics.median(a / b for a, b in zip(times, taken[BASE], strict=True))
        if name in BOUNDS:
            difference, bound = BOUNDS[name]
            row["bound_s"] = bound
            row["held"] = (beyond if difference else whole).low <= bound
            ok &= row["held"]
        results.append(row)
    if options.json:
        print(json.dumps(results, indent=2))
        return 0 if ok else 1
    print(f"\nStart-up  ({options.rounds} rounds, median [95 % interval])")
    print(f"{'':20}{'x start':>9}{'total':>10}{'beyond Python':>16}{'interval':>20}  bound")
    for row in results:
        low, high = (1e3 * value for value in row["beyond_95"])
        verdict = ""
        if "bound_s" in row:
            part = "beyond" if BOUNDS[row["name"]][0] else "total"
            verdict = f"{part} <= {1e3 * row['bound_s']:.0f} ms {'ok' if row['held'] else 'MISSED'}"
        print(
            f"{row['name']:20}{row['ratio']:9.2f}{1e3 * row['total_s']:7.0f} ms{1e3 * row['beyond_s']:13.1f} ms"
            f"{f'[{low:.1f}, {high:.1f}]':>20}  {verdict}"
        )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
