"""The class of transformers a folder is loaded as: the one with the head it was saved with, whatever its family."""

from __future__ import annotations

import json

import pytest
import torch

from actcache import errors
from actcache.model.loading import open_source
from actcache.model.options import LoadOptions
from actcache.testing.tiny import tiny_model

FAMILIES = [
    "t5",
    "t5-v1.1",
    "bart",
    "bert",
    "distilbert",
    "roberta",
    "modernbert",
    "opt",
    "mamba",
    "gpt2",
    "llama-tied",
]
IDS = torch.tensor([[5, 6, 7, 8]])
# Nothing is missing where the head is the embedding; T5's config of transformers 5 always says so.
HEAD_IS_EMBEDDING = ("t5-v1.1", "opt", "mamba", "gpt2")


def loaded(folder):
    return open_source(folder, LoadOptions()).model()


def rename_architecture(folder, name):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = name
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def logits(model):
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **given).logits


@torch.no_grad()
def last_hidden(model):
    if model.config.is_encoder_decoder:
        given = {"decoder_input_ids": IDS, "output_hidden_states": True}
        return model(input_ids=IDS, **given).decoder_hidden_states[-1]
    return model.base_model(input_ids=IDS)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_it_was_saved_as(family, tmp_path):
    model = tiny_model(family, seed=1)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_names_no_architecture(family, tmp_path):
    model = tiny_model(family, seed=1)
    model.save_pretrained(tmp_path)
    rename_architecture(tmp_path, None)
    assert type(loaded(tmp_path)) is type(model)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_that_was_trained_as_a_decoder(family, tmp_path):
    from transformers import AutoModelForCausalLM

    config = tiny_model(family).config
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert type(loaded(tmp_path)) is type(model)
    rename_architecture(tmp_path, None)
    assert type(loaded(tmp_path)) is type(model)


def test_the_decoder_of_an_encoder_decoder_alone(tmp_path):
    from transformers import BartForCausalLM

    BartForCausalLM(tiny_model("bart").config).save_pretrained(tmp_path)
    assert type(loaded(tmp_path)) is BartForCausalLM


# The heads of these consist of several modules (or, for T5, lie beside its stacks).
@pytest.mark.parametrize("family", ["t5-v1.1", "bert", "distilbert", "roberta", "modernbert", "opt", "mamba", "gpt2"])
def test_a_model_saved_without_its_head(family, tmp_path):
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_model(family).config).eval()
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(last_hidden(again), last_hidden(model))
    if family not in HEAD_IS_EMBEDDING:
        assert type(again) is type(model)


def test_an_encoder_without_its_pooler(tmp_path):
    from transformers import BertModel

    model = BertModel(tiny_model("bert").config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again) is BertModel
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


@pytest.mark.parametrize(
    ("family", "part"),
    [("bert", "encoder.layer.1.output.dense.weight"), ("t5-v1.1", "decoder.block.1.layer.0.SelfAttention.q.weight")],
)
def test_a_weight_beside_the_head_that_is_missing(family, part, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model(family).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = [key for key in weights if key.endswith(part)]
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.ModelLoadError, match=rf"lack .*{part}"):
        loaded(tmp_path)
