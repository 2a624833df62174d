"""What a storage dtype cannot hold is found, and what storing loses is measured exactly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.config import STORAGE_DTYPES
from actcache.store import segment
from actcache.store.blocks import Rows
from actcache.store.casting import CastError, Piece, cast, overflowing, quantised
from actcache.store.dtypes import code_for, is_scaled, matrix_dtype
from actcache.store.prompts import PromptTable
from actcache.store.quantize import decode_run
from actcache.store.records import Records
from actcache.store.statistics import Moments, as_float
from store_helpers import block_offsets, make_table

NUMPY: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SPACE = "0" * 32


def some_rows(rows: int, dim: int = 48, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.integers(-2, 4, dim)
    return (rng.standard_normal((rows, dim)) * size + rng.standard_normal(dim) * size).astype(np.float32)


def values_of(pieces: list[Piece]) -> np.ndarray:
    """What the pieces hold, in float64, a block of 64 rows at a time."""
    parts = []
    for piece in pieces:
        if piece.scales is None:
            parts.append(as_float(piece.rows).astype(np.float64))
            continue
        scales = np.repeat(piece.scales, 64, axis=0)[: len(piece.rows)]
        codes = piece.rows.astype(np.float64)
        parts.append(codes * scales)
    return np.concatenate(parts)


def pieces_of(rows: np.ndarray, storage: str) -> list[Piece]:
    """`rows` as they are stored, in blocks of 64 rows where there are scales."""
    code = code_for(rows.dtype, storage)
    if not is_scaled(code):
        return list(cast(rows, code))
    return list(quantised(Rows([rows], matrix_dtype(code)), block_offsets(len(rows))))


def joined(pieces: list[Piece]) -> tuple[Moments, CastError]:
    moments, error = Moments.empty(pieces[0].rows.shape[1]), CastError()
    for piece in pieces:
        assert piece.moments is not None
        moments.merge(piece.moments)
        error.add(piece.error)
    return moments, error


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("given_as", ["float32", "float64", "float16", "bfloat16"])
def test_the_error_is_that_of_float64_arithmetic(storage: str, given_as: str) -> None:
    rows = some_rows(3000).astype(NUMPY.get(given_as, np.float64))
    pieces = pieces_of(rows, storage)
    exact, stored = as_float(rows).astype(np.float64), values_of(pieces)
    moments, error = joined(pieces)
    away = stored - exact
    assert error.rows == moments.count == 3000
    assert error.max == pytest.approx(np.abs(away).max(), rel=1e-5, abs=1e-300)
    assert error.relative == pytest.approx(np.linalg.norm(away) / np.linalg.norm(exact), rel=1e-4, abs=1e-300)
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(stored, axis=1)
    cosine = (exact * stored).sum(axis=1) / lengths
    assert error.cosine == pytest.approx(cosine.mean(), abs=1e-13 + 1e-3 * (1 - cosine.mean()))
    assert error.cosine_min == pytest.approx(cosine.min(), abs=1e-13 + 1e-3 * (1 - cosine.min()))
    np.testing.assert_allclose(moments.mean, stored.mean(axis=0), rtol=0, atol=1e-7 * stored.std(axis=0).max())
    np.testing.assert_allclose(moments.variance, stored.var(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("storage", "least", "most"), [("int8", 0.004, 0.008), ("float8_e4m3", 0.015, 0.03)])
def test_the_error_of_the_small_dtypes_is_what_is_promised(storage: str, least: float, most: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2048, 512)).astype(np.float32)
    rows[:, [3, 77]] *= 2000
    _, error = joined(pieces_of(rows, storage))
    assert least < error.relative < most
    assert error.cosine > 1 - 2 * most**2


def test_measuring_goes_on_where_squares_leave_float32() -> None:
    for size in (1e-30, 1e30):
        rows = (np.random.default_rng(0).standard_normal((200, 30)) * size).astype(np.float32)
        pieces = list(cast(rows, "BF16"))
        _, error = joined(pieces)
        exact, stored = rows.astype(np.float64), values_of(pieces)
        assert error.relative == pytest.approx(np.linalg.norm(stored - exact) / np.linalg.norm(exact), rel=1e-4)
        assert error.cosine == pytest.approx(1.0, abs=1e-5)
        assert error.cosine < 1.0
    # Rows of zeros lose nothing; a row that becomes zeros has lost its direction.
    _, error = joined(list(cast(np.zeros((5, 3), np.float32), "F16")))
    assert (error.rows, error.relative, error.cosine) == (5, 0.0, 1.0)
    _, error = joined(list(cast(np.full((5, 3), 1e-9, np.float32), "F16")))
    assert [error.max, error.relative, error.cosine_min] == pytest.approx([1e-9, 1.0, 0.0])


def test_rows_that_are_not_finite_are_not_measured() -> None:
    rows = some_rows(100)
    clean = joined(list(cast(np.delete(rows, [4, 9], axis=0), "F16")))[1]
    rows[4, 1], rows[9, 0] = np.nan, np.inf
    error = joined(list(cast(rows, "F16")))[1]
    assert error.rows == 98
    assert error.max == clean.max
    assert error.angle_max == pytest.approx(clean.angle_max)
    assert error.relative == pytest.approx(clean.relative)


LIMITS = {"float16": 65519.996, "bfloat16": 3.3895313e38 * 1.0019, "float32": 3.4028235e38}


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8", "float8_e4m3"])
def test_a_finite_value_that_would_become_inf_is_found_with_site_and_prompt(storage: str) -> None:
    table = make_table(range(5))
    wide = np.float64 if storage in ("int8", "float8_e4m3") else np.float32
    data = {s: np.ones((int(table.token_offset[-1]), 3), wide) for s in ("a.0", "b.0")}
    records = Records.tokens(table, data)
    limit = LIMITS.get(storage, LIMITS["float32"])
    last = int(table.token_offset[3]) - 1
    data["b.0"][last, 2] = -limit * 0.999
    assert overflowing(records, storage) == []
    data["b.0"][last, 2] = -limit * 1.001
    (found,) = overflowing(records, storage)
    assert (found.prompt, found.site) == (2, "b.0")
    assert found.value == pytest.approx(-limit * 1.001)
    assert "bfloat16" in str(found)
    assert "b.0" in str(found)
    assert overflowing(records, None) == []


def test_inf_and_nan_are_kept_by_dtypes_that_have_them_and_refused_by_those_that_have_not() -> None:
    rows = np.ones((4, 3), np.float32)
    rows[1, 0], rows[3, 2] = np.inf, np.nan
    records = Records.pooled(make_table(range(4)), "mean", {"x": rows})
    for storage in (None, "float16", "bfloat16", "float32"):
        assert overflowing(records, storage) == []
    for storage in ("int8", "float8_e4m3"):
        found = overflowing(records, storage)
        assert [f.prompt for f in found] == [1, 3]
        assert "no inf" in str(found[0])
        assert "no nan" in str(found[1])


def test_integers_are_left_alone() -> None:
    ids = np.arange(8, dtype=np.int64).reshape(4, 2)
    assert code_for(ids.dtype, "int8") == "I64"
    (piece,) = cast(ids, "I64")
    assert piece.rows is ids
    assert piece.moments is None


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_dtype_any_shape_round_trips_through_a_file(tmp_path_factory: Any, data: st.DataObject) -> None:
    storage = data.draw(st.sampled_from(STORAGE_DTYPES))
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    table = PromptTable.build([list(range(n)) for n in lengths])
    dim = data.draw(st.integers(0, 7))
    rows = some_rows(sum(lengths), max(dim, 1), data.draw(st.integers(0, 99)))[:, :dim].copy()
    rows[data.draw(st.integers(0, len(rows) - 1))] = data.draw(st.sampled_from([0.0, 1e-40, -1e-45, 3e4]))
    folder: Path = tmp_path_factory.mktemp("file")
    records = Records(table, "tokens", table.token_offset, {"x": rows, "ids": np.ones((len(rows), 1), np.int32)})
    records.storage = storage
    each = [records.select(np.arange(len(lengths)) == i) for i in range(len(lengths))]
    parts = each if data.draw(st.booleans()) else [records]
    path = folder / f"{segment.write(folder, parts, space=SPACE).name}.safetensors"
    assert segment.validate(path) == []
    found = segment.open(path)
    if storage in NUMPY:
        with np.errstate(over="ignore"):
            expected = as_float(rows.astype(NUMPY[storage]))
    else:
        codes, scales = found.matrix("x"), found.scales("x")
        assert scales is not None
        blocks = found.block_offset.tolist()
        expected = decode_run(codes, scales, found.block_offset, 0, len(rows))
        largest = [np.abs(rows[a:b]).max(axis=0) for a, b in pairwise(blocks)]
        share = 1 / 250 if storage == "int8" else 1 / 15
        bound = np.repeat(np.array(largest), np.diff(blocks), axis=0) * share + 2.0**-126
        assert (np.abs(expected - rows) <= bound).all()
    np.testing.assert_array_equal(as_float(found.values("x", 0, len(rows))), expected)
    moments = found.moments("x")
    assert moments is not None
    exact = expected.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), atol=1e-6 * exact.std(axis=0).max(initial=0))
    np.testing.assert_allclose(moments.variance, exact.var(axis=0), rtol=1e-5, atol=1e-12)
