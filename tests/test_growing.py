"""Files that grow: batches that are read while others come, and become segments in the end."""

from __future__ import annotations

import errno
import json
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from actcache.errors import DiskFullError, FormatError
from actcache.store import appending, batches, files, segment
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
    check_pooled,
    every_token,
    growing_writer,
    in_child,
    kill,
    make_store,
    make_table,
    open_files,
    pooled,
    segment_files,
    text,
    vector,
    wait_for,
)

GB = 2**30


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few dozen batches."""
    monkeypatch.setattr(appending, "_SIZES", (1 << 18,))


def fresh(store: Store, folder: Path, name: str = "other host") -> Store:
    """The same store, of which nothing is known yet."""
    return Store(store.location, index_dir=folder / name)


def flipped(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_batches_are_found_however_long_ago_their_file_was_begun(tmp_path: Path) -> None:
    """A batch changes nothing in the folder: once that is taken for settled, its time stamp tells of no batch."""
    store, space = make_store(tmp_path)
    writer, reader = growing_writer(store, space), fresh(store, tmp_path)
    for k in range(3):
        writer.append([pooled([2 * k, 2 * k + 1])])
        os.utime(store.root / space, (1_000_000_000, 1_000_000_000.5))
        for looking in (store, reader, reader):
            assert check_pooled(looking, space, range(6)).tolist() == [i < 2 * k + 2 for i in range(6)]
    for k in (3, 4):
        writer.append([pooled([2 * k, 2 * k + 1])])
        for looking in (reader, store):
            assert check_pooled(looking, space, range(10)).tolist() == [i < 2 * k + 2 for i in range(10)]


@pytest.mark.parametrize("in_place", [True, False])
def test_batches_are_read_while_they_come_and_then_from_a_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    monkeypatch.setattr(GrowingFile, "is_well_filled", in_place)
    store, space = make_store(tmp_path)
    writer, reader = growing_writer(store, space), fresh(store, tmp_path)
    for k in range(6):
        writer.append([pooled([3 * k, 3 * k + 1]), pooled([3 * k + 2])])
        for looking in (store, reader):
            assert check_pooled(looking, space, range(18)).tolist() == [i < 3 * k + 3 for i in range(18)]
    held = reader.locate(space, table=make_table(range(18)), sites=SITES, layout="last_token")
    (grown,) = open_files(store, space)
    assert store.info().models[0].num_prompts == 18
    assert reader.verify().ok
    writer.finish(True)
    assert not open_files(store, space)
    (path,) = segment_files(store, space)
    assert (path.stem == grown.stem) == in_place
    assert segment.validate(path) == []
    np.testing.assert_array_equal(held.take()[:, 0], np.stack([vector(i, SITES[0]) for i in range(18)]))
    for looking in (store, reader, fresh(store, tmp_path, "third")):
        assert check_pooled(looking, space, range(18)).all()
    assert len(segment.open(path).info.replaces) == 6


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


def test_a_full_file_is_sealed_and_the_next_begun(tmp_path: Path, small: None) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for i in range(0, 1200, 8):
        writer.append([pooled(range(i, i + 8), dim=128)])
    assert len(segment_files(store, space)) > 2
    assert len(open_files(store, space)) == 1
    writer.finish(False)
    for path in segment_files(store, space):
        assert segment.validate(path) == []
    everything = store.locate(space, table=make_table(range(1200)), sites=SITES, layout="last_token")
    np.testing.assert_array_equal(everything.take()[:, 1], np.stack([vector(i, SITES[1], 128) for i in range(1200)]))


def test_room_for_longer_texts_and_smaller_batches_is_not_overrun(tmp_path: Path, small: None) -> None:
    """What cannot be known when the file is made: it is full earlier, never too full."""
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    rng = np.random.default_rng(0)
    kept: dict[str, np.ndarray] = {}
    for k in range(150):
        texts = [f"{k} {j} " + "x" * int(rng.integers(0, 4000)) for j in range(int(rng.integers(1, 12)))]
        values = [rng.standard_normal(8).astype(np.float32) for _ in texts]
        kept.update(zip(texts, values, strict=True))
        table = make_table(range(len(texts)))
        table = type(table).build([table.tokens(i) for i in range(len(table))], texts, text_context="t")
        writer.append([Records.pooled(table, "last_token", {"resid_post.0": np.stack(values)})])
    assert len(segment_files(store, space)) > 1
    writer.finish(False)
    place = store.locate(space, texts=list(kept), text_context="t", sites=["resid_post.0"], layout="last_token")
    found = place.take()[:, 0]
    np.testing.assert_array_equal(found, np.stack(list(kept.values())))


def test_room_that_was_not_needed_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of a file has room for many small batches, of which two have come."""
    monkeypatch.setattr(appending, "_SIZES", (1 << 24,))
    monkeypatch.setattr(GrowingFile, "is_well_filled", True)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for k in range(3):
        writer.append([pooled([k])])
    tracemalloc.start()
    try:
        writer.seal()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    (path,) = [p for p in segment_files(store, space) if segment.open(p).info.replaces]
    first = min(tensor.start for site in SITES for tensor in segment.open(path).parts(site))
    assert first > 4 << 20, "the rows lie behind the room"
    assert segment.validate(path) == [] and check_pooled(fresh(store, tmp_path), space, range(3)).all()


def test_a_short_run_makes_segments_at_once(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space, linger=60) as writer:
        writer.put(pooled([1]))
        writer.flush()
        assert not open_files(store, space)
        writer.put(pooled([2]))
        writer.flush()
        assert len(open_files(store, space)) == 1
    assert not open_files(store, space)
    assert check_pooled(store, space, [1, 2]).all()


def test_newer_copies_elsewhere_are_not_overtaken_by_sealing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment is as new as its last batch, so what lies between its batches would be read no more."""
    monkeypatch.setattr(GrowingFile, "is_well_filled", True)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    old = pooled([1, 2])
    for matrix in old.data.values():
        matrix += 1
    writer.append([old])
    store.append(space, pooled([1, 2]))
    writer.append([pooled([3])])
    assert check_pooled(store, space, [1, 2, 3]).all()
    writer.finish(False)
    assert check_pooled(store, space, [1, 2, 3]).all()
    assert check_pooled(fresh(store, tmp_path), space, [1, 2, 3]).all()


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_invalidated_while_a_file_grows_stays_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    monkeypatch.setattr(GrowingFile, "is_well_filled", in_place)
    store, space = make_store(tmp_path)
    other = fresh(store, tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([1, 2])])
    writer.append([pooled([3, 4])])
    assert other.invalidate(space, make_table([2, 3])) == 2
    expected = [True, False, False, True]
    for looking in (store, other):
        assert check_pooled(looking, space, [1, 2, 3, 4]).tolist() == expected
    writer.finish(False)
    for looking in (store, other, fresh(store, tmp_path, "third")):
        assert check_pooled(looking, space, [1, 2, 3, 4]).tolist() == expected


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_stored_again_behind_its_tomb_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    monkeypatch.setattr(GrowingFile, "is_well_filled", in_place)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([1, 2])])
    assert store.invalidate(space, make_table([1, 2])) == 2
    writer.append([pooled([1, 3])])
    expected = [True, False, True]
    assert check_pooled(store, space, [1, 2, 3]).tolist() == expected
    writer.finish(False)
    for looking in (store, fresh(store, tmp_path)):
        assert check_pooled(looking, space, [1, 2, 3]).tolist() == expected


def test_a_file_that_is_removed_is_followed_by_another(tmp_path: Path) -> None:
    """Whoever evicts or clears takes what was stored before; what is stored then is stored."""
    store, space = make_store(tmp_path)
    other = fresh(store, tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([1])])
    assert other.clear() == 1
    assert not open_files(store, space)
    writer.append([pooled([2])])
    assert check_pooled(other, space, [1, 2]).tolist() == [False, True]
    assert other.evict(0).prompts == 1
    writer.append([pooled([3])])
    assert check_pooled(store, space, [1, 2, 3]).tolist() == [False, False, True]
    other.clear()
    writer.finish(True)
    assert not check_pooled(store, space, [1, 2, 3]).any()
    assert not store.root.exists() or not segment_files(store, space)


def test_eviction_takes_what_is_being_written_last(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    other = fresh(store, tmp_path)
    store.append(space, pooled(range(100, 140)))
    writer = growing_writer(store, space)
    writer.append([pooled([1])])
    writer.append([pooled([2])])
    size = sum(p.stat().st_size for p in segment_files(store, space))
    report = other.evict((other.evict(1).bytes_kept - size // 2) / GB)
    assert report.prompts == 40
    assert check_pooled(other, space, [1, 2]).all()
    writer.append([pooled([3])])
    writer.finish(True)
    assert check_pooled(store, space, [1, 2, 3]).all()


def test_a_dead_writer_leaves_what_it_committed(tmp_path: Path) -> None:
    def work() -> None:
        store, space = make_store(tmp_path)
        writer = growing_writer(store, space)
        for i in range(5):
            writer.append([pooled([i])])
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait_for(in_child(work)) == -signal.SIGKILL
    store, space = make_store(tmp_path)
    assert len(open_files(store, space)) == 1
    assert check_pooled(store, space, range(5)).all()
    assert store.verify().ok
    with store.writer(space) as writer:
        writer.put(pooled([5]))
    assert not open_files(store, space)
    assert check_pooled(store, space, range(6)).all()


def test_what_the_dead_left_does_not_pile_up(tmp_path: Path) -> None:
    """Also where every run is killed before its end: the next one begins with it."""

    def work(start: int) -> None:
        store, space = make_store(tmp_path)
        writer = growing_writer(store, space)
        for i in range(start, start + 3):
            writer.append([pooled([i])])
        os.kill(os.getpid(), signal.SIGKILL)

    for life in range(3):
        assert wait_for(in_child(lambda life=life: work(10 * life))) == -signal.SIGKILL  # type: ignore[misc]
    store, space = make_store(tmp_path)
    assert len(open_files(store, space)) == 1
    assert check_pooled(store, space, [10 * life + i for life in range(3) for i in range(3)]).all()


def test_a_living_writer_keeps_its_file(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    read, write = os.pipe()
    go_read, go_write = os.pipe()

    def work() -> None:
        mine, _ = make_store(tmp_path)
        writer = growing_writer(mine, space)
        for i in range(3):
            writer.append([pooled([i])])
        os.write(write, b"x")
        os.read(go_read, 1)
        writer.append([pooled([3])])
        writer.finish(False)

    pid = in_child(work)
    assert os.read(read, 1) == b"x"
    store.merge(space)
    store.compact()
    assert len(open_files(store, space)) == 1
    assert check_pooled(store, space, range(4)).tolist() == [True, True, True, False]
    os.write(go_write, b"x")
    assert wait_for(pid) == 0
    assert not open_files(store, space)
    assert check_pooled(store, space, range(4)).all()


def test_a_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A child that outlives the writer would else keep others from what it left."""
    store, space = make_store(tmp_path)
    read, write = os.pipe()
    idle_read, idle_write = os.pipe()

    def work() -> None:
        mine, _ = make_store(tmp_path)
        growing_writer_held.append(growing_writer(mine, space))
        growing_writer_held[0].append([pooled([1])])
        if not os.fork():
            # Only here is it sure that what a fork has to let go of has been let go.
            os.write(write, b"x")
            os.close(idle_write)
            os.read(idle_read, 1)
            os._exit(0)
        signal.pause()

    growing_writer_held: list[Any] = []
    pid = in_child(work)
    assert os.read(read, 1) == b"x"
    kill(pid)
    store.merge(space)
    assert not open_files(store, space)
    assert check_pooled(store, space, [1]).all()
    os.close(idle_write)


@pytest.mark.parametrize(
    "call", ["fdatasync", "rename", *(pytest.param(c, marks=pytest.mark.slow) for c in ("pwritev", "fsync", "open"))]
)
def test_killed_at_every_single_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The writer dies before its k-th call, for every k of making a file, growing, and finishing it both ways."""
    for k in range(1, 80):
        folder = tmp_path / str(k)
        store, space = make_store(folder)
        store.append(space, pooled([90]))
        store.close()
        done_read, done_write = os.pipe()

        def work(folder: Path = folder, k: int = k, report: int = done_write) -> None:
            original, left = getattr(os, call), [k]

            def dying(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            mine, space = make_store(folder)
            setattr(os, call, dying)
            for in_place in (True, False):
                GrowingFile.is_well_filled = in_place  # type: ignore[method-assign, assignment]
                writer = growing_writer(mine, space)
                for i in range(2):
                    number = 10 * in_place + i
                    writer.append([pooled([number])])
                    os.write(report, bytes([number]))
                writer.finish(False)

        status = wait_for(in_child(work))
        os.close(done_write)
        stored = list(os.read(done_read, 100))
        os.close(done_read)
        for again in (make_store(folder)[0], Store(folder / "store", index_dir=folder / "fresh")):
            assert check_pooled(again, space, [90, *stored]).all(), k
            check_pooled(again, space, [10, 11, 0, 1])
            report = again.verify()
            assert report.ok, (k, report.damaged)
        again.merge(space)
        assert not open_files(again, space), k
        assert check_pooled(again, space, [90, *stored]).all(), k
        if status == 0:
            assert stored == [10, 11, 0, 1]
            return
        assert status == -signal.SIGKILL
    pytest.fail("the work never ended")


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


def test_a_sync_that_fails_is_an_error_and_its_batch_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([0])])
    (path,) = open_files(store, space)

    def failing(number: int) -> Any:
        def sync(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        return sync

    for number, expected in ((errno.EIO, OSError), (errno.ENOSPC, DiskFullError)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", failing(number))
            with pytest.raises(expected):
                writer.append([pooled([number])])
    # No mark says of the batch that it was synced.
    file = OpenFile(path)
    file.poll()
    assert path.read_bytes()[file._at :][:16] == bytes(16)
    writer.append([pooled([3])])
    writer.finish(True)
    assert check_pooled(fresh(store, tmp_path), space, [0, 3]).all()


@pytest.mark.parametrize("room", [0, 300, 3000, 6000])
def test_disk_full_in_mid_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([1])])
    original, left = os.pwritev, [room]

    def pwritev(fd: int, buffers: Any, offset: int) -> int:
        size = sum(map(len, buffers))
        if size > left[0]:
            raise OSError(28, os.strerror(28))
        left[0] -= size
        return original(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)

        def fill() -> None:
            for i in range(2, 40):
                writer.append([pooled([i])])

        with pytest.raises(DiskFullError, match="free space"):
            fill()
    found = check_pooled(store, space, range(1, 40))
    count = int(found.sum())
    assert found[0]
    assert found[:count].all()
    writer.append([pooled([50])])
    writer.finish(True)
    assert not open_files(store, space)
    assert check_pooled(store, space, [*range(1, count + 1), 50]).all()


def test_without_locks_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for i in range(3):
        writer.append([pooled([i])])
    assert len(segment_files(store, space)) == 3
    assert not [f for f in (store.root / space).iterdir() if f.suffix in (".tmp", ".open")]
    assert check_pooled(store, space, range(3)).all()


# -- what is wrong with a file -------------------------------------------------------------------------


def grown_file(folder: Path, count: int = 3) -> tuple[Store, str, Path]:
    """A file that grew by `count` batches of two prompts, whose writer is gone."""
    store, space = make_store(folder)
    writer = growing_writer(store, space)
    for i in range(count):
        writer.append([pooled([2 * i, 2 * i + 1])])
    for file in writer._files.values():
        file.close()
    return store, space, open_files(store, space)[0]


def tear_last(path: Path, *, synced: bool) -> None:
    """Take the rows of one site out of the last batch; unless it was `synced`, the mark that follows the sync, too."""
    last = OpenFile(path)
    last.poll()
    at = last._at
    with path.open("r+b") as file:
        file.seek(last.batches[-1].start_of(SITES[1]))
        file.write(bytes(64))
        if not synced:
            file.seek(at)
            assert any(file.read(16))
            file.seek(at)
            file.write(bytes(16))


def test_a_torn_last_batch_never_was(tmp_path: Path) -> None:
    """One sync makes rows and record durable, in no order: the record can be there without the rows."""
    store, space, path = grown_file(tmp_path)
    tear_last(path, synced=False)
    again = fresh(store, tmp_path)
    assert check_pooled(again, space, range(6)).tolist() == [True] * 4 + [False] * 2
    report = again.verify()
    assert report.ok
    assert report.damaged == []
    again.merge(space)
    assert not open_files(store, space)
    assert check_pooled(again, space, range(6)).tolist() == [True] * 4 + [False] * 2


def test_damage_of_a_last_batch_that_was_synced_costs_what_is_damaged(tmp_path: Path) -> None:
    """The mark that is written behind a sync tells such damage from a batch that was never committed."""
    store, space, path = grown_file(tmp_path)
    tear_last(path, synced=True)
    again = fresh(store, tmp_path)
    assert check_pooled(again, space, range(6)).tolist() == [True] * 4 + [False] * 2
    assert check_pooled(again, space, range(6), SITES[:1]).all()
    (damage,) = again.verify().damaged
    assert (damage.site, damage.rows) == (SITES[1], [4, 5])
    # Whoever writes next makes a segment of it.
    again.merge(space)
    assert not open_files(store, space)
    for host in (again, fresh(store, tmp_path, "another")):
        assert check_pooled(host, space, range(6)).tolist() == [True] * 4 + [False] * 2
        assert check_pooled(host, space, range(6), SITES[:1]).all()
        assert host.verify().ok


def test_a_mark_never_takes_the_place_of_what_stands_at_the_end(tmp_path: Path) -> None:
    """A journal that is full to the last byte leaves no room for it."""
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([0])])
    (file,) = writer._files.values()
    before = file._at
    writer.append([pooled([0])])
    length = file._at - before
    assert any(file.path.read_bytes()[file._at :][:16])
    # As if the file ended behind the next record.
    whole, file._size = file._size, file._at + length + 16
    file.add([pooled([0])])
    assert file._at + 16 == file._size
    assert not any(file.path.read_bytes()[file._at :][:16])
    file._size = whole
    writer.finish(True)
    assert check_pooled(store, space, [0]).all()


@pytest.mark.parametrize("what", ["rows", "record"])
def test_damage_before_the_last_batch_is_found_and_repaired(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, space, path = grown_file(tmp_path)
    held = OpenFile(path)
    held.poll()
    flipped(path, held.batches[1].start_of(SITES[0]) + 5 if what == "rows" else held.batches[1].start + 900)
    again = fresh(store, tmp_path)
    assert check_pooled(again, space, range(6)).tolist() == [True, True, False, False, True, True] or what == "rows"
    assert not check_pooled(again, space, [2]).any()
    assert check_pooled(again, space, [0, 1, 4, 5]).all()
    assert "damaged" in caplog.text
    report = again.verify()
    assert [d.segment for d in report.damaged] == [str(path.relative_to(store.location))]
    assert not report.ok
    assert report.damaged[0].rows == ([2, 3] if what == "rows" else [])
    assert again.verify(repair=True).ok
    assert again.verify().damaged == []
    assert check_pooled(again, space, [0, 1, 4, 5]).all()
    assert not check_pooled(again, space, [2]).any()


@pytest.mark.parametrize("known", [0, 2])
def test_a_writer_need_not_read_what_it_seals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """Damage of a record costs nothing then, whether its process has read some batches or none."""
    monkeypatch.setattr(GrowingFile, "is_well_filled", True)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for k in range(4):
        writer.append([pooled([2 * k, 2 * k + 1])])
        if k < known:
            assert check_pooled(store, space, range(2 * k + 2)).all()
    (path,) = open_files(store, space)
    held = OpenFile(path)
    held.poll()
    flipped(path, held.batches[2].start + 900)
    assert not check_pooled(fresh(store, tmp_path), space, [4, 5]).any()
    writer.finish(True)
    (made,) = segment_files(store, space)
    assert made.stem == path.stem and segment.validate(made) == []
    assert len(segment.open(made).info.replaces) == 4
    for looking in (store, fresh(store, tmp_path, "third")):
        assert check_pooled(looking, space, range(8)).all()


def test_every_byte_flipped_is_detected_or_harmless(tmp_path: Path) -> None:
    """Of everything that is not a hole."""
    store, _, path = grown_file(tmp_path, 2)
    store.close()
    data = path.read_bytes()
    table = make_table(range(4))
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    for at in used[:: max(1, len(used) // 400)].tolist():
        flipped(path, at)
        try:
            file = OpenFile(path)
        except FormatError:
            pass
        else:
            for batch in [b for b in (file.poll() or ()) if b.is_whole()]:
                for i, key in enumerate(batch.prompts.token_key):
                    number = int(np.flatnonzero((table.token_key == key).all(axis=1))[0])
                    assert batch.prompts.text_of(i) == text(number)
                    for site in SITES:
                        np.testing.assert_array_equal(batch.matrix(site)[i], vector(number, site))
        flipped(path, at)
    assert path.read_bytes() == data


def test_hostile_descriptions_are_refused(tmp_path: Path) -> None:
    """Places outside the file, or over one another, must not be read."""
    store, space, path = grown_file(tmp_path)
    good = OpenFile(path)
    with path.open("rb") as file:
        data = bytearray(file.read())
    journal = good._journal()
    length = batches.FRAME.unpack_from(data, journal)[0]
    blob = bytes(data[journal + 16 : journal + 16 + length])

    def with_description(**changes: str) -> None:
        metadata = {**good.metadata, **changes}
        made = batches.framed(batches.blob_of(metadata, {}))
        path.write_bytes(data[:journal] + made + bytes(len(data) - journal - len(made) - 16) + data[-16:])

    assert blob
    with_description()
    assert OpenFile(path).poll() == []
    site, code, dim, at = good.strips[0]
    wrong = {
        "outside": [(site, code, dim, len(data))],
        "negative": [(site, code, dim, -64)],
        "wide": [(site, code, 1 << 40, at)],
        "over one another": [(site, code, dim, at), ("other", code, dim, at)],
        "scaled": [(site, "I8+S", dim, at)],
        "slash": [("a/b", code, dim, at)],
        "twice": [(site, code, dim, at), (site, code, dim, good.strips[1][3])],
        "none": [],
    }
    for columns in wrong.values():
        with_description(columns=json.dumps(columns))
        with pytest.raises(FormatError):
            OpenFile(path)
    for changes in ({"rows": "-1"}, {"rows": str(1 << 50)}, {"layout": "a b"}, {"version": "x"}, {"format": "other"}):
        with_description(**changes)
        with pytest.raises(FormatError):
            OpenFile(path)
    path.write_bytes(data[:-100])
    with pytest.raises(FormatError):
        OpenFile(path)
    again = fresh(store, tmp_path)
    assert not check_pooled(again, space, range(6)).any()
    assert not again.verify().ok
    assert again.verify(repair=True).ok
    assert not path.exists()


def test_rows_beyond_what_was_mapped_are_never_read(tmp_path: Path) -> None:
    """A reader that mapped a growing file too short once handed out another prompt's rows: here it has its full size
    from the beginning, and a record that points elsewhere is refused."""
    store, _, path = grown_file(tmp_path, 1)
    file = OpenFile(path)
    (batch,) = file.poll()
    record = file._record(batch.start - batches.FRAME.size)
    assert record is not None
    assert len(file.mapped.raw) == path.stat().st_size
    size = int.from_bytes(record[:8], "little")
    for first in (file.rows - 1, file.rows, file.rows + 5):
        header = record[8 : 8 + size].rstrip().replace(b'"row":"0"', b'"row":"%d"' % first).ljust(size)
        assert len(header) == size
        with pytest.raises(FormatError, match="room for"):
            batches.Batch(file, record[:8] + header + record[8 + size :], batch.start, 0)
    assert store.verify().ok
