"""What is intact beside damage stays readable where damage is found, whatever is done next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.demo import model_path
from actcache.errors import NotCachedError
from actcache.store import segment as segments
from actcache.store.batches import OpenFile
from actcache.store.records import Records
from actcache.store.store import Store
from damage_helpers import WIDE, break_blocks, kept, merge, repair, row, wide, without
from store_helpers import flip, growing_writer, make_store, make_table, open_files, segment_files


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
