"""Hold sites and analysis of a cache against TransformerLens; print the relative error of each comparison as JSON."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from hooked import FAMILIES, both
from torch import Tensor

import actcache as ac

IDS = [[5, 200, 31, 7, 90, 11, 254, 3, 17], [9, 9, 14, 77, 250, 100, 101, 2, 60]]
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "head_out": "attn.hook_result",
    "pattern": "attn.hook_pattern",
    "mlp_act": "mlp.hook_post",
}
POSITIONS = (None, -1, 3, (1, 5), (0, 9, 2), [0, 4, 2])


def error(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


def options(**choices: Any) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@torch.no_grad()
def compare(family: str) -> dict[str, float]:
    model, hooked = both(family)
    hooked.set_use_attn_result(True)
    ids = torch.tensor(IDS)
    logits, theirs = hooked.run_with_cache(ids)
    output, ours = ac.run_with_cache(model, ids, sites=[*HOOKS, "embed", "attn_in", "mlp_in", "final_norm", "logits"])
    found = {"logits": error(output.logits, logits)}
    for name, hook in HOOKS.items():
        for layer in range(4):
            value = ours[f"{name}.{layer}"]
            assert torch.equal(value, ours[f"blocks.{layer}.{hook}"])
            found[f"{name}.{layer}"] = error(value, theirs[f"blocks.{layer}.{hook}"])
    # What ours is after weight and bias, theirs is before.
    norms = {"final_norm": ("ln_final", hooked.ln_final)}
    for layer, block in enumerate(hooked.blocks):
        norms |= {f"attn_in.{layer}": (f"blocks.{layer}.ln1", block.ln1)}
        norms |= {f"mlp_in.{layer}": (f"blocks.{layer}.ln2", block.ln2)}
    for name, (place, norm) in norms.items():
        normalised = theirs[f"{place}.hook_normalized"] * norm.w + (norm.b if family == "gpt2" else 0.0)
        found[name] = error(ours[name], normalised)

    def hold(name: str, given: dict[str, Any]) -> None:
        mine, labels = getattr(ours, name)(**given, return_labels=True)
        their, their_labels = getattr(theirs, name)(**given, return_labels=True)
        assert labels == their_labels, (name, given, labels, their_labels)
        found[f"{name} {given}"] = error(mine, their)

    for given in options(
        layer=(None, -1, 4, 0, 2), incl_mid=(False, True), apply_ln=(False, True), pos_slice=POSITIONS
    ):
        hold("accumulated_resid", given)
        if given["layer"] in (0, 2):
            hold("accumulated_resid", {**given, "mlp_input": True})
    for given in options(
        layer=(None, 0, 3), mode=("all", "attn", "mlp"), apply_ln=(False, True), incl_embeds=(True, False),
        pos_slice=POSITIONS,
    ):  # fmt: skip
        if given["layer"] != 0 or given["incl_embeds"]:
            hold("decompose_resid", given)
        if given["layer"] == 3:
            hold("decompose_resid", {**given, "mlp_input": True})
    for given in options(
        layer=(-1, None, 4, 2), incl_remainder=(False, True), apply_ln=(False, True), pos_slice=POSITIONS
    ):
        hold("stack_head_results", given)
    stack = torch.randn(3, 2, 9, 32)
    for given in options(layer=(None, 1), recompute_ln=(False, True), batch_slice=(None, 1, (0, 1), [1, 0])):
        found[f"apply_ln_to_stack {given}"] = error(
            ours.apply_ln_to_stack(stack, **given), theirs.apply_ln_to_stack(stack, **given)
        )
    for layer in (0, 3):
        found[f"apply_ln_to_stack mlp {layer}"] = error(
            ours.apply_ln_to_stack(stack, layer, True), theirs.apply_ln_to_stack(stack, layer, True)
        )
    return found | attributions(hooked, ours, ids)


def attributions(hooked: Any, ours: Any, ids: Tensor) -> dict[str, float]:
    """Logit attributions, for which TransformerLens wants the final norm's weight in the unembedding: its default."""
    hooked.load_and_process_state_dict(
        hooked.state_dict(), center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    _, theirs = hooked.run_with_cache(ids)
    found = {}
    each = torch.tensor(IDS).flip(1)
    cases = [(7, None), (7, 250), (torch.tensor([7, 9]), torch.tensor([31, 31])), (each, None), (each, each.flip(0))]
    for number, (tokens, wrong) in enumerate(cases):
        for at in (None, -1, (2, 5)) if number < 2 else (-1,) if number == 2 else (None,):
            given = {"incorrect_tokens": wrong, "pos_slice": at}
            mine = ours.logit_attrs(ours.decompose_resid(pos_slice=at), tokens, **given)
            found[f"logit_attrs {number} {at}"] = error(
                mine, theirs.logit_attrs(theirs.decompose_resid(pos_slice=at), tokens, **given)
            )
    given = {"tokens": 7, "incorrect_tokens": 9, "pos_slice": -1, "batch_slice": 1}
    found["logit_attrs of one prompt"] = error(
        ours.logit_attrs(ours.decompose_resid(pos_slice=-1), **given),
        theirs.logit_attrs(theirs.decompose_resid(pos_slice=-1), **given),
    )
    # The lens as TransformerLens' users write it.
    stream = theirs.accumulated_resid(apply_ln=True)
    lens = torch.stack([ours.logit_lens("resid_pre").logits(layer) for layer in range(4)])
    found["logit_lens"] = error(lens, hooked.unembed(stream)[:4])
    found["logit_lens of the last layer"] = error(ours.logit_lens().logits(3), hooked.unembed(stream)[4])
    return found


torch.manual_seed(0)
print(json.dumps({family: compare(family) for family in FAMILIES}))
