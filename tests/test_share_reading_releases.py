"""Datasets that eight releases of lmprobe have written, read back."""

from __future__ import annotations

import json

import numpy as np
import pytest

import actcache as ac
from actcache.errors import OptionError
from lmprobe_datasets import FIXTURES, WRITTEN, needs_fixtures, plain_read


@needs_fixtures
@pytest.mark.parametrize("name", WRITTEN)
def test_what_releases_of_lmprobe_wrote(name):
    given = json.loads((FIXTURES / "prompts.json").read_text())
    expected = np.load(FIXTURES / "expected.npz")
    prompts, folder = given["prompts"], FIXTURES / name
    plain = plain_read(folder)
    found, labels = ac.load_activations(folder, prompts=prompts, as_dict=False, return_labels=True)
    assert labels.tolist() == given["labels"]
    assert np.array_equal(found, np.stack([plain[prompt][-1] for prompt in prompts]))
    # They computed these prompts in other batches than those of expected.npz, which moves the last bits.
    assert np.allclose(found, expected["pooled_last_token"], rtol=2e-6, atol=2e-8)
    metadata = ac.fetch_dataset_metadata(folder)
    assert metadata.prompts == list(plain) and metadata.num_prompts == 12
    assert np.array_equal(ac.load_activations(folder, as_dict=False), np.stack([rows[-1] for rows in plain.values()]))
    for i, prompt in enumerate(metadata.prompts):
        assert metadata.metadata["score"][i] == given["metadata"][prompts.index(prompt)]["score"]
    if "fullseq" in name:
        whole = ac.load_activations(folder, prompts=prompts, pooling=None, as_dict=False)
        for i, rows in enumerate(whole):
            assert np.array_equal(rows, plain[prompts[i]])
            assert np.allclose(rows.swapaxes(0, 1), expected[f"hidden_{i}"], rtol=2e-6, atol=2e-8)
        for pooling in ("mean", "first_token"):
            pooled = ac.load_activations(folder, prompts=prompts, pooling=pooling, as_dict=False)
            assert np.allclose(pooled, expected[f"pooled_{pooling}"], rtol=1e-5, atol=5e-8), pooling
    else:
        with pytest.raises(OptionError, match="pooled with 'last_token'"):
            ac.load_activations(folder, pooling="mean")


@needs_fixtures
@pytest.mark.parametrize("name", WRITTEN)
def test_logits_and_perplexity_of_releases_of_lmprobe(name):
    prompts = json.loads((FIXTURES / "prompts.json").read_text())["prompts"]
    expected = np.load(FIXTURES / "expected.npz")
    tensors, info = ac.load_activation_dataset(FIXTURES / name)
    order = [prompts.index(prompt) for prompt in ac.fetch_dataset_metadata(FIXTURES / name).prompts]
    assert np.array_equal(tensors["logits_topk.indices"].numpy(), expected["topk_indices"][order])
    assert np.allclose(tensors["logits_topk.values"].numpy(), expected["topk_values"][order], rtol=2e-6, atol=1e-7)
    assert ("perplexity" in tensors) == (info["format_version"] in ("1.2", "2.0"))
    if "perplexity" in tensors:
        assert np.allclose(tensors["perplexity"].numpy(), expected["perplexity"][order], rtol=2e-6)
