"""Files that grow: batches that are read while others come, and become segments in the end."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from actcache.store import appending, segment
from actcache.store.growing import GrowingFile
from actcache.store.records import Records
from store_helpers import (
    SITES,
    check_pooled,
    fresh,
    growing_writer,
    make_store,
    make_table,
    open_files,
    pooled,
    segment_files,
    vector,
)

GB = 2**30


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few dozen batches."""
    monkeypatch.setattr(appending, "_SIZES", (1 << 18,))


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
