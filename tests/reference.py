"""Independent code for what a prompt gives alone: a bare forward pass and plain torch hooks, nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def alone(model: torch.nn.Module, ids: Sequence[int], site: str) -> torch.Tensor:
    """`[T, D]`: the value of `site` for one prompt run by itself, gpt2-like and llama-like models."""
    name, _, number = site.partition(".")
    model.eval()
    blocks = blocks_of(model)
    block = blocks[int(number)] if number else None
    attention, mlp = ("attn", "mlp") if hasattr(model, "transformer") else ("self_attn", "mlp")
    seen: list[torch.Tensor] = []

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    def output(_module, _args, value):
        seen.append(first(value).clone())

    def given(_module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    final = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    handle = {
        "resid_post": lambda: block.register_forward_hook(output),
        "resid_pre": lambda: block.register_forward_pre_hook(given, with_kwargs=True),
        "attn_out": lambda: getattr(block, attention).register_forward_hook(output),
        "mlp_out": lambda: getattr(block, mlp).register_forward_hook(output),
        "embed": lambda: blocks[0].register_forward_pre_hook(given, with_kwargs=True),
        "final_norm": lambda: final.register_forward_hook(output),
        "logits": lambda: model.register_forward_hook(lambda m, a, out: seen.append(out.logits.clone())),
    }[name]()
    try:
        model(input_ids=torch.tensor([list(ids)]))
    finally:
        handle.remove()
    (value,) = seen
    return value[0]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |difference| over max |reference|."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))
