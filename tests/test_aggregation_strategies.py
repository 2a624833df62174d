"""How values of caches are joined: strategies by key and pattern, at once or at the end."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import actcache as ac
from actcache.capture import aggregation
from actcache.errors import AggregationError, JoinError, OptionError, UnknownKeyError, UnsavableError
from aggregation_helpers import WAYS, joined, keep_old, of


def fails_at_three(old: Any, new: Any) -> Any:
    if new == 3:
        raise RuntimeError("three")
    return [new] if old is None else [*old, new]


def test_strategies_by_key_and_pattern() -> None:
    def tag(name: str) -> Any:
        return lambda old, new: name

    cache = ac.ActivationCache()
    for pattern in ("*", "resid_post.*", "resid_post.1", "resid_post.1?", "map*"):
        cache.register_aggregation(pattern, tag(pattern))
    keys = ["resid_post.1", "resid_post.10", "resid_post.2", "other", "mapping_index"]
    cache.cat(ac.ActivationCache(dict.fromkeys(keys, 0)))
    assert dict(cache) == {
        "resid_post.1": "resid_post.1",
        "resid_post.10": "resid_post.1?",
        "resid_post.2": "resid_post.*",
        "other": "*",
        "mapping_index": "map*",
    }
    cache.remove_aggregation("resid_post.1?")
    assert cache.cat(ac.ActivationCache(dict.fromkeys(keys, 0)))["resid_post.10"] == "resid_post.*"
    with pytest.raises(UnknownKeyError, match=r"Did you mean 'resid_post\.1'"):
        cache.remove_aggregation("resid_post.7")
    with pytest.raises(OptionError, match="expected function"):
        cache.register_aggregation("x", 3)  # type: ignore[arg-type]


def test_a_strategy_replaces_the_default() -> None:
    cache = of(x=torch.tensor([1, 2]), kept=torch.tensor([1]))
    cache.register_aggregation("x", lambda old, new: new if old is None else torch.stack((old, new)))
    cache.register_aggregation("kept", keep_old)
    cache.cat(of(x=torch.tensor([3, 4]), kept=torch.tensor([9])))
    assert cache["x"].tolist() == [[1, 2], [3, 4]]
    assert cache["kept"].tolist() == [1]
    by_alias = ac.ActivationCache()
    by_alias.register_aggregation("resid_out_1", keep_old)
    batch = ac.ActivationCache({"resid_post.1": torch.ones(1), "resid_post.10": torch.ones(1)})
    by_alias.cat(batch).cat(batch)
    assert [len(by_alias["resid_post.1"]), len(by_alias["resid_post.10"])] == [1, 2]


def test_a_pattern_that_matches_nothing() -> None:
    for how in ("cat", "deferred"):
        cache = ac.ActivationCache()
        cache.register_aggregation("resid_post.", keep_old)
        batch = ac.ActivationCache({"resid_post.1": 1})
        mode = cache.deferred_mode() if how == "deferred" else nullcontext()
        with mode, pytest.raises(JoinError, match=r"matches no key.*Did you mean 'resid_post\.\*'"):
            cache.cat(batch)
        cache.remove_aggregation("resid_post.")
        assert cache.cat(batch) == batch


def test_a_strategy_that_fails() -> None:
    cache = ac.ActivationCache()
    cache.register_aggregation("n", fails_at_three)
    batches = [of(n=n, x=torch.full((1, 2), float(n))) for n in range(5)]
    for batch in batches:
        if batch["n"] == 3:
            with pytest.raises(AggregationError, match="fails_at_three failed for 'n': RuntimeError: three") as caught:
                cache.cat(batch)
            assert isinstance(caught.value.__cause__, RuntimeError)
        else:
            cache.cat(batch)
    assert cache["n"] == [0, 1, 2, 4]
    assert cache["x"][:, 0].tolist() == [0, 1, 2, 4]

    def spoils(old: Any, new: Any) -> Any:
        old.append(new)
        raise RuntimeError("too late")

    cache.register_aggregation("n", spoils)
    with pytest.raises(AggregationError):
        cache.cat(batches[0])
    assert cache["n"] == [0, 1, 2, 4]


def test_ready_made_strategies() -> None:
    batches = [
        of(
            mapping_index={"last": [i]}, offset=[i, i], token_dict={"last": i},
            last_layernorm={"mean": torch.full((2, 3), float(i)), "variance": torch.ones(2, 3)}, all=[i], flat=(i, i),
        )
        for i in range(3)
    ]  # fmt: skip
    both = ac.ActivationCache()
    both.register_aggregation("all", ac.aggregate.collect)
    both.register_aggregation("flat", ac.aggregate.flatten)
    for batch in batches:
        both.cat(batch)
    assert both["mapping_index"] == {"last": [2]}
    assert both["offset"] == [0, 0, 1, 1, 2, 2]
    assert both["token_dict"] == [{"last": 0}, {"last": 1}, {"last": 2}]
    assert both["last_layernorm"]["mean"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert both["all"] == [[0], [1], [2]]
    assert both["flat"] == [0, 0, 1, 1, 2, 2]
    assert ac.aggregate.default(torch.ones(1, 2), torch.ones(1, 3)).shape == (2, 3)
    with pytest.raises(JoinError, match="dicts of tensors"):
        ac.aggregate.layernorm_statistics(None, [1])
    with pytest.raises(AggregationError, match="last_layernorm"):
        both.cat(of(**{**batches[0], "last_layernorm": {"mean": torch.ones(2, 3)}}))


def test_strategies_survive_what_a_cache_goes_through() -> None:
    cache = of(x=torch.ones(1), mapping_index=1, token_dict=1, last_layernorm={"mean": torch.ones(1, 2)})
    cache.register_aggregation("x", keep_old)
    batch = copy.copy(cache)
    for twin in (
        copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache | {}, {} | cache,
        ac.ActivationCache.concatenate([cache]), cache.select(prompts=slice(None)),
    ):  # fmt: skip
        twin.cat(batch)
        assert twin["x"].tolist() == [1]
        assert twin["token_dict"] == [1, 1]
        assert twin["mapping_index"] == 1
        assert twin["last_layernorm"]["mean"].shape == (2, 2)
    cache.register_aggregation("x", lambda old, new: new)
    assert copy.deepcopy(cache) == cache
    with pytest.raises(UnsavableError, match=r"registered for 'x'.*top of a module"):
        pickle.dumps(cache)


def _fail_after(cache: ac.ActivationCache, batch: ac.ActivationCache) -> None:
    with cache.deferred_mode():
        cache.cat(batch)
        raise RuntimeError("in the loop")


def test_deferred_mode_joins_at_its_end() -> None:
    cache = of(x=torch.zeros(1, 2))
    with cache.deferred_mode() as same:
        assert same is cache
        for i in range(3):
            cache.cat(of(x=torch.full((1, 2), float(i + 1))))
            assert cache["x"].shape == (1, 2)
    assert cache["x"][:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="in the loop"):
        _fail_after(cache, of(x=torch.full((1, 2), 4.0)))
    assert cache["x"][:, 0].tolist() == [0, 1, 2, 3, 4]
    with cache.deferred_mode(), cache.deferred_mode():
        cache.cat(of(x=torch.full((1, 2), 5.0)))
        cache["note"] = "written inside"
    assert cache["x"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert cache["note"] == "written inside"


def test_finished_caches_and_their_metadata() -> None:
    one, other = of(x=torch.ones(1, 2)), of(x=torch.ones(2, 2))
    one.add_metadata(model_name="gpt2", target_token_positions={"last": -1}, run=3)
    assert one.metadata["model_name"] == "gpt2"
    assert one.metadata["interventions"] is None
    both = copy.deepcopy(one).cat(other).cat(one)
    assert both.metadata == one.metadata
    assert len(both["x"]) == 4
    other.add_metadata(model_name="llama")
    with pytest.raises(JoinError, match="model_name: 'gpt2' and 'llama'"):
        both.cat(other)
    assert both.metadata == one.metadata
    other.metadata.clear()
    assert len(both.cat(other)["x"]) == 6
    one.add_metadata(model_name="gpt2-xl")
    assert one.metadata["target_token_positions"] == {"last": -1}


def test_values_with_info_join() -> None:
    one = ac.ActivationCache()
    one.add_with_info("x", torch.ones(1, 2), "unit")
    both = ac.ActivationCache.concatenate([one, one])
    assert both["x"].value().shape == (2, 2)
    assert both.info("x") == "unit"
    other = ac.ActivationCache()
    other.add_with_info("x", torch.ones(1, 3), "other")
    for how in WAYS:
        mixed = joined([one, one, other, other], how)
        assert mixed.info("x") == ["unit", "other"]
        assert [len(row) for row in mixed.rows("x")] == [2, 2, 3, 3]


def test_many_batches_are_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(aggregation, "merge", lambda parts, *rest, **options: calls.append(len(parts)) or parts[0])
    cache = ac.ActivationCache()
    for i in range(50):
        cache.cat(of(x=torch.full((1, 2 + i % 2), float(i)), y=i))
        # Keys are known before values are.
        assert list(cache) == ["x", "y"]
        assert len(cache) == 2
        assert "x" in cache and "z" not in cache
    assert calls == []
    list(cache.items())
    assert calls == [50, 50]
