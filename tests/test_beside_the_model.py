"""What is computed beside the model to be read takes nothing from it: no random numbers, no place in its graph."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 8], [8, 3, 4, 50, 2]])


def lora(dropout: float) -> Any:
    """A model whose output projections are no plain matrices, and draw random numbers."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules=["o_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model("llama"), config).train()


def seeded(model: Any) -> Tensor:
    torch.manual_seed(3)
    logits: Tensor = model(IDS).logits
    return logits


def test_heads_add_up_while_the_projection_drops_values() -> None:
    model = lora(0.5)
    plain = seeded(model)
    assert not torch.equal(plain, model(IDS).logits)
    with ac.capture(model, sites=["head_out.1", "head_out.1.2", "attn_out.1"]) as cache:
        assert torch.equal(seeded(model), plain)
    # Each head's part is what is left out with that head: the same values are dropped for all.
    torch.testing.assert_close(cache["head_out.1"].sum(2), cache["attn_out.1"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache["head_out.1.2"], cache["head_out.1"][:, :, 2])
    with ac.edit(model, ac.ablate("head_out.1.2")), ac.capture(model, sites="attn_out.1") as cut:
        seeded(model)
    rest = cache["attn_out.1"] - cache["head_out.1"][:, :, 2]
    torch.testing.assert_close(cut["attn_out.1"], rest, rtol=1e-5, atol=1e-5)


PARTS = ["base_layer", "lora_A.default", "lora_B.default"]


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_inside_a_projection_run_once(everywhere: bool) -> None:
    model = lora(0.0).eval()
    projection = model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")
    parts = [projection.get_submodule(path) for path in PARTS]
    met: list[Any] = []
    request: dict[str, Any] = {"sites": ["head_out.1", "head_out.1.2", "attn_out.1"]}
    with ac.capture(model, **request) as plain:
        model(IDS)
    if everywhere:
        handles = [nn.modules.module.register_module_forward_hook(lambda module, *_: met.append(module))]
    else:
        handles = [part.register_forward_hook(lambda module, *_: met.append(module)) for part in parts]
        handles += [part.register_forward_pre_hook(lambda module, *_: met.append(module)) for part in parts]
    expected: list[Any] = []
    try:
        model(IDS)
        expected, met[:] = [module for module in met if module in parts], []
        with ac.capture(model, **request) as cache:
            model(IDS)
        assert [module for module in met if module in parts] == expected
        met.clear()
        with ac.edit(model, ac.ablate("head_out.1.2")), ac.capture(model, **request) as cut:
            model(IDS)
        assert [module for module in met if module in parts] == expected
    finally:
        for handle in handles:
            handle.remove()
    assert len(expected) == (3 if everywhere else 6)
    for key in plain:
        assert torch.equal(cache[key], plain[key]), key
    rest = plain["attn_out.1"] - plain["head_out.1"][:, :, 2]
    torch.testing.assert_close(cut["attn_out.1"], rest, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("by", ["hook", "pre-hook", "edit", "edit first"])
@pytest.mark.parametrize("path", PARTS)
def test_what_is_done_inside_a_projection_stays_beside_an_edit_of_a_head(path: str, by: str) -> None:
    model = lora(0.0).eval()
    projection = "base_model.model.model.layers.1.self_attn.o_proj"
    part = model.get_submodule(f"{projection}.{path}")
    with ac.capture(model, sites=["head_out.1", "attn_out.1"]) as plain:
        model(IDS)
    with ExitStack() as blocks:
        if by == "edit first":
            blocks.enter_context(ac.edit(model, {f"{projection}.{path}": lambda x: x + 10}))
        blocks.enter_context(ac.edit(model, ac.ablate("head_out.1.2")))
        if by == "edit":
            blocks.enter_context(ac.edit(model, {f"{projection}.{path}": lambda x: x + 10}))
        elif by == "hook":
            blocks.callback(part.register_forward_hook(lambda module, args, output: output + 10).remove)
        elif by == "pre-hook":
            blocks.callback(part.register_forward_pre_hook(lambda module, args: (args[0] + 10,)).remove)
        cut = blocks.enter_context(ac.capture(model, sites=["head_out.1", "attn_out.1"]))
        model(IDS)
    # The parts are linear: what was put into one comes out the same, whatever the heads are.
    tens = torch.full((1, part.in_features if by == "pre-hook" else part.out_features), 10.0)
    own = model.get_submodule(projection)
    moved = part(tens) - part(torch.zeros_like(tens)) if by == "pre-hook" else tens
    if path == "lora_A.default":
        moved = own.lora_B["default"](moved)
    if path != "base_layer":
        moved = moved * own.scaling["default"]
    rest = plain["attn_out.1"] - plain["head_out.1"][:, :, 2] + moved
    torch.testing.assert_close(cut["attn_out.1"], rest, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cut["head_out.1"][:, :, [0, 1, 3]], plain["head_out.1"][:, :, [0, 1, 3]])
    assert not bool(cut["head_out.1"][:, :, 2].any())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("site", ["head_out", "head_out.1.2", "pattern", "pattern.1.0"])
def test_a_checkpoint_repeats_the_pass_behind_the_block(site: str, attention: str) -> None:
    model = tiny_model("llama", attn_implementation=attention).train()

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def loss_of() -> Tensor:
        loss: Tensor = model(IDS, use_cache=False).logits.pow(2).mean()
        return loss

    plain = gradients(loss_of())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with ac.capture(model, sites=site) as cache:
        loss = loss_of()
    for found, expected in zip(gradients(loss), plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert not any(cache[key].requires_grad for key in cache)


def test_documents_in_a_mask_are_no_padding() -> None:
    model = tiny_model("gpt2")
    given = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 2, 2]] * 2)}
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ac.run_with_cache(model, given, sites="resid_post.1")
    handle.remove()
    assert seen[-1].get("position_ids") is None
