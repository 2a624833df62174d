"""Codes and scales: held against ml_dtypes and plain float64, with outliers, zeros, denormals, inf and nan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actcache.store import quantize
from store_helpers import block_offsets

DTYPES = [quantize.INT8, quantize.FLOAT8]
both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


def outliers(rows: int, dim: int = 256, seed: int = 0) -> np.ndarray:
    """Ordinary dimensions beside some a thousand times as large, as residual streams have them."""
    rng = np.random.default_rng(seed)
    size = np.ones(dim)
    size[rng.choice(dim, 3, replace=False)] = 1000
    return (rng.standard_normal((rows, dim)) * size).astype(np.float32)


def decoded(rows: np.ndarray, dtype: Any) -> np.ndarray:
    codes, scales = quantize.encode(rows, dtype, block_offsets(len(rows)))
    return quantize.decode_run(codes, scales, block_offsets(len(rows)), 0, len(rows))


def by_hand(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Code times scale, row by row in float64."""
    values = codes.astype(np.float64)
    if codes.dtype == np.int8:
        values[codes == -128] = np.nan
    return np.stack([values[i] * scales[i // 64].astype(np.float64) for i in range(len(codes))])


@both
@settings(max_examples=150, deadline=None)
@given(
    rows=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 140), st.integers(0, 5)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 3.4028235e38, -3.4028235e38, 1e-38, 65504.0]),
    )
)
def test_every_finite_value_comes_back_within_half_a_step(rows: np.ndarray, dtype: Any) -> None:
    codes, scales = quantize.encode(rows, dtype, block_offsets(len(rows)))
    found = quantize.decode_run(codes, scales, block_offsets(len(rows)), 0, len(rows))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, by_hand(codes, scales).astype(np.float32))
    exact = rows.astype(np.float64)
    for first in range(0, len(rows), 64):
        block = slice(first, first + 64)
        largest = np.abs(exact[block]).max(axis=0)
        # Half a step of the largest code, or what the smallest scale there is cannot tell from zero.
        step = largest / 127 if dtype == quantize.INT8 else np.maximum(np.abs(exact[block]) / 8, largest / 448 / 512)
        bound = step / 2 * (1 + 1e-6) + 2.0**-127
        assert (np.abs(found[block] - exact[block]) <= bound).all()
        assert (found[block][:, largest == 0] == 0).all()


@both
def test_codes_are_those_of_ml_dtypes(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    rows = (rng.uniform(-1, 1, (640, 50)) * 10.0 ** rng.integers(-6, 1, (640, 50))).astype(np.float32)
    rows[::64] = 1
    rows *= np.float32(quantize.LARGEST[dtype])
    codes, scales = quantize.encode(rows, dtype, block_offsets(len(rows)))
    assert (scales == 1).all()
    expected = rows.astype(dtype) if dtype == quantize.FLOAT8 else np.rint(rows.astype(np.float64)).astype(np.int8)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))


def test_ties_go_to_the_even_code_and_every_float8_is_kept() -> None:
    every = np.arange(256, dtype=np.uint8).view(quantize.FLOAT8).astype(np.float32)
    every = every[np.isfinite(every)]
    middle = (np.sort(every)[:-1] + np.sort(every)[1:]) / 2
    row = np.concatenate([every, middle]).astype(np.float32)
    # The second row makes every scale 1.
    codes, scales = quantize.encode(np.stack([row, np.full_like(row, 448)]), quantize.FLOAT8, block_offsets(2))
    assert (scales == 1).all()
    np.testing.assert_array_equal(codes[0].view(np.uint8), row.astype(quantize.FLOAT8).view(np.uint8))
    assert len(set(codes[0].view(np.uint8).tolist())) == len(every)


@both
def test_outlier_dimensions_cost_the_others_nothing(dtype: Any) -> None:
    rows = outliers(512)
    found = decoded(rows, dtype)
    relative = np.sqrt(((found - rows) ** 2).mean(axis=0, dtype=np.float64)) / rows.std(axis=0)
    limit = 0.008 if dtype == quantize.INT8 else 0.03
    assert relative.max() < limit
    assert relative.mean() > limit / 4
    # What a scale for each row would give, as this test must be able to tell the two apart.
    ordinary = rows.std(axis=0) < 10
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    naive = np.rint(rows / scale) * scale
    assert np.sqrt(((naive - rows)[:, ordinary] ** 2).mean()) > 0.1


@both
def test_what_is_not_finite_becomes_nan_and_harms_nobody(dtype: Any) -> None:
    rows = outliers(100, 8)
    clean = decoded(np.where(np.arange(8) == 3, 0, rows).astype(np.float32), dtype)
    strange = rows.copy()
    strange[70, 3], strange[71, 3], strange[99, 3] = np.inf, -np.inf, np.nan
    found = decoded(strange, dtype)
    assert np.isnan(found[[70, 71, 99], 3]).all()
    assert np.isfinite(np.delete(found, [70, 71, 99], axis=0)).all()
    np.testing.assert_array_equal(np.delete(found, 3, axis=1), np.delete(clean, 3, axis=1))
    kept = np.delete(np.arange(100), [70, 71, 99])
    np.testing.assert_allclose(found[kept, 3], rows[kept, 3], atol=np.abs(rows[:, 3]).max() / 16)
    assert np.isnan(decoded(np.full((3, 2), np.nan, np.float32), dtype)).all()


@both
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_can_be_had_in_any_order(dtype: Any, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=6))
    dim = data.draw(st.integers(1, 9))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    parts = [
        quantize.encode(outliers(size, max(dim, 3), seed)[:, :dim].copy(), dtype, np.array([0, size]))
        for seed, size in enumerate(sizes)
    ]
    codes, scales = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    block = np.repeat(np.arange(len(sizes)), sizes)
    expected = (codes.astype(np.float32) * scales[block]).astype(np.float32)
    rows = np.array(data.draw(st.lists(st.integers(0, len(codes) - 1), max_size=200)), np.int64)
    if data.draw(st.booleans()):
        rows = np.sort(rows)
    n = len(rows) + 3
    at = np.sort(np.random.default_rng(0).permutation(n)[: len(rows)])
    for kind in (np.float32, np.float16, np.float64):
        out = np.full((n, dim), 7, kind)
        quantize.gather(codes, scales, offsets, rows, out, at)
        np.testing.assert_array_equal(out[at], expected[rows].astype(kind))
        assert (np.delete(out, at, axis=0) == 7).all()
    start = data.draw(st.integers(0, len(codes)))
    stop = data.draw(st.integers(start, len(codes)))
    np.testing.assert_array_equal(quantize.decode_run(codes, scales, offsets, start, stop), expected[start:stop])
