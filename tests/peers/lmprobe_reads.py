"""Read a dataset of the Hub with lmprobe: ``REPO PROMPTS.json OUT.npz``; what it says of it goes to standard output."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import lmprobe
import numpy as np


def main() -> None:
    repo, prompts_file, out = sys.argv[1:]
    prompts = json.loads(Path(prompts_file).read_text("utf-8"))
    about = lmprobe.fetch_dataset_metadata(repo)
    found: dict[str, np.ndarray] = {}
    everything, labels = lmprobe.load_activations(repo, return_labels=True, show_progress=False)
    for layer, values in everything.items():
        found[f"all.{layer}"] = values
    asked = lmprobe.load_activations(repo, prompts=prompts, show_progress=False)
    for layer, values in asked.items():
        found[f"asked.{layer}"] = values
    tensors, _ = lmprobe.load_activation_dataset(repo)
    for name, tensor in tensors.items():
        found[f"tensor.{name}"] = tensor.float().numpy()
    lmprobe.pull_dataset(repo, materialize=True, overwrite=True)
    held = [lmprobe.discover_cached(about.model_name, prompt) for prompt in prompts]
    np.savez(out, **found)
    told = {
        "lmprobe": version("lmprobe"),
        "model": about.model_name,
        "layers": about.available_layers,
        "prompts": about.num_prompts,
        "version": about.format_version,
        "labels": labels.tolist(),
        "raw_layers": [info.raw_layers for info in held],
        "pooled": [info.pooled for info in held],
        "tokens": [info.num_tokens for info in held],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
