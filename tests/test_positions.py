"""Positions and pooling: the same meaning for batches, single prompts and stored rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.capture.positions import (
    POOLINGS,
    check_positions,
    each_prompt,
    pool,
    pool_numpy,
    pool_rows,
    resolve_positions,
)
from actcache.errors import LayerRangeError, OptionError


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        (None, [0, 1, 2, 3, 4]),
        ("last", [4]),
        ("first", [0]),
        (2, [2]),
        (-2, [3]),
        ((1, 3), [1, 2]),
        ((-2, 5), [3, 4]),
        ((1, -1), [1, 2, 3]),
        ([0, -1], [0, 4]),
        ([(1, 3), "last", 0], [1, 2, 4, 0]),
        (np.int64(3), [3]),
    ],
)
def test_positions_of_one_prompt(positions: object, expected: list[int]) -> None:
    check_positions(positions)
    assert resolve_positions(positions, 5) == expected


@pytest.mark.parametrize("positions", [5, -6, (2, 6), (3, 3), (4, 2), [0, 9], (-9, 2)])
def test_positions_outside_the_prompt(positions: object) -> None:
    with pytest.raises(LayerRangeError, match="5 tokens"):
        resolve_positions(positions, 5)


@pytest.mark.parametrize("positions", ["end", (1,), (1, 2, 3), [], 1.5, [1.5], ("first", "last"), {"a": 1}, True])
def test_positions_that_are_none(positions: object) -> None:
    with pytest.raises(OptionError):
        check_positions(positions)


def test_positions_per_prompt() -> None:
    assert each_prompt([[0], [1, 2]], 2) == [[0], [1, 2]]
    assert each_prompt([0, 1], 2) == [[0, 1], [0, 1]]
    with pytest.raises(OptionError, match="3 prompts"):
        each_prompt([[0], [1]], 3)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(POOLINGS), st.integers(0, 3), st.booleans())
def test_pooling_ignores_padding(lengths: list[int], pooling: str, shift: int, poisoned: bool) -> None:
    rows = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in lengths]
    padded = torch.full((len(rows), max(lengths) + shift, 3), torch.nan if poisoned else 1e9)
    for i, row in enumerate(rows):
        padded[i, shift : shift + len(row)] = row
    offsets = torch.full((len(rows),), shift)
    pooled = pool(padded, torch.tensor(lengths), pooling, offsets=offsets)
    reference = {
        "last_token": lambda r: r[-1],
        "first_token": lambda r: r[0],
        "mean": lambda r: r.double().mean(0).float(),
        "max": lambda r: r.max(0).values,
        "min": lambda r: r.min(0).values,
    }[pooling]
    for got, row in zip(pooled, rows, strict=True):
        # A mean of at most 9 float32 numbers: a few roundings of their magnitude.
        torch.testing.assert_close(got, reference(row), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(pool_rows(row, pooling), got, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(pool_numpy(row.numpy(), pooling), got.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_narrow_types_pool_in_float32(pooling: str) -> None:
    rows = torch.randn(400, 8).bfloat16()
    stored = rows.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    wide = pool_rows(rows.float(), pooling).bfloat16()
    assert torch.equal(pool_rows(rows, pooling), wide)
    assert torch.equal(pool(rows[None], torch.tensor([400]), pooling)[0], wide)
    pooled = pool_numpy(stored, pooling)
    assert pooled.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(pooled.view(np.int16), wide.view(torch.int16).numpy())


def test_half_precision_means_do_not_overflow() -> None:
    rows = torch.full((100, 2), 60000.0, dtype=torch.float16)
    assert float(pool_rows(rows, "mean")[0]) == 60000.0
    assert float(pool_numpy(rows.numpy(), "mean")[0]) == 60000.0
    assert float(pool(rows[None], torch.tensor([100]), "mean")[0, 0]) == 60000.0


def test_unknown_pooling_and_empty_prompts() -> None:
    with pytest.raises(OptionError, match="last_token"):
        pool_rows(torch.zeros(1, 1), "last")
    with pytest.raises(OptionError, match="0 tokens"):
        pool_rows(torch.zeros(0, 1), "mean")
    with pytest.raises(OptionError, match="0 tokens"):
        pool_numpy(np.zeros((0, 1)), "mean")
