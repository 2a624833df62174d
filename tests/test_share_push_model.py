"""From a model to a dataset and back: what is loaded is what the model gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error
from share_helpers import Published

TEXTS = ["the cat sat", "a dog", "x", "rain fell over hills"]
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def model():
    return tiny_model("mixtral")


@pytest.fixture
def cache(model, tmp_path):
    sites = ["resid_post", "attn_out", "router_logits"]
    return ac.UnifiedCache(
        model, tokenizer=tiny_tokenizer(), store=tmp_path / "store", cache_pooled=False, cache_logits=True,
        logit_top_k=4, sites=sites,
    )  # fmt: skip


def test_every_value(model, cache, tmp_path):
    cache.warmup(TEXTS, labels=[3, 1, None, 2], metadata={"score": [0.5, 1, 2, 3]})
    ac.push_dataset(tmp_path / "set", cache.model_name, TEXTS, store=cache.store)
    loaded = ac.load_activations(tmp_path / "set", prompts=TEXTS, pooling=None)
    tokenizer = tiny_tokenizer()
    for layer in range(4):
        for i, prompt in enumerate(TEXTS):
            wanted = alone(model, tokenizer(prompt)["input_ids"], f"resid_post.{layer}")
            assert relative_error(torch.from_numpy(loaded[layer][i]), wanted) < FLOAT32
    found = Published(tmp_path / "set")
    for i, prompt in enumerate(TEXTS):
        row = found.by_text[prompt]
        assert row["label"] == [3, 1, None, 2][i] and row["score"] == [0.5, 1, 2, 3][i]
        assert row["token_ids"] == tokenizer(prompt)["input_ids"]
        assert row["token_perplexity"] == pytest.approx(cache.get_token_perplexity([prompt])[0].tolist(), rel=1e-6)
        perplexity = [row[f"perplexity_{name}"] for name in ("mean", "min", "max")]
        assert perplexity == pytest.approx(cache.get_perplexity([prompt])[0].tolist(), rel=1e-6)
    logits = cache.get_logits(TEXTS)
    tensors, _ = ac.load_activation_dataset(tmp_path / "set", tensors=["logits_topk", "router_logits"])
    order = [TEXTS.index(row["text"]) for row in found.index]
    assert np.array_equal(tensors["logits_topk.indices"].numpy(), logits.indices.reshape(4, 4)[order])
    assert np.array_equal(tensors["logits_topk.values"].numpy(), logits.values.reshape(4, 4)[order])
    router, mask = cache.get_activations(TEXTS, site="router_logits", layers=[2])
    last = torch.stack([rows[real][-1] for rows, real in zip(router, mask, strict=True)])
    assert torch.equal(tensors["router.layer_2"], last[order])


def test_what_it_is_of_goes_along(cache, tmp_path):
    cache.warmup(TEXTS)
    ac.push_dataset(tmp_path / "set", cache.model_name, TEXTS, store=cache.store)
    (space,) = cache.store.spaces()
    told = Published(tmp_path / "set").ours
    assert told["space"]["identity"] == dict(space.identity) and told["space"]["space"] == space.space
    assert told["text_context"] == cache.store.prompts(space.space).text_context
    assert told["provenance"]["extracted_with"]["torch_version"] == torch.__version__


def test_prompts_that_a_model_continued(tmp_path):
    cache = ac.UnifiedCache(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), store=tmp_path / "store", cache_pooled=False,
        generate={"max_new_tokens": 3},
    )  # fmt: skip
    cache.warmup(["ab", "cd"])
    ac.push_dataset(tmp_path / "set", cache.model_name, None, store=cache.store)
    found = Published(tmp_path / "set")
    # What is stored is of prompt and completion together.
    assert sorted(len(row["token_ids"]) for row in found.index) == [6, 6]
    assert {row["prompt_kind"] for row in found.index} == {"ids"}
