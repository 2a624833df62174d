"""Stores of segments whose sizes and times of reading matter, and what of them is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actcache.store.store import Store
from store_helpers import CONTEXT, SITES, pooled, text, vector

GB = 2**30
DIM = 512


def bytes_on_disk(store: Store) -> int:
    return sum(f.stat().st_size for f in store.location.rglob("*") if f.is_file())


def fill(store: Store, space: str, groups: Sequence[Sequence[int]], **options: Any) -> int:
    """A segment for each group; the size of the largest."""
    sizes = [store.append(space, pooled(numbers, dim=DIM, **options)).size for numbers in groups]
    return max(sizes)


def there(store: Store, space: str, numbers: Sequence[int], sites: Sequence[str] = SITES) -> list[int]:
    """Which prompts are stored; their values are compared, and this does not count as reading."""
    place = store.locate(
        space, texts=[text(i) for i in numbers], text_context=CONTEXT, sites=sites, layout="last_token", check=False
    )
    members = np.flatnonzero(place.found)
    for row, k in zip(place.take(index=members), members.tolist(), strict=True):
        for j, site in enumerate(sites):
            np.testing.assert_array_equal(row[j], vector(numbers[k], site, DIM))
    return [numbers[k] for k in members.tolist()]


def read(store: Store, space: str, numbers: Sequence[int]) -> None:
    assert store.read(space, [text(i) for i in numbers], SITES[0], pooling="last_token").shape == (len(numbers), DIM)
