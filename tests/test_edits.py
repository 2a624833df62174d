"""`ac.edit` with functions: at sites, modules and patterns, changing in place or returning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import FAMILIES, tiny_model
from edit_helpers import moved

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
POST_NORM = ("bert", "distilbert", "roberta", "bart", "opt-350m")


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def inputs_of(model: Any) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        return {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    return {"input_ids": IDS}


@torch.no_grad()
@pytest.mark.parametrize("site", ["resid_pre.2", "attn_out.2", "mlp_out.2", "resid_post.2"])
def test_logits_are_those_of_a_plain_hook(model: Any, site: str) -> None:
    block = model.transformer.h[2]
    module = {"attn_out.2": block.attn, "mlp_out.2": block.mlp}.get(site, block)

    def change_output(module: Any, args: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if isinstance(output, tuple) else moved(output)

    def change_input(module: Any, args: Any) -> Any:
        return (moved(args[0]), *args[1:])

    if site.startswith("resid_pre"):
        handle = module.register_forward_pre_hook(change_input)
    else:
        handle = module.register_forward_hook(change_output)
    expected = model(IDS).logits
    handle.remove()
    with ac.edit(model, {site: moved}):
        edited = model(IDS).logits
    assert torch.equal(edited, expected)
    assert not torch.allclose(edited, model(IDS).logits, atol=1e-3)


@torch.no_grad()
def test_the_middle_of_a_block_is_what_its_mlp_reads_and_what_it_adds_to(model: Any) -> None:
    seen: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        seen.append(moved(x))
        return seen[-1]

    with ac.edit(model, {"resid_mid.1": change}), ac.capture(model, sites=["resid_mid", "resid_post"]) as cache:
        model(IDS)
    block = model.transformer.h[1]
    assert torch.equal(cache["resid_mid.1"], seen[0])
    assert torch.equal(cache["resid_post.1"], seen[0] + block.mlp(block.ln_2(seen[0])))


@torch.no_grad()
def test_embed_final_norm_and_logits(model: Any) -> None:
    with ac.edit(model, {"embed": moved}):
        edited = model(IDS).logits
    embedded = model.transformer.wte(IDS) + model.transformer.wpe(torch.arange(4))
    assert torch.allclose(
        edited, model(inputs_embeds=moved(embedded) - model.transformer.wpe.weight[:4]).logits, atol=1e-4
    )
    normed = model.transformer(IDS).last_hidden_state
    with ac.edit(model, {"final_norm": moved}):
        assert torch.equal(model(IDS).logits, model.lm_head(moved(normed)))
    logits = model(IDS).logits
    for dictionary in (True, False):
        with ac.edit(model, {"logits": moved}):
            output = model(IDS, return_dict=dictionary)
        assert torch.equal(output.logits if dictionary else output[0], moved(logits))
    with ac.edit(model, {"logits": moved}), pytest.raises(ac.errors.OptionError, match="loss"):
        model(IDS, labels=IDS)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_site_of_every_architecture(family: str) -> None:
    """Captured values add up around what was edited, and nothing that ran before it changed."""
    model = tiny_model(family)
    inputs = inputs_of(model)
    sites = [info.site for info in ac.sites(model)]
    order = {str(site): i for i, site in enumerate(sites)}
    with ac.capture(model, sites=sites) as before:
        model(**inputs)
    # One block in the middle has each kind; the others are read and checked all the same.
    for site in [s for s in sites if s.layer in (None, 2)]:
        seen: list[Tensor] = []

        def change(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(moved(x))
            return seen[-1]

        if site.name == "router_logits" and not routers_hand_on(family):
            with pytest.raises(
                ac.errors.SiteUnavailableError, match=r"only read: its router goes on with scores.*mlp_in"
            ):
                ac.edit(model, {site: change})
            continue
        with ac.edit(model, {site: change}), ac.capture(model, sites=sites) as cache:
            model(**inputs)
        # Where a factor stands between branch and stream, the way there and back rounds.
        torch.testing.assert_close(cache[str(site)], seen[0], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(cache[str(site)], before[str(site)], atol=1e-3)
        for key in order:
            same_name = {"embed", "resid_pre.0"} if str(site) in ("embed", "resid_pre.0") else {str(site)}
            if order[key] < order[str(site)] and key not in same_name and not parallel(site, key, before):
                assert torch.equal(cache[key], before[key]), (str(site), key)
        if family not in POST_NORM:
            check_sums(cache, sites, str(site))


def routers_hand_on(family: str) -> bool:
    """Whether the logits that a router returns are what its block goes on with."""
    return transformers.__version__.startswith("4.") and family not in ("gpt_oss", "deepseek_v3")


def parallel(site: ac.Site, key: str, cache: Any) -> bool:
    """Branches that run side by side are listed in one order, and may run in the other."""
    middle = str(ac.Site("resid_mid", site.layer, stack=site.stack)) if site.layer is not None else ""
    return middle not in cache and ac.Site.parse(key).layer == site.layer


def check_sums(cache: Any, sites: list[ac.Site], edited: str) -> None:
    names = {site.name for site in sites}
    for site in (s for s in sites if s.name == "resid_post"):

        def value(name: str, site: ac.Site = site) -> Any:
            return cache.get(str(ac.Site(name, site.layer, stack=site.stack)), None)

        branches = [value(n) for n in ("attn_out", "cross_attn_out", "mixer_out") if value(n) is not None]
        middle, mlp, post = value("resid_mid"), value("mlp_out"), value("resid_post")
        if middle is not None:
            if edited != str(ac.Site("resid_mid", site.layer, stack=site.stack)):
                torch.testing.assert_close(sum(branches, value("resid_pre")), middle, rtol=1e-5, atol=1e-4)
            branches = []
        start = middle if middle is not None else value("resid_pre")
        if edited != str(site):
            torch.testing.assert_close(sum(branches, start) + (0 if mlp is None else mlp), post, rtol=1e-5, atol=1e-4)
    assert "resid_post" in names


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "bart", "opt-350m"])
def test_post_norm_middle(family: str) -> None:
    model = tiny_model(family)
    prefix = "decoder." if family == "bart" else ""
    with (
        ac.capture(model, sites=[f"{prefix}resid_post.1"]) as cache,
        ac.edit(model, {f"{prefix}resid_mid.1": moved}),
        ac.capture(model, sites=[f"{prefix}{name}.1" for name in ("resid_mid", "mlp_out")]) as inner,
    ):
        model(**inputs_of(model))
    block = {"bert": "bert.encoder.layer.1.output.LayerNorm", "bart": "model.decoder.layers.1.final_layer_norm"}
    norm = model.get_submodule(block.get(family, "model.decoder.layers.1.final_layer_norm"))
    expected = norm(inner[f"{prefix}resid_mid.1"] + inner[f"{prefix}mlp_out.1"])
    torch.testing.assert_close(cache[f"{prefix}resid_post.1"], expected)


@torch.no_grad()
def test_modules_by_path_pattern_and_object(model: Any) -> None:
    def double(output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    handles = [block.mlp.register_forward_hook(lambda m, a, output: output * 2) for block in model.transformer.h]
    every = model(IDS).logits
    for handle in handles[1:]:
        handle.remove()
    first = model(IDS).logits
    handles[0].remove()
    for target in ("transformer.h.0.mlp", model.transformer.h[0].mlp, "model.transformer.h.0.mlp"):
        with ac.edit(model, {target: double}):
            assert torch.equal(model(IDS).logits, first)
    with ac.edit(model, {"transformer.h.*.mlp": double}):
        assert torch.equal(model(IDS).logits, every)
    # The attention returns a tuple.
    with ac.edit(model, {"transformer.h.0.attn": double}), ac.capture(model, sites="attn_out", layers=0) as cache:
        model(IDS)
    with ac.capture(model, sites="attn_out", layers=0) as before:
        model(IDS)
    assert torch.equal(cache["attn_out.0"], before["attn_out.0"] * 2)


@torch.no_grad()
def test_any_module() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 1, 4, 4)
    with ac.edit(net, {"1": lambda y: y + 1}), ac.capture(net, ["0", "1"]) as cache:
        result = net(x)
    assert torch.equal(cache["1"].output, net[1](net[0](x)) + 1)
    assert torch.equal(result, net[3]((net[1](net[0](x)) + 1).flatten(1)))
    # A module that is named like a site, in a model that has none.
    named = nn.ModuleDict({"embed": nn.Linear(3, 3)})
    named.forward = lambda x: named["embed"](x)  # type: ignore[method-assign]
    with ac.edit(named, {"embed": lambda y: y * 0}):
        assert not named(torch.ones(1, 3)).any()


@torch.no_grad()
def test_the_key_value_cache_of_an_edited_module_stays(model: Any) -> None:
    with ac.edit(model, {"": lambda output: output}):
        output = model(IDS, use_cache=True)
    assert output.past_key_values.get_seq_length() == 4


@torch.no_grad()
def test_a_module_that_runs_several_times_is_edited_each_time() -> None:
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(2, 3)
    with ac.edit(net, {"0": lambda y: y * 2}), ac.capture(net, "0") as cache:
        result = net(x)
    assert torch.equal(result, layer(torch.tanh(layer(x) * 2)) * 2)
    assert len(cache["0"]) == 2


@torch.no_grad()
def test_changing_in_place_equals_returning(model: Any) -> None:
    def written(x: Tensor) -> None:
        x[:, -1] = 0

    def through_data(x: Tensor) -> None:
        x.data[:, -1] = 0

    def returned(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1)

    results = []
    for change in (written, through_data, returned):
        with ac.edit(model, {"resid_post.1": change}), ac.capture(model, sites="resid_post") as cache:
            results.append(model(IDS).logits)
        assert not cache["resid_post.1"][:, -1].any()
        assert cache["resid_post.1"][:, 0].any()
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


@torch.no_grad()
def test_the_model_changes_no_tensor_of_the_callers() -> None:
    # Falcon adds to what its MLP returned in place.
    model = tiny_model("falcon")
    given = torch.ones(2, 4, 32)
    row = torch.ones(32)
    with ac.edit(model, {"mlp_out.1": lambda x: given, "mlp_out.2": lambda x: row.expand_as(x)}):
        model(IDS)
    assert torch.equal(given, torch.ones(2, 4, 32))
    assert torch.equal(row, torch.ones(32))


def test_aliases_and_negative_layers(model: Any) -> None:
    results = []
    for target in (
        "resid_post.3",
        "resid_post.-1",
        "blocks.3.hook_resid_post",
        "resid_out_3",
        ac.Site("resid_post", 3),
    ):
        with torch.no_grad(), ac.edit(model, {target: moved}):
            results.append(model(IDS).logits)
    assert all(torch.equal(results[0], one) for one in results)


@torch.no_grad()
def test_names_of_other_libraries_are_targets_too(model: Any) -> None:
    """One head of one layer, and no other."""
    with ac.capture(model, sites="head_out.0") as before:
        model(IDS)
    for target in ("head_out_L0H0", "head_out.0.0"):
        with ac.edit(model, ac.ablate(target)), ac.capture(model, sites="head_out.0") as cache:
            model(IDS)
        assert not bool(cache["head_out.0"][:, :, 0].any())
        assert torch.equal(cache["head_out.0"][:, :, 1:], before["head_out.0"][:, :, 1:])
    with ac.edit(model, {"blocks.1.attn.hook_z": moved}), ac.capture(model, sites="z.1") as cache:
        model(IDS)
    with ac.edit(model, {"z.1": moved}), ac.capture(model, sites="z.1") as same:
        model(IDS)
    assert torch.equal(cache["z.1"], same["z.1"])
