"""Moments against arithmetic in extended precision: every dtype, any size, any mean, outliers, and any merging."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store.statistics import JointMoments, Moments

DTYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def moments(rows: np.ndarray) -> Moments:
    found = Moments.empty(rows.shape[1])
    found.update(rows)
    return found


def same(found: Moments, rows: np.ndarray, rel: float = 1e-12) -> None:
    exact = rows.astype(np.float64).astype(np.longdouble)
    assert found.count == len(rows)
    mean = exact.mean(axis=0)
    m2 = ((exact - mean) ** 2).sum(axis=0)
    size = np.abs(exact).max(axis=0, initial=0)
    # A mean near zero is known as well as the values that it is the mean of.
    assert (np.abs(found.mean - mean) <= rel * np.abs(mean) + rel / 100 * size).all()
    # Means are kept in float64, so that those which are merged differ by their last bits at best.
    last = len(rows) * (4e-16 * size) ** 2
    assert (np.abs(found.m2 - m2) <= rel * m2 + last + 2 * np.sqrt(m2 * last)).all()
    norms = np.sqrt((exact**2).sum(axis=1)).sum()
    assert abs(found.norms - norms) <= rel * norms


def hard_rows(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Dimensions with means from nothing to 2000 times their spread, constant ones, and rows that are far longer."""
    spread = rng.choice([0.0, 1e-3, 1.0, 20.0], dim)
    rows = rng.standard_normal((n, dim)) * spread + rng.choice([0.0, 1.0, -8.0, 2000.0], dim)
    rows[rng.random(n) < 0.05] *= rng.choice([-1.0, 20.0])
    return rows


@all_dtypes
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 700), dim=st.sampled_from([1, 3, 257, 1500]), seed=st.integers(0, 2**32), data=st.data())
def test_moments_are_those_of_extended_precision_however_they_are_put_together(
    dtype: Any, n: int, dim: int, seed: int, data: st.DataObject
) -> None:
    rows = hard_rows(np.random.default_rng(seed), n, dim).astype(dtype)
    same(moments(rows), rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    one, total = Moments.empty(dim), Moments.empty(dim)
    for part in np.split(rows, cuts):
        one.update(part)
        total.merge(moments(part))
    same(one, rows)
    same(total, rows)


@all_dtypes
@pytest.mark.parametrize("dim", [3, 1500])
def test_columns_that_are_measured_together_are_as_measured_apart(dtype: Any, dim: int) -> None:
    rng = np.random.default_rng(dim)
    columns = [hard_rows(rng, 700, dim).astype(dtype) for _ in range(4)]
    columns[2][17, 1], columns[2][600, 2] = np.inf, np.nan
    joint = JointMoments(4, dim)
    for start, stop in ((0, 1), (1, 1), (1, 65), (65, 400), (400, 700)):
        joint.update([rows[start:stop] for rows in columns])
    with np.errstate(invalid="ignore"):
        for k, rows in enumerate(columns):
            # Without the two that are not numbers, which the next test is about.
            finite = np.delete(np.arange(dim), [1, 2]) if k == 2 else np.arange(dim)
            found = joint.of(k)
            found.mean, found.m2 = found.mean[finite], found.m2[finite]
            found.norms = found.norms if k != 2 else float(np.linalg.norm(rows[:, finite].astype(float), axis=1).sum())
            same(found, rows[:, finite])
    assert not np.isfinite(joint.of(2).mean[[1, 2]]).any()
    taken = joint.of(0)
    joint.update([rows[:5] for rows in columns])
    assert taken.count == 700 and joint.of(0).count == 705, "what was taken out is a copy"


def test_the_first_rows_of_joint_moments_may_be_too_large_to_square() -> None:
    joint = JointMoments(2, 3)
    joint.update([np.full((2, 3), 1e200), np.full((2, 3), -3.0)])
    for k, value in enumerate((1e200, -3.0)):
        assert (joint.of(k).mean == value).all() and (joint.of(k).m2 == 0).all()


@all_dtypes
def test_what_numpy_finds_in_float64(dtype: Any) -> None:
    """The claim as a caller would check it: a whole set against numpy's own float64."""
    rows = (np.random.default_rng(0).standard_normal((20_000, 48)) * 3 + np.arange(48)).astype(dtype)
    exact = rows.astype(np.float64)
    found = Moments.empty(48)
    for start in range(0, len(rows), 64):
        found.update(rows[start : start + 64])
    np.testing.assert_allclose(found.mean[1:], exact.mean(axis=0)[1:], rtol=1e-12)
    np.testing.assert_allclose(found.variance, exact.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, exact.std(axis=0), rtol=1e-12)
    assert found.mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-12)


@all_dtypes
def test_equal_rows_have_no_variance(dtype: Any) -> None:
    rows = np.tile(np.array([0.1, -3.7, 1e4, 0.0]), (300, 1)).astype(dtype)
    # But for the rounding of their mean.
    assert (moments(rows).std <= 1e-15 * np.abs(rows[0].astype(np.float64))).all()
    np.testing.assert_allclose(moments(rows).mean, rows[0].astype(np.float64), rtol=1e-15)


@all_dtypes
def test_what_is_not_finite_spoils_its_own_dimension(dtype: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(dtype)
    clean = moments(rows)
    rows[7, 2], rows[100, 5] = np.inf, np.nan
    found = moments(rows)
    others = [0, 1, 3, 4, 6, 7]
    assert found.mean[2] == np.inf
    assert np.isnan(found.mean[5])
    assert not np.isfinite(found.m2[[2, 5]]).any()
    np.testing.assert_allclose(found.mean[others], clean.mean[others], rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(found.m2[others], clean.m2[others], rtol=1e-14)


def test_the_ends_of_float16() -> None:
    rows = np.array([[65504.0, 2**-24, -(2**-14)], [-65504.0, 3 * 2**-24, 2**-14], [65504.0, 0, 1]], np.float16)
    same(moments(np.tile(rows, (50, 1))), np.tile(rows, (50, 1)))


def test_numbers_whose_squares_need_float64() -> None:
    rows = (np.random.default_rng(0).standard_normal((100, 4)) * [1e30, 1e-30, 1, 1e38 / 5]).astype(np.float32)
    same(moments(rows), rows)


def test_no_rows_and_no_dimensions() -> None:
    found = moments(np.zeros((0, 3), np.float32))
    assert (found.count, found.mean.tolist(), found.variance.tolist()) == (0, [0.0] * 3, [0.0] * 3)
    assert moments(np.zeros((5, 0), np.float32)).count == 5
    one = moments(np.array([[3.0, 4.0]], np.float32))
    assert (one.count, one.mean.tolist(), one.m2.tolist(), one.mean_norm) == (1, [3.0, 4.0], [0.0, 0.0], 5.0)
