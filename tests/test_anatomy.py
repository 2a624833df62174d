"""The parts of a model are found, sites mean what they say, and the check of that is made once and leaves no trace."""

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
from anatomy_helpers import IDS, captured

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
