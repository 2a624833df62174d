"""A saved model, texts, and what the model alone gives for each of them."""

from __future__ import annotations

import torch

from actcache.testing.tiny import tiny_model, tiny_tokenizer

FLOAT32 = 5e-6
TEXTS = ["the cat sat on the mat", "a", "dogs and cats and dogs", "the mat sat", "on a mat the cat sat and sat"]
CHAT = [{"role": "user", "content": "the cat sat"}]


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ids_of(folder, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def misses(cache, prompts=TEXTS):
    return cache.plan(prompts).missing


def saved_gpt2(folder, *, layers):
    """A gpt2-like model with a tokenizer, as save_pretrained leaves them."""
    tiny_model("gpt2", seed=1, n_layer=layers).save_pretrained(folder)
    tiny_tokenizer(bos=False).save_pretrained(folder)
    return folder
