"""Attention of which edges are cut by hand: a mask that is written into a plain eager forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import edit_helpers

IDS = torch.tensor([[5, 9, 100, 7, 60, 41], [8, 3, 4, 50, 11, 90]])


def attention_of(model: Any, family: str, layer: int, stack: str | None) -> Any:
    """The module that is called with the mask of self-attention."""
    if family.startswith("t5"):
        return getattr(model, str(stack)).block[layer].layer[0].SelfAttention
    if family == "bart":
        return getattr(model.model, str(stack)).layers[layer].self_attn
    if family in ("bert", "roberta"):
        return getattr(model, family).encoder.layer[layer].attention.self
    if family == "distilbert":
        return model.distilbert.transformer.layer[layer].attention
    if family == "mpt":
        return model.transformer.blocks[layer].attn
    if family.startswith("gpt_neox"):
        return model.gpt_neox.layers[layer].attention
    if family.startswith("opt"):
        return model.model.decoder.layers[layer].self_attn
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[layer]
    return next(
        getattr(block, name) for name in ("attn", "self_attn", "self_attention", "attention") if hasattr(block, name)
    )


@contextmanager
def masked_by_hand(attention: Any, cut: Tensor) -> Iterator[None]:
    """`cut` (bool ``[B, H, S, S]``) at -inf in the mask that one attention module of an eager model is given."""

    def pre(module: Any, args: Any, kwargs: Any) -> Any:
        def changed(mask: Tensor) -> Tensor:
            # Some masks are wider than there are keys.
            here = torch.nn.functional.pad(cut, (0, max(0, mask.shape[-1] - cut.shape[-1])))
            if mask.dtype == torch.bool:
                # MPT hides what is true.
                return mask | here
            return mask + torch.zeros(here.shape, dtype=mask.dtype).masked_fill(here, -torch.inf)

        # The first block of T5 puts the mask into the bias, which all others hand on.
        names = ["position_bias"] if type(module).__name__ == "T5Attention" else []
        names = names or [
            n for n in ("attention_mask", "mask", "sliding_window_mask") if isinstance(kwargs.get(n), Tensor)
        ]
        if not names and any(is_mask := [isinstance(a, Tensor) and a.ndim == 4 for a in args]):
            return tuple(changed(a) if yes else a for a, yes in zip(args, is_mask, strict=True)), kwargs
        # Where every token sees every other one, there may be no mask.
        masks = {name: kwargs[name] for name in names} or {
            "mask" if "mask" in kwargs else "attention_mask": torch.zeros(1, 1, 1, 1)
        }
        return args, {**kwargs, **{name: changed(mask) for name, mask in masks.items()}}

    handle = attention.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run(model: Any, edits: Any = None, sites: Any = None, ids: Tensor = IDS, **kwargs: Any) -> Any:
    return edit_helpers.run(model, edits, sites or ["logits"], ids, **kwargs)


def cut_of(heads: list[int], queries: list[int], keys: list[int], length: int = 6, n_heads: int = 4) -> Tensor:
    cut = torch.zeros(2, n_heads, length, length, dtype=torch.bool)
    for head in heads:
        for query in queries:
            cut[:, head, query, keys] = True
    return cut


def by_hand(model: Any, layer: int, cut: Tensor, sites: Any = None, ids: Tensor = IDS, **kwargs: Any) -> Any:
    with masked_by_hand(attention_of(model, "llama", layer, None), cut):
        return run(model, sites=sites, ids=ids, **kwargs)
