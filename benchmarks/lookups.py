"""Finding prompts in stores of 10,000 and 1,000,000: one, many, opening, reporting, memory.

    python benchmarks/lookups.py [--quick] [--json FILE] [--folder DIR]

Ratios against a reference in the same run; what is bounded in seconds and bytes is measured in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

from _measure import Tables, arguments, compare, reporting
from actcache.store.prompts import PromptTable, text_keys
from actcache.store.records import Records
from actcache.store.store import Store
from actcache.testing.memory import anonymous

FEW, MANY, ASKED = 10_000, 1_000_000, 100_000
CONTEXT, SITE, LAYOUT = "benchmark", "embed", "last_token"
_CHUNK = 20_000
_CALLS = 200
_SECONDS, _BYTES = 0.5, 100


def texts_of(n: int) -> list[str]:
    return [f"prompt {i}: {'word ' * (i % 17)}ends here" for i in range(n)]


def fill(folder: Path, n: int) -> str:
    """A store of `n` prompts in segments of 20,000, indexed; its space."""
    rng = np.random.default_rng(0)
    store = Store(folder / "store", index_dir=folder / "index")
    space = store.open_space({"benchmark": True}, {"model_name": "benchmark"})
    texts = texts_of(n)
    for start in range(0, n, _CHUNK):
        part = texts[start : start + _CHUNK]
        table = PromptTable.build(list(rng.integers(0, 50_000, (len(part), 8), np.int32)), part, text_context=CONTEXT)
        store.append(space, Records.pooled(table, LAYOUT, {SITE: np.zeros((len(part), 4), np.float32)}))
    store.close()
    return space


def opened(folder: Path) -> Store:
    return Store(folder / "store", index_dir=folder / "index")


def finder(folder: Path, space: str, n: int) -> Callable[[], object]:
    """Finds one text after the other, in random order."""
    store = opened(folder)
    texts = texts_of(n)
    order = cycle(np.random.default_rng(1).integers(0, n, 5_000).tolist())

    def find() -> None:
        for _ in range(_CALLS):
            text = texts[next(order)]
            place = store.locate(space, texts=[text], text_context=CONTEXT, sites=[SITE], layout=LAYOUT, check=False)
            assert place.found[0]

    return find


def selector(folder: Path, n: int) -> Callable[[], object]:
    """SELECTs one key after the other from a table with that primary key."""
    keys = [key.tobytes() for key in text_keys(texts_of(n), 1, CONTEXT)]
    db = sqlite3.connect(folder / "reference.sqlite")
    db.execute("CREATE TABLE prompt (key BLOB PRIMARY KEY, segment INTEGER, row INTEGER) WITHOUT ROWID")
    with db:
        db.executemany("INSERT INTO prompt VALUES (?, 0, ?)", ((key, i) for i, key in enumerate(keys)))
    order = cycle(np.random.default_rng(1).integers(0, n, 5_000).tolist())

    def select() -> None:
        for _ in range(_CALLS):
            assert db.execute("SELECT segment, row FROM prompt WHERE key = ?", (keys[next(order)],)).fetchone()

    return select


def one(few: Path, many: Path, spaces: tuple[str, str], counts: tuple[int, int], rounds: int) -> Tables:
    here, there = finder(few, spaces[0], counts[0]), finder(many, spaces[1], counts[1])
    name = f"one text of {counts[1]:,}"
    against_sqlite = compare(
        selector(many, counts[1]), {name: there}, rounds, reference_name=f"{_CALLS} SELECTs by primary key"
    )
    growth = compare(here, {name: there}, rounds, reference_name=f"one text of {counts[0]:,}")
    return [
        (f"finding one prompt, {_CALLS} times", against_sqlite, {"bounds": {name: 5.0}}),
        (f"from {counts[0]:,} to {counts[1]:,} prompts", growth, {"bounds": {name: 1.5}}),
    ]


def membership(folder: Path, space: str, n: int, asked: int, rounds: int) -> Tables:
    texts = texts_of(n)
    chosen = np.random.default_rng(2).permutation(n)[:asked]
    keys = text_keys(texts, 1, CONTEXT)
    known = {key.tobytes() for key in keys}
    wanted = keys[chosen]
    as_bytes = [key.tobytes() for key in wanted]
    some = [texts[i] for i in chosen]
    store = opened(folder)
    index = store._index(space)
    index.refresh()
    (group,) = index.groups(LAYOUT)
    name = "keys in the index"
    rows = compare(
        lambda: sum(key in known for key in as_bytes),
        {
            name: lambda: index.find(group, "text", wanted)[0].min() >= 0,
            "by text: hash, find, compare": lambda: store.contains(space, some, SITE, pooling=LAYOUT).all(),
            "hash only": lambda: text_keys(some, 1, CONTEXT),
        },
        rounds,
        reference_name=f"{asked:,} look-ups in a set",
    )
    return [(f"membership of {asked:,} texts in {n:,}", rows, {"show": "speed", "bounds": {name: 1.0}})]


def in_process(folder: Path, space: str, n: int) -> dict[str, float]:
    """Opening, reporting and memory, in this process, which has opened no store yet."""
    text = texts_of(1)
    fill(folder / "warm", 10)
    warm = opened(folder / "warm")
    warm.locate(space, texts=text, text_context=CONTEXT, sites=[SITE], layout=LAYOUT)
    warm.info()
    gc.collect()
    before = anonymous()
    start = time.perf_counter()
    store = opened(folder)
    found = store.locate(space, texts=text, text_context=CONTEXT, sites=[SITE], layout=LAYOUT).found
    opening = time.perf_counter() - start
    start = time.perf_counter()
    info = store.info()
    reporting = time.perf_counter() - start
    store.contains(space, [[1, 2, 3]], SITE, pooling=LAYOUT)
    gc.collect()
    assert found.all() and info.models[0].num_prompts == n
    return {"opening": opening, "cache_info": reporting, "bytes_per_entry": (anonymous() - before) / n}


def absolute(folder: Path, space: str, n: int, rounds: int) -> tuple[bool, dict[str, float]]:
    """Medians over fresh processes, and whether they keep to their bounds."""
    command = [sys.executable, __file__, "--measure", str(folder), space, str(n)]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)
    ]
    found = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    bounds = {"opening": _SECONDS, "cache_info": _SECONDS}
    if n >= MANY:
        # Of fewer, what a process needs once would be most of it.
        bounds["bytes_per_entry"] = float(_BYTES)
    print(f"\na store of {n:,} prompts in a fresh process  (median of {rounds})")
    for name in found:
        bound = bounds.get(name, math.inf)
        unit = "" if name == "bytes_per_entry" else " s"
        best = min(run[name] for run in runs)
        print(f"{name:16} {found[name]:8.3f}{unit}  <= {bound:g}{unit} {'ok' if best <= bound else 'MISSED'}")
    return all(min(run[name] for run in runs) <= bound for name, bound in bounds.items()), found


def main() -> int:
    parser = arguments(__doc__, "a tenth of the prompts, fewer rounds: a look only")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, space, n = options.measure
        print(json.dumps(in_process(Path(folder), space, int(n))))
        return 0
    counts = (FEW, MANY // 10 if options.quick else MANY)
    rounds = 7 if options.quick else 31
    with reporting(options) as report:
        few, many = report.folder / "few", report.folder / "many"
        spaces = fill(few, counts[0]), fill(many, counts[1])
        # A folder that has just been written to is listed again at every look.
        time.sleep(3)
        report.add(one(few, many, spaces, counts, rounds))
        report.add(membership(few, spaces[0], counts[0], counts[0], rounds))
        report.add(membership(many, spaces[1], counts[1], min(ASKED, counts[1]), rounds))
        held, found = absolute(many, spaces[1], counts[1], 3 if options.quick else 5)
        report.held &= held
        report.record.append({"title": "in a fresh process", "rows": [found]})
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
