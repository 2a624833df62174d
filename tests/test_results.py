"""Perplexity and logits: computed with activations, and from them, they are those of the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache import errors
from actcache.model.head_way import Way
from results_helpers import LOGITS, PROMPTS, check_logits, check_perplexity, logits_alone

CAUSAL = [
    name
    for name, known in zoo.FAMILIES.items()
    if not known.encoder_decoder and name not in ("bert", "distilbert", "roberta", "modernbert")
]


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
    return zoo.saved("llama", tmp_path_factory.mktemp("model"))


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
