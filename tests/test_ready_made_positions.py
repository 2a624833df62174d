"""The positions that ready-made edits act at: padding, generation and its caches, stacks, threads."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.testing.tiny import PAD, tiny_model
from ready_made_helpers import IDS, LEFT, OTHER, VECTOR, captured

RIGHT = torch.tensor([[9, 100, 7, PAD, PAD], [8, 3, 4, 50, 6]])


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


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
