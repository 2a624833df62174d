"""Positions of logits that a model computes for some of its tokens only, and positions in the steps of generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actcache as ac
from actcache.errors import LayerRangeError, OptionError
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@torch.no_grad()
def test_kept_positions_are_found_among_the_last(model: Any) -> None:
    full = model(IDS).logits
    with ac.capture(model, sites=["logits", "final_norm"], positions={"last": -1, "pair": (4, 6)}) as cache:
        model(IDS, logits_to_keep=3)
    assert cache["logits"].shape == (2, 3, full.shape[-1])
    named = cache.map_to_dict("logits")
    torch.testing.assert_close(named["last"], full[:, 5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(named["pair"], full[:, 4:6], rtol=1e-5, atol=1e-5)
    with ac.capture(model, sites="logits", positions="last") as cache:
        model(IDS, logits_to_keep=2)
    torch.testing.assert_close(cache["logits"], full[:, 5:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_kept_positions_are_found_among_those_asked_for(model: Any) -> None:
    full = model(IDS).logits
    with ac.capture(model, sites="logits", positions={"subject": 2, "first": 0}) as cache:
        model(IDS, logits_to_keep=torch.tensor([2, 5, 0]))
    named = cache.map_to_dict("logits")
    torch.testing.assert_close(named["subject"], full[:, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(named["first"], full[:, 0], rtol=1e-5, atol=1e-5)
    with (
        pytest.raises(OptionError, match="logits_to_keep"),
        ac.capture(model, sites="logits", positions={"subject": 2, "second": 1}),
    ):
        model(IDS, logits_to_keep=torch.tensor([2, 5, 0]))


@torch.no_grad()
def test_a_position_whose_logits_were_not_computed_is_refused(model: Any) -> None:
    def generate() -> None:
        model.generate(IDS, max_new_tokens=1, **GREEDY)

    def keep_one(**kwargs: Any) -> None:
        model(IDS, logits_to_keep=1, **kwargs)

    for positions, call in (({"subject": 2}, keep_one), (2, generate), ([-1, -2], keep_one)):
        with pytest.raises(OptionError, match="logits_to_keep"), ac.capture(model, sites="logits", positions=positions):
            call()
    # The last token of the first prompt has padding behind it.
    with pytest.raises(OptionError, match="for 1 of 6"), ac.capture(model, sites="logits", positions="last"):
        keep_one(attention_mask=RIGHT)
    with ac.capture(model, sites="resid_post", positions=2) as cache:
        generate()
    assert cache["resid_post.0"].shape == (2, 1, 32)


def test_gradients_of_kept_logits() -> None:
    model = tiny_model("llama")
    with ac.capture(model, sites="logits", positions=[-1], include_grads=True) as cache:
        model(IDS, logits_to_keep=3).logits[:, -1].sum().backward()
    assert torch.equal(cache.grad("logits"), torch.ones_like(cache["logits"]))
    assert cache["logits"].shape[1] == 1


@torch.no_grad()
@pytest.mark.parametrize("positions", [{"subject": (2, 4)}, 2, -2])
def test_positions_of_the_prompt_over_generate_say_what_to_do(model: Any, positions: Any) -> None:
    block = ac.capture(model, sites="resid_post", positions=positions)
    with (
        pytest.raises(LayerRangeError, match=r"tokens of each pass.* behind 6 in the KV cache.*leave positions out"),
        block,
    ):
        model.generate(IDS, max_new_tokens=2, **GREEDY)
