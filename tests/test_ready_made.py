"""Ready-made edits: `ablate`, `steer` and `patch`, of sites, heads and modules, and what tells them apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import FAMILIES, PAD, tiny_model
from ready_made_helpers import IDS, LEFT, OTHER, VECTOR, captured


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def hidden(model: Any, ids: Tensor, block: int, change: Any, **kwargs: Any) -> Tensor:
    """Logits with `change` applied to a block's output by a plain hook."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = model.transformer.h[block].register_forward_hook(hook)
    with torch.no_grad():
        logits: Tensor = model(ids, **kwargs).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_ablating_what_is_added_leaves_the_stream_as_it_was(family: str) -> None:
    model = tiny_model(family)
    stacks = ["encoder.", "decoder."] if model.config.is_encoder_decoder else [""]
    inputs = {"decoder_input_ids": IDS[:, :3]} if len(stacks) > 1 else {}
    have = {str(info.site) for info in ac.sites(model)}
    for stack in stacks:
        branches = [f"{stack}{name}.1" for name in ("attn_out", "cross_attn_out", "mixer_out", "mlp_out")]
        branches = [name for name in branches if name in have]
        before, after = f"{stack}resid_pre.1", f"{stack}resid_post.1"
        edits = [ac.ablate(name) for name in branches]
        with torch.no_grad(), ac.edit(model, edits), ac.capture(model, sites=[before, after, *branches]) as cache:
            model(IDS, **inputs)
        assert not any(cache[name].any() for name in branches)
        if family not in ("bert", "distilbert", "roberta", "bart", "opt-350m"):
            assert torch.equal(cache[after], cache[before])
        else:
            # Its norms stay.
            assert not torch.allclose(cache[after], cache[before], atol=1e-2)


def test_ablating_attention_alone(model: Any) -> None:
    cache = captured(model, ac.ablate("attn_out.2"))
    assert torch.equal(cache["resid_mid.2"], cache["resid_pre.2"])
    assert not torch.allclose(cache["resid_post.2"], cache["resid_mid.2"], atol=1e-3)


def test_ablating_to_a_mean(model: Any) -> None:
    for mean in (VECTOR, VECTOR.numpy(), VECTOR.tolist()):
        cache = captured(model, ac.ablate("attn_out.2", mean=mean))
        torch.testing.assert_close(cache["resid_mid.2"], cache["resid_pre.2"] + VECTOR)
    rows = torch.randn(2, 32)
    cache = captured(model, ac.ablate("resid_post.1", mean=rows, positions=[0, "last"]))
    assert torch.equal(cache["resid_post.1"][:, [0, 3]], rows.expand(2, 2, 32))


def test_steering_adds_the_vector_there_and_nowhere_before(model: Any) -> None:
    before = captured(model, None)
    cache = captured(model, ac.steer("resid_post.1", VECTOR, scale=4.0, positions="last"))
    assert torch.equal(cache["resid_post.1"][:, -1], before["resid_post.1"][:, -1] + 4.0 * VECTOR)
    assert torch.equal(cache["resid_post.1"][:, :-1], before["resid_post.1"][:, :-1])
    for key in ("resid_pre.0", "resid_mid.1", "resid_pre.1", "resid_post.0"):
        assert torch.equal(cache[key], before[key])
    # Causal: what comes after changes at the last position only.
    assert torch.equal(cache["logits"][:, :-1], before["logits"][:, :-1])

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1] += 4.0 * VECTOR
        return x

    assert torch.equal(cache["logits"], hidden(model, IDS, 1, change))
    everywhere = captured(model, ac.steer("resid_post.1", VECTOR, scale=-2))
    assert torch.equal(everywhere["logits"], hidden(model, IDS, 1, lambda x: x + VECTOR * -2))


@pytest.mark.parametrize("site", ["embed", "resid_pre.2", "resid_mid.1", "resid_post.0", "resid_post.3", "final_norm"])
def test_patching_all_of_a_layer_gives_the_logits_of_the_source(model: Any, site: str) -> None:
    source = captured(model, None, OTHER, sites=["embed", "resid_pre", "resid_mid", "resid_post", "final_norm"])
    cache = captured(model, ac.patch(site, source))
    assert torch.equal(cache["logits"], source["logits"])
    assert torch.equal(captured(model, ac.patch(site, source[site]))["logits"], source["logits"])
    assert torch.equal(captured(model, ac.patch("logits", source))["logits"], source["logits"])


def test_patching_single_positions(model: Any) -> None:
    source = captured(model, None, OTHER)
    before = captured(model, None)
    cache = captured(model, ac.patch("resid_post.1", source, positions=[1, "last"]))
    assert torch.equal(cache["resid_post.1"][:, [1, 3]], source["resid_post.1"][:, [1, 3]])
    assert torch.equal(cache["resid_post.1"][:, [0, 2]], before["resid_post.1"][:, [0, 2]])
    # A vector goes wherever it is put; a source of one prompt serves all.
    vector = source["resid_post.1"][0, 2]
    cache = captured(model, ac.patch("resid_post.1", vector, positions=(0, 2)))
    assert torch.equal(cache["resid_post.1"][:, :2], vector.expand(2, 2, 32))
    cache = captured(model, ac.patch("resid_post.1", source.select(prompts=[0]), positions=1))
    assert torch.equal(cache["resid_post.1"][:, 1], source["resid_post.1"][0, 1].expand(2, 32))
    # Per prompt: other positions for each, of the same number or not.
    cache = captured(model, ac.patch("resid_post.1", source, positions=[[0, 1], [3]]))
    assert torch.equal(cache["resid_post.1"][0, :2], source["resid_post.1"][0, :2])
    assert torch.equal(cache["resid_post.1"][1, 3], source["resid_post.1"][1, 3])
    assert torch.equal(cache["resid_post.1"][1, :3], before["resid_post.1"][1, :3])


def test_a_patch_does_not_follow_its_source(model: Any) -> None:
    source = captured(model, None, OTHER)
    expected = source["logits"].clone()
    edit = ac.patch("resid_post.1", source)
    source["resid_post.1"].zero_()
    assert torch.equal(captured(model, edit)["logits"], expected)


def test_modules_are_edited_too(model: Any) -> None:
    block = "transformer.h.1"
    with torch.no_grad(), ac.capture(model, block) as source:
        logits = model(OTHER).logits
    assert torch.equal(captured(model, ac.patch(block, source))["logits"], logits)
    before = captured(model, None)
    cache = captured(model, ac.steer(f"{block}.mlp", VECTOR, positions="first"))
    assert torch.allclose(cache["resid_post.1"][:, 0], before["resid_post.1"][:, 0] + VECTOR, atol=1e-5)
    assert torch.equal(cache["resid_post.1"][:, 1:], before["resid_post.1"][:, 1:])
    # The attention returns a tuple; patterns reach several modules.
    cache = captured(model, ac.ablate("transformer.h.*.attn"))
    assert all(torch.equal(cache[f"resid_mid.{i}"], cache[f"resid_pre.{i}"]) for i in range(4))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with ac.edit(net, ac.ablate("0", mean=[1.0, -1.0, 2.0, 0.0])):
        assert torch.equal(net(torch.ones(2, 3)), torch.tensor([[1.0, 0, 2, 0]] * 2))
    with (
        pytest.raises(ac.errors.EditError, match=r"'0' cannot be told"),
        ac.edit(net, ac.ablate("0", positions="last")),
    ):
        net(torch.ones(2, 3))


def test_half_precision_and_other_dtypes() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad(), ac.capture(model, sites="resid_post") as before:
        model(IDS)
    edits = [ac.steer("resid_post.1", VECTOR.double(), positions="last"), ac.ablate("attn_out.3", mean=VECTOR)]
    with torch.no_grad(), ac.edit(model, edits), ac.capture(model, sites=["resid_post", "attn_out"]) as cache:
        model(IDS)
    assert torch.equal(cache["resid_post.1"][:, -1], before["resid_post.1"][:, -1] + VECTOR.bfloat16())
    assert torch.equal(cache["attn_out.3"], VECTOR.bfloat16().expand(2, 4, 32))


def test_a_steering_vector_gets_its_gradient(model: Any) -> None:
    vector = torch.zeros(32, requires_grad=True)
    with ac.edit(model, ac.steer("resid_post.1", vector, scale=3.0, positions="last")):
        model(IDS).logits[:, -1].square().mean().backward()
    given = torch.zeros(32, requires_grad=True)

    def hook(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = torch.cat([x[:, :-1], x[:, -1:] + 3.0 * given], 1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.transformer.h[1].register_forward_hook(hook)
    model(IDS).logits[:, -1].square().mean().backward()
    handle.remove()
    torch.testing.assert_close(vector.grad, given.grad)
    assert vector.grad is not None and bool(vector.grad.any())


def test_what_does_not_fit(model: Any) -> None:
    errors = ac.errors
    for edit, message in [
        (ac.steer("resid_post.1", torch.ones(31)), "31 wide, and the value 32"),
        (
            ac.patch("resid_post.1", torch.ones(3, 1, 32), positions="last"),
            "values for 3 prompts, and this pass 2 rows",
        ),
        (ac.patch("resid_post.1", torch.ones(2, 32), positions="last"), "values for 2 positions of prompt 0"),
        (ac.patch("resid_post.1", torch.ones(1, 33), positions="last"), "33 wide"),
    ]:
        with pytest.raises(errors.EditError, match=message):
            captured(model, edit)
    four = IDS.repeat(2, 1)
    with pytest.raises(errors.EditError, match="values for 2 prompts, and this pass 4 rows"):
        captured(model, ac.patch("resid_post.1", torch.ones(2, 1, 32), positions="last"), four)
    with pytest.raises(errors.LayerRangeError, match="position 7"):
        captured(model, ac.ablate("resid_post.1", positions=7))
    first = ac.ablate("transformer.h.1.mlp", positions=1)
    with pytest.raises(errors.EditError, match="shows no token ids"), ac.edit(model, first):
        model.transformer.h[1](torch.zeros(1, 4, 32))
    source = captured(model, None)
    for wrong, error in [
        (lambda: ac.steer("resid_post.1", torch.ones(2, 32)), errors.OptionError),
        (lambda: ac.steer("resid_post.1", "up"), errors.OptionError),
        (lambda: ac.steer("resid_post.1", VECTOR, scale=float("nan")), errors.OptionError),
        (lambda: ac.steer("resid_post.1", VECTOR, positions="middle"), errors.OptionError),
        (lambda: ac.steer("resid_post.1", VECTOR, positions=[[0], ["middle"]]), errors.OptionError),
        (lambda: ac.ablate(model.transformer.h[1]), errors.OptionError),
        (lambda: ac.ablate("resid_post.1", mean=torch.ones(0)), errors.OptionError),
        (lambda: ac.patch("attn_out.1", source), errors.UnknownKeyError),
        (lambda: ac.patch("resid_post.1", source, positions=9), errors.LayerRangeError),
        (lambda: ac.edit(model, {"resid_post.2": ac.ablate("resid_post.1")}), errors.OptionError),
    ]:
        with pytest.raises(error):
            wrong()
    ac.edit(model, {"resid_post.1": ac.ablate("resid_post.1")})


def test_identity_tells_edits_apart() -> None:
    edits = [
        ac.ablate("attn_out.3"),
        ac.ablate("attn_out.2"),
        ac.ablate("attn_out.3", mean=VECTOR),
        ac.ablate("attn_out.3", positions="last"),
        ac.ablate("attn_out.3", positions=(0, 3)),
        ac.ablate("attn_out.3", positions=[0, 3]),
        ac.steer("attn_out.3", VECTOR),
        ac.steer("attn_out.3", VECTOR, scale=2.0),
        ac.steer("attn_out.3", VECTOR + 1e-6),
        ac.patch("attn_out.3", VECTOR),
        ac.patch("attn_out.3", VECTOR[None], positions="last"),
        ac.patch("attn_out.3", VECTOR.reshape(2, 16), positions=[0, 1]),
        ac.patch("attn_out.3", VECTOR.reshape(2, 1, 16), positions=0),
        ac.ablate("transformer.h.3.attn"),
    ]
    told = [json.dumps(edit.identity(), sort_keys=True) for edit in edits]
    assert len(set(told)) == len(edits)
    assert all(isinstance(edit, ac.ReadyMade) for edit in edits)


def test_identity_is_the_same_for_the_same() -> None:
    for one, other in [
        (ac.ablate("attn_out.3"), ac.ablate("blocks.3.hook_attn_out", positions=None)),
        (ac.steer("resid_post.1", VECTOR, positions="last"), ac.steer("resid_out_1", VECTOR.clone(), positions=-1)),
        (ac.steer("resid_post.1", VECTOR, scale=4), ac.steer("resid_post.1", VECTOR.numpy(), scale=4.0)),
        (ac.ablate("embed", positions=["first", np.int64(2)]), ac.ablate("embed", positions=[0, 2])),
        (ac.patch("embed", VECTOR[::2]), ac.patch("embed", VECTOR[::2].contiguous())),
    ]:
        assert one.identity() == other.identity()
    vector = VECTOR.clone()
    edit = ac.steer("resid_post.1", vector)
    kept, told = edit.snapshot(), edit.identity()
    vector.zero_()
    assert edit.identity() != told
    assert kept.identity() == told


def test_heads_are_chosen_and_others_stay() -> None:
    """On values [B, S, H, hd] as such: where they come from is another matter."""
    value = torch.randn(2, 4, 3, 5)
    edited = ac.ablate("z.1", heads=[0, -1]).changed(value, None)
    assert not edited[:, :, [0, 2]].any()
    assert torch.equal(edited[:, :, 1], value[:, :, 1])
    assert not ac.ablate("z.1").changed(value, None).any()
    one, each = torch.randn(5), torch.randn(2, 5)
    steered = ac.steer("q.1", one, heads=[1, 2], scale=2.0).changed(value, None)
    assert torch.equal(steered[:, :, 1:], value[:, :, 1:] + 2 * one)
    assert torch.equal(steered[:, :, 0], value[:, :, 0])
    assert torch.equal(
        ac.steer("q.1", each, heads=[0, 2]).changed(value, None)[:, :, [0, 2]], value[:, :, [0, 2]] + each
    )
    assert torch.equal(ac.ablate("v.1", mean=each, heads=[0, 2]).changed(value, None)[1, 3, [0, 2]], each)
    every = torch.randn(3, 5)
    assert torch.equal(ac.patch("v.1", every).changed(value, None)[0, 0], every)


def test_what_is_wrong_with_heads() -> None:
    value = torch.randn(2, 4, 3, 5)
    with pytest.raises(ac.errors.LayerRangeError, match=r"head 3 of 'z\.1' is out of range: it has 3 heads \(0 to 2\)"):
        ac.ablate("z.1", heads=3).changed(value, None)
    for heads in ([], True, "0", [0.5], [[0]], 1.0):
        with pytest.raises(ac.errors.OptionError, match="heads is"):
            ac.ablate("z.1", heads=heads)
    for target in ("attn_out.1", "head_out.1.2", "transformer.h.1"):
        with pytest.raises(ac.errors.OptionError, match="no vector for each head"):
            ac.ablate(target, heads=0)
    for vector, why in [(torch.ones(4), "is 4 wide, and the value 5"), (torch.ones(3, 5), "3 heads, and 2 are edited")]:
        with pytest.raises(ac.errors.EditError, match=why):
            ac.steer("z.1", vector, heads=[0, 1]).changed(value, None)
    with pytest.raises(ac.errors.OptionError, match=r"expected numbers \[hd\] or \[heads, hd\]$"):
        ac.steer("z.1", torch.ones(1, 3, 5))
    with pytest.raises(ac.errors.OptionError, match=r"\[heads, n, keys\]"):
        ac.patch("pattern.1", torch.ones(3, 5))
    with pytest.raises(ac.errors.OptionError, match="takes no vector"):
        ac.steer("pattern.1.0", torch.ones(5))


def test_a_mean_over_a_reference_set(model: Any) -> None:
    """A cache in place of numbers: the mean over the real tokens of all its prompts."""
    mask = (LEFT != PAD).long()
    reference = captured(model, None, LEFT, sites=["attn_out"], attention_mask=mask)
    real = torch.cat([reference["attn_out.2"][0, 2:], reference["attn_out.2"][1]])
    for edit in (
        ac.ablate("attn_out.2", mean=reference, positions="last"),
        ac.ablate("attn_out.2", mean=real.mean(0), positions="last"),
    ):
        cache = captured(model, edit, sites=["attn_out"])
        torch.testing.assert_close(cache["attn_out.2"][:, -1], real.mean(0).expand(2, 32))
    with pytest.raises(ac.errors.UnknownKeyError, match=r"holds no 'attn_out\.1'"):
        ac.ablate("attn_out.1", mean=captured(model, None, sites=["attn_out.2"]))


def test_a_mean_that_was_made_batch_by_batch(model: Any) -> None:
    """`extract_batches` with reduce="mean" holds one vector a site, which is taken as it is."""
    batches = [[[9, 100, 7], [8, 3, 4, 50, 6]], [[5, 9]]]
    alone = [
        captured(model, None, torch.tensor([ids]), sites=["attn_out.2", "head_out.2"]) for two in batches for ids in two
    ]
    means = ac.extract_batches(model, batches, sites=["attn_out", "head_out"], positions="last", reduce="mean")
    last = torch.stack([cache["attn_out.2"][0, -1] for cache in alone]).mean(0)
    heads = torch.stack([cache["head_out.2"][0, -1] for cache in alone]).mean(0)
    put = captured(model, ac.ablate("attn_out.2", mean=means, positions="last"), sites=["attn_out"])
    torch.testing.assert_close(put["attn_out.2"][:, -1], last.expand(2, 32))
    for edit, chosen in [
        (ac.ablate("head_out.2", mean=means), slice(None)),
        (ac.ablate("head_out.2", mean=means, heads=[1, 3]), [1, 3]),
        (ac.ablate("head_out.2.1", mean=means), 1),
    ]:
        put = captured(model, edit, sites=["head_out.2"])
        found = put["head_out.2"][:, :, chosen]
        torch.testing.assert_close(found, heads[chosen].expand_as(found))
    named = ac.extract_batches(model, batches, sites="attn_out", positions={"last": -1, "first": 0}, reduce="mean")
    with pytest.raises(
        ac.errors.OptionError, match=r"at each of the positions 'last', 'first': choose one, mean=source"
    ):
        ac.ablate("attn_out.2", mean=named)
    several = ac.extract_batches(model, batches, sites="attn_out", positions=(0, 2), reduce="mean")
    with pytest.raises(
        ac.errors.OptionError, match=r"\[2, 32\], neither rows of prompts nor one mean.* pass the tensor"
    ):
        ac.ablate("attn_out.2", mean=several)
    put = captured(model, ac.ablate("attn_out.2", mean=several["attn_out.2"], positions=(0, 2)), sites=["attn_out"])
    torch.testing.assert_close(put["attn_out.2"][:, :2], several["attn_out.2"].expand(2, 2, 32))
