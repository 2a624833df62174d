"""What is computed beside the model to be read takes nothing from it: no random numbers, no place in its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
