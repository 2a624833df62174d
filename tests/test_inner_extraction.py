"""Values inside attention and MLP through extraction and the store: rows of all heads, widths of their own, and blocks
that do not have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import actcache as ac
import zoo
from actcache.errors import OptionError, SiteUnavailableError
from actcache.testing.tiny import tiny_tokenizer

SITES = ["attn_in", "mlp_in", "q", "k", "v", "z", "head_out", "mlp_act"]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [90, 91, 92, 93, 94, 95]]
# Families that differ in how queries, keys and values are kept, and in their widths.
FAMILIES = ["gpt2", "llama", "gpt_neox", "falcon-40b", "opt", "phi3", "bert", "modernbert"]
every_family = pytest.mark.parametrize("family", FAMILIES)
FP32 = 1e-5


def folder_of(family: str, path: Path) -> Path:
    zoo.model_of(family).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def expected(family: str, names: list[str], ids: list[int]) -> torch.Tensor:
    alone = zoo.reference(family, 0, tuple(ids))
    return torch.cat([alone[name] for name in names], -1)


@every_family
def test_rows_of_every_width_are_planned_stored_and_found_again(family: str, tmp_path: Path) -> None:
    folder, store = folder_of(family, tmp_path / "model"), ac.Store(tmp_path / "store")
    cache = ac.UnifiedCache(
        folder, layers=[2, 0], compute_perplexity=False, sites=SITES, cache_pooled=False, store=store
    )
    plan = cache.plan(PROMPTS)
    # What a configuration tells is enough to plan.
    assert not cache.model_loaded or family in ("falcon-40b", "gpt2", "bert")
    answers = cache.get_activations(PROMPTS)
    alone = zoo.reference(family, 0, tuple(PROMPTS[0]))
    widths = {site: 2 * alone[f"{site}.0"].shape[1] for site in SITES}
    assert plan.bytes_to_write == 4 * sum(map(len, PROMPTS)) * sum(widths.values())
    for site, (values, mask) in answers.items():
        assert values.shape[2] == widths[site]
        for i, ids in enumerate(PROMPTS):
            assert zoo.relative_error(values[i][mask[i]], expected(family, [f"{site}.2", f"{site}.0"], ids)) < FP32
    warm = ac.UnifiedCache(
        folder, layers=[2, 0], compute_perplexity=False, sites=SITES, cache_pooled=False, store=store
    )
    assert warm.plan(PROMPTS).missing == 0
    again = warm.get_activations(PROMPTS)
    assert all(torch.equal(again[site][0], answers[site][0]) for site in SITES)
    # Side by side, whatever their widths.
    both = ac.CachedExtractor(ac.ActivationExtractor(folder, sites=["q.0", "head_out.0", "resid_post.0"]), store)
    values, mask = both.extract(PROMPTS)
    for i, ids in enumerate(PROMPTS):
        assert (
            zoo.relative_error(values[i][mask[i]], expected(family, ["q.0", "head_out.0", "resid_post.0"], ids)) < FP32
        )
    assert not warm.model_loaded


@every_family
@pytest.mark.parametrize("pooling", ["last_token", "mean", "max"])
def test_pooling(family: str, pooling: str, tmp_path: Path) -> None:
    store = ac.Store(tmp_path)
    cache = ac.UnifiedCache(
        zoo.model_of(family), layers=1, compute_perplexity=False, sites=["k", "head_out"], pooling=pooling, store=store
    )
    answers = cache.get_activations(PROMPTS)
    together = ac.CachedExtractor(
        ac.ActivationExtractor(zoo.model_of(family), sites=["k.1", "head_out.1"], pooling=pooling), store
    ).extract(PROMPTS)[0]
    for i, ids in enumerate(PROMPTS):
        for site, (values, mask) in answers.items():
            rows = expected(family, [f"{site}.1"], ids)
            pooled = {"last_token": rows[-1], "mean": rows.mean(0), "max": rows.amax(0)}[pooling]
            assert mask is None
            assert zoo.relative_error(values[i], pooled) < FP32
        assert torch.equal(together[i, 0], torch.cat([answers["k"][0][i], answers["head_out"][0][i]]))


def test_one_head_and_all_of_them(tmp_path: Path) -> None:
    model = zoo.model_of("llama")
    got = ac.ActivationExtractor(model, sites=["head_out.1.2", "head_out.1", "z.1"], positions="last").extract(PROMPTS)
    for i in range(len(PROMPTS)):
        assert got["head_out.1"][i].shape == (1, 4 * 32)
        assert torch.equal(got["head_out.1.2"][i], got["head_out.1"][i].unflatten(-1, (4, 32))[:, 2])
    cache = ac.UnifiedCache(model, compute_perplexity=False, sites=["head_out.1.2", "head_out.0"], store=tmp_path)
    assert cache.plan(PROMPTS).bytes_to_write == 4 * len(PROMPTS) * (32 + 4 * 32)
    assert cache.warmup(PROMPTS).bytes_written == 4 * len(PROMPTS) * (32 + 4 * 32)


@pytest.mark.parametrize(
    ("family", "site", "layers"),
    [
        ("deepseek_v3", "router_logits", [1, 2, 3]), ("deepseek_v3", "mlp_act", [0]), ("qwen3_next", "z", [1, 3]),
        ("qwen3_next", "router_logits", [0, 1, 2, 3]), ("deepseek_v3", "mlp_in", [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_all_layers_are_those_that_have_the_site(family: str, site: str, layers: list[int], tmp_path: Path) -> None:
    folder, store = folder_of(family, tmp_path / "model"), ac.Store(tmp_path / "store")
    cache = ac.UnifiedCache(folder, sites=site, store=store)
    assert not cache.model_loaded
    names = [f"{site}.{layer}" for layer in layers]
    assert cache.sites == names
    values, _ = cache.get_activations(PROMPTS)
    for i, ids in enumerate(PROMPTS):
        assert zoo.relative_error(values[i], expected(family, names, ids)[-1]) < FP32
    # The same without the model: this host remembers.
    warm = ac.UnifiedCache(folder, sites=site, store=store)
    assert warm.plan(PROMPTS).missing == 0
    assert torch.equal(warm.get_activations(PROMPTS)[0], values)
    assert warm.sites == names
    assert not warm.model_loaded
    in_memory = ac.UnifiedCache(zoo.model_of(family), sites=site, store=store)
    assert in_memory.sites == names
    captured = ac.run_with_cache(zoo.model_of(family), PROMPTS[0], sites=site)[1]
    assert list(captured) == names


def test_a_layer_that_is_named_must_have_the_site(tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3", tmp_path / "model")
    for layers in ([0, 1], 0):
        with pytest.raises(SiteUnavailableError, match=r"router_logits\.0.*blocks 1, 2, 3 have it"):
            ac.activations(folder, PROMPTS, site="router_logits", layers=layers, store=tmp_path / "store")
    assert ac.UnifiedCache(folder, sites="mlp_act", layers="middle", store=tmp_path / "store").sites == [
        "mlp_act.1",
        "mlp_act.2",
    ]
    with pytest.raises(SiteUnavailableError, match="each of its experts"):
        ac.activations(folder, PROMPTS, site="mlp_act", layers="middle", store=tmp_path / "store")


def test_a_plan_for_a_site_that_no_block_has_is_refused(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    for _ in range(2):
        with pytest.raises(SiteUnavailableError, match="no mixture of experts"):
            ac.UnifiedCache(folder, sites="router_logits", store=tmp_path / "store").plan(PROMPTS)


def test_declared_widths_are_those_of_the_model() -> None:
    from actcache.extract.inventory import declared_width
    from actcache.model.loading import open_source
    from actcache.model.options import LoadOptions

    told = 0
    for family in zoo.FAMILIES:
        model = zoo.model_of(family)
        source = open_source(model, LoadOptions(), None)
        for name, value in zoo.reference(family, 0, (5, 6)).items():
            width = declared_width(source, ac.Site.parse(name))
            told += width is not None
            assert width in (None, value.shape[1]), (family, name)
    assert told > 1500


def test_layers_of_other_widths_fit_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ac.UnifiedCache(zoo.model_of("llama"), sites=["q.0", "k.0"], store=tmp_path)
    values, _ = ac.CachedExtractor(cache.extractor, tmp_path).extract(PROMPTS)
    assert values.shape == (len(PROMPTS), 1, 32 + 16)
    monkeypatch.setattr("actcache.unified.UnifiedCache.sites", property(lambda self: ["q.0", "k.0"]))
    with pytest.raises(OptionError, match="has other widths at other layers"):
        ac.activations(zoo.model_of("llama"), PROMPTS, site="q", store=tmp_path)
