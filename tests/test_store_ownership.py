"""Whoever owns prompts reads the versions that it wrote last, whatever others write, invalidate and merge beside it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from actcache.store.records import Records
from actcache.store.store import Store
from store_helpers import CONTEXT, SITES, in_child, make_store, make_table, pooled, text, vector, wait_for

pytestmark = pytest.mark.slow

OWNERS, EACH, STEPS = 4, 20, 80


def version(numbers: list[int], number: int) -> Records:
    """What `pooled` makes of prompts, moved by the number of the version: anyone can recompute it."""
    records = pooled(numbers)
    records.data = {site: rows + np.float32(number) for site, rows in records.data.items()}
    return records


def check(store: Store, space: str, mine: range, versions: dict[int, int]) -> None:
    """Of one's own prompts those are there that were not invalidated since, each in its last version."""
    texts = [text(i) for i in mine]
    place = store.locate(space, texts=texts, text_context=CONTEXT, sites=SITES, layout="last_token")
    there = [i for i, found in zip(mine, place.found.tolist(), strict=True) if found]
    assert there == sorted(versions)
    for rows, i in zip(place.take(index=np.flatnonzero(place.found)), there, strict=True):
        for row, site in zip(rows, SITES, strict=True):
            np.testing.assert_array_equal(row, vector(i, site) + np.float32(versions[i]))


def own(store: Store, space: str, owner: int, merges: bool = True) -> None:
    """Overwrite some of one's prompts, invalidate some, may merge what all wrote; look at one's own each time."""
    rng = np.random.default_rng(owner)
    mine = range(owner, OWNERS * EACH, OWNERS)
    versions: dict[int, int] = {}
    for step in range(1, STEPS + 1):
        some = sorted(rng.choice(mine, 5, replace=False).tolist())
        act = int(rng.integers(10 if merges else 8))
        if act < 6:
            store.append(space, version(some, step))
            versions.update(dict.fromkeys(some, step))
        elif act < 8:
            store.invalidate(space, make_table(some))
            versions = {i: kept for i, kept in versions.items() if i not in some}
        elif act == 8:
            store.merge(space)
        else:
            store.compact(space)
        check(store, space, mine, versions)


def test_threads_read_what_they_wrote_last(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    errors: list[BaseException] = []

    def guarded(owner: int) -> None:
        try:
            own(store, space, owner)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(owner,)) for owner in range(OWNERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.verify().ok


@pytest.mark.parametrize("separate", [False, True])
def test_processes_read_what_they_wrote_last(tmp_path: Path, separate: bool) -> None:
    """On one host, which has one index, and each on its own, where one of them merges.

    Two that merge the same at once know of one another only on one host: on two, what the slower one has made is seen
    for the moment until it is withdrawn, with prompts in it that were invalidated in what the faster one made.
    """
    store, _ = make_store(tmp_path)

    def child(owner: int) -> None:
        folder = tmp_path / (f"index {owner}" if separate else "index")
        mine = Store(store.location, index_dir=folder)
        own(
            mine,
            mine.open_space({"weights": "abc"}, {"model_name": "org/model"}),
            owner,
            merges=not separate or owner == 0,
        )

    pids = [in_child(lambda owner=owner: child(owner)) for owner in range(OWNERS)]  # type: ignore[misc]
    assert [wait_for(pid) for pid in pids] == [0] * OWNERS
    assert store.verify().ok
