"""Ready-made edits: `ablate`, `steer` and `patch`, and the positions they act at."""

from __future__ import annotations

import copy
import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import FAMILIES, PAD, tiny_model
from edit_helpers import run

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
OTHER = torch.tensor([[31, 12, 77, 60], [22, 90, 41, 17]])
LEFT = torch.tensor([[PAD, PAD, 9, 100, 7], [8, 3, 4, 50, 6]])
RIGHT = torch.tensor([[9, 100, 7, PAD, PAD], [8, 3, 4, 50, 6]])
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def captured(
    model: Any, edits: Any, ids: Tensor = IDS, sites: Any = ("resid_pre", "resid_mid", "resid_post"), **kwargs: Any
) -> Any:
    return run(model, edits, [*sites, "logits"], ids, **kwargs)


def hidden(model: Any, ids: Tensor, block: int, change: Any, **kwargs: Any) -> Tensor:
    """Logits with `change` applied to a block's output by a plain hook."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = model.transformer.h[block].register_forward_hook(hook)
    with torch.no_grad():
        logits: Tensor = model(ids, **kwargs).logits
    handle.remove()
    return logits


# -- what they do


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


# -- positions


@pytest.mark.parametrize("positions", ["last", "first", 1, -2, (0, 2), (-3, -1), [0, "last"], [[1], [-1]]])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_positions_count_real_tokens_whatever_the_padding_side(family: str, positions: Any) -> None:
    model = tiny_model(family)
    real = {"left": (LEFT, 2), "right": (RIGHT, 0)}
    prompts = [LEFT[0, 2:], LEFT[1]]
    for ids, start in real.values():
        mask = (ids != PAD).long()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        edit = ac.steer("resid_post.1", VECTOR, positions=positions)
        cache = captured(model, edit, ids, attention_mask=mask, position_ids=places)
        for row, prompt in enumerate(prompts):
            choice = positions[row] if isinstance(positions, list) and isinstance(positions[0], list) else positions
            alone = captured(model, ac.steer("resid_post.1", VECTOR, positions=choice), prompt[None])
            first = start if row == 0 else 0
            there = cache["resid_post.1"][row, first : first + len(prompt)]
            torch.testing.assert_close(there, alone["resid_post.1"][0], rtol=1e-4, atol=1e-5)
            there = cache["logits"][row, first : first + len(prompt)]
            torch.testing.assert_close(there, alone["logits"][0], rtol=1e-4, atol=1e-4)


def test_a_patch_reads_and_writes_real_tokens(model: Any) -> None:
    """The source is padded on one side, the target on the other, and their lengths differ."""
    ids = torch.cat([OTHER, torch.full((2, 1), PAD)], 1)
    ids[0, 3] = PAD
    source = captured(model, None, ids, attention_mask=(ids != PAD).long())
    mask = (LEFT != PAD).long()
    edit = ac.patch("resid_post.1", source, positions=[0, "last"])
    cache = captured(model, edit, LEFT, attention_mask=mask)
    assert torch.equal(cache["resid_post.1"][0, [2, 4]], source["resid_post.1"][0, [0, 2]])
    assert torch.equal(cache["resid_post.1"][1, [0, 4]], source["resid_post.1"][1, [0, 3]])
    with pytest.raises(ac.errors.EditError, match="values for 4 positions of prompt 1, and this pass has 5"):
        captured(model, ac.patch("resid_post.1", source), LEFT, attention_mask=mask)


@pytest.mark.parametrize(
    "positions", ["last", "first", 1, -2, (0, 2), [0, "last"], "all", [[0], [-1]]], ids=lambda p: str(p)
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "t5"])
def test_generation_is_the_same_with_and_without_a_kv_cache(family: str, positions: Any) -> None:
    """Positions are those of the prompt: a step's new token is edited only where all positions are."""
    model = tiny_model(family)
    site = "decoder.resid_post.1" if family == "t5" else "resid_post.1"
    if family == "t5" and positions not in ("last", "first", "all"):
        pytest.skip("the decoder's own prompt is one token")
    left = {"input_ids": LEFT, "attention_mask": (LEFT != PAD).long()}
    edit = ac.steer(site, VECTOR, scale=8.0, positions=positions)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for beams in (1, 2) if family != "mamba" else (1,):
        results, scores = [], []
        for cached in (True, False):
            with ac.edit(model, edit):
                out = model.generate(
                    **left,
                    **options,
                    num_beams=beams,
                    use_cache=cached,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            results.append(out.sequences)
            scores.append(torch.stack(out.logits))
        assert torch.equal(results[0], results[1])
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
        plain = model.generate(**left, **options, num_beams=beams, output_logits=True, return_dict_in_generate=True)
        assert not torch.allclose(torch.stack(plain.logits), scores[0], atol=1e-2)


@torch.no_grad()
def test_steps_of_generation_are_left_alone(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache, ac.edit(model, ac.ablate("resid_post.1", positions="last")):
        sequences = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    value = cache["resid_post.1"]
    assert value.shape == (2, 6, 32)
    assert not value[:, 3].any()
    assert value[:, [0, 1, 2, 4, 5]].abs().sum(-1).min() > 0
    with ac.capture(model, sites="resid_post") as cache, ac.edit(model, ac.ablate("resid_post.1")):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert not cache["resid_post.1"].any()
    assert sequences.shape == (2, 7)
    # What a source has no value for is left alone.
    source = captured(model, None, OTHER)
    with ac.capture(model, sites="resid_post") as cache, ac.edit(model, ac.patch("resid_post.1", source)):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(cache["resid_post.1"][:, :4], source["resid_post.1"])


@torch.no_grad()
def test_drafts_of_another_model_are_no_part_of_the_prompt() -> None:
    model = tiny_model("llama")
    edit = ac.steer("resid_post.1", VECTOR, scale=4.0, positions="last")
    # transformers 4.57 takes no least number of tokens beside drafts.
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with ac.edit(model, edit):
        expected = model.generate(IDS[:1], **options)
        assert expected.shape[1] > IDS.shape[1] + 3
        drafted = model.generate(IDS[:1], **options, assistant_model=tiny_model("llama", seed=1))
    assert torch.equal(drafted, expected)


@torch.no_grad()
def test_logits_of_generation(model: Any) -> None:
    """The prompt's pass computes logits for its last position only."""
    row = torch.full((259,), -1.0)
    row[77] = 9.0
    with ac.edit(model, ac.patch("logits", row, positions="last")):
        first = model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert (first[:, 4] == 77).all()
    assert torch.equal(first[:, 5], model(first[:, :5]).logits[:, -1].argmax(-1))
    with ac.edit(model, ac.patch("logits", row, positions=0)):
        other = model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert torch.equal(other, model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False))


@torch.no_grad()
def test_a_call_with_a_kv_cache_counts_what_is_in_it(model: Any) -> None:
    whole = captured(model, None)
    start = model(IDS[:, :3], use_cache=True)
    mask = torch.ones(2, 4)
    for positions, edited in (("last", True), (3, True), (-1, True), (2, False), (0, False)):
        cache = copy.deepcopy(start.past_key_values)
        edit = ac.steer("resid_post.1", VECTOR, positions=positions)
        with ac.edit(model, edit), ac.capture(model, sites="resid_post") as step:
            model(IDS[:, 3:], past_key_values=cache, attention_mask=mask)
        expected = whole["resid_post.1"][:, 3:] + (VECTOR if edited else 0)
        torch.testing.assert_close(step["resid_post.1"], expected, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(ac.errors.LayerRangeError, match="the prompt has 4 tokens"),
        ac.edit(model, ac.steer("resid_post.1", VECTOR, positions=4)),
    ):
        model(IDS[:, 3:], past_key_values=copy.deepcopy(start.past_key_values), attention_mask=mask)
    with (
        pytest.raises(ac.errors.OptionError, match="covers 1 positions, and there are 4"),
        ac.edit(model, ac.steer("resid_post.1", VECTOR, positions=0)),
    ):
        model(IDS[:, 3:], past_key_values=copy.deepcopy(start.past_key_values), attention_mask=torch.ones(2, 1))


@torch.no_grad()
def test_a_prompt_that_runs_in_chunks_is_refused(model: Any) -> None:
    edit = ac.steer("resid_post.1", VECTOR, positions="last")
    with pytest.raises(ac.errors.EditError, match="in chunks of 2"), ac.edit(model, edit):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, prefill_chunk_size=2)


@torch.no_grad()
def test_encoder_decoders_count_in_each_stack() -> None:
    model = tiny_model("bart")
    inputs = {"attention_mask": (LEFT != PAD).long(), "decoder_input_ids": IDS[:, :3]}
    before = captured(model, None, LEFT, sites=["encoder.resid_post", "decoder.resid_pre"], **inputs)
    edits = [ac.ablate("encoder.resid_post.1", positions=0), ac.ablate("decoder.resid_pre.1", positions="last")]
    cache = captured(model, edits, LEFT, sites=["encoder.resid_post", "decoder.resid_pre"], **inputs)
    assert not cache["encoder.resid_post.1"][0, 2].any()
    assert not cache["encoder.resid_post.1"][1, 0].any()
    assert torch.equal(cache["encoder.resid_post.1"][0, 3:], before["encoder.resid_post.1"][0, 3:])
    assert not cache["decoder.resid_pre.1"][:, 2].any()
    assert cache["decoder.resid_pre.1"][:, :2].any()


@torch.no_grad()
def test_threads_have_positions_of_their_own(model: Any) -> None:
    edit = ac.steer("resid_post.1", VECTOR, positions=-2)
    short, long = IDS, torch.cat([OTHER, IDS], 1)
    expected = {id(ids): captured(model, edit, ids)["logits"] for ids in (short, long)}
    wrong: list[int] = []

    def run(ids: Tensor) -> None:
        with torch.no_grad(), ac.edit(model, edit):
            wrong.extend(i for i in range(40) if not torch.equal(model(ids).logits, expected[id(ids)]))

    threads = [threading.Thread(target=run, args=(ids,)) for ids in (short, long)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- refusals


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


# -- identity


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


# -- heads


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
