"""Which rows share scales: outlier rows cost their neighbours nothing, and a longer prompt depends on no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache.store import blocks, quantize, segment
from actcache.store.blocks import Rows, plan, sharing
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store
from store_helpers import block_offsets

SMALL = ["int8", "float8_e4m3"]
DTYPES = {"int8": quantize.INT8, "float8_e4m3": quantize.FLOAT8}
# What a row of ordinary numbers loses without any outlier beside it, at most: measured below.
ORDINARY = {"int8": 0.0075, "float8_e4m3": 0.032}
SPACE = "0" * 32


def ordinary(rows: int, dim: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def new_store(folder: Path, dtype: str) -> tuple[Store, str]:
    store = Store(folder / "store", dtype=dtype, index_dir=folder / "index")
    return store, store.open_space({"weights": "abc"}, {"model_name": "org/model"})


def lost(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What each row lost, as a share of its length."""
    away, exact = found.astype(np.float64) - rows, rows.astype(np.float64)
    return np.asarray(np.linalg.norm(away, axis=1) / np.linalg.norm(exact, axis=1))


def table_of(lengths: Any, first: int = 0) -> PromptTable:
    return PromptTable.build([[first + i, *range(n - 1)] for i, n in enumerate(lengths)])


def stored(folder: Path, dtype: str, lengths: Any, rows: np.ndarray) -> tuple[np.ndarray, segment.Segment]:
    """What is read back of token rows, all prompts together, and the segment."""
    store, space = new_store(folder, dtype)
    table = table_of(lengths)
    info = store.append(space, Records.tokens(table, {"x": rows}))
    values = store.read(space, table, "x")
    return torch.cat(values).numpy(), segment.open(store.root / space / f"{info.name}.safetensors")


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("size", [10, 100, 1000, 1e6])
@pytest.mark.parametrize("dims", ["all", "two"])
def test_the_row_of_a_first_token_costs_the_others_nothing(tmp_path: Path, dtype: str, size: float, dims: str) -> None:
    lengths = [3, 40, 1, 17, 100, 64, 2, 2, 30]
    rows = ordinary(sum(lengths))
    clean, _ = stored(tmp_path / "clean", dtype, lengths, rows)
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    others = np.setdiff1d(np.arange(len(rows)), first)
    assert lost(clean, rows).max() < ORDINARY[dtype]
    tall = rows.copy()
    if dims == "all":
        tall[first] *= size
    else:
        tall[np.ix_(first, [7, 100])] = size * 5
    found, file = stored(tmp_path / "tall", dtype, lengths, tall)
    # Beside a row ten times as long, or long in two dimensions where another has next to nothing, a little may go.
    limit = ORDINARY[dtype] + (0 if size >= 100 and dims == "all" else blocks.MOST_LOST)
    assert lost(found, tall)[others].max() < limit
    assert lost(found, tall)[first].max() < limit
    assert segment.validate(file.path) == []
    # This test can tell: with scales for 64 rows whatever they are, little is left of int8 rows.
    fixed = block_offsets(len(tall))
    codes, scales = quantize.encode(tall, DTYPES[dtype], fixed)
    naive = lost(quantize.decode_run(codes, scales, fixed, 0, len(tall)), tall)[others]
    if dtype == "int8" and size >= 100:
        assert naive.max() > (0.3 if dims == "all" else 0.05)


@pytest.mark.parametrize("dtype", SMALL)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_outliers_anywhere_among_prompts_of_any_length(tmp_path_factory: Any, dtype: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))
    dims = data.draw(st.lists(st.sampled_from([8, 64]), min_size=1, max_size=2))
    total = sum(lengths)
    tall = data.draw(st.lists(st.integers(0, total - 1), max_size=8, unique=True))
    sites = {}
    for j, dim in enumerate(dims):
        rows = ordinary(total, dim, seed=j)
        for at in tall:
            rows[at] *= data.draw(st.sampled_from([1e-3, 30.0, 1e3, 1e12]))
        sites[f"resid_post.{j}"] = rows
    # Long rows can be split into batches anywhere between prompts.
    table = table_of(lengths)
    records = Records(table, "tokens", table.token_offset, dict(sites), storage=dtype)
    each = [records.select(np.arange(len(lengths)) == i) for i in range(len(lengths))]
    parts = each if data.draw(st.booleans()) else [records]
    folder = tmp_path_factory.mktemp("blocks")
    file = segment.open(folder / f"{segment.write(folder, parts, space=SPACE).name}.safetensors")
    assert segment.validate(file.path) == []
    sizes = np.diff(file.block_offset)
    assert sizes.min() >= 1
    assert sizes.max() <= 64
    # Of few dimensions one may be close to zero in a whole row, so that the bound is looser than with many.
    limit = blocks.MOST_LOST * 2 + ORDINARY[dtype] * (4 if min(dims) < 64 else 1)
    for site, rows in sites.items():
        assert lost(file.values(site, 0, total), rows).max() < limit
    if len(tall) < total // 3:
        assert len(sizes) <= sum(-(-n // 64) for n in lengths) + 2 * len(tall) + 2


@pytest.mark.parametrize("dtype", SMALL)
def test_what_is_stored_of_a_longer_prompt_does_not_depend_on_the_others(tmp_path: Path, dtype: str) -> None:
    lengths = [5, 40, 16, 3, 200, 9, 64]
    offset = np.concatenate([[0], np.cumsum(lengths)])
    rows = ordinary(int(offset[-1])) * np.repeat([1, 3, 0.5, 50, 2, 20, 1], lengths)[:, None].astype(np.float32)
    found, file = stored(tmp_path / "together", dtype, lengths, rows)
    codes, edges = file.matrix("x"), file.block_offset.tolist()
    for i, length in enumerate(lengths):
        mine = slice(offset[i], offset[i + 1])
        alone, single = stored(tmp_path / str(i), dtype, [length], rows[mine].copy())
        if length >= blocks.OWN_ROWS:
            assert alone.tobytes() == found[mine].tobytes()
            assert single.matrix("x").tobytes() == codes[mine].tobytes()
            assert {int(offset[i]), int(offset[i + 1])} <= set(edges)
        else:
            assert lost(found[mine], rows[mine]).max() < blocks.MOST_LOST + ORDINARY[dtype]


def test_short_prompts_and_pooled_rows_share_scales(tmp_path: Path) -> None:
    _, file = stored(tmp_path / "short", "int8", [2] * 64, ordinary(128))
    assert np.diff(file.block_offset).tolist() == [64, 64]
    store, space = new_store(tmp_path / "pooled", "int8")
    table = table_of([40] * 200)
    info = store.append(space, Records.pooled(table, "mean", {"x": ordinary(200)}))
    file = segment.open(store.root / space / f"{info.name}.safetensors")
    assert np.diff(file.block_offset).tolist() == [64, 64, 64, 8]


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=SMALL)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_a_block_ends_where_the_arithmetic_says(dtype: Any, size: float) -> None:
    """Held against the definition, every number of rows tried, in float64."""
    rng = np.random.default_rng(3)
    steps = {quantize.INT8: 127.0, quantize.FLOAT8: 448 * 512.0}[dtype]
    ends = set()
    for spread in (0.1, 1.0, 3.0, 9.0):
        rows = rng.standard_normal((64, 24)) * np.exp(spread * rng.standard_normal((64, 1)))
        rows *= rng.random((64, 24)) < 0.7
        rows[:, 3] *= 100
        rows = (rows * size).astype(np.float32)
        exact = np.abs(rows.astype(np.float64))
        found = sharing(rows, dtype)

        def worst(count: int, exact: np.ndarray = exact) -> float:
            step = exact[:count].max(axis=0) / steps / np.sqrt(12)
            taken = np.linalg.norm(np.minimum(exact[:count], step), axis=1)
            length = np.linalg.norm(exact[:count], axis=1)
            return float(np.where(length > 0, taken / np.where(length > 0, length, 1), 0).max())

        assert found == 1 or worst(found) <= blocks.MOST_LOST * (1 + 1e-5)
        assert found == 64 or worst(found + 1) >= blocks.MOST_LOST * (1 - 1e-5)
        ends.add(found)
    assert len(ends) > 1


def test_zeros_and_what_is_not_finite_split_nothing() -> None:
    rows = ordinary(64, 16)
    rows[5] = 0
    rows[9, 3], rows[11, 4] = np.inf, np.nan
    assert sharing(rows, quantize.INT8) == 64
    assert sharing(np.zeros((64, 16), np.float32), quantize.INT8) == 64
    assert sharing(np.zeros((7, 0), np.float32), quantize.INT8) == 7
    doubles = rows.astype(np.float64)
    doubles[20] = 1e300
    assert sharing(doubles, quantize.INT8) == 64


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=SMALL)
@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64])
def test_what_is_found_by_lengths_alone_is_what_is_found_by_looking_closely(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, given: Any
) -> None:
    rng = np.random.default_rng(5)
    columns = []
    for spread, outlier in ((0.0, 1), (0.3, 1), (0.05, 30), (0.0, 300)):
        rows = ordinary(1500, 48, seed=len(columns)) * np.exp(spread * rng.standard_normal((1500, 1)))
        rows[:, 7] *= outlier
        rows[700 + len(columns)] *= 100 if given is np.float16 else 1e8
        rows[1300:1310] = 0
        if len(columns) == 2:
            rows[900, 3], rows[1000, 4] = np.inf, np.nan
        columns.append(rows.astype(given))
    lengths = np.concatenate([np.ones(900, int), rng.integers(1, 40, 15), np.ones(1500, int)])
    offset = np.concatenate([[0], np.minimum(np.cumsum(lengths), 1500)])
    offset = offset[: np.argmax(offset == 1500) + 1]

    def planned(columns: list[np.ndarray]) -> list[int]:
        return plan([Rows([rows[:333], rows[333:]], dtype) for rows in columns], offset).tolist()

    found = [planned(columns[:1]), planned(columns[1:]), planned(columns)]
    monkeypatch.setattr(
        blocks._Alike, "sharing", lambda self, at, size: sharing(self.rows.between(at, at + size), dtype)
    )
    assert found == [planned(columns[:1]), planned(columns[1:]), planned(columns)]
    assert len(set(map(len, found))) > 1 or (given is np.float16 and dtype == quantize.FLOAT8)


def test_rows_that_lie_in_several_arrays_are_planned_as_one() -> None:
    rows = ordinary(500, 32)
    rows[[3, 70, 71, 300]] *= 1000
    whole = plan([Rows([rows], quantize.INT8)], np.arange(501))
    for cuts in ([100], [1, 2, 3, 4], [64, 64, 128], [0, 499]):
        parts = np.split(rows, cuts)
        assert plan([Rows(parts, quantize.INT8)], np.arange(501)).tolist() == whole.tolist()
    # A row that is long at any site is a block of its own, and what lies before it.
    assert {3, 4, 70, 72, 300, 301} <= set(whole.tolist())
    calm = [Rows([ordinary(500, 8, seed=j)], quantize.INT8) for j in range(2)]
    assert plan([calm[0], Rows([rows], quantize.INT8), calm[1]], np.arange(501)).tolist() == whole.tolist()


@pytest.mark.parametrize("dtype", SMALL)
def test_every_flipped_byte_of_a_segment_of_many_blocks_is_detected(tmp_path: Path, dtype: str) -> None:
    rows = ordinary(23, 5)
    rows[[0, 18]] *= 1e4
    table = table_of([18, 5])
    records = Records(table, "tokens", table.token_offset, {"x": rows}, storage=dtype)
    path = tmp_path / f"{segment.write(tmp_path, records, space=SPACE).name}.safetensors"
    original = path.read_bytes()
    assert len(segment.open(path).block_offset) == (5 if dtype == "int8" else 3)
    victim = tmp_path / ("f" * 32 + ".safetensors")
    unseen = []
    for at in range(len(original)):
        broken = bytearray(original)
        broken[at] ^= 0x41
        victim.write_bytes(broken)
        if not segment.validate(victim):
            unseen.append(at)
    assert unseen == []


@pytest.mark.parametrize("dtype", SMALL)
def test_dropping_and_merging_prompts_with_outliers_changes_no_value(tmp_path: Path, dtype: str) -> None:
    store, space = new_store(tmp_path, dtype)
    lengths = [20, 3, 70, 1, 33, 16]
    read: dict[int, np.ndarray] = {}
    for k in range(3):
        table = table_of(lengths, first=100 * k)
        rows = ordinary(sum(lengths), 16, seed=k)
        rows[table.token_offset[:-1]] *= 500
        store.append(space, Records.tokens(table, {"x": rows}))
        read |= {100 * k + i: v.numpy() for i, v in enumerate(store.read(space, table, "x"))}
        gone = [k, 5 - k]
        store.invalidate(space, table.select(gone))
        read = {number: v for number, v in read.items() if number - 100 * k not in gone}
        store.merge(space)
    store.compact()
    left = store.prompts(space)
    assert len(left) == len(read) == 12
    for ids, values in zip(left.ids, store.read(space, left, "x"), strict=True):
        assert ids is not None
        np.testing.assert_array_equal(values.numpy(), read[int(ids[0])])
    assert store.verify().ok
