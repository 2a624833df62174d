"""Capture inside the models of TransformerLens, beside its own hooks. Prints which of our claims hold, as JSON."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import torch
from hooked import both
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

import actcache as ac
from actcache.testing.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
claims: dict[str, bool] = {}


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("_call_impl" in vars(m)) for m in model.modules()]


def hooked_transformer(family: str) -> None:
    _, model = both(family)
    before = hooks_of(model)
    logits, theirs = model.run_with_cache(IDS)
    points = ["hook_embed", "blocks.*.hook_resid_*", "blocks.*.attn.hook_*", "blocks.*.mlp.hook_*", "ln_final.hook_*"]
    names = [name for name, module in model.named_modules() if name in theirs]
    with ac.capture(model, names, include_inputs=True) as cache:
        again = model(IDS)
    claims[f"{family}: every hook point, by its path"] = len(names) > 40 and all(
        # It keeps the last of several runs.
        torch.equal(cache[name][-1].output, theirs[name]) and torch.equal(cache[name][-1].input, theirs[name])
        for name in names
    )
    claims[f"{family}: the pass is theirs"] = torch.equal(again, logits)
    with ac.capture(model, points[:2]) as patterned:
        model(IDS)
    claims[f"{family}: patterns of paths"] = len(patterned) == 1 + 3 * 4
    claims[f"{family}: by attribute"] = torch.equal(patterned.blocks[1].hook_resid_post.output, theirs["resid_post", 1])
    with ac.capture(model, points[1]) as cache:
        with_hooks = model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x * 0 + 1)])
    claims[f"{family}: behind their hooks"] = bool((cache["blocks.1.hook_resid_post"].output == 1).all()) and bool(
        (cache["blocks.2.hook_resid_pre"].output == 1).all()
    )
    with ac.edit(model, {"blocks.1.hook_resid_post": lambda x: x * 0 + 1}):
        edited, seen = model.run_with_cache(IDS)
    claims[f"{family}: edits reach the model"] = torch.equal(edited, with_hooks)
    claims[f"{family}: their hooks stand before our edits"] = torch.equal(
        seen["resid_post", 1], theirs["resid_post", 1]
    ) and bool((seen["resid_pre", 2] == 1).all())
    with ac.capture(model, "blocks.1.hook_resid_post", include_grads=True) as cache:
        model(IDS).square().sum().backward()
    kept: list[Any] = []
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_post", lambda gradient, hook: kept.append(gradient.clone()))]):
        model(IDS).square().sum().backward()
    claims[f"{family}: gradients"] = torch.equal(cache["blocks.1.hook_resid_post"].grad, kept[0])
    model.reset_hooks()
    claims[f"{family}: nothing is left"] = hooks_of(model) == before


def bridge() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridged: Any = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)
    with torch.no_grad():
        logits, theirs = bridged.run_with_cache(IDS)
        # It puts hooks of its own there in its first pass.
        before = hooks_of(bridged)
        with ac.capture(bridged, ["blocks.*.hook_out", "blocks.*.hook_in"]) as cache:
            again = bridged(IDS)
        claims["bridge: hook points of blocks"] = len(cache) == 8 and all(
            torch.equal(cache[f"blocks.{i}.hook_out"].output, theirs[f"blocks.{i}.hook_resid_post"])
            and torch.allclose(cache[f"blocks.{i}.hook_in"].output, expected[i], rtol=1e-5, atol=1e-5)
            for i in range(4)
        )
        claims["bridge: the pass is theirs"] = torch.equal(again, logits)
        with ac.capture(model, "transformer.h.1", sites="resid_post") as cache:
            bridged(IDS)
        inside = cache["transformer.h.1"].hidden
        claims["bridge: by the model inside"] = torch.equal(inside, cache["resid_post.1"]) and torch.allclose(
            inside, expected[2], rtol=1e-5, atol=1e-5
        )
        with (
            ac.edit(bridged, {"blocks.1.hook_out": lambda x: x * 0 + 1}),
            ac.capture(bridged, "blocks.2.hook_in") as cache,
        ):
            bridged(IDS)
        claims["bridge: edits reach the model"] = bool((cache["blocks.2.hook_in"].output == 1).all())
    claims["bridge: nothing is left"] = hooks_of(bridged) == before


def main() -> None:
    for family in ("gpt2", "llama"):
        hooked_transformer(family)
    bridge()
    print(json.dumps(claims))


if __name__ == "__main__":
    main()
