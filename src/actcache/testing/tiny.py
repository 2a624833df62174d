"""Tiny models and a tokenizer, made on the spot: real architectures, no download, nothing trivially the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 3 + 256

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Name -> (transformers' model type, config values). Rows are data: a new family is a new row.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 8}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 8}),
    "phi3": ("phi3", _LLAMA),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
        },
    ),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 8}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {**_LLAMA, "num_key_value_heads": 4}),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "granite": ("granite", {**_LLAMA, "residual_multiplier": 0.22}),
}


def tiny_model(family: str = "gpt2", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 4-block, 32-wide causal language model in evaluation mode, float32, context 64, vocabulary `VOCABULARY`.

    Every norm weight and bias is moved away from 1 and 0, so that no norm and no bias can be skipped unnoticed.
    `overrides` are config values.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values = FAMILIES[family]
    values = {**values, "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**values, **overrides})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                else:
                    # The default spread leaves the branches so small that a missing one would hide in rounding.
                    parameter.mul_(4)
    return model.eval()


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, a BOS in front (`bos`), ids as in `tiny_model`: 0 pad, 1 BOS, 2 EOS, then the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=64,
        # Token types are embedded by some architectures, and mean nothing here.
        model_input_names=["input_ids", "attention_mask"],
    )
