"""Depth, width and context as a config alone tells them, and the longest prompt that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.model.source import ModelSource
from actcache.testing.tiny import EOS


class _Config(ModelSource):
    """What is known of a model by its config alone: loading it would be an error."""

    name = "a model"

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    config = property(lambda self: self._config)
    loaded = property(lambda self: False)
    weight_bytes = property(lambda self: 0)
    dtype = "float32"

    def identity(self):
        raise AssertionError

    tokenizer_source = model = model_to_run = head = predicts_next = end_tokens = identity


SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({"n_embd": 8, "n_layer": 3, "n_positions": 50}, {"d_model": 8, "n_layers": 3, "context_length": 50}),
    "gptj": ({"n_embd": 8, "n_layer": 3, "n_positions": 50}, {"d_model": 8, "n_layers": 3, "context_length": 50}),
    "gpt_neo": (
        {"hidden_size": 8, "num_layers": 2, "max_position_embeddings": 50,
         "attention_types": [[["global", "local"], 1]]},
        {"d_model": 8, "n_layers": 2, "context_length": 50},
    ),
    "llama": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 50, "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "opt": (
        {"hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 3, "max_position_embeddings": 50,
         "num_attention_heads": 4},
        {"d_model": 32, "n_layers": 3, "context_length": 50},
    ),
    "bloom": ({"hidden_size": 8, "n_layer": 3}, {"d_model": 8, "n_layers": 3, "context_length": None}),
    "falcon": (
        {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "alibi": True},
        {"d_model": 8, "n_layers": 3, "context_length": None},
    ),
    "mpt": ({"d_model": 8, "n_layers": 3, "max_seq_len": 50}, {"d_model": 8, "n_layers": 3, "context_length": 50}),
    "mamba": ({"hidden_size": 8, "num_hidden_layers": 3}, {"d_model": 8, "n_layers": 3, "context_length": None}),
    "t5": (
        {"d_model": 8, "num_layers": 3, "num_decoder_layers": 2, "n_positions": 50},
        {"d_model": 8, "encoder": 3, "decoder": 2, "n_layers": 5, "context_length": None},
    ),
    "bart": (
        {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 50},
        {"d_model": 8, "encoder": 3, "decoder": 2, "n_layers": 5, "context_length": 50},
    ),
    "bert": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 50, "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "distilbert": (
        {"dim": 8, "hidden_dim": 99, "n_layers": 3, "max_position_embeddings": 50, "n_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "roberta": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 514, "pad_token_id": 1,
         "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 512},
    ),
    "modernbert": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 50, "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "led": (
        {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "max_encoder_position_embeddings": 60,
         "max_decoder_position_embeddings": 50},
        {"d_model": 8, "encoder": 3, "decoder": 2, "n_layers": 5, "context_length": 50},
    ),
}  # fmt: skip


@pytest.mark.parametrize("raw", [False, True], ids=["object", "file"])
@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_known_from_the_config(kind, raw, tmp_path):
    """From ``config.to_dict()`` of a live model, and from the file that `save_pretrained` writes."""
    import json

    from transformers import AutoConfig

    values, expected = SIZES[kind]
    made = AutoConfig.for_model(kind, vocab_size=77, **values)
    config = made.to_dict()
    if raw:
        made.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
    source = _Config(config)
    assert source.vocab_size == 77
    for name, value in expected.items():
        found = source.depth(name) if name in ("encoder", "decoder") else getattr(source, name)
        assert found == value, name


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 200),
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 4}}, 400),
        (
            {"max_position_embeddings": 100,
             "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}},
            400,
        ),
        (
            {"max_position_embeddings": 800,
             "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 100}},
            800,
        ),
        (
            {"max_position_embeddings": 100, "model_type": "gemma3_text",
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            100,
        ),
        ({"max_position_embeddings": 514, "model_type": "xlm-roberta"}, 512),
        ({"max_position_embeddings": -1, "model_type": "xlnet"}, None),
        ({"text_config": {"max_position_embeddings": 30}, "max_position_embeddings": 9}, 30),
    ],
)  # fmt: skip
def test_the_longest_prompt(config, length):
    assert _Config(config).context_length == length


def test_the_last_position_of_the_limit_runs_and_the_next_does_not():
    model = zoo.model_of("roberta")
    extractor = ac.ActivationExtractor(model, layers=0)
    limit = extractor.source.context_length
    extractor.extract([[7] * limit])
    with pytest.raises(errors.PromptError, match=f"the context of .* is {limit}"):
        extractor.extract([[7] * (limit + 1)])
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(input_ids=torch.full((1, limit + 1), 7))


def test_bart_alone_without_its_encoder():
    config = {"model_type": "bart", "is_decoder": True, "encoder_layers": 3, "decoder_layers": 2, "bos_token_id": EOS}
    source = _Config(config)
    assert source.stacks == (None,)
    assert source.n_layers == 2
