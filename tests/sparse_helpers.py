"""Sparse matrices whose numbers anyone can compute again."""

from __future__ import annotations

from typing import Any

import numpy as np

from actcache.store.records import Records
from actcache.store.sparse import SparseSite
from actcache.store.store import Store
from store_helpers import make_table

SIZE = 50
SITE = SparseSite("features", SIZE)


def dense(i: int) -> np.ndarray:
    """What prompt `i` has: anyone can recompute it. Every fifth prompt has nothing but zeros."""
    rng = np.random.default_rng(i)
    rows = rng.standard_normal((1 + i % 7, SIZE)) * (rng.random((1 + i % 7, SIZE)) < 0.1) * (i % 5 > 0)
    return rows.astype(np.float32)


def sparse(numbers: Any, dtype: Any = np.float32) -> Records:
    position, index, value, lengths = [], [], [], []
    for i in numbers:
        rows = dense(i)
        at = np.nonzero(rows)
        lengths.append(len(at[0]))
        position.append(at[0])
        index.append(at[1])
        value.append(rows[at])
    joined = (np.concatenate(part) for part in (position, index, value))
    position_, index_, value_ = joined
    return SITE.records(make_table(numbers), np.array(lengths), position_, index_, value_.astype(dtype))


def same(store: Store, space: str, numbers: Any) -> None:
    for found, i in zip(store.read(space, make_table(numbers), "features"), numbers, strict=True):
        assert found.is_sparse and found.is_coalesced()
        np.testing.assert_array_equal(found.to_dense().numpy(), dense(i))
