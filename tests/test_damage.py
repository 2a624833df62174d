"""Damage costs what is damaged, whoever comes across it: verifying, merging, evicting, finishing a file that grows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store import segment as segments
from actcache.store.batches import OpenFile
from actcache.store.damage import remnants
from actcache.store.growing import GrowingFile
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from damage_helpers import DIM, GB, WIDE, break_blocks, kept, merge, repair, wide, without
from store_helpers import flip, growing_writer, make_store, make_table, open_files, segment_files


def compact_what_is_invalidated(store: Store, space: str) -> None:
    store.invalidate(space, make_table([39]))
    store.compact(space)


def evict_a_third(store: Store, space: str) -> None:
    """What was read last of the damaged segment is copied out of it: prompts 0 to 15."""
    fresh = Store(store.location, index_dir=store.index_dir)
    fresh.locate(space, table=make_table(range(40, 60)), sites=WIDE[:1], layout="last_token")
    fresh.locate(space, table=make_table(range(16)), sites=WIDE[:1], layout="last_token")
    size = sum(path.stat().st_size for path in segment_files(store, space))
    fresh.evict(0.69 * size / GB)
    fresh.close()


@pytest.mark.parametrize("work", [repair, merge, compact_what_is_invalidated, evict_a_third])
@pytest.mark.parametrize("known", [True, False])
def test_only_what_is_damaged_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, work: Callable[[Store, str], None], known: bool
) -> None:
    """Also where the process that does it has come across the damage before."""
    store, space = make_store(tmp_path)
    first = store.append(space, wide(range(40)))
    store.append(space, wide(range(40, 60)))
    path = break_blocks(store, first, {WIDE[1]: [1], WIDE[2]: [1, 3]})
    if known:
        place = store.locate(space, table=make_table(range(40)), sites=WIDE, layout="last_token")
        assert (~place.found).sum() == 16
    with caplog.at_level(logging.WARNING):
        work(store, space)
    assert not path.exists()
    left = range(16) if work is evict_a_third else range(39)
    found = kept(store, space, range(39), tmp_path)
    assert found[WIDE[0]] == list(left)
    assert found[WIDE[1]] == without(left, *range(8, 16))
    assert found[WIDE[2]] == without(left, *range(8, 16), *range(24, 32))
    if work is not repair:
        assert f"{WIDE[1]} of 8 prompts is damaged, and dropped" in caplog.text
    second = kept(store, space, range(40, 60), tmp_path)
    assert all(len(numbers) == 20 for numbers in second.values())
    assert store.verify().ok
    assert all(segments.validate(file) == [] for file in segment_files(store, space))


def test_a_site_of_which_all_is_damaged_takes_no_other_with_it(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, wide(range(20)))
    break_blocks(store, info, {WIDE[1]: range(3)})
    report = store.verify(repair=True)
    assert (report.lost, report.lost_prompts, report.lost_sites) == (20, 20, {WIDE[1]: 20})
    (path,) = segment_files(store, space)
    assert segments.read_info(path).sites == (WIDE[0], WIDE[2])
    assert kept(store, space, range(20), tmp_path) == {WIDE[0]: [*range(20)], WIDE[1]: [], WIDE[2]: [*range(20)]}
    store.append(space, Records.pooled(make_table(range(20)), "last_token", {WIDE[1]: wide(range(20)).data[WIDE[1]]}))
    assert all(len(numbers) == 20 for numbers in kept(store, space, range(20), tmp_path).values())


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_codes_and_scales_are_copied_out_as_they_are(tmp_path: Path, dtype: str) -> None:
    store = Store(tmp_path / "store", dtype=dtype, index_dir=tmp_path / "index")
    space = store.open_space({"weights": "abc"}, {"model_name": "org/model"})
    table = make_table(range(300))
    rows = len(table.token_ids)
    rng = np.random.default_rng(0)
    data = {site: rng.standard_normal((rows, 512)).astype(np.float32) for site in WIDE}
    # Without scales, in the same segment.
    data["token_nll"] = rng.standard_normal((rows, 1)).astype(np.float32)
    info = store.append(space, Records.tokens(table, data))
    sites = [*WIDE, "token_nll"]

    def values(opened: Store) -> dict[str, list[bytes | None]]:
        found = {}
        for site in sites:
            place = opened.locate(space, table=table, sites=[site], layout="tokens")
            found[site] = [place.rows(k)[0].tobytes() if place.found[k] else None for k in range(300)]
        return found

    before = values(store)
    errors = {s.site: s.stored for s in store.summaries(space)}
    break_blocks(store, info, {WIDE[0]: [0], WIDE[1]: range(-(-rows * 512 // BLOCK))})
    first_lost = int(np.searchsorted(table.token_offset, BLOCK // 512, "left"))
    Store(store.location, index_dir=tmp_path / "second").verify(repair=True)
    again = Store(store.location, index_dir=tmp_path / "third")
    after = values(again)
    assert after[WIDE[1]] == [None] * 300
    for site in (WIDE[2], "token_nll"):
        assert after[site] == before[site]
    assert after[WIDE[0]] == [None] * first_lost + before[WIDE[0]][first_lost:]
    assert again.verify().ok
    assert all(segments.validate(file) == [] for file in segment_files(again, space))
    for summary in again.summaries(space):
        # What storing changed was measured once, and is told once.
        assert summary.stored == errors[summary.site]


def test_what_another_copy_has_or_was_invalidated_is_not_lost(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, wide(range(16)))
    store.append(space, wide(range(4)))
    store.invalidate(space, make_table([4]))
    break_blocks(store, info, {WIDE[1]: [0]})
    for wanted in (False, True):
        report = store.verify(repair=wanted)
        assert (report.lost, report.lost_prompts, report.lost_sites) == (3, 3, {WIDE[1]: 3})
    assert (store.verify().lost, store.verify().lost_prompts) == (0, 0)


def test_prompts_are_counted_once_and_activations_by_site(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, wide(range(16)))
    break_blocks(store, info, {WIDE[0]: [0], WIDE[1]: [0, 1]})
    report = store.verify()
    assert (report.lost, report.lost_prompts, report.lost_sites) == (24, 16, {WIDE[0]: 8, WIDE[1]: 16})


def test_of_a_file_that_cannot_be_read_what_is_known_of_it_counts(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, wide(range(5), dim=8))
    flip(store.root / space / f"{info.name}.safetensors", 300)
    stranger = Store(store.location, index_dir=tmp_path / "stranger").verify()
    assert (stranger.lost, stranger.ok) == (0, False)
    assert stranger.damaged[0].reason.endswith("what it held is not known")
    report = Store(store.location, index_dir=tmp_path / "index").verify()
    assert (report.lost, report.lost_prompts) == (15, 5)


def test_a_file_whose_writer_is_gone_loses_only_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrowingFile, "is_well_filled", False)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for start in range(0, 32, 8):
        writer.append([wide(range(start, start + 8))])
    (path,) = open_files(store, space)
    file = OpenFile(path)
    file.poll()
    second = file.batches[1].matrix(WIDE[1])
    assert np.array_equal(second, wide(range(8, 16)).data[WIDE[1]])
    flip(path, file.batches[1].start_of(WIDE[1]) + 5)
    report = Store(store.location, index_dir=tmp_path / "beside").verify()
    assert (report.lost, report.lost_sites) == (8, {WIDE[1]: 8})
    writer.finish(True)
    assert not open_files(store, space)
    everything = list(range(32))
    assert kept(store, space, everything, tmp_path) == {
        WIDE[0]: everything,
        WIDE[1]: without(everything, *range(8, 16)),
        WIDE[2]: everything,
    }


def test_a_remnant_is_not_newer_than_what_it_is_left_of(tmp_path: Path) -> None:
    """Merging with newer segments must not bring older values to the front where a part of a prompt is damaged."""
    store, space = make_store(tmp_path)
    table = make_table(range(8))
    old, new = ({site: np.full((8, DIM), value, np.float32) for site in WIDE} for value in (1, 2))
    store.append(space, Records.pooled(table, "last_token", old))
    info = store.append(space, Records.pooled(table, "last_token", new))
    store.append(space, wide(range(40, 48)))
    break_blocks(store, info, {WIDE[1]: [0]})
    for _ in range(3):
        place = Store(store.location, index_dir=tmp_path / "index 2").locate(
            space, table=table, sites=[WIDE[0]], layout="last_token"
        )
        assert (place.take() == 2).all()
        assert (store.locate(space, table=table, sites=[WIDE[1]], layout="last_token").take() == 1).all()
        store.merge(space)


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda sites: st.lists(st.lists(st.booleans(), min_size=sites, max_size=sites), min_size=1, max_size=9)
    ),
    st.data(),
)
def test_all_that_is_intact_is_in_exactly_one_remnant(columns: list[list[bool]], data: st.DataObject) -> None:
    intact = np.array(columns).T
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=intact.shape[1], max_size=intact.shape[1])))
    names = [f"s{k}" for k in range(len(intact))]
    times = np.zeros(intact.shape, int)
    found = remnants(names, intact, wanted)
    for remnant in found:
        times[np.ix_([names.index(s) for s in remnant.sites], np.flatnonzero(remnant.keep))] += 1
    np.testing.assert_array_equal(times, intact & wanted & ~intact.all(axis=0))
    assert len(found) <= min(len(names), int(wanted.sum()))
