"""Read all tokens of a dataset of the Hub with lmprobe, in each of its ways: ``REPO OUT.npz``."""

from __future__ import annotations

import sys

import lmprobe
import numpy as np
from lmprobe.cache import load_prompt_activations, load_prompt_logits


def main() -> None:
    repo, out = sys.argv[1:]
    about = lmprobe.fetch_dataset_metadata(repo)
    layers = about.available_layers
    found: dict[str, np.ndarray] = {}
    pooled = lmprobe.load_activations(repo, as_dict=False, show_progress=False)
    found["pooled"] = pooled
    tensors, told = lmprobe.load_activation_dataset(repo)
    found |= {name: tensor.float().numpy() for name, tensor in tensors.items()}
    assert told["format_version"] == "2.0", told
    whole = about.tensor_descriptors["hidden_layers"]["storage"] == "full_sequence"
    for i, prompt in enumerate(about.prompts):
        if "logits_topk" in about.tensor_descriptors:
            values, indices = load_prompt_logits(about.model_name, prompt, top_k=1)
            found[f"logits.{i}"] = np.concatenate([values.float().numpy()[0], indices.numpy()[0]])
        if whole and not about.tensor_descriptors["hidden_layers"].get("last_token_shards"):
            # On demand it takes every token of a split dataset from the shards of last tokens.
            found[f"demand.{i}"] = load_prompt_activations(about.model_name, prompt, layers)[0].float().numpy()[0]
    lmprobe.pull_dataset(repo, materialize=True, overwrite=True)
    for i, prompt in enumerate(about.prompts if whole else ()):
        found[f"unpacked.{i}"] = load_prompt_activations(about.model_name, prompt, layers)[0].float().numpy()[0]
    np.savez(out, **found)


if __name__ == "__main__":
    main()
