"""Beam search whose passes run positions again: a cache that the model lets go of, or none.

Reference: every returned sequence without its last token, run alone on the bare model, whose frequencies follow its
length: past 16 tokens every position has others than in the steps up to there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.testing.tiny import PAD, ROPE_THRESHOLD, tiny_model
from reference import alone, relative_error

PROMPTS = torch.tensor([[5, 9, 100, 41, 8, 8, 77, 3, 250], [8, 4, 200, 31, 60, 61, 62, 9, 12]])
SITES = ["embed", "attn_out.2", "resid_post.3"]


def own(sequence: Tensor, ends: list[int]) -> list[int]:
    """The tokens of a sequence that went through the model: up to its end, without the last."""
    made = sequence.tolist()[PROMPTS.shape[1] :]
    n_made = next((i + 1 for i, token in enumerate(made) if token in ends), len(made))
    ids: list[int] = sequence.tolist()[: PROMPTS.shape[1] + n_made - 1]
    return ids


def searched(model: Any, new: int, *, use_cache: bool, ends: list[int] | None = None, **request: Any) -> Any:
    with ac.capture(model, **request) as cache:
        sequences = model.generate(
            PROMPTS, num_beams=4, num_return_sequences=3, max_new_tokens=new, do_sample=False, use_cache=use_cache,
            eos_token_id=ends or None, pad_token_id=PAD, length_penalty=-1.0,
        )  # fmt: skip
    return cache, sequences


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("new", [7, 8, 9, 20])
@pytest.mark.parametrize("family", ["phi3-longrope", "llama"])
def test_positions_that_are_run_again(family: str, new: int, use_cache: bool) -> None:
    model = tiny_model(family)
    cache, sequences = searched(model, new, use_cache=use_cache, sites=SITES)
    assert sequences.shape[1] == PROMPTS.shape[1] + new
    assert torch.equal(cache.input_ids, sequences[:, :-1])
    assert bool(cache.attention_mask.all())
    for row, sequence in enumerate(sequences):
        for site in SITES:
            assert relative_error(cache[site][row], alone(model, sequence[:-1].tolist(), site)) < 1e-5, (row, site)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sequences_that_had_ended_keep_what_they_were(use_cache: bool) -> None:
    model = tiny_model("phi3-longrope")
    # Tokens that the search comes by early and late.
    free = searched(model, 20, use_cache=use_cache, sites="embed")[1]
    lengths = set()
    for at in range(PROMPTS.shape[1] + 2, free.shape[1]):
        ends = free[:, at].unique().tolist()
        cache, sequences = searched(model, 20, use_cache=use_cache, ends=ends, sites=SITES)
        for row, sequence in enumerate(sequences):
            ids = own(sequence, ends)
            lengths.add(len(ids))
            assert cache.input_ids[row][cache.attention_mask[row]].tolist() == ids
            for site in SITES:
                assert relative_error(cache.rows(site)[row], alone(model, ids, site)) < 1e-5, (at, row, site)
                assert not cache[site][row, len(ids) :].any()
    assert min(lengths) < ROPE_THRESHOLD < max(lengths)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_patterns_of_positions_that_are_run_again(use_cache: bool) -> None:
    # transformers 4.57's eager attention looks ahead in the pass that begins anew, whose mask is one of a single token.
    model, eager = (tiny_model("phi3-longrope", attn_implementation=kind) for kind in ("sdpa", "eager"))
    cache, sequences = searched(model, 12, use_cache=use_cache, sites=["pattern.1", "z.1", "logits"])
    length = sequences.shape[1] - 1
    assert cache["pattern.1"].shape == (6, 4, length, length)
    assert cache["z.1"].shape[:2] == (6, length)
    # Of the logits each pass makes those of its last position.
    assert cache["logits"].shape[:2] == (6, 12)
    for row, sequence in enumerate(sequences):
        bare = eager(sequence[None, :-1], output_attentions=True)
        assert relative_error(cache["pattern.1"][row], bare.attentions[1][0]) < 1e-5
        assert relative_error(cache["logits"][row, -1], bare.logits[0, -1]) < 1e-5


def test_steps_as_they_came_would_be_wrong() -> None:
    """The trap itself: the steps before the cache was let go of had other frequencies."""
    model = tiny_model("phi3-longrope")
    cache, sequences = searched(model, 20, use_cache=True, modules="model.layers.3")
    first = cache["model.layers.3"].output[0]
    first = first[0] if isinstance(first, tuple) else first
    expected = alone(model, sequences[0, :-1].tolist(), "resid_post.3")[: PROMPTS.shape[1]]
    assert relative_error(first[0], expected) > 1e-2
