"""For every architecture: what is captured, extracted and stored is what a prompt gives when it is run alone.

The other side of each comparison is `zoo.py`: plain hooks, written from transformers' own code.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
import zoo_inside

# float32 and another batch: the order of sums inside matrix products differs, by about 1e-6 of the largest value.
FP32 = 1e-5
every_family = pytest.mark.parametrize("family", list(zoo.FAMILIES))
seeds = pytest.mark.parametrize("seed", [0, 1])


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of all sites that are ours, and where."""
    assert set(ours) <= set(theirs), set(ours) - set(theirs)
    return max((zoo.relative_error(ours[site].flatten(1), theirs[site]), site) for site in ours)


@every_family
@seeds
def test_sites_are_those_of_the_architecture(family: str, seed: int) -> None:
    model = zoo.model_of(family, seed)
    listed = ac.sites(model)
    # Patterns have no rows, and a test of their own.
    names = [str(info.site) for info in listed if info.site.name != "pattern"]
    assert len({info.site for info in listed}) == len(listed)
    assert sorted(names) == sorted(zoo.expected_sites(family, model))
    modules = dict(model.named_modules())
    assert all(info.path in modules and info.side in ("input", "output") for info in listed)


@every_family
def test_a_site_the_architecture_lacks_is_refused_with_a_reason(family: str) -> None:
    model = zoo.model_of(family)
    for site in zoo.absent_sites(family, model):
        with pytest.raises(ac.ActCacheError, match=site.replace(".", r"\.")):
            ac.capture(model, sites=site)


@every_family
@seeds
def test_capture_is_the_pass_itself(family: str, seed: int) -> None:
    """The same pass read twice: nothing is computed again, so sites that are one tensor have its very bits."""
    model, ids = zoo.model_of(family, seed), zoo.prompts_of(seed)[5]
    theirs = zoo.reference(family, seed, tuple(ids))
    running = zoo.unused(family, model)
    with torch.no_grad(), ac.capture(running, sites=zoo.expected_sites(family, model)) as cache:
        running(**zoo.inputs_of(family, model, ids))
    theirs = {site: theirs[site] for site in zoo.expected_sites(family, model)}
    ours = {site: cache[site][0].flatten(1) for site in theirs}
    error, where = worst(ours, theirs)
    assert error < 1e-6, where
    inexact = {site.split(".")[-2] for site in theirs if not torch.equal(ours[site], theirs[site])}
    assert inexact <= set(zoo_inside.COMPUTED)
    for sites, states in zip(
        zoo.same_hidden_states(family, model).values(), zoo.hidden_states(family, model, ids).values(), strict=True
    ):
        for site, state in zip(sites, states, strict=True):
            assert site is None or torch.equal(cache[site], state), site


@every_family
@seeds
def test_patterns_are_those_of_an_eager_pass(family: str, seed: int) -> None:
    """Alone and in a padded batch: transformers' own probabilities, and every other site as in that pass."""
    model, prompts = zoo.eager_model_of(family, seed), zoo.prompts_of(seed, [1, 6, 17, 9])
    sites = [str(info.site) for info in ac.sites(model) if info.site.name == "pattern"]
    z = [site for site in zoo.expected_sites(family, model) if "z." in site]
    assert sites == [site.replace("z.", "pattern.") for site in z]
    if not sites:
        return
    alone = {tuple(prompt): zoo.eager(family, model, prompt) for prompt in prompts}
    together = [prompts] if not zoo.FAMILIES[family].lengths else []
    for batch in [[prompts[1]], *together]:
        running = zoo.unused(family, model)
        _, cache = ac.run_with_cache(running, batch, sites=[*sites, *z])
        for i, prompt in enumerate(batch):
            theirs = alone[tuple(prompt)]
            for site in sites:
                ours = cache.rows(site)[i]
                assert ours.shape == theirs[site].shape
                assert float((ours - theirs[site]).abs().max()) < FP32, (site, len(batch))
            error, where = worst({site: cache.rows(site)[i] for site in z}, theirs)
            assert error < FP32, where


@every_family
@seeds
def test_extraction_is_what_each_prompt_gives_alone(family: str, seed: int) -> None:
    """Batches of 1, 3 and 8, in several orders, over lengths on both sides of window and RoPE thresholds."""
    model, prompts = zoo.model_of(family, seed), zoo.prompts_of(seed)
    sites = zoo.expected_sites(family, model)
    for batch_size in (1, 3, 8):
        order = random.Random(10 * seed + batch_size).sample(range(len(prompts)), len(prompts))
        extractor = ac.ActivationExtractor(model, sites=sites, batch_size=batch_size)
        got = extractor.extract([prompts[i] for i in order])
        for row, i in enumerate(order):
            ours = {site: got[site][row] for site in sites}
            error, where = worst(ours, zoo.reference(family, seed, tuple(prompts[i])))
            assert error < FP32, (batch_size, len(prompts[i]), where)


def padded(family: str, model: Any, prompts: list[list[int]], side: str) -> dict[str, Tensor]:
    """The batch as a user would build it: padding ids on one side, a mask, positions that count real tokens."""
    longest = max(map(len, prompts))

    def pad(rows: list[list[int]], value: int) -> Tensor:
        filled = [[value] * (longest - len(row)) for row in rows]
        return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, filled, strict=True)])

    inputs = {"input_ids": pad(prompts, 0), "attention_mask": pad([[1] * len(p) for p in prompts], 0)}
    if zoo.FAMILIES[family].encoder_decoder:
        inputs["decoder_input_ids"] = pad([zoo.shifted_right(model, p) for p in prompts], 0)
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_side(family: str, side: str) -> None:
    """One padded pass, its rows without the padding."""
    made, model = zoo.FAMILIES[family], zoo.model_of(family)
    if made.lengths:
        pytest.skip("values depend on the longest prompt of a pass, whatever the padding: extraction never mixes them")
    if side == "left" and made.left:
        pytest.skip(f"left padding: {made.left}")
    # RoBERTa tells real tokens by their id, so a prompt that holds padding ids has no left-padded form.
    prompts = [*[p for p in zoo.prompts_of() if 0 not in p][::3], zoo.prompts_of(4, [40])[0]]
    sites = zoo.expected_sites(family, model)
    _, cache = ac.run_with_cache(model, padded(family, model, prompts, side), sites=sites)
    rows = {site: cache.rows(site) for site in sites}
    for i, prompt in enumerate(prompts):
        error, where = worst({site: rows[site][i] for site in sites}, zoo.reference(family, 0, tuple(prompt)))
        assert error < FP32, (len(prompt), where)


@every_family
def test_prompts_given_as_ids_are_prepared_rightly(family: str) -> None:
    """Several prompts in one call: padding, mask, positions and decoder inputs are made here."""
    model, prompts = zoo.model_of(family), zoo.prompts_of()[-5:]
    sites = zoo.expected_sites(family, model)
    if zoo.FAMILIES[family].lengths:
        with pytest.raises(ac.ActCacheError, match="depend on the longest prompt"):
            ac.run_with_cache(model, prompts, sites=sites)
        return
    _, cache = ac.run_with_cache(model, prompts, sites=sites)
    rows = {site: cache.rows(site) for site in sites}
    for i, prompt in enumerate(prompts):
        error, where = worst({site: rows[site][i] for site in sites}, zoo.reference(family, 0, tuple(prompt)))
        assert error < FP32, (len(prompt), where)


@every_family
def test_what_is_stored_and_read_back(family: str, tmp_path: Path) -> None:
    """Every row that comes back from the store, pooled and not."""
    model, prompts = zoo.model_of(family), zoo.prompts_of()
    names = zoo.site_names(family, model)
    for pooled in (False, True):
        store = ac.Store(tmp_path / str(pooled))
        cache = ac.UnifiedCache(model, sites=list(names), cache_pooled=pooled, pooling="mean", store=store)
        cache.warmup(prompts)
        assert cache.plan(prompts).missing == 0
        read = {name: cache.get_activations(prompts, site=name) for name in names}
        store.close()
        for i, prompt in enumerate(prompts):
            theirs = zoo.reference(family, 0, tuple(prompt))
            for name, (values, mask) in read.items():
                expected = torch.cat([theirs[site] for site in names[name]], dim=-1)
                if pooled:
                    ours, expected = torch.as_tensor(values[i]), expected.mean(dim=0)
                else:
                    ours = torch.as_tensor(values[i])[torch.as_tensor(np.asarray(mask[i])).bool()]
                assert zoo.relative_error(ours, expected) < FP32, (name, len(prompt), pooled)
