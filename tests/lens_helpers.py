"""Maps of a tuned lens, and folders of them as the package tuned-lens leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEPTH, WIDTH = 4, 32


def maps(seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (torch.randn(WIDTH, WIDTH, generator=generator) / 6, torch.randn(WIDTH, generator=generator) / 6)
        for layer in range(DEPTH)
    }


def save(folder: Path, given: dict[int, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """As ``TunedLens.save`` does: the state of a list of linear layers, and a JSON beside it."""
    folder.mkdir()
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in given)
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, given.values(), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    torch.save(layers.state_dict(), folder / "params.pt")
    said = {
        "base_model_name_or_path": "gpt2",
        "d_model": WIDTH,
        "num_hidden_layers": DEPTH,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "0",
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder
