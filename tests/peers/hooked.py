"""Tiny transformers models as TransformerLens models: its own conversion of the weights, no processing, no download."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

from actcache.testing.tiny import tiny_model

FAMILIES = ("gpt2", "llama")


def both(family: str) -> tuple[Any, HookedTransformer]:
    """The model of transformers, and the same one of TransformerLens."""
    model = tiny_model(family)
    config = model.config
    shared = {
        "n_layers": 4,
        "d_model": 32,
        "n_ctx": 64,
        "n_heads": 4,
        "d_head": 8,
        "d_vocab": config.vocab_size,
        "device": "cpu",
        "init_weights": False,
        "default_prepend_bos": False,
        "attn_only": False,
    }
    if family == "gpt2":
        made = HookedTransformerConfig(
            **shared,
            d_mlp=4 * 32,
            act_fn="gelu_new",
            eps=config.layer_norm_epsilon,
            normalization_type="LN",
            positional_embedding_type="standard",
            original_architecture="GPT2LMHeadModel",
        )
        state = convert_gpt2_weights(model, made)
    else:
        made = HookedTransformerConfig(
            **shared,
            d_mlp=config.intermediate_size,
            act_fn="silu",
            eps=config.rms_norm_eps,
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=8,
            rotary_base=10000,
            rotary_adjacent_pairs=False,
            gated_mlp=True,
            final_rms=True,
            n_key_value_heads=config.num_key_value_heads,
            original_architecture="LlamaForCausalLM",
        )
        state = convert_llama_weights(model, made)
    state.setdefault("unembed.b_U", torch.zeros(config.vocab_size))
    hooked = HookedTransformer(made)
    left = hooked.load_state_dict(copy.deepcopy({k: v.detach() for k, v in state.items()}), strict=False)
    assert not left.unexpected_keys, left
    # Masks and rotary tables only: every weight was given.
    assert not {name for name, _ in hooked.named_parameters()} & set(left.missing_keys), left
    return model, hooked.eval()
