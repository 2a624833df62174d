"""The parts of a model are found, sites mean what they say, and what does not add up is refused."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import AdditivityError, LayerRangeError, SiteUnavailableError
from actcache.model.anatomy import check_identities, describe
from actcache.model.inner import INNER
from actcache.model.sites import Site
from actcache.testing.tiny import FAMILIES, VOCABULARY, tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
PRE_NORM = ["gpt2", "llama", "mistral", "qwen2", "gpt_neo"]
PARALLEL = ["gptj", "gpt_neox", "falcon"]
# Block-relative module whose output joins the stream, independently of the package's tables.
BRANCHES = {
    "gpt2": ("attn", "mlp"),
    "gpt_neo": ("attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def plain_hooks(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """Outputs of modules by ordinary torch hooks, copied."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return found


def captured(model: nn.Module, *sites: str) -> ac.ActivationCache:
    with torch.no_grad(), ac.capture(model, sites=list(sites)) as cache:
        model(IDS)
    return cache


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parts(family: str) -> None:
    model = tiny_model(family)
    anatomy = describe(model)
    assert (anatomy.d_model, anatomy.vocab_size) == (32, VOCABULARY)
    assert [model.get_submodule(path) for path in anatomy.block_paths] == anatomy.blocks
    assert anatomy.embed is model.get_input_embeddings()
    assert anatomy.head is model.get_output_embeddings()
    assert set(anatomy.blocks) <= set(anatomy.backbone.modules())
    if anatomy.backbone is not model:
        assert not any(m is anatomy.head for m in anatomy.backbone.modules())
    assert describe(model) is anatomy
    if model.config.is_encoder_decoder:
        assert anatomy.stacks == ("encoder", "decoder")
        assert anatomy.depth("encoder") == 4
        with pytest.raises(SiteUnavailableError, match=r"write 'encoder\.resid_mid\.1' or 'decoder\.resid_mid\.1'"):
            ac.capture(model, sites="resid_mid.1")
    else:
        assert anatomy.stacks == (None,)
        assert anatomy.n_layers == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*PRE_NORM, "gemma2", *PARALLEL])
def test_branches_are_what_is_added(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    anatomy = describe(model)
    attn, mlp = BRANCHES.get(family, ("self_attn", "mlp"))
    plain = plain_hooks(model, [f"{block}.{part}" for block in anatomy.block_paths for part in (attn, mlp)])
    parallel = family in PARALLEL
    cache = captured(model, "resid_pre", "attn_out", "mlp_out", "resid_post", *([] if parallel else ["resid_mid"]))
    # One rounding per addition, element by element.
    eps = torch.finfo(dtype).eps
    for layer, block in enumerate(anatomy.block_paths):
        pre, a, m, post = (cache[f"{n}.{layer}"] for n in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        assert torch.equal(a, plain[f"{block}.{attn}"])
        assert torch.equal(m, plain[f"{block}.{mlp}"])
        total = pre.double() + a.double() + m.double()
        bound = 2 * eps * (pre.double().abs() + a.double().abs() + m.double().abs())
        assert bool(((post.double() - total).abs() <= bound).all())
        if not parallel:
            mid = cache[f"resid_mid.{layer}"]
            assert torch.equal(mid, pre + a)
            assert torch.equal(post, mid + m)


class Unheard(nn.Module):
    """A block of no family, with names that say nothing but which branch is attention."""

    def __init__(self, width: int, *, order: str) -> None:
        super().__init__()
        self.looking_attn = nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.rate = 0.25
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "post":
            x = self.one(x + self.looking_attn(x.cumsum(1)))
            return self.two(x + self.wide(x))
        mixed = self.looking_attn(self.one(x).cumsum(1))
        if self.order == "pre":
            x = x + mixed
            return x + self.wide(self.two(x))
        if self.order == "scaled":
            x = x + mixed * self.rate
            return x + self.wide(self.two(x)) * self.rate
        if self.order == "parallel":
            return x + (mixed + self.wide(self.two(x)))
        if self.order == "branch in place":
            wide = self.wide(self.two(x))
            wide += mixed
            return x + wide
        assert self.order == "gated"
        return x + mixed * torch.sigmoid(self.wide(self.two(x)))


class Unseen(nn.Module):
    """A language model of no family of transformers."""

    def __init__(self, order: str, width: int = 16) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 3, "vocab_size": 50, "hidden_size": width})()
        self.table = nn.Embedding(50, width)
        self.storeys = nn.ModuleList(Unheard(width, order=order) for _ in range(3))
        self.closing_norm = nn.LayerNorm(width)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for storey in self.storeys:
            x = storey(x)
        out: Tensor = self.closing_norm(x)
        return out


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


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_blocks_have_no_middle(family: str) -> None:
    with pytest.raises(SiteUnavailableError, match="parallel"):
        ac.capture(tiny_model(family), sites="resid_mid")


def test_a_block_that_adds_something_else_is_found_out() -> None:
    model = tiny_model("llama")
    block = model.model.layers[2]
    block_forward = block.forward
    block.forward = lambda *args, **kwargs: block_forward(*args, **kwargs) + 1e-4
    with pytest.raises(AdditivityError, match=r"block 2 \(model.layers.2\).*resid_mid \+ mlp_out = resid_post is off"):
        check_identities(model)


def test_a_block_that_scales_its_input_is_found_out() -> None:
    model = tiny_model("gpt2")
    second = model.transformer.h[1]
    forward = second.forward
    second.forward = lambda hidden, *args, **kwargs: forward(hidden * 1.5, *args, **kwargs)
    with pytest.raises(AdditivityError, match="block 1"):
        check_identities(model)


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    calls: list[str] = []
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append("forward"))
    model.transformer.h[2].register_forward_hook(lambda module, args, output: output + 1)
    model.transformer.h[3].register_forward_pre_hook(lambda *_: calls.append("pre"))
    attributes = [dict(m.__dict__) for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_identities(model)
    assert torch.equal(torch.rand(4), expected)
    assert [m.training for m in model.modules()] == modes
    assert [dict(m.__dict__) for m in model.modules()] == attributes
    assert all(p.grad is None for p in model.parameters())
    assert calls == []


def test_the_check_runs_once_per_model() -> None:
    model = tiny_model("gpt2")
    runs = 0
    forward = model.transformer.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return forward(*args, **kwargs)

    model.transformer.forward = counting
    check_identities(model)
    check_identities(model, sites=["resid_post"])
    ac.capture(model, sites=["attn_out", "resid_mid"])
    assert runs == 1
    # What is inside attention and MLP is looked for when it is first asked for.
    ac.sites(model)
    looked = runs
    assert looked > 1
    ac.sites(model)
    ac.capture(model, sites=["attn_in"])
    assert runs == looked


def test_threads_that_first_meet_a_model_check_it_once() -> None:
    for _ in range(5):
        model = tiny_model("gpt2")
        describe(model)
        start = threading.Barrier(4)

        def check(model: nn.Module = model, start: threading.Barrier = start) -> None:
            start.wait()
            check_identities(model)

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(check) for _ in range(4)]:
                done.result()


def test_describing_does_not_keep_the_model() -> None:
    model = tiny_model("llama")
    check_identities(model)
    describe(model).read_point(Site("resid_mid", 1))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_replaced_blocks_are_described_anew() -> None:
    model = tiny_model("gpt2")
    assert describe(model).n_layers == 4
    model.transformer.h = model.transformer.h[:2]
    assert describe(model).n_layers == 2
    with pytest.raises(LayerRangeError, match="2 layers"):
        ac.capture(model, sites="resid_post.2")
    replaced = model.transformer.h[1].mlp = tiny_model("gpt2", seed=1).transformer.h[1].mlp
    assert describe(model).read_point(Site("mlp_out", 1)).module is replaced


def test_a_factor_that_changed_is_found_anew() -> None:
    model = tiny_model("granite")
    captured(model, "attn_out.1")
    for module in model.modules():
        if "residual_multiplier" in vars(module):
            module.residual_multiplier = 0.75
    cache = captured(model, "resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1")
    torch.testing.assert_close(cache["resid_pre.1"] + cache["attn_out.1"], cache["resid_mid.1"])
    torch.testing.assert_close(cache["resid_mid.1"] + cache["mlp_out.1"], cache["resid_post.1"])


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


def test_a_backbone_without_a_head() -> None:
    backbone = tiny_model("llama").model
    anatomy = describe(backbone)
    assert anatomy.head is None
    assert anatomy.backbone is backbone
    with pytest.raises(SiteUnavailableError, match="no language-model head"):
        ac.capture(backbone, sites="logits")
    assert captured(backbone, "final_norm")["final_norm"].shape == (2, 6, 32)


def test_models_that_are_no_transformer() -> None:
    with pytest.raises(
        SiteUnavailableError, match="Sequential has no config: capture by module path, which works on any"
    ):
        ac.sites(nn.Sequential(nn.Linear(2, 2)))


def test_blocks_that_nothing_points_at_are_named_with_what_would_point_at_them() -> None:
    model = Unseen("pre")
    del type(model.config).num_hidden_layers
    with pytest.raises(
        SiteUnavailableError, match=r"it has storeys of 3\); set it in the config, or .*_no_split_modules"
    ):
        describe(model)


def test_sites_that_are_not_read() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(SiteUnavailableError, match="It has embed, resid_pre"):
        ac.capture(model, sites="mixer_out")
    with pytest.raises(SiteUnavailableError, match="one stack"):
        ac.capture(model, sites="encoder.resid_post.1")
    with pytest.raises(LayerRangeError, match="4 layers"):
        ac.capture(model, sites="resid_post.4")


def test_list_of_sites_says_where_each_is_read() -> None:
    infos = {str(info.site): info for info in ac.sites(tiny_model("llama"))}
    assert sum(info.site.name not in INNER for info in infos.values()) == 1 + 4 * 5 + 2
    assert (infos["resid_post.3"].path, infos["resid_post.3"].side) == ("model.layers.3", "output")
    assert (infos["resid_mid.0"].path, infos["resid_mid.0"].side) == (
        "model.layers.0.post_attention_layernorm",
        "input",
    )
    assert (infos["logits"].path, infos["logits"].shape) == ("", "[B, S, V]")


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
