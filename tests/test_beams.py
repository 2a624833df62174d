"""Capture over `generate`: rows follow the sequences that came out, whatever happened between the steps.

Reference: every returned sequence without its last token, run alone on the bare model with plain hooks.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.testing.tiny import PAD, tiny_model
from beam_helpers import ENDS, PROMPTS, SITES, blocks, hold, left_padded
from reference import alone, relative_error


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.mark.parametrize(
    ("use_cache", "returned", "sample"),
    [(True, 1, False), (True, 2, False), (True, 3, False), (False, 1, False), (False, 3, False), (True, 2, True)],
)
def test_rows_follow_the_beams_that_survived(model: Any, use_cache: bool, returned: int, sample: bool) -> None:
    def run() -> Any:
        torch.manual_seed(5)
        return model.generate(
            **left_padded(PROMPTS), num_beams=3, num_return_sequences=returned, do_sample=sample, max_new_tokens=9,
            use_cache=use_cache, eos_token_id=ENDS, pad_token_id=PAD, length_penalty=-1.0,
        )  # fmt: skip

    expected = run()
    with ac.capture(model, sites=SITES) as cache:
        sequences = run()
    assert type(sequences) is Tensor
    assert torch.equal(sequences, expected)
    assert cache["resid_post.3"].shape == (4 * returned, sequences.shape[1] - 1, 32)
    lengths = hold(cache, model, sequences, PROMPTS, ENDS)
    assert cache.attention_mask.sum(1).tolist() == lengths
    if returned == 3:
        # The test has power where rows end at different steps.
        assert len(set(cache.attention_mask[:, 6:].sum(1).tolist())) > 1
    for row in (~cache.attention_mask).nonzero()[:, 0].unique().tolist():
        ended = ~cache.attention_mask[row]
        ended[:6] = False
        assert not cache["resid_post.3"][row, ended].any()


@torch.no_grad()
def test_rows_as_they_come_would_be_wrong(model: Any) -> None:
    """The trap itself: each step's rows put one after the other belong to different sequences."""
    with ac.capture(model, [f"{blocks(model)}.3"], sites=["resid_post.3"]) as cache:
        sequences = model.generate(
            **left_padded(PROMPTS), num_beams=3, num_return_sequences=3, max_new_tokens=9, pad_token_id=PAD,
            min_new_tokens=9,
        )  # fmt: skip
    naive = torch.cat([visit.hidden for visit in cache[f"{blocks(model)}.3"]], 1)
    right = cache["resid_post.3"]
    assert naive.shape == right.shape
    wrong = (naive - right).abs().amax((1, 2)) > 1e-2
    assert wrong.sum() >= 4, wrong
    hold_rows = [alone(model, s[s != PAD][:-1].tolist(), "resid_post.3") for s in sequences]
    for row, reference in enumerate(hold_rows):
        assert relative_error(cache.rows("resid_post.3")[row], reference) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_sampling_several_sequences_of_each_prompt(model: Any, use_cache: bool, beams: int) -> None:
    torch.manual_seed(3)
    with ac.capture(model, sites=SITES) as cache:
        sequences = model.generate(
            **left_padded(PROMPTS), do_sample=True, num_return_sequences=3, num_beams=beams, max_new_tokens=6,
            use_cache=use_cache, eos_token_id=ENDS, pad_token_id=PAD,
        )  # fmt: skip
    assert cache["resid_post.3"].shape[:2] == (12, sequences.shape[1] - 1)
    hold(cache, model, sequences, PROMPTS, ENDS)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_cache_of_fixed_size(family: str, options: dict[str, int]) -> None:
    """The mask is made into one of queries and keys there, and a version counts what is in the cache wrongly."""
    model = tiny_model(family)
    with ac.capture(model, sites=SITES) as cache:
        sequences = model.generate(
            **left_padded(PROMPTS),
            cache_implementation="static",
            max_new_tokens=5,
            min_new_tokens=5,
            pad_token_id=PAD,
            **options,
        )
    for row, sequence in enumerate(sequences[:, 6:-1].tolist()):
        ids = [*PROMPTS[row // options.get("num_return_sequences", 1)], *sequence]
        assert cache.input_ids[row][cache.attention_mask[row]].tolist() == ids
        assert relative_error(cache.rows("resid_post.3")[row], alone(model, ids, "resid_post.3")) < 1e-5


def test_beams_of_a_model_with_an_adapter() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    bare = tiny_model("llama")
    model = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with ac.capture(model, sites="resid_post.3") as cache:
        sequences = model.generate(
            **left_padded(PROMPTS), num_beams=3, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5
        )
    for row, sequence in enumerate(sequences[:, 6:-1].tolist()):
        ids = [*PROMPTS[row // 2], *sequence]
        assert relative_error(cache.rows("resid_post.3")[row], alone(bare, ids, "resid_post.3")) < 1e-5


@pytest.mark.parametrize("asked", [None, False, True])
def test_the_caller_gets_what_it_asked_for(model: Any, asked: bool | None) -> None:
    options = {} if asked is None else {"return_dict_in_generate": asked, "output_scores": asked}

    def run() -> Any:
        return model.generate(**left_padded(PROMPTS), num_beams=3, max_new_tokens=4, pad_token_id=PAD, **options)

    plain = run()
    before = dict(model.__dict__)
    with ac.capture(model, sites=SITES) as cache:
        captured = run()
    assert model.__dict__ == before
    assert type(captured) is type(plain)
    if asked:
        assert list(captured) == list(plain)
        assert torch.equal(captured.sequences_scores, plain.sequences_scores)
        captured = captured.sequences
    hold(cache, model, captured, PROMPTS, [2])


@pytest.mark.parametrize("positions", ["last", [0, -1]])
def test_positions_of_each_step(model: Any, positions: Any) -> None:
    with ac.capture(model, sites="resid_post.3", positions=positions) as cache, ac.capture(model, sites=SITES) as all_:
        sequences = model.generate(
            **left_padded(PROMPTS), num_beams=3, num_return_sequences=2, max_new_tokens=5, pad_token_id=PAD,
            eos_token_id=ENDS,
        )  # fmt: skip
    hold(all_, model, sequences, PROMPTS, ENDS)
    if positions == "last":
        real = all_.attention_mask[:, 5:]
        assert torch.equal(cache.attention_mask, real)
        close = torch.where(real[..., None], all_["resid_post.3"][:, 5:], 0)
        torch.testing.assert_close(cache["resid_post.3"], close, rtol=1e-5, atol=1e-5)
        assert torch.equal(cache.input_ids[real], all_.input_ids[:, 5:][real])
    else:
        # A step has one token, which is its first and its last.
        assert cache["resid_post.3"].shape[1] == 2 * (sequences.shape[1] - 6)


def test_several_calls_in_one_block(model: Any) -> None:
    short = [[5, 9], [8, 8]]
    with ac.capture(model, sites="resid_post.3") as cache, torch.no_grad():
        searched = model.generate(
            **left_padded(short), num_beams=2, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4,
            pad_token_id=PAD,
        )  # fmt: skip
        model(torch.tensor([[60, 61, 62]]))
        greedy = model.generate(**left_padded([[77]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=PAD)
    expected = [*searched[:, :-1].tolist(), [60, 61, 62], *greedy[:, :-1].tolist()]
    assert cache["resid_post.3"].shape[0] == len(expected)
    assert cache.attention_mask.sum(1).tolist() == [len(ids) for ids in expected]
    for row, ids in enumerate(expected):
        assert relative_error(cache.rows("resid_post.3")[row], alone(model, ids, "resid_post.3")) < 1e-5


def test_going_on_from_the_cache_of_an_earlier_call(model: Any) -> None:
    with ac.capture(model, sites="resid_post.3") as cache:
        first = model.generate(
            **left_padded([[5, 9, 100]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=PAD,
            return_dict_in_generate=True,
        )  # fmt: skip
        more = torch.cat([first.sequences, torch.tensor([[70, 71]])], 1)
        second = model.generate(
            more, past_key_values=first.past_key_values, max_new_tokens=3, min_new_tokens=3, pad_token_id=PAD
        )
    assert torch.equal(cache.input_ids, second[:, :-1])
    (rows,) = cache.rows("resid_post.3")
    assert relative_error(rows, alone(model, second[0, :-1].tolist(), "resid_post.3")) < 1e-5


def test_the_ends_that_a_call_names(model: Any) -> None:
    """Another end than the model's own: what follows the model's own end token is kept."""
    with ac.capture(model, sites="resid_post.3") as cache:
        made = model.generate(**left_padded(PROMPTS), max_new_tokens=9, eos_token_id=ENDS, pad_token_id=PAD)
    for row, sequence in enumerate(made[:, 6:].tolist()):
        n_made = next((i + 1 for i, token in enumerate(sequence) if token in ENDS), len(sequence))
        assert cache.attention_mask[row, 6:].sum() == min(n_made, len(sequence) - 1)


def test_drafts_that_were_rejected_leave_no_rows(model: Any) -> None:
    prompt = torch.tensor([[5, 9, 5, 9, 5, 9, 5, 9]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ac.capture(model, sites="resid_post.3") as cache:
            made = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), prompt_lookup_num_tokens=3, max_new_tokens=8,
                do_sample=False, pad_token_id=PAD,
            )  # fmt: skip
    assert torch.equal(cache.input_ids, made[:, :-1])
    (rows,) = cache.rows("resid_post.3")
    assert relative_error(rows, alone(model, made[0, :-1].tolist(), "resid_post.3")) < 1e-5


def test_one_step_and_one_beam(model: Any) -> None:
    with ac.capture(model, sites=SITES) as cache:
        made = model.generate(
            **left_padded(PROMPTS), num_beams=4, num_return_sequences=4, max_new_tokens=1, pad_token_id=PAD
        )
    hold(cache, model, made, PROMPTS, [2])
    assert cache["resid_post.3"].shape[:2] == (16, 6)


def test_beams_over_embeddings(model: Any) -> None:
    prompt = torch.tensor([[5, 9, 100], [8, 8, 4]])
    with ac.capture(model, sites="resid_post.3") as cache, torch.no_grad():
        made = model.generate(
            inputs_embeds=model.get_input_embeddings()(prompt), attention_mask=torch.ones_like(prompt), num_beams=3,
            num_return_sequences=2, max_new_tokens=5, min_new_tokens=5, pad_token_id=PAD,
        )  # fmt: skip
    assert cache.input_ids is None
    for row in range(4):
        ids = [*prompt[row // 2].tolist(), *made[row, :-1].tolist()]
        assert relative_error(cache.rows("resid_post.3")[row], alone(model, ids, "resid_post.3")) < 1e-5
