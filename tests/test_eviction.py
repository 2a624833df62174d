"""Eviction: what was read longest ago goes, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache as ac
from actcache.cli.app import run
from actcache.demo import model_path
from actcache.errors import OptionError
from actcache.extract.stats import after_eviction
from actcache.store import eviction, files, segment
from actcache.store.records import Records
from actcache.store.store import Store
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

GB = 2**30
DIM = 512


def bytes_on_disk(store: Store) -> int:
    return sum(f.stat().st_size for f in store.location.rglob("*") if f.is_file())


def fill(store: Store, space: str, groups: Sequence[Sequence[int]], **options: Any) -> int:
    """A segment for each group; the size of the largest."""
    sizes = [store.append(space, pooled(numbers, dim=DIM, **options)).size for numbers in groups]
    return max(sizes)


def there(store: Store, space: str, numbers: Sequence[int], sites: Sequence[str] = SITES) -> list[int]:
    """Which prompts are stored; their values are compared, and this does not count as reading."""
    place = store.locate(
        space, texts=[text(i) for i in numbers], text_context=CONTEXT, sites=sites, layout="last_token", check=False
    )
    members = np.flatnonzero(place.found)
    for row, k in zip(place.take(index=members), members.tolist(), strict=True):
        for j, site in enumerate(sites):
            np.testing.assert_array_equal(row[j], vector(numbers[k], site, DIM))
    return [numbers[k] for k in members.tolist()]


def read(store: Store, space: str, numbers: Sequence[int]) -> None:
    assert store.read(space, [text(i) for i in numbers], SITES[0], pooling="last_token").shape == (len(numbers), DIM)


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


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No byte more can be written while the first item is 1; removing frees nothing here. Counts what was tried."""
    state = [0, 0]
    real = os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int) -> int:
        if state[0]:
            state[1] += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    return state


def test_eviction_works_on_a_full_disk(tmp_path: Path, full_disk: list[int]) -> None:
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(k, k + 20) for k in range(0, 100, 20)])
    read(store, space, [3, 25, 44, 63, 85])
    full_disk[0] = 1
    report = store.evict(2.5 * size / GB)
    assert full_disk[1]
    assert bytes_on_disk(store) == report.bytes_kept <= 2.5 * size
    left = there(store, space, range(100))
    assert len(left) == 40
    full_disk[0] = 0
    assert not list(store.location.rglob("*.tmp"))
    fill(store, space, [range(100, 110)])


def test_the_cost_grows_with_what_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of many segments goes: nothing else is opened, nothing is written."""
    store, space = make_store(tmp_path)
    size = fill(store, space, [range(k, k + 5) for k in range(0, 300, 5)])
    fresh = Store(store.location, index_dir=tmp_path / "index")
    fresh.info()
    opened: list[str] = []
    real = os.open

    def watching(path: Any, flags: int, *args: Any, **options: Any) -> int:
        opened.append(Path(path).name)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", watching)
    total = bytes_on_disk(store)
    assert fresh.evict((total - size // 2) / GB).prompts == 5
    assert len([name for name in opened if files.SEGMENT_NAME.fullmatch(name)]) <= 2
    assert not [name for name in opened if files.TEMP_NAME.fullmatch(name)]


def test_a_full_store_keeps_to_its_limit_while_it_is_used(tmp_path: Path) -> None:
    prompts = [f"The number {i} is" for i in range(30)]
    probe = ac.UnifiedCache(str(model_path()), store=tmp_path / "probe")
    probe.warmup(prompts[:10])
    limit = probe.store.info().total_size_bytes * 1.5
    store = Store(tmp_path / "store", limit_gb=limit / GB)
    cache = ac.UnifiedCache(str(model_path()), store=store)
    expected, _ = ac.UnifiedCache(str(model_path()), store=tmp_path / "all").get_activations(prompts)
    for start in range(0, 30, 10):
        values, _ = cache.get_activations(prompts[start : start + 10])
        assert values.equal(expected[start : start + 10])
        assert bytes_on_disk(store) <= limit
    assert cache.plan(prompts[20:]).missing == 0
    assert cache.plan(prompts[:20]).missing >= 15


def test_a_limit_smaller_than_a_request_still_answers_it(tmp_path: Path) -> None:
    prompts = [f"The number {i} is" for i in range(10)]
    expected, _ = ac.UnifiedCache(str(model_path()), store=tmp_path / "all").get_activations(prompts)
    store = Store(tmp_path / "store", limit_gb=100 / GB)
    cache = ac.UnifiedCache(str(model_path()), store=store)
    for _ in range(2):
        assert cache.get_activations(prompts)[0].equal(expected)
        assert bytes_on_disk(store) <= 100
    raw = ac.UnifiedCache(str(model_path()), store=store, cache_pooled=False, sites=("resid_post", "mlp_out"))
    answer = raw.get_activations(prompts)
    values, mask = answer["resid_post"]
    assert values.shape[:2] == mask.shape
    assert values[mask].abs().sum() > 0
    assert bytes_on_disk(store) <= 100


def test_a_limit_of_zero_works_without_storing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"The number {i} is" for i in range(6)]
    expected, _ = ac.UnifiedCache(str(model_path()), store=tmp_path / "all").get_activations(prompts)
    store = Store(tmp_path / "store", limit_gb=0)
    cache = ac.UnifiedCache(str(model_path()), store=store, sites=("resid_post", "mlp_out"))
    both = cache.get_activations(prompts)
    assert both["resid_post"][0].equal(expected)
    assert cache.warmup(prompts).activations_extracted == 0
    one = ac.activations(str(model_path()), prompts, pooling=None, store=store)
    np.testing.assert_array_equal(np.stack([p[-1] for p in one]).reshape(6, -1), expected.numpy())
    values, mask = cache.cached.extract(prompts)  # type: ignore[misc]
    assert mask.all() and len(values) == 6
    assert cache.cached.extract(prompts, cache_only=True) is None
    assert store.write(ac.new_space("m"), ["a"], {"x": [np.zeros(4, np.float32)]}, pooling="mean") == 0
    assert not store.location.exists()
    assert not list(Path("/dev/shm").glob("actcache-*"))
    cache = ac.UnifiedCache(str(model_path()), store=Store(tmp_path / "store"))
    assert cache.warmup(prompts).activations_extracted == 6


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    vectors = [np.zeros(1000, np.float32)] * 10
    for name in ("one", "two", "three"):
        store.write(ac.new_space(name), [f"p{i}" for i in range(10)], {"resid_post.0": vectors}, pooling="mean")
    where = ["--store", str(tmp_path / "store")]
    assert run(["evict", *where]) == 2
    assert "give --limit-gb" in capsys.readouterr().err
    monkeypatch.setenv("ACTCACHE_MAX_GB", str(120_000 / GB))
    assert run(["evict", *where]) == 2
    assert "ACTCACHE_MAX_GB is the default store's" in capsys.readouterr().err
    monkeypatch.setenv("ACTCACHE_DIR", where[1])
    assert run(["evict", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == 10 and report["bytes_kept"] <= 120_000
    assert run(["evict", *where, "--limit-gb", str(70_000 / GB)]) == 0
    assert "10 prompts evicted" in capsys.readouterr().out
    ac.set_cache_backend(tmp_path / "store")
    assert ac.evict(0).prompts == 10
    ac.set_cache_backend(None)


def test_a_writer_at_work_loses_nothing_but_what_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that appears while the others are evicted is not taken for one of them."""
    store, space = make_store(tmp_path)
    fill(store, space, [range(k, k + 20) for k in range(0, 60, 20)])
    other = Store(store.location, index_dir=tmp_path / "elsewhere")
    other.open_space({"weights": "abc"}, {"model_name": "org/model"})
    real = eviction.discard
    done = []

    def late(copy: None, path: Path) -> int:
        if not done:
            done.append(other.append(space, pooled([100], dim=DIM)).name)
        return real(copy, path)

    monkeypatch.setattr(eviction, "discard", late)
    store.evict(30_000 / GB)
    assert done
    assert 100 in there(store, space, [*range(60), 100])
    assert bytes_on_disk(store) <= 30_000


def test_a_warm_up_says_what_its_limit_had_no_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [f"The number {i} is" for i in range(12)]
    model = str(model_path())
    whole = ac.UnifiedCache(model, store=tmp_path / "all", cache_pooled=False)
    planned = whole.plan(prompts)
    assert (planned.bytes_limit, planned.over_limit) == (None, False)
    stats = whole.warmup(prompts)
    assert (stats.prompts_evicted, stats.activations_evicted, caplog.messages) == (0, 0, [])
    needed = bytes_on_disk(whole.store)
    for limit, some in ((100, False), (needed * 2 // 3, True)):
        caplog.clear()
        cache = ac.UnifiedCache(model, store=Store(tmp_path / str(limit), limit_gb=limit / GB), cache_pooled=False)
        plan = cache.plan(prompts)
        assert plan.bytes_limit == int(limit / GB * GB)
        assert plan.over_limit is (plan.bytes_to_write > limit)
        assert plan.over_limit or some
        stats = cache.warmup([*prompts, prompts[0]])
        # What is there now is seen by whoever asks next.
        left = cache.plan(prompts).missing
        assert stats.prompts_evicted == left
        activations = ac.UnifiedCache(model, store=cache.store, cache_pooled=False, compute_perplexity=False)
        assert stats.activations_evicted == activations.plan(prompts).missing
        assert stats.activations_evicted > 0 if some else stats.activations_evicted == left == 12
        (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
        text = warning.getMessage()
        assert f"of {left} of 13 prompts" in text
        assert f"{limit / 2**20:,.2f} MB" in text if some else "100 bytes" in text
        assert "ac.set_cache_limit" in text
        # In how many files it was written, each with its header, chance decides.
        (said,) = re.findall(r"would need ([\d.]+) MB", text)
        assert float(said) == pytest.approx(needed / 2**20, rel=0.2)


def test_results_that_a_limit_takes_are_not_counted_as_activations(tmp_path: Path) -> None:
    prompts = [f"The number {i} is" for i in range(6)]
    cache = ac.UnifiedCache(str(model_path()), store=Store(tmp_path / "one", limit_gb=1), cache_pooled=True)
    assert cache.warmup(prompts).prompts_evicted == 0
    store = Store(cache.store.location, index_dir=tmp_path / "index")
    (space,) = store.spaces()
    results = [p for p in segment_files(store, space.space) if "perplexity" in str(segment.open(p).info.sites)]
    assert results
    for path in results:
        path.unlink()
    left = cache.cached.request(prompts, cache.sites, check=False, asked=cache._asked)
    report = eviction.EvictionReport(6, 10, 20, 1, 0, 15, {})
    stats = after_eviction(ac.WarmupStats(6), left, report)
    assert (stats.prompts_evicted, stats.activations_evicted) == (6, 0)


def test_the_verbs_say_what_the_limit_has_no_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTCACHE_DIR", str(tmp_path / "store"))
    arguments = [str(model_path()), "--prompt", "The sky is", "--prompt", "Snow is"]
    assert run(["plan", *arguments]) == 0
    assert "the limit" not in capsys.readouterr().out
    monkeypatch.setenv("ACTCACHE_MAX_GB", str(1000 / GB))
    assert run(["plan", *arguments]) == 0
    assert "the limit        1000 B: not all of this stays." in capsys.readouterr().out
    assert run(["plan", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bytes_limit"], found["over_limit"]) == (1000, True)
    assert run(["warmup", *arguments]) == 0
    assert "2 prompts did not stay: the limit of the store has no room for all." in capsys.readouterr().out
