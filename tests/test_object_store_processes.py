"""Machines that know nothing of one another: processes with folders of their own, at one bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from actcache.store.store import Store
from bucket_helpers import LABEL
from store_helpers import SITES, check_pooled, make_table

# One machine: writes batches of ten from a place on, and forgets every seventh prompt of what it sees.
WORKER = """
import sys
from pathlib import Path
from actcache.store.store import Store
from store_helpers import make_table, pooled
from bucket_helpers import LABEL

url, index, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with Store(url, index_dir=index) as store:
    space = store.open_space({"weights": "abc"}, LABEL)
    for start in range(first, last, 10):
        store.append(space, pooled(range(start, start + 10)))
        if start % 20 == 0:
            store.flush()
        print(start, flush=True)
    store.flush()
    store.invalidate(space, make_table([n for n in range(first, last) if n % 7 == 0]))
"""


def worker(url: str, index: Path, first: int, last: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, url, str(index), str(first), str(last)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_machines_that_write_and_invalidate_at_once(anywhere: str, tmp_path: Path) -> None:
    """Overlapping prompts; whoever looks sees the union, less what was forgotten, and never a wrong row."""
    spans = [(0, 60), (40, 100), (60, 120)]
    early = Store(anywhere, index_dir=tmp_path / "early")
    space = early.open_space({"weights": "abc"}, LABEL)
    assert not check_pooled(early, space, range(120)).any()
    workers = [worker(anywhere, tmp_path / f"machine {i}", *span) for i, span in enumerate(spans)]
    while any(w.poll() is None for w in workers):
        check_pooled(early, space, range(0, 120, 5))
        time.sleep(0.05)
    for w in workers:
        _, err = w.communicate()
        assert w.returncode == 0, err
    fresh = Store(anywhere, index_dir=tmp_path / "fresh")
    early.refresh()
    # What one has forgotten another may have written again behind it.
    again = {n for n in range(120) if n % 7 == 0 and sum(a <= n < b for a, b in spans) > 1}
    for store in (early, fresh):
        found = set(np.flatnonzero(check_pooled(store, space, range(120))).tolist())
        wanted = {n for n in range(120) if n % 7}
        assert wanted <= found <= wanted | again
        assert store.verify().ok
    assert fresh.compact(space)
    fresh.flush()
    early.refresh()
    left = set(np.flatnonzero(check_pooled(early, space, range(120))).tolist())
    assert left == found


def test_what_a_killed_process_left_is_put_by_the_next_on_its_host(anywhere: str, tmp_path: Path) -> None:
    process = worker(anywhere, tmp_path / "host", 0, 4000)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = range(told[-1] + 10)
    next_one = Store(anywhere, index_dir=tmp_path / "host")
    space = next_one.open_space({"weights": "abc"}, LABEL)
    assert check_pooled(next_one, space, written).all()
    next_one.flush()
    other = Store(anywhere, index_dir=tmp_path / "another host")
    assert check_pooled(other, space, written).all()
    assert other.verify().ok


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_that_was_acknowledged(anywhere: str, tmp_path: Path) -> None:
    """Twelve processes of one host, one after another, each killed at a random moment; another host reads along."""
    rng = np.random.default_rng(0)
    acknowledged: set[int] = set()
    reader = Store(anywhere, index_dir=tmp_path / "reader")
    space = reader.open_space({"weights": "abc"}, LABEL)
    for k in range(12):
        process = worker(anywhere, tmp_path / "host", 1000 * k, 1000 * k + 1000)
        assert process.stdout is not None
        start = int(process.stdout.readline())
        time.sleep(float(rng.uniform(0, 0.6)))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        for line in [str(start), *out.split("\n")]:
            if line.strip():
                acknowledged |= set(range(int(line), int(line) + 10))
        # Forgetting comes last, and only what got that far has begun with it.
        acknowledged = {n for n in acknowledged if n % 7}
        some = sorted(acknowledged)[:: max(1, len(acknowledged) // 50)]
        check_pooled(reader, space, some)
    last = Store(anywhere, index_dir=tmp_path / "host")
    assert check_pooled(last, space, sorted(acknowledged)).all()
    last.flush()
    reader.refresh()
    for store in (reader, Store(anywhere, index_dir=tmp_path / "fresh")):
        assert check_pooled(store, space, sorted(acknowledged)).all()
        assert store.verify().ok
        assert store.contains(space, make_table(sorted(acknowledged)), SITES[0], pooling="last_token").all()
