"""Run one of the examples that train an autoencoder, in a store of its own; what came of it, as JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import actcache as ac

example, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_num_threads(1)
given: list[Any] = []
encode_store = ac.encode_store


def keeping(*arguments: Any) -> ac.Features:
    """What `ac.encode_store` gives; what it was called with is kept."""
    given.append(arguments)
    return encode_store(*arguments)


ac.encode_store = keeping
store = ac.Store(folder / "store", index_dir=folder / "index")
result = import_module(example).main(store)

((cache, sae, site),) = given
# It has run since, and is the same all the same.
again = encode_store(cache, sae, site)
prompts = import_module("single_facts").PROMPTS[:40]
activations, mask = cache.get_activations(prompts)
sae.eval()
apart = 0.0
with torch.no_grad():
    for vectors, real, found in zip(activations, mask, again.read(prompts), strict=True):
        expected = sae.encode(vectors[real])
        expected = expected.to_dense() if expected.layout != torch.strided else expected
        apart = max(apart, float((found.to_dense() - expected).abs().max() / expected.abs().max()))
print(json.dumps({**result, "again": again.encoded, "found": again.found, "apart": apart}))
