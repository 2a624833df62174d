"""Blocks of kinds that nobody thought of: what cannot be told is absent with a reason, and all the rest is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import actcache as ac
from actcache.errors import SiteUnavailableError
from actcache.model import inner
from actcache.model.anatomy import describe
from actcache.testing.tiny import tiny_model
from reference import relative_error

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.tensor([[3, 9, 4, 30, 8, 11, 7], [5, 5, 21, 40, 17, 2, 13]])


def made(name: str, **values: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**values)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{name}Model")(config).eval()
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def found_in(model: Any, layer: int = 0) -> set[str]:
    return {site.name for site in (info.site for info in ac.sites(model)) if site.layer == layer}


@torch.no_grad()
def given_to(model: Any, path: str, *args: Any, **kwargs: Any) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    model(*args, **kwargs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_relative_positions_are_projected_too() -> None:
    """DeBERTa projects as many positions as there are distances: rows of no token."""
    model = made("Deberta", **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=64)
    assert {"pattern", "z", "head_out", "mlp_act", "resid_post"} <= found_in(model)
    with ac.capture(model, sites=["pattern", "z", "mlp_act"]) as cache:
        model(IDS)
    theirs = model(IDS, output_attentions=True).attentions
    for layer in range(2):
        assert relative_error(cache[f"pattern.{layer}"], theirs[layer]) < 1e-5
        block = f"encoder.layer.{layer}"
        z = given_to(model, f"{block}.attention.output.dense", IDS)
        assert torch.equal(cache[f"z.{layer}"].flatten(2), z)
        assert torch.equal(cache[f"mlp_act.{layer}"], given_to(model, f"{block}.output.dense", IDS))
    with pytest.raises(SiteUnavailableError, match=r"'q\.0'.*something is added"):
        ac.run_with_cache(model, {"input_ids": IDS}, sites=["q.0"])


def test_attention_to_a_window_has_no_heads_that_could_be_told() -> None:
    model = made("Longformer", **SIZES, attention_window=4, max_position_embeddings=64)
    branches = {"resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"}
    assert found_in(model) == branches | {"attn_in", "mlp_in", "mlp_act"}
    with torch.no_grad(), ac.capture(model, sites=["mlp_act.1"]) as cache:
        model(IDS)
    assert relative_error(cache["mlp_act.1"], given_to(model, "encoder.layer.1.output.dense", IDS)) == 0
    with pytest.raises(SiteUnavailableError, match=r"'pattern\.0' is not available .*nothing shows"):
        ac.run_with_cache(model, {"input_ids": IDS}, sites=["pattern.0"])
    assert "with 6 tokens its attention makes something else" in describe(model).inner.blocks[None, 0].absent["q"]


@torch.no_grad()
def test_one_stack_takes_nothing_from_the_other() -> None:
    sizes = {f"{s}_{name}": n for s in ("encoder", "decoder") for name, n in (("attention_heads", 4), ("ffn_dim", 48))}
    positions = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    model = made(
        "LED", vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, attention_window=4, **sizes, **positions
    )
    names = {str(info.site) for info in ac.sites(model)}
    assert {f"decoder.{name}.1" for name in ("q", "k", "v", "pattern", "z", "head_out", "mlp_act")} <= names
    assert "encoder.mlp_act.0" in names and "encoder.q.0" not in names
    with ac.capture(model, sites=["decoder.pattern.1", "decoder.q.0", "encoder.mlp_act.0"]) as cache:
        model(IDS, decoder_input_ids=IDS[:, :5])
    told = model(IDS, decoder_input_ids=IDS[:, :5], output_attentions=True).decoder_attentions[1]
    assert relative_error(cache["decoder.pattern.1"], told) < 1e-5
    act = given_to(model, "encoder.layers.0.fc2", IDS, decoder_input_ids=IDS[:, :5])
    assert relative_error(cache["encoder.mlp_act.0"], act) < 1e-6


@pytest.mark.parametrize("context", [1, 2, 3, 4])
@torch.no_grad()
def test_short_contexts(context: int) -> None:
    model = made("GPT2", vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=context)
    heads = {"q", "k", "v", "z", "head_out", "pattern"}
    found = found_in(model)
    assert {"mlp_act", "mlp_in", "attn_in", "resid_mid"} <= found
    ids = IDS[:, :context]
    if context < 3:
        assert not found & heads
        with pytest.raises(SiteUnavailableError, match=f"context of {context} token"):
            ac.run_with_cache(model, {"input_ids": ids}, sites=["q.0"])
        return
    assert heads <= found
    seen: list[Tensor] = []
    handle = model.h[1].attn.c_attn.register_forward_hook(lambda _, args, out: seen.append(out))
    with ac.capture(model, sites=["q.1", "k.1", "v.1", "pattern.1"]) as cache:
        model(ids)
    handle.remove()
    for name, part in zip("qkv", seen[0].chunk(3, -1), strict=True):
        assert torch.equal(cache[f"{name}.1"].flatten(2), part)
    told = model(ids, output_attentions=True).attentions[1]
    assert relative_error(cache["pattern.1"], told) < 1e-5


def test_what_fails_in_one_kind_of_block_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bart")
    before = inner.find_roles

    def failing(anatomy: Any, subjects: Any) -> Any:
        if any(hasattr(one.block, "encoder_attn") for one in subjects):
            raise RuntimeError("no such shape")
        return before(anatomy, subjects)

    monkeypatch.setattr(inner, "find_roles", failing)
    blocks = describe(model).inner.blocks
    assert {"q", "pattern", "z", "mlp_act"} <= blocks["encoder", 0].readings.keys()
    assert blocks["decoder", 0].readings.keys() == {"attn_in", "mlp_in", "mlp_act"}
    assert "RuntimeError: no such shape" in blocks["decoder", 0].absent["q"]


@pytest.mark.parametrize(
    ("part", "gone"),
    [("find_attention", "attn_in"), ("subject_of", "q"), ("find_mlp_sites", "mlp_act"), ("attention_readings", "q")],
)
def test_what_fails_in_looking_is_told_as_the_reason(part: str, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise IndexError("index 13 is out of bounds")

    monkeypatch.setattr(inner, part, failing)
    model = tiny_model("llama")
    found = describe(model).inner.blocks[None, 1]
    assert "IndexError: index 13 is out of bounds" in found.absent[gone]
    assert ("mlp_in" in found.readings) == (part != "find_mlp_sites")
    assert ("v" in found.readings) == (part == "find_mlp_sites")


# -- values that are made anew from what is kept


@torch.no_grad()
def test_values_of_tokens_that_are_kept_are_refused_beside_those_of_the_pass() -> None:
    """Such values of DeepSeek-V2 come of what its cache holds of all tokens, in each step."""
    experts = {"n_routed_experts": 4, "first_k_dense_replace": 2, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.DeepseekV2Config(
            **SIZES, **experts, **latent, num_key_value_heads=4, n_group=1, topk_group=1, max_position_embeddings=64
        )
        model = transformers.DeepseekV2ForCausalLM(config).eval()
    options = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
    seen: list[Tensor] = []
    projection = model.model.layers[1].self_attn.kv_b_proj
    handle = projection.register_forward_hook(lambda _, args, out: seen.append(out))
    plain = model.generate(IDS, **options)
    handle.remove()
    with ac.capture(model, sites=["v.1"]) as cache:
        assert torch.equal(model.generate(IDS, use_cache=False, **options), plain)
    handle = projection.register_forward_hook(lambda _, args, out: seen.append(out))
    model(plain[:, :-1])
    handle.remove()
    whole = seen[-1].reshape(2, 9, 4, 16)[..., 8:]
    assert relative_error(cache["v.1"], whole) < 1e-5
    if seen[1].numel() == 2 * 64:
        # Of the new token only, as transformers 4.57 has it.
        return
    kept = r"is made for .* tokens .*use_cache=False"
    with pytest.raises(SiteUnavailableError, match=rf"'v\.1' {kept}"), ac.capture(model, sites=["v.1"]):
        model.generate(IDS, **options)
    with pytest.raises(SiteUnavailableError, match=rf"'v\.0' {kept}"), ac.edit(model, ac.ablate("v.0", heads=1)):
        model.generate(IDS, **options)
    with ac.capture(model, sites=["z.1", "q.1"]) as cache:
        assert torch.equal(model.generate(IDS, **options), plain)
    assert cache["z.1"].shape == (2, 9, 4, 8)
