"""Eviction: what was read longest ago goes, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from actcache.errors import OptionError
from actcache.store.records import Records
from actcache.store.store import Store
from eviction_helpers import DIM, GB, bytes_on_disk, fill, read, there
from store_helpers import (
    CONTEXT,
    SITES,
    every_token,
    in_child,
    make_store,
    make_table,
    pooled,
    segment_files,
    text,
    vector,
    wait_for,
)


def test_the_segment_read_longest_ago_goes_first(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(k, k + 10) for k in range(0, 50, 10)])
    read(store, space, range(20))
    report = store.evict(3.5 * size / GB)
    assert there(store, space, range(50)) == [*range(20), *range(40, 50)]
    assert (report.prompts, report.segments, report.segments_rewritten) == (20, 2, 0)
    assert report.bytes_kept == bytes_on_disk(store) <= 3.5 * size
    assert report.models == {space: 20}
    assert report.limit_bytes == int(3.5 * size)


def test_prompts_read_lately_are_copied_out_of_cold_segments(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(k, k + 50) for k in range(0, 300, 50)])
    hot = [7, 60, 61, 110, 199, 222, 298]
    read(store, space, hot)
    report = store.evict(4 * size / GB)
    left = there(store, space, range(300))
    assert set(hot) <= set(left)
    assert len(left) < 200
    assert report.prompts == 300 - len(left)
    assert report.segments_rewritten >= 1
    assert bytes_on_disk(store) == report.bytes_kept <= 4 * size
    assert report.bytes_freed >= 2 * size - report.segments_rewritten * 50_000
    fresh = Store(store.location, index_dir=tmp_path / "other")
    assert there(fresh, space, range(300)) == left


def test_the_copy_inherits_when_its_prompts_were_read(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(50), range(50, 100), range(100, 150)])
    read(store, space, [3, 51])
    time.sleep(0.01)
    read(store, space, [3])
    assert store.evict(1.5 * size / GB).segments_rewritten
    assert {3, 51} <= set(there(store, space, range(150)))
    # What was copied was read later than anything else was written: it goes last.
    store.evict(size / 5 / GB)
    assert 3 in there(store, space, range(150))


def test_one_segment_is_cut_to_what_fits(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(100)])
    read(store, space, range(20, 40))
    store.evict(size / 2 / GB)
    left = there(store, space, range(100))
    assert set(range(20, 40)) <= set(left)
    assert 35 <= len(left) <= 50
    assert bytes_on_disk(store) <= size / 2


def test_of_few_segments_no_more_goes_than_must(tmp_path: Path) -> None:
    """The larger one, read a moment before the other, does not go whole."""
    store, space = make_store(tmp_path)
    fill(store, space, [range(90), range(90, 100)])
    read(store, space, range(100))
    limit = 0.7 * bytes_on_disk(store)
    store.evict(limit / GB)
    left = there(store, space, range(100))
    assert 55 <= len(left) <= 70
    assert set(range(90, 100)) <= set(left)
    assert 0.8 * limit <= bytes_on_disk(store) <= limit


def test_what_was_read_last_stays_though_its_segment_is_cold(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    fill(store, space, [range(144), range(144, 176), range(176, 216), range(216, 300)])
    for numbers in (range(144), range(144, 176), range(176, 216)):
        read(store, space, numbers)
    last = [*range(130, 144), *range(216, 300)]
    read(store, space, last)
    store.evict(0.45 * bytes_on_disk(store) / GB)
    assert set(last) <= set(there(store, space, range(300)))


def test_merging_keeps_the_times(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    fill(store, space, [[i] for i in range(40)])
    read(store, space, [2, 30])
    store.merge(space)
    (merged,) = segment_files(store, space)
    store.evict(merged.stat().st_size / 4 / GB)
    left = there(store, space, range(40))
    assert {2, 30} <= set(left)
    assert len(left) < 10


def test_the_times_are_those_of_every_process(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(10), range(10, 20), range(20, 30)])

    def other() -> None:
        own = Store(store.location, index_dir=tmp_path / "index")
        read(own, space, range(10))
        read(own, space, range(10, 20))
        own.close()

    assert wait_for(in_child(other)) == 0
    store.evict(2.2 * size / GB)
    assert there(store, space, range(30)) == list(range(20))


def test_without_an_index_the_time_of_writing_counts(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(10), range(10, 20), range(20, 30)])
    read(store, space, range(10))
    (tmp_path / "file").touch()
    fresh = Store(store.location, index_dir=tmp_path / "file")
    fresh.evict(2.2 * size / GB)
    assert there(fresh, space, range(30)) == list(range(10, 30))
    read(fresh, space, range(10, 20))
    fresh.evict(1.2 * size / GB)
    assert there(fresh, space, range(30)) == list(range(10, 20))


def test_membership_is_not_reading(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(10), range(10, 20), range(20, 30)])
    assert store.contains(space, [text(i) for i in range(10)], SITES[0], pooling="last_token").all()
    store.evict(2.2 * size / GB)
    assert there(store, space, range(30)) == list(range(10, 30))


def test_of_two_copies_the_one_nobody_reads_goes(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(10), range(10), range(10, 20)])
    read(store, space, range(20))
    report = store.evict(2.2 * size / GB)
    assert len(segment_files(store, space)) == 2
    assert there(store, space, range(20)) == list(range(20))
    # Something of ten prompts went, though all of them are still there.
    assert report.prompts == 10


def test_spaces_and_layouts_are_one_queue(tmp_path: Path) -> None:
    store, first = make_store(tmp_path)
    second = store.open_space({"weights": "other"}, {"model_name": "org/other"})
    wide = {"resid_post.0": np.zeros((10, 300), np.float32), "mlp_act.0": np.ones((10, 1200), np.float32)}
    store.append(first, Records.pooled(make_table(range(10)), "mean", wide))
    store.append(second, every_token(range(10, 40), dim=300))
    size = store.append(first, pooled(range(40, 60), dim=600)).size
    store.read(second, make_table(range(10, 14)), SITES[1])
    store.evict((size + 80_000) / GB)
    assert not store.contains(first, make_table(range(10))).any()
    assert store.contains(first, make_table(range(40, 60))).all()
    found = store.contains(second, make_table(range(10, 40)), SITES[1])
    assert found[:4].all()
    assert not found[4:].all()
    place = store.locate(second, table=make_table(range(10, 14)), sites=SITES, layout="tokens")
    for k, i in enumerate(range(10, 14)):
        for site, rows in zip(SITES, place.rows(k), strict=True):
            np.testing.assert_array_equal(rows, vector(i, site, 300) + np.arange(1 + i % 7, dtype=np.float32)[:, None])


def test_derived_results_go_with_their_prompt(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    first = fill(store, space, [range(10), range(10, 20)])
    derived = Records.pooled(make_table(range(20)), "last_token", {"perplexity": np.ones((20, 3), np.float32)})
    more = store.append(space, derived).size
    report = store.evict((first + more + 2000) / GB)
    assert report.prompts == 10
    found = store.contains(space, make_table(range(20)), "perplexity", pooling="last_token")
    assert found.tolist() == [False] * 10 + [True] * 10
    store.evict((more + 2000) / GB)
    assert not store.contains(space, make_table(range(20)), "perplexity", pooling="last_token").any()


def test_what_was_invalidated_goes_before_what_is_live(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(40), range(40, 80), range(80, 120)])
    store.invalidate(space, make_table([*range(85, 120), *range(40, 60)]))
    report = store.evict(2.3 * size / GB)
    assert report.prompts == 0
    assert there(store, space, range(120)) == [*range(40), *range(60, 80 + 5)]
    assert bytes_on_disk(store) <= 2.3 * size


def test_damaged_files_go_first_and_foreign_ones_stay(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(10), range(10, 20), range(20, 30)])
    broken = next(f for f in segment_files(store, space) if f.stem == store._index(space)._infos[1].name)  # type: ignore[union-attr]
    data = bytearray(broken.read_bytes())
    data[300] ^= 255
    broken.write_bytes(data)
    foreign = [broken.with_name("notes.txt"), broken.with_name("f" * 32 + ".safetensors")]
    for file in foreign:
        file.write_bytes(b"x" * 100)
    fresh = Store(store.location, index_dir=tmp_path / "fresh")
    assert fresh.evict(2.5 * size / GB).prompts == 0
    assert not broken.exists()
    assert there(fresh, space, range(30)) == [*range(10), *range(20, 30)]
    fresh.evict(0)
    assert {f for f in store.location.rglob("*") if f.is_file()} == set(foreign)


def test_nothing_goes_without_a_limit_or_below_it(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(10)])
    for limit in (None, 0, 2 * size / GB):
        limited = Store(store.location, limit_gb=limit, index_dir=tmp_path / "index")
        report = limited.evict()
        assert (report.prompts, report.bytes_freed, report.segments) == (0, 0, 0)
        assert report.bytes_kept == bytes_on_disk(store)
    assert store.evict(0).bytes_kept == 0
    assert not store.root.exists() or not any(store.root.rglob("*"))
    assert not store.spaces()
    fill(store, space, [range(10)])
    assert store.spaces()[0].num_prompts == 10
    with pytest.raises(OptionError, match="limit_gb is -1"):
        store.evict(-1)


def test_what_a_process_has_mapped_stays_readable_for_it(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    fill(store, space, [range(40)])
    ready, go = os.pipe(), os.pipe()

    def reader() -> None:
        own = Store(store.location, index_dir=tmp_path / "index")
        place = own.locate(
            space, texts=[text(i) for i in range(40)], text_context=CONTEXT, sites=SITES, layout="last_token"
        )
        os.write(ready[1], b"x")
        assert os.read(go[0], 1) == b"x"
        for i, row in enumerate(place.take()):
            for j, site in enumerate(SITES):
                np.testing.assert_array_equal(row[j], vector(i, site, DIM))
        assert not there(own, space, range(40))

    pid = in_child(reader)
    assert os.read(ready[0], 1) == b"x"
    mine = store.locate(space, table=make_table(range(40)), sites=SITES, layout="last_token")
    assert store.evict(0).prompts == 40
    os.write(go[1], b"x")
    assert wait_for(pid) == 0
    np.testing.assert_array_equal(mine.take()[7, 1], vector(7, SITES[1], DIM))
