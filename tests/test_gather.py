"""Gathering rows, in every shape of request, against the plain double loop."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import NotCachedError
from actcache.store import gather as module
from actcache.store.gather import gather


def matrices_of(sites: int, rows: int, width: int, dtype: np.dtype, gap: int) -> list[np.ndarray]:
    """Matrices in one piece of memory as in a segment, `gap` rows of something else between them."""
    whole = np.arange(sites * (rows + gap) * width, dtype=np.float32).astype(dtype).reshape(-1, width)
    return [whole[j * (rows + gap) : j * (rows + gap) + rows] for j in range(sites)]


@given(st.data())
def test_any_rows_to_any_places(data):
    sites, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    dtype = np.dtype(data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])))
    matrices = matrices_of(sites, 20, width, dtype, data.draw(st.integers(0, 2)))
    columns = data.draw(st.permutations(range(sites)))[: data.draw(st.integers(1, sites))]
    chosen = [matrices[j] for j in data.draw(st.permutations(range(sites)))[: len(columns)]]
    n = data.draw(st.integers(1, 80))
    rows = np.array(data.draw(st.lists(st.integers(0, 19), min_size=n, max_size=n)), np.int64)
    first = data.draw(st.integers(0, 3))
    at = data.draw(st.one_of(st.just(list(range(first, first + n))), st.permutations(range(n))))
    at = np.array(at, np.int64)
    target = np.dtype(data.draw(st.sampled_from([dtype, np.dtype(np.float32)])))
    out = np.full((n + 4, sites, width), -1, target)
    expected = out.copy()
    for row, place in zip(rows, at, strict=True):
        for matrix, column in zip(chosen, columns, strict=True):
            expected[place, column] = matrix[row].astype(target)
    gather(chosen, rows, out, at, columns)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_several_threads_copy_the_same(monkeypatch, threads):
    monkeypatch.setattr(module, "_THREAD_BYTES", 64)
    monkeypatch.setattr(module, "_allowed_threads", lambda: threads)
    matrices = matrices_of(3, 50, 7, np.dtype(np.float32), 1)
    rows = np.random.default_rng(0).integers(0, 50, 41)
    out = np.empty((41, 3, 7), np.float32)
    gather(matrices, rows, out, np.arange(41), range(3))
    np.testing.assert_array_equal(out, np.stack([m[rows] for m in matrices], axis=1))


@pytest.mark.parametrize("row", [-1, 20, 10**12])
def test_a_row_outside_is_an_error_and_never_another_row(row):
    matrices = matrices_of(2, 20, 3, np.dtype(np.float32), 0)
    out = np.zeros((2, 2, 3), np.float32)
    with pytest.raises(NotCachedError, match=f"row {row} of"):
        gather(matrices, np.array([1, row]), out, np.arange(2), range(2))
    assert not out.any()
