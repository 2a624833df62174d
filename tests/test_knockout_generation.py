"""`ac.knockout` where positions are counted: padding, generation and its caches, queries that would see nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actcache as ac
import edit_helpers
from actcache.testing.tiny import PAD, WINDOW, tiny_model
from knockout_helpers import IDS, by_hand, cut_of, run

LEFT = torch.tensor([[PAD, PAD, 9, 100, 7, 41], [8, 3, 4, 50, 6, 90]])
RIGHT = torch.tensor([[9, 100, 7, 41, PAD, PAD], [8, 3, 4, 50, 6, 90]])


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", attn_implementation="eager")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert"])
@pytest.mark.parametrize("from_positions", ["last", [1, -2], (1, 3), "all", [[2], ["last", 1]]])
def test_positions_count_real_tokens_whatever_the_padding_side(family: str, from_positions: Any) -> None:
    model = tiny_model(family)
    to_positions = [2] if from_positions == "all" else 0
    for ids in (LEFT, RIGHT):
        mask = (ids != PAD).long()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        options = {"attention_mask": mask} | ({} if family == "bloom" else {"position_ids": places})
        edit = ac.knockout([1, 2], [0, 2], from_positions=from_positions, to_positions=to_positions)
        cache = run(model, edit, ids=ids, sites=["logits", "pattern"], **options)
        for row, real in enumerate(mask.bool()):
            alone = (
                from_positions[row] if isinstance(from_positions, list) and from_positions[0] == [2] else from_positions
            )
            edit = ac.knockout([1, 2], [0, 2], from_positions=alone, to_positions=to_positions)
            one = run(model, edit, ids=ids[row][real][None], sites=["logits", "pattern"])
            torch.testing.assert_close(cache["logits"][row][real], one["logits"][0], rtol=1e-4, atol=1e-4)
            pattern = cache["pattern.1"][row][:, real][:, :, real]
            torch.testing.assert_close(pattern, one["pattern.1"][0], rtol=1e-4, atol=1e-5)
            assert bool((one["pattern.1"][0, [0, 2]] == 0).tril().any())
        assert not any(bool(value.isnan().any()) for value in cache.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_oss", "t5", "gemma3"])
@pytest.mark.parametrize("from_positions", ["last", "all", [1, "last"]])
def test_generation_is_the_same_with_and_without_a_kv_cache(family: str, from_positions: Any) -> None:
    """Positions of the prompt keep their meaning in every step; with "all" new tokens are cut off too. Prompts grow
    past the sliding windows."""
    model = tiny_model(family)
    if family == "t5":
        if from_positions != "all":
            pytest.skip("the decoder's own prompt is one token")
        edit = ac.knockout("all", [0, 1], from_positions="all", to_positions=[1, 2], stack="encoder")
    else:
        edit = ac.knockout(
            "all", [0, 1, 3], from_positions=from_positions, to_positions=[0] if from_positions != "all" else 1
        )
    edit_helpers.hold_generation(model, edit, 2 * WINDOW, input_ids=LEFT, attention_mask=(LEFT != PAD).long())


def test_generation_is_a_mask_in_every_step(model: Any) -> None:
    """New tokens cut off from two tokens of the prompt: each step's logits by hand, the whole sequence at once."""
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    edit = ac.knockout(1, [0, 2], from_positions="all", to_positions=[1, 3])
    with ac.edit(model, edit):
        out = model.generate(IDS, **options, output_logits=True, return_dict_in_generate=True)
    ids = out.sequences[:, :-1]
    cut = cut_of([0, 2], list(range(10)), [1, 3], length=10)
    expected = by_hand(model, 1, cut, ids=ids)["logits"][:, 5:]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)
    # Of beams, each prompt's rows are cut alike.
    with ac.edit(model, edit):
        beams = [model.generate(IDS, **options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


def test_a_query_that_would_see_nothing_is_named(model: Any) -> None:
    before = run(model)["logits"]
    for edit, message in [
        (ac.knockout(1, 2, from_positions=0, to_positions=0), "layer 1 leaves token 0 of prompt 0 nothing.*in head 2"),
        (ac.knockout(1, from_positions="last", to_positions="all"), "token 5 of prompt 0"),
        (
            ac.knockout([2], from_positions=[[3], [1]], to_positions=[[0], [0, 1]]),
            r"layer 2 leaves token 1 of prompt 1",
        ),
        (
            ac.knockout(1, from_positions="all", to_positions=0),
            r"token 0 of prompt 0.*ac\.ablate\('z\.1', heads=0, pos",
        ),
    ]:
        with pytest.raises(ac.errors.EditError, match=message):
            run(model, edit)
    mask = (LEFT != PAD).long()
    with pytest.raises(ac.errors.EditError, match="token 0 of prompt 0"):
        run(model, ac.knockout(1, from_positions="first", to_positions="first"), ids=LEFT, attention_mask=mask)
    # Padding attends to what nobody sees; that is no reason to refuse.
    run(model, ac.knockout(1, from_positions=(1, 4), to_positions=0), ids=LEFT, attention_mask=mask)
    assert torch.equal(run(model)["logits"], before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_patterns_of_generation(family: str) -> None:
    """With and without a KV cache, and where queries that share keys are put together for a single new token."""
    model = tiny_model(family)
    left = {"input_ids": LEFT, "attention_mask": (LEFT != PAD).long()}
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    edit = ac.knockout(1, [1, 2], from_positions="all", to_positions=[1, 2])
    with ac.edit(model, edit), ac.capture(model, sites="pattern.1") as cache:
        ids = model.generate(**left, **options)
    mask = torch.cat([left["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    whole = run(model, edit, ids=ids[:, :-1], sites="pattern.1", attention_mask=mask, position_ids=places)["pattern.1"]
    real = mask.bool()
    for row in range(2):
        torch.testing.assert_close(
            cache["pattern.1"][row][:, real[row]], whole[row][:, real[row]], rtol=1e-4, atol=1e-5
        )
    # A query of a sliding window sees other keys: those that are cut are cut for every query.
    assert not bool(cache["pattern.1"][1, [1, 2]][:, :, [1, 2]].any())
