"""The process's default store: where it is, and the functions that act on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.errors import AmbiguousVariantError, NotCachedError, OptionError
from actcache.store.default import default_location, default_store, store_at


def fill(store: ac.Store, model: str, prompts: list[str], **identity: str) -> None:
    vectors = [np.full(4, i, np.float32) for i in range(len(prompts))]
    store.write(ac.new_space(model, **identity), prompts, {"resid_post.0": vectors}, pooling="mean")


def test_a_call_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTCACHE_DIR", str(tmp_path / "dir"))
    assert default_store().location == tmp_path / "dir"
    monkeypatch.setenv("ACTCACHE_BACKEND", str(tmp_path / "backend"))
    assert default_store().location == tmp_path / "backend"
    ac.set_cache_backend(tmp_path / "call")
    assert ac.cache_info().cache_dir == tmp_path / "call"
    ac.set_cache_backend(None)
    assert ac.cache_info().cache_dir == tmp_path / "backend"


def test_the_default_store_is_one_object_until_it_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = default_store()
    assert default_store() is first
    assert store_at(None) is first
    monkeypatch.setenv("ACTCACHE_DIR", str(tmp_path))
    assert default_store() is not first


def test_a_store_object_is_taken_as_it_is(tmp_path: Path) -> None:
    store = ac.Store(tmp_path)
    ac.set_cache_backend(store)
    assert default_store() is store


@pytest.mark.parametrize("place", ["file:///tmp/x", "s4://bucket", "memory://x", "s3://", Path("hdfs://host/x")])
def test_a_url_of_another_kind_is_refused(place: str | Path) -> None:
    with pytest.raises(OptionError, match=r"s3://"):
        ac.set_cache_backend(place)


def test_a_url_is_the_default_however_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACTCACHE_BACKEND", "s3://bucket/some/prefix/")
    store = default_store()
    assert store.location == default_location().value == "s3://bucket/some/prefix"
    assert store_at("s3://bucket/some/prefix") is store
    assert store_at(Path("s3://bucket/some/prefix")) is store
    assert store_at("s3://bucket/other").location == "s3://bucket/other"
    ac.set_cache_backend("gs://elsewhere")
    assert default_store().location == "gs://elsewhere"
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_is_no_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTCACHE_BACKEND", "s3a://bucket")
    with pytest.raises(OptionError, match=r"ACTCACHE_BACKEND: .*Did you mean 's3'"):
        default_store()
    monkeypatch.delenv("ACTCACHE_BACKEND")
    monkeypatch.setenv("ACTCACHE_DIR", "s3://bucket")
    with pytest.raises(OptionError, match=r"ACTCACHE_DIR is a URL.*ACTCACHE_BACKEND"):
        default_store()


def test_a_backend_can_be_the_default() -> None:
    backend = ac.MemoryBackend("of a test")
    ac.set_cache_backend(backend)
    assert default_store().backend is backend
    assert ac.cache_info().cache_dir == "memory://of a test"


@pytest.mark.parametrize("place", [3, "", "  "])
def test_what_is_no_folder_is_refused(place: object) -> None:
    with pytest.raises(OptionError, match="folder"):
        ac.set_cache_backend(place)  # type: ignore[arg-type]


def test_a_refused_choice_changes_nothing(tmp_path: Path) -> None:
    ac.set_cache_backend(tmp_path)
    with pytest.raises(OptionError):
        ac.set_cache_backend("s4://bucket")
    assert default_store().location == tmp_path


def test_info_and_clear_can_be_about_one_model() -> None:
    fill(default_store(), "one", ["a", "b"])
    fill(default_store(), "two", ["a"])
    everything, part = ac.cache_info(), ac.cache_info("one")
    assert [m.model_name for m in everything.models] == ["one", "two"]
    assert [(m.model_name, m.num_prompts) for m in part.models] == [("one", 2)]
    assert part.total_size_bytes == part.models[0].size_bytes < everything.total_size_bytes
    assert ac.cache_info("three").models == []
    assert ac.clear_cache("one") == 2
    assert [m.model_name for m in ac.cache_info().models] == ["two"]
    assert ac.clear_cache() == 1


def test_a_model_folder_goes_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    fill(default_store(), str(folder), ["a"])
    monkeypatch.chdir(tmp_path)
    info = ac.discover_cached("./model", "a")
    assert info is not None
    assert info.pooled == {"mean": [0]}
    assert ac.discover_cached("./model", "b") is None
    assert len(ac.cache_info(Path("model")).models) == 1


def test_invalidating_takes_exactly_one_variant() -> None:
    store = default_store()
    fill(store, "m", ["a", "b"], dtype="float32")
    fill(store, "m", ["a", "b"], dtype="bfloat16")
    with pytest.raises(AmbiguousVariantError, match=r"2 variants.*float32.*bfloat16"):
        ac.invalidate_extraction_cache("m")
    assert ac.invalidate_extraction_cache("m", ["a"], dtype="bfloat16") == 1
    left = {s.dtype: list(store.contains(s, ["a", "b"])) for s in store.spaces()}
    assert left == {"float32": [True, True], "bfloat16": [False, True]}
    space = next(s.space for s in store.spaces() if s.dtype == "float32")
    assert ac.invalidate_extraction_cache("m", space=space) == 2
    with pytest.raises(NotCachedError, match=r"no variant of 'm' has .*float16"):
        ac.invalidate_extraction_cache("m", dtype="float16")


def test_an_unknown_model_is_named_with_the_nearest() -> None:
    with pytest.raises(NotCachedError, match="The store is empty"):
        ac.invalidate_extraction_cache("gpt2")
    fill(default_store(), "gpt2", ["a"])
    with pytest.raises(NotCachedError, match="Did you mean 'gpt2'"):
        ac.invalidate_extraction_cache("gtp2")
    with pytest.raises(NotCachedError, match="Did you mean 'gpt2'"):
        ac.clear_cache("gtp2")
    assert ac.clear_cache("gpt2") == 1
    with pytest.raises(NotCachedError, match="The store is empty"):
        ac.clear_cache("gpt2")
    assert ac.clear_cache() == 0
