"""Perplexity and logits in a store: found, completed, forgotten, and refused where they cannot be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.demo import model_path
from actcache.store.appending import Appender
from actcache.store.records import Records, is_result
from results_helpers import PROMPTS, check_logits, check_perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.saved("llama", tmp_path_factory.mktemp("model"))


def test_what_was_asked_is_what_is_labelled(folder: Path, tmp_path: Path) -> None:
    """Other numbers of logits than those stored are computed, and never cut out of others or padded."""
    for top_k in (3, 50, 3):
        cache = ac.UnifiedCache(folder, cache_logits=True, logit_top_k=top_k, store=tmp_path)
        stats = cache.warmup(PROMPTS)
        found = cache.get_logits(PROMPTS)
        assert (found.top_k, found.values.shape[-1]) == (top_k, top_k)
        check_logits(found, "llama")
    assert (stats.logits_cached, stats.logits_extracted, stats.tokens_extracted) == (len(PROMPTS), 0, 0)
    assert cache.compute_logits_from_cache(PROMPTS, top_k=50) == 0
    assert cache.compute_logits_from_cache(PROMPTS, top_k=49) == len(PROMPTS)
    assert cache.compute_logits_from_cache(PROMPTS) == len(PROMPTS)
    # All logits answer every number.
    assert cache.compute_logits_from_cache(PROMPTS, top_k=48) == 0
    check_logits(cache.get_logits(PROMPTS, top_k=48), "llama")
    with pytest.raises(ValueError, match=r"the top 48 logits of every token are not stored.*logit_positions='all'.*"):
        cache.get_logits(PROMPTS, top_k=48, positions="all")


def test_stored_results_of_texts_are_found_without_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits would answer, too, but are not looked for where those that were asked are there."""
    texts = ["The sky is blue.", "Snow is white."]

    def cache() -> ac.UnifiedCache:
        return ac.UnifiedCache(str(model_path()), layers=-1, cache_logits=True, logit_top_k=3, store=tmp_path)

    cache().warmup(texts)

    def load_no_tokenizer(*_: object) -> None:
        pytest.fail("a tokenizer is loaded")

    monkeypatch.setattr("actcache.model.tokenizer.load_tokenizer", load_no_tokenizer)
    stats = cache().warmup(texts)
    assert (stats.activations_cached, stats.perplexity_cached, stats.logits_cached) == (2, 2, 2)
    assert cache().get_logits(texts).top_k == 3
    assert np.isfinite(cache().get_perplexity(texts)).all()


def test_some_prompts_by_their_own_number_and_some_by_all(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, store=tmp_path)
    cache.warmup(PROMPTS)
    assert cache.compute_logits_from_cache(PROMPTS[:3], top_k=5) == 3
    assert cache.compute_logits_from_cache(PROMPTS[2:]) == 5
    assert cache.compute_logits_from_cache([*PROMPTS, *PROMPTS], top_k=5) == 0
    check_logits(cache.get_logits(PROMPTS, top_k=5), "llama")


def test_only_what_is_missing_is_computed(folder: Path, tmp_path: Path) -> None:
    plain = ac.UnifiedCache(folder, compute_perplexity=False, store=tmp_path)
    stats = plain.warmup(PROMPTS[:4])
    assert (stats.activations_extracted, stats.perplexity_extracted, stats.perplexity_cached) == (4, 0, 0)
    cache = ac.UnifiedCache(folder, store=tmp_path)
    # Reading what is stored computes nothing, whatever else the cache is for.
    cache.get_activations(PROMPTS[:4])
    assert not cache.model_loaded
    stats = cache.warmup([*PROMPTS[:5], PROMPTS[0]])
    assert (stats.activations_cached, stats.activations_extracted) == (5, 1)
    assert (stats.perplexity_cached, stats.perplexity_extracted) == (0, 5)
    again = ac.UnifiedCache(folder, store=tmp_path)
    stats = again.warmup(PROMPTS[:5])
    assert (stats.perplexity_cached, stats.tokens_extracted) == (5, 0)
    # Values are unchanged by where they come from.
    check_perplexity(again, "llama")
    assert again.warmup(PROMPTS).perplexity_cached == len(PROMPTS)


def test_results_are_never_durable_before_the_vectors_of_their_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Appender.append
    held: dict[bool, set[bytes]] = {True: set(), False: set()}
    early = []

    def slow_for_vectors(self: Appender, group: Sequence[Records]) -> None:
        results = all(is_result(site) for site in group[0].data)
        if not results:
            time.sleep(0.1)
        append(self, group)
        held[results] |= {key.tobytes() for records in group for key in records.prompts.token_key}
        early.append(len(held[True] - held[False]))

    monkeypatch.setattr(Appender, "append", slow_for_vectors)
    monkeypatch.setattr("actcache.extract.results._LINGER_SECONDS", 0.0)
    cache = ac.UnifiedCache(folder, cache_pooled=False, cache_logits=True, store=tmp_path, batch_size=1)
    # Labels are no results, and would mean as little alone.
    cache.warmup(PROMPTS, labels=list(range(len(PROMPTS))))
    assert len(held[True]) == len(held[False]) == len({tuple(p) for p in PROMPTS})
    assert not any(early)


def test_the_last_tokens_vector_serves_the_last_tokens_logits(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, layers=[0, -1], compute_perplexity=False, store=tmp_path)
    cache.warmup(PROMPTS)
    assert cache.compute_logits_from_cache(PROMPTS) == len(PROMPTS)
    check_logits(cache.get_logits(PROMPTS), "llama")
    for compute in (
        lambda: cache.compute_perplexity_from_cache(PROMPTS),
        lambda: cache.compute_logits_from_cache(PROMPTS, "all"),
    ):
        with pytest.raises(errors.NotCachedError, match=r"7 of 7 prompts.*every token\).*cache_pooled=False"):
            compute()
    mean = ac.UnifiedCache(folder, compute_perplexity=False, pooling="mean", store=tmp_path / "mean")
    mean.warmup(PROMPTS)
    with pytest.raises(errors.NotCachedError, match="of the last token or of every one"):
        mean.compute_logits_from_cache(PROMPTS)
    without = ac.UnifiedCache(folder, layers=[0, 1], compute_perplexity=False, store=tmp_path)
    for again in (without.compute_perplexity_from_cache, without.compute_logits_from_cache):
        with pytest.raises(ValueError, match=r"'resid_post.3', which is not among this cache's sites: add the last"):
            again(PROMPTS)


def test_forgetting_prompts_forgets_their_results(folder: Path, tmp_path: Path) -> None:
    store = ac.Store(tmp_path)
    texts = ["The cat sat", "on the mat", "a"]
    cache = ac.UnifiedCache(folder, cache_logits=True, logit_top_k=2, logit_positions="all", store=store)
    cache.warmup(texts)
    name = str(folder.resolve())
    info = store.discover(name, texts[0])
    assert info is not None
    assert (info.has_perplexity, info.has_token_perplexity, info.logits_top_k, info.has_logits) == (
        True,
        True,
        2,
        False,
    )
    (model,) = store.info().models
    assert (model.has_perplexity, model.has_logits, model.stored_dtypes) == (True, True, ["float32"])
    (space,) = store.spaces()
    assert store.invalidate(space, texts[:1]) == 1
    assert store.discover(name, texts[0]) is None
    again = ac.UnifiedCache(folder, cache_logits=True, logit_top_k=2, logit_positions="all", store=store)
    stats = again.warmup(texts)
    assert (stats.activations_cached, stats.perplexity_cached, stats.logits_cached) == (2, 2, 2)
    assert (stats.activations_extracted, stats.perplexity_extracted, stats.logits_extracted) == (1, 1, 1)
    store.evict(0)
    assert again.warmup(texts).perplexity_cached == 0


def test_a_store_that_keeps_nothing_still_answers(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, cache_logits=True, store=ac.Store(tmp_path, limit_gb=0))
    check_perplexity(cache, "llama")
    check_logits(cache.get_logits(PROMPTS), "llama")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_predicts_nothing_has_no_perplexity(tmp_path: Path) -> None:
    for family in ("bert", "t5"):
        site = "resid_post" if family == "bert" else "decoder.resid_post"
        zoo.model_of(family).save_pretrained(tmp_path / family)
        for model in (zoo.model_of(family), tmp_path / family):
            cache = ac.UnifiedCache(model, sites=site, store=tmp_path / "store")
            stats = cache.warmup(PROMPTS[2:4])
            assert stats.perplexity_extracted == stats.perplexity_cached == 0
            with pytest.raises(errors.SiteUnavailableError, match="does not predict the token that follows"):
                cache.get_perplexity(PROMPTS[2:4])
            with pytest.raises(errors.SiteUnavailableError, match="does not predict the token that follows"):
                cache.compute_perplexity_from_cache(PROMPTS[2:4])
    logits = ac.UnifiedCache(
        zoo.model_of("t5"), sites="decoder.resid_post", cache_logits=True, store=tmp_path / "logits"
    ).get_logits(PROMPTS)
    check_logits(logits, "t5")
    headless: Any = zoo.model_of("gpt2")
    cache = ac.UnifiedCache(headless.transformer, store=tmp_path / "headless")
    assert cache.warmup(PROMPTS).activations_extracted == len(PROMPTS)


def test_what_is_not_stored_and_not_asked_for_is_said(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, compute_perplexity=False, store=tmp_path)
    for read in (cache.get_perplexity, cache.get_token_perplexity):
        with pytest.raises(ValueError, match=r"compute_perplexity=True.*compute_perplexity_from_cache"):
            read(PROMPTS)
    with pytest.raises(ValueError, match=r"all logits of the last token.*cache_logits=True.*compute_logits_from_cache"):
        cache.get_logits(PROMPTS)
    assert not cache.model_loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_top_k": 0}, "top_k is 0: expected a positive integer"),
        ({"logit_top_k": 260}, "top_k is 260: the model has 259 tokens"),
        ({"logit_positions": "first"}, "unknown logit position 'first'"),
        ({"remote": True}, "remote=True: backend 'local' runs models in this process"),
    ],
)
def test_bad_options_fail_before_any_work(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        ac.UnifiedCache(folder, **options)


def test_options_come_in_the_order_of_the_signature(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, [0], False, "cpu", False, 4, False, "mean", "local", "float64", store=tmp_path)
    values, mask = cache.get_activations(PROMPTS)  # type: ignore[misc]
    assert values.shape == (len(PROMPTS), 17, 32)  # type: ignore[union-attr]
    assert values.dtype is torch.float64  # type: ignore[union-attr]
    assert mask is not None
    with pytest.raises(errors.ResultsNotCachedError):
        cache.get_perplexity(PROMPTS)
