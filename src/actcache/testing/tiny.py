"""Tiny models and a tokenizer, made on the spot: real architectures, no download, nothing trivially the identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 3 + 256
CONTEXT = 64
# Sliding windows, and the lengths at which RoPE changes its frequencies.
WINDOW, ROPE_THRESHOLD = 8, 16

_CAUSAL, _SEQ2SEQ, _MASKED = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"


@dataclass(frozen=True)
class Family:
    """How a tiny model of one family is made.

    Attributes:
        model_type: transformers' name of the architecture.
        values: config values.
        auto_class: the transformers class that builds it with its head.
        spread: factor on the initial weight matrices; the default spread of most families leaves the branches so
            small that a missing one would hide in rounding.
    """

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    auto_class: str = _CAUSAL
    spread: float = 4.0


_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GPTJ: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT}
_FALCON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_NEOX: dict[str, Any] = {**_LLAMA, "num_key_value_heads": 4}
_STABLELM: dict[str, Any] = {**_LLAMA, "use_qkv_bias": True}
_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "word_embed_proj_dim": 32,
}
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_heads": 4,
    # Small enough that distances inside the context fall into shared buckets, and past the last one.
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "decoder_start_token_id": PAD,
}
_LONGROPE: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 8.0]}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

# Name -> how it is made. Rows are data: a new family is a new row.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", _GPTJ),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "gpt_neox": Family("gpt_neox", _NEOX),
    "gpt_neox-sequential": Family("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "gptj": Family("gptj", {**_GPTJ, "rotary_dim": 4}),
    "llama": Family("llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": Family("llama", {**_LLAMA, "tie_word_embeddings": True}),
    # Longer than the positions it was configured for, frequencies follow the length.
    "llama-dynamic": Family(
        "llama",
        {
            **_LLAMA,
            "max_position_embeddings": ROPE_THRESHOLD,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    ),
    "llama-longrope": Family(
        "llama",
        {
            **_LLAMA,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": ROPE_THRESHOLD,
                **_LONGROPE,
            },
            # transformers 4.57 reads it from the config itself.
            "original_max_position_embeddings": ROPE_THRESHOLD,
        },
    ),
    "mistral": Family("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "qwen2": Family("qwen2", _LLAMA),
    "qwen3": Family("qwen3", {**_LLAMA, "head_dim": 8}),
    "gemma": Family("gemma", {**_LLAMA, "head_dim": 8}, spread=8.0),
    "gemma2": Family("gemma2", {**_LLAMA, "head_dim": 8, "sliding_window": WINDOW}),
    "gemma3": Family("gemma3_text", {**_LLAMA, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "phi": Family("phi", _LLAMA),
    "phi3": Family("phi3", _LLAMA),
    "phi3-longrope": Family(
        "phi3",
        {
            **_LLAMA,
            "rope_scaling": {"type": "longrope", **_LONGROPE},
            "original_max_position_embeddings": ROPE_THRESHOLD,
        },
    ),
    "olmo2": Family("olmo2", _LLAMA),
    "opt": Family("opt", _OPT),
    "opt-350m": Family("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": Family("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon": Family("falcon", _FALCON),
    "falcon-40b": Family("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": Family(
        "falcon", {**_FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
    ),
    "stablelm": Family("stablelm", _STABLELM),
    "stablelm-parallel": Family("stablelm", {**_STABLELM, "use_parallel_residual": True}),
    "cohere": Family("cohere", _LLAMA),
    "granite": Family(
        "granite",
        {
            **_LLAMA,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 3.0,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.125,
        },
        spread=8.0,
    ),
    "mixtral": Family("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        "qwen3_moe", {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {
            **_LLAMA,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": ROPE_THRESHOLD,
            },
        },
    ),
    "mamba": Family("mamba", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}, spread=1.0),
    "mamba2": Family(
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        spread=1.0,
    ),
    "t5": Family("t5", {**_T5, "feed_forward_proj": "relu", "tie_word_embeddings": True}, _SEQ2SEQ, 1.0),
    "t5-v1.1": Family(
        "t5",
        {**_T5, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _SEQ2SEQ,
        1.0,
    ),
    "bart": Family(
        "bart",
        {
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": CONTEXT,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
        _SEQ2SEQ,
    ),
    "bert": Family("bert", _BERT, _MASKED),
    "distilbert": Family(
        "distilbert",
        {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "max_position_embeddings": CONTEXT},
        _MASKED,
    ),
    # Positions start behind the one of the padding id.
    "roberta": Family("roberta", {**_BERT, "max_position_embeddings": CONTEXT + PAD + 1}, _MASKED),
    "modernbert": Family(
        "modernbert",
        {
            **_BERT,
            "global_attn_every_n_layers": 2,
            "local_attention": 2 * WINDOW,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
        },
        _MASKED,
        8.0,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "glm4": Family("glm4", {**_LLAMA, "head_dim": 8}),
    "mpt": Family("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": CONTEXT}),
    "qwen3_next": Family(
        "qwen3_next",
        {
            **_LLAMA,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
}


def tiny_model(family: str = "gpt2", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 32-wide language model of about 4 blocks in evaluation mode, float32, context 64, vocabulary `VOCABULARY`.

    `family` is a name of `FAMILIES`: causal, masked and encoder-decoder models, each with its head. Every norm weight
    and bias is moved away from 1 and 0, so that no norm and no bias can be skipped unnoticed. `overrides` are config
    values.
    """
    import torch
    import transformers

    made = FAMILIES[family]
    values = {**made.values, "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(made.model_type, **{**values, **overrides})
        if "tie_word_embeddings" in made.values and "tie_word_embeddings" not in overrides:
            # T5's config of transformers 5 always says tied, and leaves the rest to the checkpoint that is loaded.
            config.tie_word_embeddings = made.values["tie_word_embeddings"]
        auto_class = getattr(transformers, made.auto_class)
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        if config.is_encoder_decoder:
            # One embedding for both stacks, also where the head has its own.
            model.set_input_embeddings(model.get_input_embeddings())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The logarithm of a state's decay is no weight matrix: a factor on it would leave no state.
                if parameter.ndim == 1 or name.endswith(("bias", "A_log")):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                else:
                    parameter.mul_(made.spread)
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
