"""Models of families never seen: blocks and branches are found by what adds up, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import AdditivityError, SiteUnavailableError
from actcache.model.anatomy import check_identities, describe
from actcache.model.sites import Site
from actcache.testing.tiny import VOCABULARY, tiny_model
from anatomy_helpers import IDS, Unseen, captured


@pytest.mark.parametrize("order", ["pre", "scaled", "parallel", "post", "branch in place"])
def test_a_family_never_seen_works_when_its_branches_add_up(order: str) -> None:
    torch.manual_seed(0)
    model = Unseen(order).eval()
    anatomy = describe(model)
    kind = {"pre": "sequential", "scaled": "sequential", "post": "post-norm"}.get(order, "parallel")
    assert {form.kind for form in anatomy.findings.forms.values() if form is not None} == {kind}
    assert anatomy.final_norm is model.closing_norm
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + (["resid_mid"] if kind != "parallel" else [])
    with torch.no_grad(), ac.capture(model, sites=names) as cache:
        model(IDS % 50)
    for layer, storey in enumerate(model.storeys):
        pre, attn, mlp, post = (cache[f"{n}.{layer}"] for n in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        with torch.no_grad():
            mixed = storey.looking_attn((pre if order == "post" else storey.one(pre)).cumsum(1))
            assert torch.allclose(attn, mixed * (0.25 if order == "scaled" else 1.0), atol=1e-6)
            middle = storey.one(pre + attn) if order == "post" else pre + attn
            if kind != "parallel":
                assert torch.allclose(cache[f"resid_mid.{layer}"], middle, atol=1e-6)
            total = pre + attn + mlp if kind == "parallel" else middle + mlp
            assert torch.allclose(storey.two(total) if order == "post" else total, post, atol=1e-5)
            wide = storey.wide({"post": middle}.get(order, storey.two(pre if kind == "parallel" else middle)))
            assert torch.allclose(mlp, wide * (0.25 if order == "scaled" else 1.0), atol=1e-6)


def test_a_family_whose_branches_do_not_add_up_is_refused() -> None:
    model = Unseen("gated").eval()
    with pytest.raises(AdditivityError, match=r"block 0 \(storeys\.0\), nothing .* adds up.*It has embed, resid_pre"):
        ac.capture(model, sites="attn_out")
    with pytest.raises(AdditivityError):
        check_identities(model)
    with pytest.raises(AdditivityError):
        describe(model).read_point(Site("mlp_out", 1))
    check_identities(model, sites=["resid_post", "final_norm"])
    with ac.capture(model, sites="resid_post") as cache:
        model(IDS % 50)
    assert not cache.missed
    assert {info.site.name for info in ac.sites(model)} == {"embed", "resid_pre", "resid_post", "final_norm"}


def test_a_branch_that_adds_nothing_is_still_found() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    paths = {str(i.site): i.path for i in ac.sites(model)}
    assert paths["attn_out.0"] == "model.layers.0.self_attn"
    assert paths["mlp_out.2"] == "model.layers.2.mlp"
    assert not captured(model, "attn_out.0")["attn_out.0"].any()


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_branches_that_gave_nothing_are_looked_for_again(family: str) -> None:
    """Weights that training starts from tell neither what runs in parallel nor whether a norm follows."""
    model, begun = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for name, parameter in begun.named_parameters():
            if ".dense" in name or ".o_proj" in name or ".down_proj" in name:
                parameter.zero_()
    ac.sites(begun)
    begun.load_state_dict(model.state_dict())
    assert [(i.site, i.path) for i in ac.sites(begun)] == [(i.site, i.path) for i in ac.sites(model)]


@pytest.mark.parametrize("family", ["gemma2", "t5"])
def test_a_branch_too_small_for_half_precision_is_still_the_one_that_is_added(family: str) -> None:
    """Everything else a block computes adds up as well there: which one is named must not be left to rounding."""
    model, large = tiny_model(family), tiny_model(family).to(torch.bfloat16)
    with torch.no_grad():
        large.get_input_embeddings().weight.mul_(1e6 if family == "gemma2" else 1e4)
    paths = {str(i.site): i.path for i in ac.sites(model)}
    found = {str(i.site): i.path for i in ac.sites(large)}
    assert found == {site: paths[site] for site in found}


def test_a_block_that_runs_several_times_has_no_sites() -> None:
    model = Unseen("pre").eval()
    model.storeys = nn.ModuleList([model.storeys[0]] * 3)
    with pytest.raises(AdditivityError, match=r"block 0 .* ran 3 times in one pass"):
        ac.capture(model, sites="resid_post")


def test_a_stream_of_another_shape_is_refused() -> None:
    class Transposed(Unseen):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids.T).transpose(0, 1)

    model = Transposed("pre").eval()
    for site in ("embed", "resid_post", "attn_out"):
        with pytest.raises(AdditivityError, match=r"for 2 x 4 tokens, block 0 .* was given rows \(4, 2\)"):
            ac.capture(model, sites=site)


def test_a_cross_attention_that_runs_only_when_it_is_given_states_comes_before_the_middle() -> None:
    from transformers import BartForCausalLM

    whole = tiny_model("bart")
    model = BartForCausalLM(whole.config).eval()
    model.model.decoder.load_state_dict(whole.model.decoder.state_dict())
    states = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    assert not describe(model).findings.refused
    for given in ({}, {"encoder_hidden_states": states}):
        with torch.no_grad(), ac.capture(model, sites=["resid_mid", "mlp_out", "resid_post"]) as cache:
            model(IDS, **given)
            for layer, block in enumerate(model.model.decoder.layers):
                total = cache[f"resid_mid.{layer}"] + cache[f"mlp_out.{layer}"]
                assert torch.equal(block.final_layer_norm(total), cache[f"resid_post.{layer}"])


def test_a_model_that_cannot_be_run_on_tokens_keeps_its_stream() -> None:
    class Demanding(Unseen):
        def forward(self, input_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
            if pixels is None:
                raise ValueError("pixels are needed")
            return super().forward(input_ids)

    model = Demanding("pre").eval()
    with pytest.raises(AdditivityError, match=r"could not be run on .* token ids .*pixels are needed"):
        ac.capture(model, sites="attn_out")
    with ac.capture(model, sites="resid_post") as cache:
        model(IDS % 50, pixels=IDS)
    assert cache["resid_post.2"].shape == (2, 6, 16)


@pytest.mark.parametrize("mixer", ["self_attn", "conv"])
def test_a_branch_behind_a_norm_is_what_the_norm_was_given(mixer: str) -> None:
    """A norm's name says nothing, neither of attention nor of what is none."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(mixer, nn.Linear(16, 16))
            self.post_norm = nn.LayerNorm(16)
            self.post_attention_layernorm = nn.LayerNorm(16)
            self.mlp = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            behind, before = self.post_norm, self.post_attention_layernorm
            if mixer == "conv":
                behind, before = before, behind
            x = x + behind(getattr(self, mixer)(x))
            out: Tensor = x + self.mlp(before(x))
            return out

    model = Unseen("pre")
    model.storeys = nn.ModuleList(Block() for _ in range(3))
    names = {site.name for site in describe(model).sites()}
    assert ("attn_out" if mixer == "self_attn" else "mixer_out") in names
    assert ("mixer_out" if mixer == "self_attn" else "attn_out") not in names


def test_blocks_that_nothing_points_at_are_named_with_what_would_point_at_them() -> None:
    model = Unseen("pre")
    del type(model.config).num_hidden_layers
    with pytest.raises(
        SiteUnavailableError, match=r"it has storeys of 3\); set it in the config, or .*_no_split_modules"
    ):
        describe(model)


@pytest.mark.parametrize("kind", ["images", "sounds"])
def test_blocks_of_a_tower_for_other_inputs_are_not_the_blocks(kind: str) -> None:
    """Beside the language model and as deep in the model, or even shallower."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"model_type": "qwen2", "vocab_size": VOCABULARY, "intermediate_size": 48, **sizes}
    if kind == "images":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        renamed = {"rope_scaling": rope, "rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": 2}
        tower = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
        config = transformers.Qwen2VLConfig(
            text_config=text | renamed | {"model_type": "qwen2_vl_text"}, vision_config=tower
        )
        model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    else:
        tower = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        small = {"model_type": "qwen2_audio_encoder", "num_mel_bins": 16, "max_source_positions": 20}
        config = transformers.Qwen2AudioConfig(text_config=text, audio_config=tower | small)
        model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    assert "language_model" in describe(model).block_paths[0]
    cache = captured(model, "resid_pre.1", "attn_out.1", "resid_mid.1")
    torch.testing.assert_close(cache["resid_pre.1"] + cache["attn_out.1"], cache["resid_mid.1"])


def test_experts_as_many_as_blocks_are_not_the_blocks() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert describe(model).block_paths[0] == "model.layers.0"
    check_identities(model)
