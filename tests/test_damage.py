"""Damage costs what is damaged, whoever comes across it: verifying, merging, evicting, finishing a file that grows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.demo import model_path
from actcache.errors import NotCachedError
from actcache.store import segment as segments
from actcache.store.batches import OpenFile
from actcache.store.damage import remnants
from actcache.store.growing import GrowingFile
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from store_helpers import flip, growing_writer, make_store, make_table, open_files, segment_files

GB = 2**30
WIDE = ["resid_post.0", "resid_post.1", "resid_post.2"]
DIM = 4096
"""A row of 16 KiB: a block has eight."""


def row(i: int, site: str, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng([i, int(site[-1])]).standard_normal(dim).astype(np.float32)


def wide(numbers: Sequence[int], dim: int = DIM) -> Records:
    data = {site: np.stack([row(i, site, dim) for i in numbers]) for site in WIDE}
    return Records.pooled(make_table(numbers), "last_token", data)


def break_blocks(store: Store, info: segments.SegmentInfo, blocks: dict[str, Sequence[int]]) -> Path:
    path = store.root / info.space / f"{info.name}.safetensors"
    opened = segments.open(path)
    for site, numbers in blocks.items():
        for block in numbers:
            flip(path, opened.start_of(site) + block * BLOCK + 3)
    return path


def kept(store: Store, space: str, numbers: Sequence[int], folder: Path, dim: int = DIM) -> dict[str, list[int]]:
    """Which prompts are stored at each site, as a host sees it that knows nothing yet; their values are compared."""
    fresh = Store(store.location, index_dir=folder / "a host that knows nothing" / str(len(list(folder.iterdir()))))
    found = {}
    for site in WIDE:
        place = fresh.locate(space, table=make_table(numbers), sites=[site], layout="last_token")
        members = np.flatnonzero(place.found)
        for values, k in zip(place.take(index=members)[:, 0], members.tolist(), strict=True):
            np.testing.assert_array_equal(values, row(numbers[k], site, dim))
        found[site] = [numbers[k] for k in members.tolist()]
    (together,) = [fresh.locate(space, table=make_table(numbers), sites=WIDE, layout="last_token").found]
    everywhere = set.intersection(*map(set, found.values()))
    assert [numbers[k] for k in np.flatnonzero(together)] == sorted(everywhere)
    fresh.close()
    return found


def without(numbers: Sequence[int], *gone: int) -> list[int]:
    return [i for i in numbers if i not in gone]


def repair(store: Store, space: str) -> None:
    assert store.verify(repair=True).ok


def merge(store: Store, space: str) -> None:
    store.merge(space)


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


def test_what_is_intact_stays_readable_where_damage_is_found(tmp_path: Path) -> None:
    """In the process that has come across it, before anything is repaired, one prompt and many."""
    store, space = make_store(tmp_path)
    info = store.append(space, wide(range(40)))
    path = break_blocks(store, info, {WIDE[1]: [1], WIDE[2]: [1, 3]})
    table = make_table(range(40))
    lost = {WIDE[0]: [], WIDE[1]: range(8, 16), WIDE[2]: [*range(8, 16), *range(24, 32)]}
    sizes = {s.site: (s.size_bytes, s.stored) for s in store.summaries(space)}
    for sites in (WIDE, WIDE[::-1], WIDE[1:], WIDE[:1], WIDE[:2]):
        found = store.locate(space, table=table, sites=sites, layout="last_token").found
        gone = {i for site in sites for i in lost[site]}
        assert np.flatnonzero(found).tolist() == without(range(40), *gone)
    for site in WIDE:
        place = store.locate(space, table=table, sites=[site], layout="last_token")
        left = without(range(40), *lost[site])
        assert np.flatnonzero(place.found).tolist() == left
        np.testing.assert_array_equal(place.take(index=left)[:, 0], np.stack([row(i, site) for i in left]))
        alone = [store.contains(space, make_table([i]), site, pooling="last_token")[0] for i in range(40)]
        assert np.flatnonzero(alone).tolist() == left
        everything = store.read(space, None, site, pooling="last_token").numpy()
        assert sorted(map(bytes, everything)) == sorted(bytes(row(i, site)) for i in left)
        assert store.statistics(space, site, pooling="last_token").count == len(left)
        rows = np.stack([row(i, site) for i in left]).astype(np.float64)
        np.testing.assert_allclose(store.statistics(space, site, pooling="last_token").mean, rows.mean(0), atol=1e-5)
    found_out = store.discover("org/model", make_table([9]).text_of(0))
    assert found_out is not None and found_out.sites == {"last_token": [WIDE[0]]}
    assert store.info().models[0].num_prompts == len(store.prompts(space)) == 40
    # Bytes and errors of a file are told once.
    assert {s.site: (s.size_bytes, s.stored) for s in store.summaries(space)} == sizes
    # What is stored again is read, and goes when it is invalidated; with it what was left.
    again = Records.pooled(make_table([9]), "last_token", {WIDE[1]: row(9, WIDE[1])[None]})
    store.append(space, again)
    both = store.locate(space, table=make_table([9]), sites=WIDE[:2], layout="last_token")
    np.testing.assert_array_equal(both.take()[0], np.stack([row(9, site) for site in WIDE[:2]]))
    assert store.invalidate(space, make_table([9, 10])) == 2
    for site in WIDE:
        assert not store.contains(space, make_table([9, 10]), site, pooling="last_token").any()
    store.compact(space)
    assert not path.exists()
    assert kept(store, space, range(40), tmp_path)[WIDE[0]] == without(range(40), 9, 10)
    assert store.contains(space, make_table(range(40)), WIDE[0], pooling="last_token").sum() == 38


@pytest.mark.parametrize("copies", [1, 2])
def test_reading_all_there_is_tells_of_what_turns_out_damaged(tmp_path: Path, copies: int) -> None:
    """Else there would be fewer rows than prompts were listed; what an older copy has is read from there."""
    store, space = make_store(tmp_path)
    for _ in range(copies):
        info = store.append(space, wide(range(40)))
    break_blocks(store, info, {WIDE[1]: [1, 3]})
    fresh = Store(store.location, index_dir=tmp_path / "fresh")
    listed = fresh.prompts(space, site=WIDE[1], layout="last_token")
    if copies == 1:
        with pytest.raises(NotCachedError, match=r"16 of 40 prompts .* turned out damaged.*list those that are left"):
            fresh.read(space, None, WIDE[1], pooling="last_token")
        listed = fresh.prompts(space, site=WIDE[1], layout="last_token")
        assert len(listed) == 24
    read = fresh.read(space, None, WIDE[1], pooling="last_token").numpy()
    np.testing.assert_array_equal(read, [row(int(ids[0]), WIDE[1]) for ids in listed.ids])


def test_a_batch_of_a_file_that_grows_stays_readable_beside_its_damage(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for start in (0, 8, 16):
        writer.append([wide(range(start, start + 8))])
    (path,) = open_files(store, space)
    reader = Store(store.location, index_dir=tmp_path / "reader")
    table = make_table(range(24))
    assert reader.contains(space, table, WIDE[0], pooling="last_token").all()
    file = OpenFile(path)
    file.poll()
    flip(path, file.batches[0].start_of(WIDE[2]) + 5)
    assert (
        reader.locate(space, table=table, sites=WIDE, layout="last_token").found.tolist() == [False] * 8 + [True] * 16
    )
    assert reader.locate(space, table=table, sites=WIDE[:2], layout="last_token").found.all()
    writer.append([wide(range(24, 32))])
    assert reader.locate(space, table=make_table(range(32)), sites=WIDE[:2], layout="last_token").found.all()
    writer.finish(True)
    assert reader.locate(space, table=make_table(range(32)), sites=WIDE[:2], layout="last_token").found.all()


def test_only_the_damaged_site_is_computed_again(tmp_path: Path) -> None:
    prompts = [f"The number {i} is" for i in range(5)]
    store = Store(tmp_path / "store", index_dir=tmp_path / "index")
    cache = ac.UnifiedCache(str(model_path()), [0, 3, 5], store=store, compute_perplexity=False)
    expected, _ = cache.get_activations(prompts)
    (space,) = store.spaces()
    (path,) = segment_files(store, space.space)
    flip(path, segments.open(path).start_of("resid_post.3") + 9)
    fresh = Store(store.location, index_dir=tmp_path / "index 2")
    cache = ac.UnifiedCache(str(model_path()), [0, 3, 5], store=fresh, compute_perplexity=False)
    plan = cache.plan(prompts)
    assert plan.missing == 5
    assert plan.bytes_to_write == 5 * 128 * 4
    assert cache.get_activations(prompts)[0].equal(expected)
    made = [segments.read_info(p).sites for p in segment_files(store, space.space) if p != path]
    assert made == [("resid_post.3",)]


def readable(store: Store, space: str, numbers: Sequence[int]) -> set[tuple[int, str]]:
    """Every prompt and site that can be read, its values compared."""
    found = set()
    for site in WIDE:
        place = store.locate(space, table=make_table(numbers), sites=[site], layout="last_token")
        members = np.flatnonzero(place.found)
        for values, k in zip(place.take(index=members)[:, 0], members.tolist(), strict=True):
            np.testing.assert_array_equal(values, row(numbers[k], site))
            found.add((numbers[k], site))
    return found


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 16))])
def test_nothing_that_can_be_read_is_lost_whatever_is_damaged_and_done(tmp_path: Path, seed: int) -> None:
    """What a host that knows nothing reads before is what everybody reads after; the values are compared, too."""
    rng = np.random.default_rng(seed)
    store, space = make_store(tmp_path)
    numbers = range(24)
    written = set()
    for _ in range(rng.integers(1, 5)):
        some = rng.permutation(24)[: rng.integers(4, 21)].tolist()
        sites = rng.permutation(WIDE)[: rng.integers(1, 4)].tolist()
        whole = wide(some)
        store.append(space, replace(whole, data={site: whole.data[site] for site in sites}))
        written |= {(i, site) for i in some for site in sites}
    for turn in range(3):
        files = segment_files(store, space)
        if not files:
            break
        # Their names are drawn by chance.
        files.sort(key=lambda path: (segments.read_info(path).created_ns, segments.read_info(path).columns))
        path = files[rng.integers(len(files))]
        opened = segments.open(path)
        for _ in range(rng.integers(1, 4)):
            site = str(rng.choice(opened.info.sites))
            flip(path, opened.start_of(site) + int(rng.integers(opened.matrix(site).nbytes)))
        before = readable(Store(store.location, index_dir=tmp_path / f"before {turn}"), space, numbers)
        # A process that knows of the damage, or comes across it as it reads, or only as it works.
        aware = Store(store.location, index_dir=tmp_path / "aware")
        knows = rng.integers(3)
        if knows == 2:
            aware.locate(space, table=make_table(numbers), sites=WIDE, layout="last_token")
        if knows:
            assert readable(aware, space, numbers) == before
        report = Store(store.location, index_dir=tmp_path / "verify").verify()
        assert report.lost == len(written - before)
        assert report.lost_prompts == len({i for i, _ in written - before})
        for work in (merge, lambda s, space: s.compact(space), repair)[rng.integers(3) :]:
            work(aware, space)
            assert readable(aware, space, numbers) == before
            assert readable(Store(store.location, index_dir=tmp_path / f"after {turn}"), space, numbers) == before
        written = before
