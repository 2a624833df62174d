"""Hand a cache to SAELens' autoencoders and transcoders, and hold the features against what SAELens itself makes of
TransformerLens' values; print the relative error of each comparison as JSON."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from hooked import both
from sae_lens import SAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAEConfig, Transcoder, TranscoderConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE
from torch import Tensor

import actcache as ac
from actcache.capture.encoding import trained_on
from actcache.errors import WrongSiteError

IDS = [[5, 200, 31, 7, 90, 11, 254, 3, 17], [9, 9, 14, 77, 250, 100, 101, 2, 60]]
N = 64


def made(kind: Any, config: Any, hook: str, *, width: int = 32, **more: Any) -> Any:
    torch.manual_seed(len(hook))
    metadata = SAEMetadata(hook_name=hook, model_name="tiny", **more.pop("metadata", {}))
    sae = kind(config(d_in=width, d_sae=N, metadata=metadata, **more))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.b_enc.normal_(std=0.3)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.4)
    return sae


def error(ours: Tensor, theirs: Tensor) -> float:
    assert bool((theirs > 0).any())
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@torch.no_grad()
def compare(family: str) -> dict[str, float]:
    model, hooked = both(family)
    ids = torch.tensor(IDS)
    _, theirs = hooked.run_with_cache(ids)
    sites = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
    _, ours = ac.run_with_cache(model, ids, sites=sites)
    off = {"apply_b_dec_to_input": False}
    saes = {
        "standard": made(StandardSAE, StandardSAEConfig, "blocks.2.hook_resid_pre"),
        "normalising": made(
            StandardSAE, StandardSAEConfig, "blocks.2.hook_resid_post", normalize_activations="layer_norm"
        ),
        "rescaling": made(
            StandardSAE, StandardSAEConfig, "blocks.1.hook_resid_mid", normalize_activations="constant_norm_rescale"
        ),
        "jumprelu": made(JumpReLUSAE, JumpReLUSAEConfig, "blocks.3.hook_mlp_out"),
        "topk": made(TopKSAE, TopKSAEConfig, "blocks.0.hook_attn_out", k=5),
        "transcoder": made(
            Transcoder, TranscoderConfig, "blocks.2.ln2.hook_normalized", d_out=32, **off,
            metadata={"hook_name_out": "blocks.2.hook_mlp_out"},
        ),
        "transcoder of the attention's input": made(
            Transcoder, TranscoderConfig, "blocks.1.ln1.hook_normalized", d_out=32, **off
        ),
    }  # fmt: skip
    found = {}
    for name, sae in saes.items():
        expected = sae.encode(theirs[sae.cfg.metadata.hook_name])
        features = ac.encode(ours, sae)
        found[name] = error(features, expected)
        site = str(trained_on(sae).site)
        found[f"{name}, a vector"] = error(ac.encode(ours.vector(site, 1, 4), sae, model=model), expected[1, 4])
        found[f"{name}, decoded"] = error(sae.decode(ac.encode(ours, sae)), sae(theirs[sae.cfg.metadata.hook_name]))
        said = ""
        try:
            ac.encode(ours.vector("resid_pre.3"), sae, model=model)
        except WrongSiteError as refused:
            said = str(refused)
        # resid_post.2 is the same value.
        assert (name == "normalising") == (not said), name
        assert not said or (sae.cfg.metadata.hook_name in said and "resid_pre.3" in said)
    assert str(trained_on(saes["transcoder"]).out_site) == "mlp_out.2"

    sae = saes["standard"]
    values, indices = ac.encode(ours, sae, top_k=4)
    expected = sae.encode(theirs["blocks.2.hook_resid_pre"])
    found["the strongest"] = error(values, expected.topk(4).values)
    assert torch.equal(indices, expected.topk(4).indices)
    # One prompt shorter: its padding is no token.
    _, padded = ac.run_with_cache(model, [IDS[0], IDS[1][:4]], sites=sites)
    features = ac.encode(padded, sae)
    found["ragged"] = error(features[1, :4], expected[1, :4])
    assert not bool(features[1, 4:].any())

    z = made(StandardSAE, StandardSAEConfig, "blocks.1.attn.hook_z", reshape_activations="hook_z")
    expected = z.encode(theirs["blocks.1.attn.hook_z"])
    found["heads, joined"] = error(ac.encode(ours, z), expected)
    found["heads, a vector"] = error(ac.encode(ours.vector("z.1", 0, 3), z), expected[0, 3])

    # Autoencoders that were trained on a model with centred weights say so.
    hooked.load_and_process_state_dict(hooked.state_dict(), center_unembed=False, fold_value_biases=False)
    _, centred = hooked.run_with_cache(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, hook in (("resid_pre", "hook_resid_pre"), ("mlp_out", "hook_mlp_out")):
            sae = made(
                StandardSAE, StandardSAEConfig, f"blocks.2.{hook}",
                metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            )  # fmt: skip
            found[f"centred {name}"] = error(ac.encode(ours, sae), sae.encode(centred[f"blocks.2.{hook}"]))
    # Normalised values are the same, however the weights are kept.
    sae = saes["transcoder"]
    found["folded"] = error(ac.encode(ours, sae), sae.encode(centred["blocks.2.ln2.hook_normalized"]))
    return found


@torch.no_grad()
def from_disk(folder: str) -> dict[str, float]:
    """An autoencoder as SAELens writes and reads it."""
    model, hooked = both("gpt2")
    sae = made(StandardSAE, StandardSAEConfig, "blocks.2.hook_resid_pre")
    sae.save_model(folder)
    loaded = SAE.load_from_disk(folder)
    _, ours = ac.run_with_cache(model, IDS, sites="resid_post")
    _, theirs = hooked.run_with_cache(torch.tensor(IDS))
    half = SAE.load_from_disk(folder, dtype="bfloat16")
    assert ac.encode(ours, half).dtype == torch.bfloat16
    return {"from disk": error(ac.encode(ours, loaded), sae.encode(theirs["blocks.2.hook_resid_pre"]))}


if __name__ == "__main__":
    import sys

    print(json.dumps({**{family: compare(family) for family in ("gpt2", "llama")}, "disk": from_disk(sys.argv[1])}))
