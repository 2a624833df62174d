"""`mlp_in`, `mlp_act` and `router_logits`, held against what plain hooks see on each architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import actcache as ac
import zoo
import zoo_inside
from actcache.testing.tiny import FAMILIES, tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 60], [8, 3, 4, 50, 11]])
TRANSFORMERS_4 = transformers.__version__.startswith("4.")

MIXERS = ("mamba", "mamba2")
SPARSE = [family for family in zoo.FAMILIES if "router_logits" in zoo_inside.INSIDE.get(family, {})]
DENSE = [family for family in zoo.FAMILIES if family not in (*SPARSE, *MIXERS)]


def inputs_of(model: Any) -> dict[str, Tensor]:
    return (
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {"input_ids": IDS}
    )


def modules_of(model: Any, family: str, name: str) -> dict[str, Any]:
    """Site -> the module that is given its value, by the tables of the zoo."""
    found = zoo.hooks_of(family, model)
    return {site: module for site, module, _ in found if zoo.name_of(site) == name}


def given(model: Any, modules: dict[str, Any]) -> dict[str, Tensor]:
    """What each module is called with, by a plain hook."""
    seen: dict[str, Tensor] = {}
    handles = []
    for key, module in modules.items():

        def note(m: Any, args: Any, kwargs: Any, key: str = key) -> None:
            seen[key] = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).clone()

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(**inputs_of(model))
    for handle in handles:
        handle.remove()
    return seen


def captured(model: Any, sites: Any, **kwargs: Any) -> Any:
    with torch.no_grad(), ac.capture(model, sites=sites, **kwargs) as cache:
        model(**inputs_of(model))
    return cache


@pytest.mark.parametrize("family", DENSE)
def test_what_the_projections_of_an_mlp_are_given(family: str) -> None:
    model = tiny_model(family)
    expected = given(model, modules_of(model, family, "mlp_in") | modules_of(model, family, "mlp_act"))
    cache = captured(model, list(expected))
    assert len(expected) == 2 * sum(zoo.stack_depths(family, model).values())
    for key, value in expected.items():
        length = 3 if key.startswith("decoder") else 5
        assert cache[key].shape == (2, length, 32 if "mlp_in" in key else 128 if value.shape[-1] == 128 else 48), key
        assert torch.equal(cache[key], value.reshape(cache[key].shape)), key


@pytest.mark.parametrize("family", list(SPARSE))
def test_mixtures_of_experts(family: str) -> None:
    """Each router's input and its logits, computed by hand from the weights; no hidden activations of its own."""
    model = tiny_model(family)
    routers = modules_of(model, family, "router_logits")
    assert len(routers) == (3 if family == "deepseek_v3" else 4)
    inputs = given(model, routers)
    cache = captured(model, ["router_logits", "mlp_in"])
    for site, router in routers.items():
        value = inputs[site].reshape(2, 5, 32)
        assert torch.equal(cache[site.replace("router_logits", "mlp_in")], value)
        logits = value.double() @ router.weight.double().T
        if family == "gpt_oss":
            logits = logits + router.bias.double()
        got = cache[site]
        assert got.shape == (2, 5, 4)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), logits, rtol=1e-5, atol=1e-6)
        with pytest.raises(ac.errors.SiteUnavailableError, match="each of its experts has hidden activations"):
            ac.capture(model, sites=site.replace("router_logits", "mlp_act"))


@pytest.mark.parametrize("family", [f for f in SPARSE if not (TRANSFORMERS_4 and f in ("gpt_oss", "deepseek_v3"))])
def test_router_logits_are_those_that_transformers_returns(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        told = model(IDS, output_router_logits=True).router_logits
    cache = captured(model, [info.site for info in ac.sites(model) if info.site.name == "router_logits"])
    assert len(told) == len(cache)
    for key, logits in zip(cache, told, strict=True):
        assert torch.equal(cache[key], logits.reshape(2, 5, 4)), key


def test_a_mixture_behind_a_dense_block() -> None:
    model = tiny_model("deepseek_v3")
    block = model.model.layers[0]
    expected = given(model, {"mlp_in": block.mlp.gate_proj, "mlp_act": block.mlp.down_proj})
    cache = captured(model, ["mlp_in.0", "mlp_act.0"])
    assert torch.equal(cache["mlp_in.0"], expected["mlp_in"])
    assert torch.equal(cache["mlp_act.0"], expected["mlp_act"])
    with pytest.raises(ac.errors.SiteUnavailableError, match=r"no mixture of experts.*blocks 1, 2, 3 have it"):
        ac.capture(model, sites="router_logits.0")
    with pytest.raises(ac.errors.SiteUnavailableError, match=r"block 0 has it|blocks 0 have it"):
        ac.capture(model, sites="mlp_act.2")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_where_they_are_absent_there_is_a_reason(family: str) -> None:
    model = tiny_model(family)
    prefix = "decoder." if model.config.is_encoder_decoder else ""
    have = {info.site.name for info in ac.sites(model)}
    expected = {
        "mlp_in": family not in MIXERS,
        "mlp_act": family not in MIXERS and (family not in SPARSE or family == "deepseek_v3"),
        "router_logits": family in SPARSE,
    }
    for name, there in expected.items():
        assert (name in have) == there, name
        if not there:
            why = "one branch, 'mixer_out'" if family in MIXERS else "no mixture of experts"
            why = "each of its experts" if name == "mlp_act" and family in SPARSE else why
            with pytest.raises(ac.errors.SiteUnavailableError, match=why):
                ac.capture(model, sites=f"{prefix}{name}.1")


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_oss", "deepseek_v3", "bert"])
def test_they_are_found_in_half_precision_too(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    inside = modules_of(model, family, "mlp_in") | modules_of(model, family, "mlp_act")
    modules = {site: module for site, module in inside.items() if site.endswith(".1")}
    expected = given(model, modules)
    cache = captured(model, list(expected))
    for key, value in expected.items():
        assert torch.equal(cache[key], value.reshape(cache[key].shape))
    if family in SPARSE:
        got = captured(model, "router_logits.1")["router_logits.1"]
        router = modules_of(model, family, "router_logits")["router_logits.1"]
        # DeepSeek routes in float32, whatever the model's own dtype.
        wide = torch.float32 if family == "deepseek_v3" else torch.bfloat16
        bias = getattr(router, "bias", None)
        assert got.dtype == wide
        by_hand = torch.nn.functional.linear(
            expected["mlp_in.1"].reshape(10, 32).to(wide), router.weight.to(wide), None if bias is None else bias
        )
        assert torch.equal(got, by_hand.reshape(2, 5, 4))


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmo2", "bart", "opt-350m", "bert", "distilbert"])
def test_what_an_mlp_is_given_and_the_stream_beside_it(family: str) -> None:
    """Where nothing lies in between, both are read at one module: an edit of the one leaves the other alone, and an
    edit of the stream reaches both, whichever block is opened first."""
    model = tiny_model(family)
    prefix = "decoder." if family == "bart" else ""
    given_there, stream, after = (f"{prefix}{name}.1" for name in ("mlp_in", "resid_mid", "resid_post"))
    before = captured(model, [given_there, stream])
    with ac.edit(model, {given_there: lambda x: x * 2}):
        cache = captured(model, [given_there, stream])
    assert torch.equal(cache[stream], before[stream])
    assert torch.equal(cache[given_there], before[given_there] * 2)
    for order in ([0, 1], [1, 0]):
        blocks = [ac.edit(model, {stream: lambda x: x + 1}), ac.edit(model, {given_there: lambda x: x * 2})]
        with blocks[order[0]], blocks[order[1]]:
            cache = captured(model, [given_there, stream, after])
        assert torch.equal(cache[stream], before[stream] + 1)
        assert torch.equal(cache[given_there], (before[stream] + 1) * 2)
        if order == [0, 1]:
            first = cache
    assert torch.equal(first[after], cache[after])


def test_other_forms_of_them() -> None:
    """Steps of `generate`, positions and the ends of passes."""
    model = tiny_model("opt")
    expected = given(model, {"in": model.model.decoder.layers[2].fc1, "act": model.model.decoder.layers[2].fc2})
    cache = captured(model, ["mlp_in.2", "mlp_act.2"], positions=[0, "last"])
    assert torch.equal(cache["mlp_in.2"], expected["in"].reshape(2, 5, 32)[:, [0, -1]])
    assert torch.equal(cache["mlp_act.2"], expected["act"].reshape(2, 5, 48)[:, [0, -1]])
    for family in ("opt", "mixtral"):
        model = tiny_model(family)
        site = "mlp_act.1" if family == "opt" else "router_logits.1"
        with ac.capture(model, sites=site) as cache:
            out = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        with torch.no_grad(), ac.capture(model, sites=site) as whole:
            model(out[:, :-1])
        torch.testing.assert_close(cache[site], whole[site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_projections_with_an_adapter(family: str, spread: float) -> None:
    """The last projection is the adapter's wrapper, also while the adapter adds nothing; an edit reaches both parts."""
    peft = pytest.importorskip("peft")
    (last,) = zoo_inside.INSIDE[family]["mlp_act"].path
    config = peft.LoraConfig(r=2, target_modules=[last.split(".")[-1]], init_lora_weights=True)
    model = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * spread)
    wrapper = model.get_base_model().get_submodule(f"{zoo.FAMILIES[family].stacks[''].blocks}.1.{last}")
    expected = given(model, {"mlp_act.1": wrapper})["mlp_act.1"]
    assert torch.equal(captured(model, "mlp_act.1")["mlp_act.1"], expected.reshape(2, 5, 48))
    with torch.no_grad(), ac.edit(model, {"mlp_act.1": lambda x: x * -2}), ac.capture(model, sites="logits") as cache:
        model(IDS)
    handle = wrapper.register_forward_pre_hook(lambda m, args: (args[0] * -2, *args[1:]))
    by_hand = captured(model, "logits")["logits"]
    handle.remove()
    assert torch.equal(cache["logits"], by_hand)
