"""Statistics of a store against numpy in float64, through duplicates, tombs, merges, dtypes and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache.config import STORAGE_DTYPES
from actcache.errors import NotCachedError, OptionError
from actcache.store import segment
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.statistics import Moments, SiteStatistics, as_float
from actcache.store.store import Store
from store_helpers import make_table, segment_files

SITE = "resid_post.0"


def new_store(folder: Path, dtype: str | None) -> tuple[Store, str]:
    store = Store(folder / "store", dtype=dtype, index_dir=folder / "index")
    return store, store.open_space({"weights": "abc"}, {"model_name": "org/model"})


def same_as_numpy(found: SiteStatistics, rows: np.ndarray) -> None:
    exact = rows.astype(np.float64)
    assert found.count == len(exact)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12, atol=1e-13 * exact.std())
    # Of equal numbers numpy itself finds no variance of zero, but what rounding leaves.
    rounding = (1e-15 * np.abs(exact).max(axis=0)) ** 2
    assert (np.abs(found.variance - exact.var(axis=0)) <= 1e-12 * exact.var(axis=0) + rounding).all()
    np.testing.assert_array_equal(found.std, np.sqrt(found.variance))
    assert found.mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-12)


@pytest.mark.parametrize("layout", ["last_token", "tokens"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happened_the_statistics_are_those_of_what_is_read(
    tmp_path_factory: Any, layout: str, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([None, *STORAGE_DTYPES]))
    store, space = new_store(tmp_path_factory.mktemp("store"), dtype)
    alive: set[int] = set()
    for step in range(data.draw(st.integers(1, 4))):
        numbers = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=20))
        table = make_table(numbers)
        rows = len(table) if layout != "tokens" else int(table.token_offset[-1])
        rng = np.random.default_rng(step)
        matrix = (rng.standard_normal((rows, 5)) * [1, 100, 1e-3, 1, 1] + [0, 5, 0, -300, 1]).astype(np.float32)
        make = (
            Records.tokens(table, {SITE: matrix})
            if layout == "tokens"
            else Records.pooled(table, layout, {SITE: matrix})
        )
        store.append(space, make)
        alive |= set(numbers)
        gone = data.draw(st.lists(st.sampled_from(sorted(alive)), max_size=4)) if alive else []
        if gone:
            store.invalidate(space, make_table(sorted(set(gone))))
            alive -= set(gone)
        if data.draw(st.booleans()):
            store.merge(space)
    if not alive:
        return
    place = store.locate(space, table=make_table(sorted(alive)), sites=[SITE], layout=layout)
    read = np.concatenate([as_float(place.rows(i)[0]) for i in range(len(alive))])
    same_as_numpy(store.statistics(space, SITE, pooling=None if layout == "tokens" else layout), read)


def test_statistics_of_whole_segments_read_no_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = new_store(tmp_path, "int8")
    for start in range(0, 400, 100):
        table = make_table(range(start, start + 100))
        store.append(
            space,
            Records.pooled(
                table, "mean", {SITE: np.random.default_rng(start).standard_normal((100, 8)).astype(np.float32)}
            ),
        )

    def refuse(*_: object) -> None:
        raise AssertionError("vectors were read")

    monkeypatch.setattr(segment.Segment, "matrix", refuse)
    assert store.statistics(space, SITE, pooling="mean").count == 400
    with pytest.raises(NotCachedError):
        store.statistics(space, "embed")


@pytest.mark.parametrize("dtype", [None, *STORAGE_DTYPES])
def test_a_long_run_batch_by_batch_has_the_statistics_of_everything(tmp_path: Path, dtype: str | None) -> None:
    """Files that grow, segments made of them, and merging; some rows a thousand times as long as the others."""
    store, space = new_store(tmp_path, dtype)
    rng = np.random.default_rng(0)
    given = []
    with store.writer(space) as writer:
        for start in range(0, 1200, 60):
            table = make_table(range(start, start + 60))
            rows = rng.standard_normal((int(table.token_offset[-1]), 6)) * [1, 30, 1e-2, 1, 1, 0] + [
                0,
                500,
                0,
                -40,
                9,
                3,
            ]
            rows[table.token_offset[:-1]] *= 50
            given.append(rows.astype(np.float32))
            writer.put(Records.tokens(table, {SITE: given[-1]}))
            writer.flush()
        place = store.locate(space, table=make_table(range(1200)), sites=[SITE], layout="tokens")
        during = store.statistics(space, SITE)
    read = np.concatenate([as_float(place.rows(i)[0]) for i in range(1200)])
    same_as_numpy(during, read)
    same_as_numpy(store.statistics(space, SITE), read)
    if dtype is None:
        same_as_numpy(during, np.concatenate(given))


def test_validate_holds_moments_and_scales_against_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    table = PromptTable.build([[i] for i in range(300)])
    store, space = new_store(tmp_path / "right", "int8")
    store.append(space, Records.pooled(table, "mean", {SITE: rows}))
    assert segment.validate(segment_files(store, space)[0]) == []

    update = Moments.update
    for wrong in ("mean", "m2"):

        def spoiled(self: Moments, rows: np.ndarray, wrong: str = wrong) -> None:
            update(self, rows)
            getattr(self, wrong)[3] += 0.1 * self.count

        store, space = new_store(tmp_path / wrong, "int8")
        with monkeypatch.context() as patch:
            patch.setattr(Moments, "update", spoiled)
            store.append(space, Records.pooled(table, "mean", {SITE: rows}))
        (problem,) = segment.validate(segment_files(store, space)[0])
        assert "moments" in problem
        assert "column 3" in problem


def test_statistics_of_parts_merge_into_those_of_the_whole() -> None:
    rows = np.random.default_rng(3).standard_normal((1000, 6)) * [1, 30, 1e-2, 1, 1, 0] + [0, 500, 0, -40, 9, 3]
    found = []
    for part in np.split(rows, [1, 400, 400, 993]):
        moments = Moments.empty(6)
        moments.update(part)
        found.append(SiteStatistics.of(moments))
    total = found[0]
    for other in found[1:]:
        before = total.mean.copy()
        merged = total.merge(other)
        np.testing.assert_array_equal(total.mean, before)
        total = merged
    same_as_numpy(total, rows)
    with pytest.raises(OptionError, match="6 and of 5"):
        total.merge(SiteStatistics(0, np.zeros(5), np.zeros(5), 0.0))


def test_statistics_follow_what_eviction_leaves(tmp_path: Path) -> None:
    store, space = new_store(tmp_path, "float8_e4m3")
    rng = np.random.default_rng(0)
    for start in (0, 300):
        rows = rng.standard_normal((300, 16)).astype(np.float32) + start
        store.append(space, Records.pooled(make_table(range(start, start + 300)), "mean", {SITE: rows}))
    before = store.statistics(space, SITE, pooling="mean")
    assert before.count == 600
    store.evict(0.6 * store.info().total_size_gb)
    left = store.read(space, None, SITE, pooling="mean").numpy()
    assert 0 < len(left) < 600
    same_as_numpy(store.statistics(space, SITE, pooling="mean"), left)
    assert before.count == 600, "what was asked before does not change"
