"""Edits of heads: `q`, `k`, `v`, `z` and `head_out`, held against plain hooks on the projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.testing.tiny import PAD, tiny_model
from edit_helpers import in_place, moved
from head_edit_helpers import ATTENTIVE, IDS, LEFT, OTHER, run

# The last projection of attention, read off the modeling files.
OUTPUTS = {
    **dict.fromkeys(("gpt2", "gpt_neo"), "attn.c_proj|attn.attention.out_proj"),
    **dict.fromkeys(("bloom", "falcon", "falcon-40b", "falcon-rw"), "self_attention.dense"),
    **dict.fromkeys(("gpt_neox", "gpt_neox-sequential"), "attention.dense"),
    "gptj": "attn.out_proj",
    "phi": "self_attn.dense",
    **dict.fromkeys(("opt", "opt-350m", "bart"), "self_attn.out_proj"),
    **dict.fromkeys(("t5", "t5-v1.1"), "layer.0.SelfAttention.o"),
    **dict.fromkeys(("bert", "roberta"), "attention.output.dense"),
    "distilbert": "attention.out_lin",
    "modernbert": "attn.Wo",
    "mpt": "attn.out_proj",
}


def blocks(model: Any, family: str) -> Any:
    if family.startswith("t5"):
        return model.encoder.block
    if family == "bart":
        return model.model.encoder.layers
    if family in ("bert", "roberta"):
        return getattr(model, family).encoder.layer
    if family == "distilbert":
        return model.distilbert.transformer.layer
    if family == "mpt":
        return model.transformer.blocks
    if family.startswith("gpt_neox"):
        return model.gpt_neox.layers
    if family.startswith("opt"):
        return model.model.decoder.layers
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def output_of(model: Any, family: str, layer: int) -> Any:
    block = blocks(model, family)[layer]
    for path in OUTPUTS.get(family, "self_attn.o_proj").split("|"):
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(family)


@contextmanager
def given(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain hook on what a module is called with."""
    handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    yield
    handle.remove()


def without(heads: list[int], n_heads: int = 4) -> Callable[[Tensor], Tensor]:
    """What an output projection is given, with some heads at zero."""

    def change(x: Tensor) -> Tensor:
        value = x.clone().view(*x.shape[:-1], n_heads, -1)
        value[..., heads, :] = 0
        return value.view(x.shape)

    return change


@pytest.mark.parametrize("family", ATTENTIVE)
def test_ablating_heads_is_zeroing_what_the_output_projection_is_given(family: str) -> None:
    model = tiny_model(family)
    prefix = "encoder." if model.config.is_encoder_decoder else ""
    sites = [f"{prefix}{name}.1" for name in ("z", "head_out", "attn_out")] + [f"{prefix}resid_post", "logits"]
    plain = run(model, sites=sites)
    projection = output_of(model, family, 1)
    for heads in ([2], [0, 3]):
        with given(projection, without(heads)):
            expected = run(model, sites=["logits", f"{prefix}resid_post"])
        others = [head for head in range(4) if head not in heads]
        several = [ac.ablate(f"{prefix}head_out.1.{head}") for head in heads]

        def zeros(x: Tensor, heads: list[int] = heads) -> None:
            x[:, :, heads] = 0

        for edit in (
            several,
            ac.ablate(f"{prefix}head_out.1", heads=heads),
            ac.ablate(f"{prefix}z.1", heads=heads),
            {f"{prefix}head_out.1": zeros},
            {f"{prefix}z.1": zeros},
        ):
            cache = run(model, edit, sites=sites)
            for key in expected:
                assert torch.equal(cache[key], expected[key]), (key, heads)
            assert not bool(cache[sites[1]][:, :, heads].any())
            assert torch.equal(cache[sites[1]][:, :, others], plain[sites[1]][:, :, others])
            assert torch.equal(cache[sites[0]][:, :, others], plain[sites[0]][:, :, others])
        # What a head adds is behind what it is made of.
        assert torch.equal(run(model, several, sites=sites)[sites[0]], plain[sites[0]])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite", "bloom", "opt", "gpt_oss", "falcon-40b"])
def test_a_head_gets_another_value(family: str) -> None:
    """The projection's output is that of the others plus the new value, and the bias once."""
    model = tiny_model(family)
    projection = output_of(model, family, 2)
    plain = run(model, sites=["z.2", "head_out.2"])
    new = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    with given(projection, without([1])):
        handle = projection.register_forward_hook(lambda m, args, output: output + new.reshape(output.shape))
        expected = run(model, sites=["logits", "attn_out.2"])
        handle.remove()
    for edit in (
        {"head_out.2.1": lambda x: new},
        {"head_out.2.1": in_place(lambda x: x.copy_(new))},
        {"head_out.2": in_place(lambda x: x[:, :, 1].copy_(new))},
        ac.patch("head_out.2.1", new),
        ac.patch("head_out.2", new[:, :, None], heads=1),
    ):
        cache = run(model, edit, sites=["logits", "attn_out.2", "z.2", "head_out.2", "head_out.2.1"])
        for key in expected:
            assert torch.equal(cache[key], expected[key]), key
        assert torch.equal(cache["head_out.2.1"], new)
        assert torch.equal(cache["head_out.2"][:, :, 1], new)
        assert torch.equal(cache["head_out.2"][:, :, [0, 2, 3]], plain["head_out.2"][:, :, [0, 2, 3]])
        assert torch.equal(cache["z.2"], plain["z.2"])


def test_edits_of_one_projection_stand_on_each_other() -> None:
    """Edits of different heads, of the sum behind them, and hooks of the caller, in any order of entering."""
    model = tiny_model("bloom")
    projection = output_of(model, "bloom", 1)
    plain = run(model, sites=["head_out.1", "attn_out.1"])
    first, second = ac.edit(model, ac.ablate("head_out.1.0")), ac.edit(model, {"head_out.1.3": lambda x: x * 2})
    behind = ac.edit(model, {"attn_out.1": lambda x: x + 1})
    results = []
    for order in ([first, second, behind], [behind, second, first], [second, behind, first]):
        with (
            torch.no_grad(),
            order[0],
            order[1],
            ac.capture(model, sites=["head_out.1", "attn_out.1"]) as cache,
            order[2],
        ):
            model(IDS)
        results.append(cache)
        heads = cache["head_out.1"]
        assert not bool(heads[:, :, 0].any())
        assert torch.equal(heads[:, :, 3], plain["head_out.1"][:, :, 3] * 2)
        assert torch.equal(heads[:, :, 1:3], plain["head_out.1"][:, :, 1:3])
        torch.testing.assert_close(cache["attn_out.1"], heads.sum(2) + projection.bias + 1, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(results[0]["attn_out.1"], one["attn_out.1"]) for one in results)
    # One head twice: the second is given what the first made.
    with ac.edit(model, {"head_out.1.2": lambda x: x + 1}), ac.edit(model, {"head_out.1.2": lambda x: x * 3}):
        cache = run(model, sites="head_out.1")
    assert torch.equal(cache["head_out.1"][:, :, 2], (plain["head_out.1"][:, :, 2] + 1) * 3)
    # What a hook of the caller does to the output stays.
    handle = projection.register_forward_hook(lambda m, args, output: output + 100)
    cache = run(model, ac.ablate("head_out.1.0"), sites="attn_out.1")
    handle.remove()
    expected = run(model, ac.ablate("head_out.1.0"), sites="attn_out.1")
    torch.testing.assert_close(cache["attn_out.1"], expected["attn_out.1"] + 100, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hooked", ["looks", "changes", "global"])
@pytest.mark.parametrize("together", [True, False])
def test_two_heads_beside_a_hook_of_the_callers(hooked: str, together: bool) -> None:
    """What the first edit did is counted once, also where it has to be told from what a hook did."""
    model = tiny_model("llama")
    projection = output_of(model, "llama", 1)
    plain = run(model, sites="head_out.1")["head_out.1"]
    moved_by = 7.0 if hooked == "changes" else 0.0
    if hooked == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    else:
        handle = projection.register_forward_hook(
            lambda module, args, output: output + moved_by if hooked == "changes" else None
        )
    first, second = ac.ablate("head_out.1.2"), {"head_out.1.0": lambda x: x * 3}
    try:
        with torch.no_grad(), ac.capture(model, sites=["head_out.1", "attn_out.1"]) as cache:
            if together:
                with ac.edit(model, [first, ac.steer("head_out.1.0", torch.full((32,), 2.0))]):
                    model(IDS)
            else:
                with ac.edit(model, first), ac.edit(model, second):
                    model(IDS)
    finally:
        handle.remove()
    expected = plain.clone()
    expected[:, :, 2] = 0
    expected[:, :, 0] = expected[:, :, 0] + 2 if together else expected[:, :, 0] * 3
    torch.testing.assert_close(cache["head_out.1"], expected)
    torch.testing.assert_close(cache["attn_out.1"], expected.sum(2) + moved_by, rtol=1e-5, atol=1e-5)


def test_editing_one_head_of_one_layer_changes_that_head_only() -> None:
    """All that the other heads are made of and make stays as it is, bit for bit, where nothing follows."""
    model = tiny_model("llama")
    names = ["q", "k", "v", "z", "head_out", "pattern"]
    plain = run(model, sites=[f"{name}.1" for name in names])
    for edit in ({"head_out.1.2": moved}, ac.steer("head_out.1", torch.ones(32), heads=2)):
        cache = run(model, edit, sites=list(plain))
        for name in ("q", "k", "v", "z", "pattern"):
            assert torch.equal(cache[f"{name}.1"], plain[f"{name}.1"]), name
        assert torch.equal(cache["head_out.1"][:, :, [0, 1, 3]], plain["head_out.1"][:, :, [0, 1, 3]])
        assert not torch.allclose(cache["head_out.1"][:, :, 2], plain["head_out.1"][:, :, 2], atol=1e-2)


def test_an_adapter_on_the_output_projection() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    projection = model.get_base_model().model.layers[1].self_attn.o_proj
    with given(projection, without([1])):
        expected = run(model)["logits"]
    cache = run(model, ac.ablate("head_out.1.1"), sites=["logits", "head_out.1"])
    assert torch.equal(cache["logits"], expected)
    assert torch.equal(
        cache["head_out.1"][:, :, [0, 2, 3]], run(model, sites="head_out.1")["head_out.1"][:, :, [0, 2, 3]]
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_projections_are_edited_in_their_own_columns(name: str) -> None:
    """By hand on the projection of llama, and in the third of GPT-2's fused one that belongs to it."""
    model = tiny_model("llama")
    heads = 4 if name == "q" else 2
    projection = getattr(model.model.layers[1].self_attn, f"{name}_proj")

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 1] = x[:, :, 1] * 2 + 1
        return x

    handle = projection.register_forward_hook(lambda m, a, y: change(y.view(2, 6, heads, 8)).view(y.shape))
    expected = run(model)["logits"]
    handle.remove()
    cache = run(model, {f"{name}.1": change}, sites=["logits", f"{name}.1"])
    assert torch.equal(cache["logits"], expected)
    assert torch.equal(cache[f"{name}.1"], change(run(model, sites=f"{name}.1")[f"{name}.1"]))

    model = tiny_model("gpt2")
    third = "qkv".index(name) * 32

    def fused(module: Any, args: Any, y: Tensor) -> Tensor:
        y = y.clone()
        y[..., third : third + 32] = change(y[..., third : third + 32].view(2, 6, 4, 8)).flatten(-2)
        return y

    handle = model.transformer.h[1].attn.c_attn.register_forward_hook(fused)
    expected = run(model)["logits"]
    handle.remove()
    assert torch.equal(run(model, {f"{name}.1": change})["logits"], expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon-40b", "phi3", "gpt_neox", "deepseek_v3", "mpt"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_ones_at_the_last_token_are_captured_as_ones(family: str, name: str) -> None:
    """Of one head, and of all."""
    model = tiny_model(family)
    if f"{name}.0" not in [str(info.site) for info in ac.sites(model)]:
        pytest.skip("what its projections return is no queries, keys or values yet")
    before = run(model, sites=f"{name}.0")[f"{name}.0"]
    width = before.shape[-1]
    for heads in (0, None):
        edit = ac.ablate(f"{name}.0", mean=torch.ones(width), positions="last", heads=heads)
        cache = run(model, edit, sites=[f"{name}.0", "logits"])
        there = cache[f"{name}.0"]
        changed = there[:, -1] if heads is None else there[:, -1, 0]
        assert torch.equal(changed, torch.ones_like(changed))
        assert torch.equal(there[:, :-1], before[:, :-1])
        if heads is not None:
            assert torch.equal(there[:, -1, 1:], before[:, -1, 1:])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "qwen3"])
@pytest.mark.parametrize("site", ["attn_in.1", "z.1", "head_out.1", "mlp_in.1", "mlp_act.1"])
def test_a_patch_of_all_of_a_site_gives_what_the_source_gave(family: str, site: str) -> None:
    model = tiny_model(family)
    part = "attn_out.1" if site[:3] in ("att", "z.1", "hea") else "mlp_out.1"
    source = run(model, sites=[site, part], ids=OTHER)
    cache = run(model, ac.patch(site, source), sites=[site, part])
    torch.testing.assert_close(cache[part], source[part], rtol=1e-5, atol=1e-6)
    assert torch.equal(cache[site], source[site])
    if site.startswith(("z", "head_out")):
        cache = run(model, ac.patch(site, source, heads=[3, 1], positions="last"), sites=[site])
        plain = run(model, sites=site)
        assert torch.equal(cache[site][:, -1, [1, 3]], source[site][:, -1, [1, 3]])
        assert torch.equal(cache[site][:, -1, [0, 2]], plain[site][:, -1, [0, 2]])
        assert torch.equal(cache[site][:, :-1], plain[site][:, :-1])


def test_means_over_a_reference_set() -> None:
    model = tiny_model("llama")
    mask = (LEFT != PAD).long()
    reference = run(model, sites=["z.1", "head_out.1"], ids=LEFT, attention_mask=mask)
    rows = torch.cat([reference["z.1"][0, 2:], reference["z.1"][1]])
    assert rows.shape == (10, 4, 8)
    cache = run(model, ac.ablate("z.1", mean=reference, heads=[3, 0]), sites="z.1")
    torch.testing.assert_close(cache["z.1"][:, :, [3, 0]], rows.mean(0)[[3, 0]].expand(2, 6, 2, 8))
    # One head's value out of that of all.
    cache = run(model, ac.ablate("head_out.1.2", mean=reference, positions=1), sites="head_out.1.2")
    of_head = torch.cat([reference["head_out.1"][0, 2:], reference["head_out.1"][1]])[:, 2]
    torch.testing.assert_close(cache["head_out.1.2"][:, 1], of_head.mean(0).expand(2, 32))
    with pytest.raises(ac.errors.OptionError, match=r"mean of 'pattern\.1' over tokens means nothing"):
        ac.ablate("pattern.1", mean=run(model, sites="pattern.1"))


def test_an_input_that_several_modules_are_given_apart_is_only_read() -> None:
    """Attention that changes what it is given before its projections: no module stands for what all of them get."""
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn

    class Doubled(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states * 2, *args, **kwargs)

    attention.__class__ = Doubled
    seen: list[Tensor] = []
    handle = attention.k_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    cache = run(model, sites=["attn_in.1", "attn_in.2"])
    handle.remove()
    assert torch.equal(cache["attn_in.1"], seen[0])
    with pytest.raises(
        ac.errors.SiteUnavailableError, match=r"'attn_in\.1' cannot be edited.*not all of that.*attn_out\.1"
    ):
        ac.edit(model, {"attn_in.1": moved})
    assert torch.equal(run(model, {"attn_in.2": moved}, sites="attn_in.2")["attn_in.2"], moved(cache["attn_in.2"]))
