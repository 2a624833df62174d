"""What is measured of batches while they are written is what one write of all of them would measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from actcache.store import batches, segment
from actcache.store.batches import OpenFile
from actcache.store.beside import LARGE
from actcache.store.growing import GrowingFile
from actcache.store.measuring import Measured
from actcache.store.records import Records
from actcache.store.statistics import Moments
from actcache.store.store import Store
from actcache.store.writing import BlockHasher
from store_helpers import (
    SITES,
    every_token,
    fresh,
    growing_writer,
    make_store,
    make_table,
    open_files,
    pooled,
    segment_files,
    text,
    vector,
)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32])
@pytest.mark.parametrize("layout", ["pooled", "tokens"])
def test_what_is_sealed_is_what_one_write_makes(tmp_path: Path, dtype: Any, layout: str) -> None:
    """Checksums, statistics, errors and prompts of the whole, though it was never seen at once."""
    numbers = [[1, 2, 3], [4], [5, 6, 2], [7, 8]]

    def records(some: list[int]) -> Records:
        if layout == "pooled":
            return pooled(some, dim=37, dtype=dtype)
        made = every_token(some, dim=37)
        return Records.tokens(made.prompts, {site: rows.astype(dtype) for site, rows in made.data.items()})

    (tmp_path / "grown").mkdir()
    file = GrowingFile(tmp_path / "grown", "a" * 32, [records([1, 2, 3])], 1 << 18)
    for some in numbers:
        assert file.fits([records(some)])
        file.add([records(some)])
    (held,) = [OpenFile(file.path)]
    held.poll()
    info = file.seal({batch.name: () for batch in file.batches})
    grown = segment.open(tmp_path / "grown" / f"{info.name}.safetensors")
    assert segment.validate(grown.path) == []
    written = segment.write(tmp_path, [records(some) for some in numbers], space="a" * 32, created_ns=info.created_ns)
    at_once = segment.open(tmp_path / f"{written.name}.safetensors")
    assert grown.info.columns == at_once.info.columns == info.columns
    assert [grown.prompts.text_of(i) for i in range(9)] == [at_once.prompts.text_of(i) for i in range(9)]
    np.testing.assert_array_equal(grown.row_offset, at_once.row_offset)
    for site in SITES:
        assert grown.matrix(site).tobytes() == at_once.matrix(site).tobytes()
        joined = np.concatenate([batch.matrix(site) for batch in held.batches])
        assert joined.tobytes() == at_once.matrix(site).tobytes()
        assert grown.error(site).numbers == pytest.approx(at_once.error(site).numbers, rel=1e-6)
        ours, theirs = grown.moments(site), at_once.moments(site)
        assert (ours is None) == (theirs is None) == (dtype is np.int32)
        if ours is not None and theirs is not None:
            parts = Moments.empty(37)
            for batch in held.batches:
                parts.merge(batch.moments(site))  # type: ignore[arg-type]
            for found in (ours, parts):
                assert found.count == theirs.count
                np.testing.assert_allclose(found.mean, theirs.mean, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(found.m2, theirs.m2, rtol=1e-5, atol=1e-6)


def test_errors_of_casting_are_measured(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", index_dir=tmp_path / "index", dtype="float16")
    space = store.open_space({"weights": "abc"}, {"model_name": "org/model"})
    plain = Store(tmp_path / "plain", index_dir=tmp_path / "plain index", dtype="float16")
    plain.open_space({"weights": "abc"}, {"model_name": "org/model"})
    writer = growing_writer(store, space)
    # Float32, that is cast, and float16, that is kept as it comes, go into one file.
    parts = [pooled([1, 2]), pooled([3, 4], dtype=np.float16), pooled([5])]
    for part in parts:
        writer.append([part])
        plain.append(space, part)
    assert len(open_files(store, space)) == 1

    def errors(of: Store) -> list[float]:
        return [
            value
            for s in of.summaries(space)
            for e in s.stored
            for value in (e.rows, e.error_max, e.error_relative, e.cosine)
        ]

    expected = errors(plain)
    assert errors(fresh(store, tmp_path)) == pytest.approx(expected, rel=1e-6)
    writer.finish(False)
    assert errors(fresh(store, tmp_path, "third")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_that_are_cast_and_rows_that_are_not_are_measured_into_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """Of one column, of columns that are otherwise alike, and of parts of one batch."""
    monkeypatch.setattr(GrowingFile, "is_well_filled", in_place)
    store = Store(tmp_path / "store", dtype="float16", index_dir=tmp_path / "index")
    space = store.open_space({"weights": "abc"}, {"model_name": "org/model"})
    given: list[list[Any]] = [
        [np.float16, np.float16], [np.float32, np.float16], [np.float16, np.float32], [np.float16, np.float16],
    ]  # fmt: skip
    groups = []
    for k, dtypes in enumerate(given):
        parts = [pooled([4 * k, 4 * k + 1]), pooled([4 * k + 2, 4 * k + 3])]
        for part in parts[: 1 if k == 3 else 2]:
            part.data = {
                site: rows.astype(dtype) for (site, rows), dtype in zip(part.data.items(), dtypes, strict=True)
            }
        groups.append(parts)
    writer = growing_writer(store, space)
    for group in groups:
        writer.append(group)
    writer.finish(True)
    (path,) = segment_files(store, space)
    assert segment.validate(path) == []
    kept = segment.open(path)
    for site in SITES:
        rows = np.concatenate([part.data[site] for group in groups for part in group], dtype=np.float64)
        found, error = kept.moments(site), kept.error(site)
        assert found is not None and (found.count, error.rows) == (16, 16)
        stored = rows.astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(found.mean, stored.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.m2, ((stored - stored.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-12)
        assert error.given == pytest.approx((rows**2).sum(), rel=1e-6)
        assert error.squares == pytest.approx(((stored - rows) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("gone", [[], [3], [0, 1]])
def test_what_is_copied_is_not_measured_again_unless_some_of_it_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: list[int]
) -> None:
    monkeypatch.setattr(GrowingFile, "is_well_filled", False)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for k in range(4):
        writer.append([pooled([2 * k, 2 * k + 1])])
    if gone:
        store.invalidate(space, [text(i) for i in gone])
    again = []
    moments = batches.Batch.moments
    monkeypatch.setattr(batches.Batch, "moments", lambda self, site: again.append(site) or moments(self, site))
    writer.finish(False)
    (path,) = segment_files(store, space)
    assert segment.validate(path) == [] and bool(again) == bool(gone)
    kept = segment.open(path)
    for site in SITES:
        rows = np.stack([vector(i, site) for i in range(8) if i not in gone]).astype(np.float64)
        found, error = kept.moments(site), kept.error(site)
        assert found is not None and found.count == len(rows) and error.squares == 0 and error.rows >= len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=1e-9)
        given = sum((vector(i, site).astype(np.float64) ** 2).sum() for i in range(8))
        assert gone or (error.rows, error.given) == (8, pytest.approx(given, rel=1e-6))


def large(numbers: list[int], seed: int) -> Records:
    """Records that are looked at beside their writing; their rows begin in the middle of blocks."""
    rng = np.random.default_rng(seed)
    data = {site: rng.standard_normal((len(numbers), 1021), np.float32).astype(np.float16) for site in SITES}
    return Records.pooled(make_table(numbers), "last_token", data)


def test_large_batches_are_what_one_write_makes_too(tmp_path: Path) -> None:
    groups = [
        [large(list(range(k, k + 700)), k), large(list(range(k + 700, k + 1201)), k + 1)] for k in (0, 2000, 4000)
    ]
    assert sum(part.stored_bytes for part in groups[0]) > LARGE
    file = GrowingFile(tmp_path, "a" * 32, groups[0], 1 << 25)
    for group in groups:
        file.add(group)
    (held,) = [OpenFile(file.path)]
    held.poll()
    for group, batch in zip(groups, held.batches, strict=True):
        for site in SITES:
            assert batch.matrix(site).tobytes() == b"".join(part.data[site].tobytes() for part in group)
            assert not len(batch.checks.damaged(site))
    info = file.seal({batch.name: () for batch in file.batches})
    path = tmp_path / f"{info.name}.safetensors"
    assert segment.validate(path) == []
    for site in SITES:
        rows = np.concatenate([part.data[site] for group in groups for part in group]).astype(np.float64)
        moments = segment.open(path).moments(site)
        assert moments is not None and moments.count == len(rows) == 3603
        np.testing.assert_allclose(moments.mean, rows.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=1e-10)


@pytest.mark.parametrize("what", ["update_both", "add_given"])
def test_a_large_batch_that_cannot_be_looked_at_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    wanted = large(list(range(1201)), 0)
    writer.append([wanted])

    def failing(*_: object) -> None:
        raise MemoryError("no room to look")

    with monkeypatch.context() as patched:
        patched.setattr(BlockHasher if what == "update_both" else Measured, what, failing)
        with pytest.raises(MemoryError, match="no room to look"):
            writer.append([large(list(range(2000, 3201)), 1)])
    if what == "update_both":
        # Without checksums there is nothing that could be committed.
        assert not fresh(store, tmp_path).contains(space, [text(2000)], SITES[0], pooling="last_token").any()
    writer.append([large(list(range(4000, 5201)), 2)])
    writer.finish(True)
    assert fresh(store, tmp_path, "third").contains(space, [text(0), text(4000)], SITES[0], pooling="last_token").all()
    assert store.verify().ok
