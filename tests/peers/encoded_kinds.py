"""Encode stored vectors with every kind of autoencoder that SAELens and dictionary_learning have; what came of it, as
JSON by the name of the kind: how far features are from those of `encode`, and how many were encoded, twice."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import sae_lens
import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

import actcache as ac
from actcache.errors import ActCacheError

WIDTH, N = 16, 48
PROMPTS = [[i + 1, *range(i % 6)] for i in range(50)]
torch.manual_seed(0)
vectors = [torch.randn(len(p), WIDTH) for p in PROMPTS]
folder = Path(sys.argv[1])
store = ac.Store(folder / "store", index_dir=folder / "index")
space = ac.new_space("org/model")
store.write(space, PROMPTS, {"resid_post.1": vectors})


def of_sae_lens(kind: str, **values: Any) -> Any:
    """One of SAELens, with weights drawn at random."""
    config = getattr(sae_lens, f"{kind}Config")(d_in=WIDTH, d_sae=N, **values)
    return drawn(getattr(sae_lens, kind)(config))


def drawn(sae: Any) -> Any:
    """`sae` with random weights, of which about a quarter of the features are active."""
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn_like(parameter) / (4 if parameter.ndim == 2 else 10))
            if "threshold" in name or "log" in name:
                parameter.abs_()
    return sae


kinds = {
    "standard": of_sae_lens("StandardSAE"),
    "standard, layer_norm": of_sae_lens("StandardSAE", normalize_activations="layer_norm"),
    "standard, without bias": of_sae_lens("StandardSAE", apply_b_dec_to_input=False),
    "topk": of_sae_lens("TopKSAE", k=4),
    "topk 5": of_sae_lens("TopKSAE", k=5),
    "jumprelu": of_sae_lens("JumpReLUSAE"),
    "gated": of_sae_lens("GatedSAE"),
    "training standard": of_sae_lens("StandardTrainingSAE"),
    "training batchtopk": of_sae_lens("BatchTopKTrainingSAE", k=4),
    "dictionary": drawn(AutoEncoder(WIDTH, N)),
    "dictionary gated": drawn(GatedAutoEncoder(WIDTH, N)),
    "dictionary jumprelu": drawn(JumpReluAutoEncoder(WIDTH, N)),
    "dictionary topk": drawn(AutoEncoderTopK(WIDTH, N, 4)),
    "dictionary batchtopk": drawn(BatchTopKSAE(WIDTH, N, 4)),
}
found: dict[str, Any] = {}
for name, sae in kinds.items():
    same = copy.deepcopy(sae)
    try:
        features = ac.encode_store(store, sae, "resid_post.1", space=space)
    except ActCacheError as error:
        found[name] = str(error)
        continue
    again = ac.encode_store(store, same, "resid_post.1", space=space)
    sae.eval()
    apart, active = 0.0, 0
    with torch.no_grad():
        for row, given in zip(features.read(PROMPTS), vectors, strict=True):
            expected = sae.encode(given[None])[0]
            expected = expected.to_dense() if expected.layout != torch.strided else expected
            apart = max(apart, float((row.to_dense() - expected).abs().max() / expected.abs().max().clamp_min(1e-9)))
            active += int((expected != 0).sum())
    found[name] = {"apart": apart, "active": active, "encoded": [features.encoded, again.encoded]}
    found[name]["space"] = features.space
print(json.dumps(found))
