"""Sparse matrices in a store: any number of rows for a prompt, through merging, deletion, damage and other places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import actcache as ac
from actcache.errors import LayerRangeError, NotCachedError, OptionError
from actcache.store import segment
from actcache.store.records import SPARSE, Records
from actcache.store.sparse import SparseSite
from actcache.store.store import Store
from sparse_helpers import SITE, SIZE, dense, same, sparse
from store_helpers import make_store, make_table, open_files, segment_files, text


def test_numbers_come_back_after_whatever_a_store_does(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for start in range(0, 60, 12):
        store.append(space, sparse(range(start, start + 12)))
    same(store, space, range(60))
    assert store.contains(space, [text(3), "something else"], "features").tolist() == [True, False]
    store.append(space, sparse([5, 10, 15, 20]))
    store.invalidate(space, make_table([0, 7, 30]))
    left = [i for i in range(60) if i not in (0, 7, 30)]
    same(store, space, left)
    store.merge(space)
    assert len(segment_files(store, space)) == 1
    same(Store(store.folder, index_dir=tmp_path / "other"), space, left)
    assert store.verify().ok
    assert [segment.validate(path) for path in segment_files(store, space)] == [[]]
    everything = store.read(space, None, "features")
    assert len(everything) == len(left) == len(store.prompts(space))
    with pytest.raises(NotCachedError, match="1 of 2 prompts"):
        store.read(space, make_table([1, 7]), "features")
    values = np.concatenate([d[d != 0] for d in map(dense, left)])
    known = store.statistics(space, SITE.columns[2], pooling=SPARSE)
    assert known.count == len(values)
    np.testing.assert_allclose(known.mean, [values.astype(float).mean()], rtol=1e-12)


def test_prompts_of_which_nothing_is_stored_but_zeros(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, sparse([0, 5, 10]))
    assert segment.validate(segment_files(store, space)[0]) == []
    same(store, space, [10, 0, 5])
    store.append(space, sparse([15]))
    store.merge(space)
    same(store, space, [0, 5, 10, 15])
    assert store.sparse_counts(space, SITE, make_table([0, 15])).tolist() == [0] * SIZE


def test_rows_are_cut_as_dense_ones_are(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, sparse(range(1, 20)))
    for positions in ("last", "first", -1, 0, (0, 1), ["last", 0], (1, None)):
        for i, found in enumerate(store.read(space, None, "features", positions=positions), start=1):
            rows = dense(i)
            cut = {"last": rows[-1:], "first": rows[:1]}.get(positions) if isinstance(positions, str) else None
            if isinstance(positions, int):
                cut = rows[positions][None]
            elif isinstance(positions, tuple):
                cut = rows[slice(*positions)]
            elif isinstance(positions, list):
                cut = np.stack([rows[-1], rows[0]])
            np.testing.assert_array_equal(found.to_dense().numpy(), cut)


def test_a_column_is_found_without_reading_it_dense(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for start in range(0, 40, 10):
        store.append(space, sparse(range(start, start + 10)))
    store.invalidate(space, make_table([11]))
    table = store.prompts(space)
    numbers = [int(table.tokens(k)[0]) for k in range(len(table))]
    for column in (0, 17, SIZE - 1):
        prompt, position, value = store.sparse_column(space, SITE, table, column)
        expected = [(k, t, v) for k, i in enumerate(numbers) for t, v in enumerate(dense(i)[:, column]) if v]
        assert list(zip(prompt.tolist(), position.tolist(), value.tolist(), strict=True)) == expected
    counts = store.sparse_counts(space, SITE, table)
    np.testing.assert_array_equal(counts, sum((dense(i) != 0).sum(axis=0) for i in numbers))
    with pytest.raises(LayerRangeError, match="0 to 49"):
        store.sparse_column(space, SITE, table, SIZE)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_stay_of_their_dtype_in_a_store_of_another(tmp_path: Path, dtype: Any) -> None:
    store = Store(tmp_path / "store", dtype="int8", index_dir=tmp_path / "index")
    space = store.open_space({"weights": "abc"}, {"model_name": "org/model"})
    store.append(space, sparse([1, 2], dtype))
    (found, _) = store.read(space, make_table([1, 2]), "features")
    assert str(found.dtype) == f"torch.{np.dtype(dtype).name}"
    np.testing.assert_array_equal(found.to_dense().double().numpy(), dense(1).astype(dtype).astype(float))
    with pytest.raises(OptionError, match="leave out dtype="):
        store.read(space, make_table([1]), "features", dtype="float32")


def test_a_writer_makes_segments_of_them_behind_the_caller(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space) as writer:
        for start in range(0, 100, 4):
            writer.put(sparse(range(start, start + 4)))
            if start % 20 == 0:
                writer.flush()
                assert not open_files(store, space)
    same(store, space, range(100))
    assert len(segment_files(store, space)) < 10


def test_in_a_place_elsewhere(tmp_path: Path) -> None:
    backend = ac.MemoryBackend()
    with Store(backend, index_dir=tmp_path / "one") as store:
        space = store.open_space({"weights": "abc"}, {"model_name": "org/model"})
        for start in (0, 20):
            store.append(space, sparse(range(start, start + 20)))
    other = Store(backend, index_dir=tmp_path / "two")
    same(other, space, [3, 39, 0, 21])
    assert other.sparse_counts(space, SITE, make_table(range(40))).sum() == sum(
        (dense(i) != 0).sum() for i in range(40)
    )


def test_damage_is_a_miss_of_the_prompts_it_touches(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    many = range(12000)
    store.append(space, sparse(many))
    (path,) = segment_files(store, space)
    opened = segment.open(path)
    (value,) = opened.parts(SITE.columns[2])
    assert value.nbytes > segment.BLOCK
    with path.open("r+b") as file:
        file.seek(value.stop - 8)
        file.write(b"\xff" * 8)
    fresh = Store(store.folder, index_dir=tmp_path / "fresh")
    same(fresh, space, range(1000))
    last = int(np.flatnonzero(np.diff(opened.row_offset))[-1])
    with pytest.raises(NotCachedError):
        fresh.read(space, make_table([last]), "features")
    assert any("checksum" in problem for problem in segment.validate(path))
    report = fresh.verify(repair=True)
    assert report.repaired
    assert fresh.verify().ok
    same(fresh, space, range(1000))


def test_eviction_takes_whole_prompts(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for start in range(0, 4000, 1000):
        store.append(space, sparse(range(start, start + 1000)))
    same(store, space, range(3000, 3500))
    store.evict(0.5 * store.info().total_size_gb)
    left = [int(ids[0]) for ids in store.prompts(space).ids if ids is not None]
    assert 0 < len(left) < 4000
    same(store, space, left)


def spoiled(part: int, at: int, value: float) -> Records:
    records = sparse(range(1, 5))
    records.data[SITE.columns[part]][at] = value
    return records


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        (lambda: spoiled(0, 0, -1), "position outside"),
        (lambda: spoiled(0, 0, 99), "position outside"),
        (lambda: spoiled(1, 0, SIZE), "index outside of 50"),
        (lambda: spoiled(1, 0, -1), "index outside of 50"),
        (lambda: spoiled(1, 1, 0), "not ordered"),
        (lambda: spoiled(2, 2, 0.0), "a zero"),
    ],
)
def test_validate_looks_at_the_numbers(tmp_path: Path, records: Any, problem: str) -> None:
    store, space = make_store(tmp_path)
    store.append(space, records())
    (found, *_) = segment.validate(segment_files(store, space)[0])
    assert problem in found


def test_validate_looks_at_the_columns(tmp_path: Path) -> None:
    for k, (column, rows, problem) in enumerate(
        [
            ("features", np.ones((3, 1), np.float32), "no column of a sparse matrix"),
            ("features.of50.index", np.ones((3, 1), np.int64), "expected one number"),
            ("features.of50.value", np.ones((3, 1), np.int32), "expected one number"),
            ("features.of50.value", np.ones((3, 2), np.float32), "expected one number"),
        ]
    ):
        store, space = make_store(tmp_path / str(k))
        store.append(space, Records(make_table([1]), SPARSE, np.array([0, 3]), {column: rows}))
        (found,) = segment.validate(segment_files(store, space)[0])
        assert problem in found


def test_rows_that_are_nobodys_are_not_stored(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for offset in ([0, 2], [1, 3], [0, 4, 3], [0, 3, 3], [0, 1, 4]):
        rows = {SITE.columns[2]: np.ones((3, 1), np.float32)}
        with pytest.raises(ValueError, match=r"row offset|expected"):
            store.append(space, Records(make_table([1]), SPARSE, np.array(offset), rows))
    # Nor do other layouts take any number of rows.
    with pytest.raises(ValueError, match="row offset"):
        store.append(space, Records(make_table([1]), "mean", np.array([0, 3]), rows))


def test_several_widths_under_one_name_have_to_be_told_apart(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, sparse([1, 2]))
    one = SparseSite("features", 7).records(make_table([1]), np.array([1]), [0], [6], np.ones(1, np.float32))
    store.append(space, one)
    with pytest.raises(OptionError, match=r"features\.of7, features\.of50|features\.of50, features\.of7"):
        store.read(space, make_table([1]), "features")
    assert store.read(space, make_table([1]), "features.of7")[0].shape == (2, 7)
