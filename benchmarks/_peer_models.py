"""The models and prompts of `benchmarks/peers.py`: of a config and a seed, in folders that every library can open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TINY, LARGE = "tiny, 4 x 32", "12 x 768"
WORDS = {TINY: 256, LARGE: 8_000}
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def make_model(name: str, folder: Path) -> int:
    """Write weights, config and tokenizer of `TINY` (Llama's shape) or `LARGE` (GPT-2's); its number of layers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": WORDS[name] + 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": name == LARGE,
    }
    if name == TINY:
        config: Any = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, **shared,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
    else:
        config = GPT2Config(n_layer=12, n_embd=768, n_head=12, n_positions=256, **shared)
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            # Branches of a default initialisation are so small that a missing one would hide in rounding.
            if weight.ndim == 2:
                weight *= 2.0
    model.save_pretrained(folder)
    _tokenizer(WORDS[name]).save_pretrained(folder)
    return int(config.num_hidden_layers)


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [PAD, BOS, EOS, *(f"w{i}" for i in range(words))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def make_prompts(name: str, n: int, seed: int = 0) -> list[str]:
    """`n` texts of mixed length, 4 to 128 tokens (log-normal, median about 24)."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(24), 0.7, n).astype(int), 4, 128)
    return [" ".join(f"w{i}" for i in generator.integers(0, WORDS[name], length)) for length in lengths]


def change_model(folder: Path) -> None:
    """Write other weights into the folder of a model, under the same names."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value * np.float32(1.5) for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
