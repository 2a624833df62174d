"""Perplexity and logits: computed with activations, computed from them, stored, read, forgotten."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache import errors
from actcache.demo import model_path
from actcache.model.head_way import Way
from actcache.store.appending import Appender
from actcache.store.records import Records, is_result
from actcache.testing.tiny import tiny_tokenizer

CAUSAL = [
    name
    for name, known in zoo.FAMILIES.items()
    if not known.encoder_decoder and name not in ("bert", "distilbert", "roberta", "modernbert")
]
# How far logits may be from the model's own, relative to the largest.
LOGITS = 1e-5
PROMPTS = zoo.prompts_of(0, [1, 2, 7, 8, 13, 17])


def logits_alone(family: str, prompt: list[int]) -> Tensor:
    """The model's own logits of one prompt ``[T, V]``."""
    return zoo.reference(family, 0, tuple(prompt))["logits"].double()


def perplexity_alone(family: str, prompt: list[int]) -> np.ndarray[Any, Any]:
    """exp of the cross-entropy of each token but the first, in float64."""
    if len(prompt) == 1:
        return np.empty(0)
    given = logits_alone(family, prompt)[:-1]
    return torch.nn.functional.cross_entropy(given, torch.tensor(prompt[1:]), reduction="none").exp().numpy()


def features(each: np.ndarray[Any, Any]) -> list[float]:
    return [float(np.exp(np.log(each).mean())), each.min(), each.max()] if len(each) else [1.0, 1.0, 1.0]


def check_perplexity(cache: ac.UnifiedCache, family: str, tolerance: float = 1e-4) -> None:
    """Against the model alone, `tolerance` relative."""
    found, each = cache.get_perplexity(PROMPTS), cache.get_token_perplexity(PROMPTS)
    assert found.shape == (len(PROMPTS), 3)
    assert found.dtype == np.float32
    for prompt, three, tokens in zip(PROMPTS, found, each, strict=True):
        expected = perplexity_alone(family, prompt)
        assert tokens.shape == expected.shape
        np.testing.assert_allclose(tokens, expected, rtol=tolerance)
        np.testing.assert_allclose(three, features(expected), rtol=tolerance)


def check_logits(found: ac.CachedLogits, family: str, tolerance: float = LOGITS) -> None:
    for i, prompt in enumerate(PROMPTS):
        expected = logits_alone(family, prompt)
        expected = expected if found.positions == "all" else expected[-1:]
        size = float(expected.abs().max())
        values, mask = found.values[i].double(), found.mask[i]
        assert mask.tolist() == [k < len(expected) for k in range(mask.shape[0])]
        assert not values[~mask].any()
        values = values[mask]
        if found.top_k is None:
            assert found.indices is None
            assert float((values - expected).abs().max()) <= tolerance * size
            best = expected.topk(2).values
            clear = best[:, 0] - best[:, 1] > 2 * tolerance * size
            assert torch.equal(values.argmax(-1)[clear], expected.argmax(-1)[clear])
        else:
            assert found.indices is not None
            assert found.indices.dtype is torch.int32
            assert (found.indices[i][~mask] == -1).all()
            indices = found.indices[i][mask].long()
            assert float((values - expected.topk(found.top_k).values).abs().max()) <= tolerance * size
            # Which tokens these are is told by their own logits: near ties may come in either order.
            assert float((expected.gather(-1, indices) - values).abs().max()) <= tolerance * size
            assert all(len(set(row)) == found.top_k for row in indices.tolist())


@pytest.mark.parametrize("family", CAUSAL)
def test_with_activations_and_from_them(family: str, tmp_path: Path) -> None:
    """For every causal architecture, against the logits of one prompt that is run alone."""
    model = zoo.model_of(family)
    store = ac.Store(tmp_path / "with")
    cache = ac.UnifiedCache(model, layers=-1, cache_logits=True, logit_positions="all", store=store)
    stats = cache.warmup(PROMPTS)
    assert (stats.perplexity_extracted, stats.logits_extracted) == (len(PROMPTS), len(PROMPTS))
    check_perplexity(cache, family)
    check_logits(cache.get_logits(PROMPTS), family)
    (space,) = store.spaces()
    for losses in store.read(space, PROMPTS, "token_nll"):
        # What follows the last token is not known.
        assert losses[:, 0].isnan().tolist() == [False] * (len(losses) - 1) + [True]
    model.save_pretrained(tmp_path / "model")
    after = ac.UnifiedCache(
        tmp_path / "model", layers=-1, compute_perplexity=False, cache_pooled=False, store=tmp_path / "after"
    )
    after.warmup(PROMPTS)
    # A cache that reads the same store, and has no model in memory.
    cold = ac.UnifiedCache(
        tmp_path / "model", layers=-1, compute_perplexity=False, cache_pooled=False, store=tmp_path / "after"
    )
    assert cold.compute_perplexity_from_cache(PROMPTS, batch_size=4) == len(PROMPTS)
    assert cold.compute_logits_from_cache(PROMPTS, "all") == len(PROMPTS)
    assert not cold.model_loaded
    check_perplexity(cold, family)
    check_logits(cold.get_logits(PROMPTS, positions="all"), family)
    # All of every token answer for the last one, and for any number of the largest.
    check_logits(cold.get_logits(PROMPTS, top_k=4), family)
    assert not cold.model_loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    zoo.model_of("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("top_k", [None, 3, 259])
def test_logits_of_every_form(folder: Path, tmp_path: Path, positions: str, top_k: int | None) -> None:
    cache = ac.UnifiedCache(
        folder, cache_logits=True, logit_top_k=top_k, logit_positions=positions, store=tmp_path, batch_size=3
    )
    found = cache.get_logits(PROMPTS)
    assert (found.top_k, found.positions) == (top_k, positions)
    assert found.values.shape == (len(PROMPTS), 17 if positions == "all" else 1, top_k or 259)
    check_logits(found, "llama")
    check_perplexity(cache, "llama")


def test_whatever_precision_the_caller_computes_in(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, layers=-1, cache_pooled=False, compute_perplexity=False, store=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        cache.warmup(PROMPTS)
        cache.compute_perplexity_from_cache(PROMPTS)
        cache.compute_logits_from_cache(PROMPTS, "all")
    check_perplexity(cache, "llama")
    check_logits(cache.get_logits(PROMPTS, positions="all"), "llama")


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


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 2e-2), ("int8", 6e-2), ("float8_e4m3", 0.3)]
)
def test_results_are_never_stored_in_a_narrow_dtype(
    folder: Path, tmp_path: Path, dtype: str, tolerance: float, record_property: Any
) -> None:
    """What is computed in the pass is exact; what is computed from vectors errs as these do."""
    store = ac.Store(tmp_path, dtype=dtype)
    cache = ac.UnifiedCache(folder, cache_pooled=False, cache_logits=True, logit_top_k=4, store=store)
    cache.warmup(PROMPTS)
    check_perplexity(cache, "llama")
    check_logits(cache.get_logits(PROMPTS), "llama")
    exact = cache.get_perplexity(PROMPTS)
    later = ac.UnifiedCache(
        folder, cache_pooled=False, compute_perplexity=False, store=ac.Store(tmp_path / "later", dtype=dtype)
    )
    later.warmup(PROMPTS)
    later.compute_logits_from_cache(PROMPTS)
    later.compute_perplexity_from_cache(PROMPTS)
    logits = later.get_logits(PROMPTS)
    assert torch.isfinite(logits.values).all()
    check_logits(logits, "llama", tolerance)
    found = later.get_perplexity(PROMPTS)
    assert np.isfinite(found).all()
    error = float(np.abs(np.log(found) - np.log(exact)).max())
    record_property("error of the logarithm of perplexity", error)
    assert 1e-6 < error < 20 * tolerance


def test_a_very_unlikely_token_is_no_infinity(tmp_path: Path) -> None:
    model = zoo.tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 200
    cache = ac.UnifiedCache(model, store=tmp_path)
    found = cache.get_perplexity(PROMPTS)
    assert np.isfinite(found).all()
    assert found.max() == np.finfo(np.float32).max
    assert all(np.isfinite(each).all() for each in cache.get_token_perplexity(PROMPTS))


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


def test_edits_are_part_of_what_follows(folder: Path, tmp_path: Path) -> None:
    """Of the stream and of the final norm; what comes behind that is refused."""
    vector = torch.linspace(-1, 1, 32)
    model = zoo.model_of("llama")
    for site in ("resid_post.1", "final_norm"):
        edits = [ac.steer(site, vector, scale=2.0)]
        cache = ac.UnifiedCache(folder, edits=edits, cache_logits=True, store=tmp_path)
        with torch.no_grad(), ac.edit(model, edits):
            expected = model(torch.tensor([PROMPTS[3]])).logits[0, -1]
        found = cache.get_logits(PROMPTS[3:4]).values[0, 0]
        assert zoo.relative_error(found, expected) < LOGITS
        assert zoo.relative_error(found, logits_alone("llama", PROMPTS[3])[-1]) > 1e-2
    cache = ac.UnifiedCache(folder, edits=edits, compute_perplexity=False, store=tmp_path)
    cache.warmup(PROMPTS)
    with pytest.raises(errors.OptionError, match="'final_norm' changes logits behind what they are computed from"):
        cache.compute_logits_from_cache(PROMPTS)
    for target in ("logits", "lm_head"):
        refused = ac.UnifiedCache(folder, edits=[ac.ablate(target)], store=tmp_path)
        with pytest.raises(errors.OptionError, match=f"'{target}' changes logits behind.*compute_perplexity=False"):
            refused.warmup(PROMPTS)


def test_logits_of_a_batch_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is given real rows, so many at a time that their logits fit, and no padding."""
    model = zoo.tiny_model("llama", vocab_size=40_000)
    prompts = [list(range(3 + i, 3 + i + n)) for i, n in enumerate((64, 60, 64, 50, 64, 64, 64, 8))]
    cache = ac.UnifiedCache(model, cache_logits=True, store=tmp_path, max_batch_tokens=10_000)
    cache.warmup([[5, 6]])
    made: list[Tensor] = []
    run = Way.run

    def watched(way: Way, *args: Any, **kwargs: Any) -> Tensor:
        made.append(run(way, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Way, "run", watched)
    cache.warmup(prompts)
    assert sum(logits.shape[1] for logits in made) == sum(map(len, prompts))
    assert max(logits.nbytes for logits in made) <= 32 << 20 < sum(logits.nbytes for logits in made)
