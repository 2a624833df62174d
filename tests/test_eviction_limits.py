"""A store that keeps to its limit while it is used: on a full disk, under writers, and what is said of it."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache as ac
from actcache.cli.app import run
from actcache.demo import model_path
from actcache.extract.stats import after_eviction
from actcache.store import eviction, files, segment
from actcache.store.store import Store
from eviction_helpers import DIM, GB, bytes_on_disk, fill, read, there
from store_helpers import make_store, pooled, segment_files


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
