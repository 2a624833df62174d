"""Segments of wide rows, blocks of them that are broken, and what of them is stored then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actcache.store import segment as segments
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from store_helpers import flip, make_table

GB = 2**30
WIDE = ["resid_post.0", "resid_post.1", "resid_post.2"]
DIM = 4096
"""A row of 16 KiB: a block has eight."""


def row(i: int, site: str, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng([i, int(site[-1])]).standard_normal(dim).astype(np.float32)


def wide(numbers: Sequence[int], dim: int = DIM) -> Records:
    data = {site: np.stack([row(i, site, dim) for i in numbers]) for site in WIDE}
    return Records.pooled(make_table(numbers), "last_token", data)


def break_blocks(store: Store, info: segments.SegmentInfo, blocks: dict[str, Sequence[int]]) -> Path:
    path = store.root / info.space / f"{info.name}.safetensors"
    opened = segments.open(path)
    for site, numbers in blocks.items():
        for block in numbers:
            flip(path, opened.start_of(site) + block * BLOCK + 3)
    return path


def kept(store: Store, space: str, numbers: Sequence[int], folder: Path, dim: int = DIM) -> dict[str, list[int]]:
    """Which prompts are stored at each site, as a host sees it that knows nothing yet; their values are compared."""
    fresh = Store(store.location, index_dir=folder / "a host that knows nothing" / str(len(list(folder.iterdir()))))
    found = {}
    for site in WIDE:
        place = fresh.locate(space, table=make_table(numbers), sites=[site], layout="last_token")
        members = np.flatnonzero(place.found)
        for values, k in zip(place.take(index=members)[:, 0], members.tolist(), strict=True):
            np.testing.assert_array_equal(values, row(numbers[k], site, dim))
        found[site] = [numbers[k] for k in members.tolist()]
    (together,) = [fresh.locate(space, table=make_table(numbers), sites=WIDE, layout="last_token").found]
    everywhere = set.intersection(*map(set, found.values()))
    assert [numbers[k] for k in np.flatnonzero(together)] == sorted(everywhere)
    fresh.close()
    return found


def without(numbers: Sequence[int], *gone: int) -> list[int]:
    return [i for i in numbers if i not in gone]


def repair(store: Store, space: str) -> None:
    assert store.verify(repair=True).ok


def merge(store: Store, space: str) -> None:
    store.merge(space)
