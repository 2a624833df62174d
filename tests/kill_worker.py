"""Forks writers, kills them at random instants, and looks at what is left: ``kill_worker.py FOLDER KILLS SEED``.

A program of its own, so that nothing of it has ever imported torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from actcache.store import files
from actcache.store.store import Store
from store_helpers import SITES, check_pooled, every_token, in_child, kill, make_store, make_table, pooled, vector

BATCH = 4
GB = 2**30


def numbers_of(batch: int) -> list[int]:
    # Neighbours overlap, so that merging finds duplicates.
    return list(range(batch * BATCH, (batch + 1) * BATCH + 1))


def append(store: Store, space: str, batch: int) -> None:
    store.append(space, pooled(numbers_of(batch)))
    if batch % 3 == 0:
        store.append(space, every_token(numbers_of(batch), dim=5))
    if batch % 4 == 3:
        store.merge(space)
    if batch % 11 == 10:
        store.compact()


def merging(store: Store, space: str, start: int) -> Iterator[int]:
    """Batch after batch, and what each has stored is merged now and then."""
    for batch in count(start):
        append(store, space, batch)
        yield batch


def evicting(store: Store, space: str, start: int) -> Iterator[int]:
    for batch in count(start):
        append(store, space, batch)
        if batch % 3 == 2:
            check_pooled(store, space, numbers_of(batch)[:2])
            store.evict(60_000 / GB)
        if batch % 7 == 6:
            store.invalidate(space, make_table(numbers_of(batch)[:1]))
        yield batch


def behind(store: Store, space: str, start: int) -> Iterator[int]:
    """As extraction stores: a thread writes, and merges when much has piled up."""
    with store.writer(space, linger=0) as writer:
        for batch in count(start):
            writer.put(pooled(numbers_of(batch)))
            if batch % 3 == 0:
                writer.put(every_token(numbers_of(batch), dim=5))
            writer.flush()
            yield batch


def child(folder: Path, work: Callable[[Store, str, int], Iterator[int]], start: int, report: int) -> None:
    store, space = make_store(folder)
    for batch in work(store, space, start):
        os.write(report, batch.to_bytes(4, "little"))


def reported(pipe: int) -> list[int]:
    data = b""
    while part := os.read(pipe, 65536):
        data += part
    os.close(pipe)
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data) - 3, 4)]


def look(store: Store, space: str, stored: list[int], started: int, *, complete: bool) -> None:
    """Every read is right or a miss; what was reported is there: all of it where `complete`, else what came last.

    A life that ended before it reported anything may have evicted all that the lives before it had stored.
    """
    asked = sorted({i for batch in [*stored, *range(started, started + 60)] for i in numbers_of(batch)})
    found = check_pooled(store, space, asked)
    must = {i for batch in stored for i in numbers_of(batch)}
    if not complete:
        # Of the last batch of all the first prompt may be invalidated, and the last one by the batch after it.
        must = set(numbers_of(stored[-1])[1:-1]) if stored and stored[-1] >= started else set()
    missing = [i for i, f in zip(asked, found, strict=True) if i in must and not f]
    assert not missing, (started, stored[-1:], missing)
    table = make_table(asked)
    place = store.locate(space, table=table, sites=SITES, layout="tokens")
    tokens = {i for batch in stored if batch % 3 == 0 for i in numbers_of(batch)}
    for k, i in enumerate(asked):
        if place.found[k]:
            for site, rows in zip(SITES, place.rows(k), strict=True):
                expected = vector(i, site, 5) + np.arange(1 + i % 7, dtype=np.float32)[:, None]
                np.testing.assert_array_equal(rows, expected)
        else:
            assert not (complete and i in tokens), i
    report = store.verify()
    assert report.ok, report.damaged
    store.close()


def main(folder: Path, kills: int, seed: int) -> None:
    # Only this machine is at work here, wherever the files lie.
    files._is_local = lambda fd: True
    rng = np.random.default_rng(seed)
    begun = time.monotonic()
    batches = 0
    for turn in range(kills):
        work = (merging, evicting, behind)[turn % 3]
        # Ten lives in each folder.
        place = folder / work.__name__ / str(turn // 30)
        place.mkdir(parents=True, exist_ok=True)
        memory = place / "stored"
        stored = np.fromfile(memory, np.int64).tolist() if memory.exists() else []
        pipe, report = os.pipe()
        start = 1000 * (turn // 3 % 10)
        pid = in_child(lambda place=place, work=work, start=start, report=report: child(place, work, start, report))  # type: ignore[misc]
        os.close(report)
        time.sleep(float(rng.uniform(0.01, 0.4)))
        kill(pid)
        done = reported(pipe)
        batches += len(done)
        stored += done
        np.array(stored, np.int64).tofile(memory)
        store, space = make_store(place)
        look(store, space, stored, start, complete=work is not evicting)
        if turn % 5 < 2:
            # An index that is made anew knows only what lies on the disk.
            fresh = Store(place / "store", index_dir=place / f"index {turn}")
            look(fresh, space, stored, start, complete=work is not evicting)
            shutil.rmtree(place / f"index {turn}")
        # Whoever opens the store next has swept up what was not finished.
        # A space that lost everything it held before it was described is no more.
        names = [f.name for f in (store.root / space).glob("*")]
        left = [name for name in names if not name.endswith((".safetensors", ".tomb", ".json", ".open"))]
        assert not left, left
        # Of every layout the last life may leave one that grew; those of earlier lives have become segments.
        assert sum(name.endswith(".open") for name in names) <= 2, names
    assert "torch" not in sys.modules
    print(f"{kills} kills, {batches} batches, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
