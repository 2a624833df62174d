"""`ac.steer_attention`, held against probabilities changed by hand behind the softmax."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import EditError, OptionError
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 60, 41], [8, 3, 4, 50, 11, 90]])
QUERIES, KEYS = [3, 5], [0, 2]


def run(model: Any, edits: Any = (), sites: Any = ("pattern.1", "logits")) -> ac.ActivationCache:
    with (
        torch.no_grad(),
        ac.capture(model, sites=list(sites)) as cache,
        ac.edit(model, edits) if edits else nullcontext(),
    ):
        model(IDS)
    return cache


def by_hand(heads: list[int], change: Callable[[Tensor], Tensor]) -> Any:
    """An edit of the probabilities themselves: `change` is given those of the queries ``[B, heads, queries, keys]``."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        rows = torch.tensor(heads)[:, None], torch.tensor(QUERIES)
        x[:, rows[0], rows[1]] = change(x[:, rows[0], rows[1]].double()).to(x.dtype)
        return x

    return {"pattern.1": edit}


def scaled(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., KEYS] *= 2.5
    sink = 1 - x.sum(-1)
    return y / (y.sum(-1) + sink)[..., None]


def shared(x: Tensor) -> Tensor:
    keys = torch.zeros(x.shape[-1], dtype=torch.bool)
    keys[KEYS] = True
    theirs, others = x * keys, x * ~keys
    whole = x.sum(-1, keepdim=True)
    return whole * (0.7 * theirs / theirs.sum(-1, keepdim=True) + 0.3 * others / others.sum(-1, keepdim=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "bloom", "bert"])
@pytest.mark.parametrize(("option", "change"), [({"scale": 2.5}, scaled), ({"share": 0.7}, shared)])
@pytest.mark.parametrize("heads", [[2], [0, 1, 2, 3]])
def test_probabilities_are_shared_out_anew(family: str, option: Any, change: Any, heads: list[int]) -> None:
    model = tiny_model(family)
    last = "logits" if family != "bert" else "resid_post.1"
    found = run(model, ac.steer_attention(1, heads, from_positions=QUERIES, to_positions=KEYS, **option),
                ("pattern.1", last))  # fmt: skip
    expected = run(model, by_hand(heads, change), ("pattern.1", last))
    torch.testing.assert_close(found["pattern.1"], expected["pattern.1"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[last], expected[last], rtol=1e-4, atol=1e-5)
    plain = run(model, (), ("pattern.1",))["pattern.1"]
    assert not torch.allclose(found["pattern.1"][:, heads], plain[:, heads], atol=1e-3)
    rest = [query for query in range(6) if query not in QUERIES]
    assert torch.equal(found["pattern.1"][:, :, rest], plain[:, :, rest])


def test_a_uniform_row_with_one_key_doubled() -> None:
    model = tiny_model("llama")

    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[1].self_attn, name).weight.zero_()
    row = run(model, ac.steer_attention(1, 1, from_positions=3, to_positions=1, scale=2))["pattern.1"][:, 1, 3]
    torch.testing.assert_close(row, torch.tensor([0.2, 0.4, 0.2, 0.2, 0, 0]).expand(2, 6))
    row = run(model, ac.steer_attention(1, 1, from_positions=3, to_positions=1, share=0.7))["pattern.1"][:, 1, 3]
    torch.testing.assert_close(row, torch.tensor([0.1, 0.7, 0.1, 0.1, 0, 0]).expand(2, 6))


def test_the_ends_of_the_ranges() -> None:
    model = tiny_model("llama")
    edges = {"from_positions": "last", "to_positions": (1, 3)}
    cut = run(model, ac.knockout(1, 2, **edges))["logits"]
    for none in ({"scale": 0}, {"share": 0}):
        found = run(model, ac.steer_attention(1, 2, **edges, **none))["logits"]
        torch.testing.assert_close(found, cut, rtol=1e-5, atol=1e-6)
    same = run(model, ac.steer_attention(1, 2, **edges, scale=1))["logits"]
    torch.testing.assert_close(same, run(model)["logits"], rtol=1e-5, atol=1e-6)
    whole = run(model, ac.steer_attention(1, 2, **edges, share=1))["pattern.1"][:, 2, 5]
    torch.testing.assert_close(whole[:, 1:3].sum(-1), torch.ones(2))
    assert not bool(whole[:, [0, 3, 4, 5]].any())
    # The first token sees nothing but itself: there is no other to share with.
    alone = run(model, ac.steer_attention(1, from_positions=0, to_positions=0, share=0.2))["logits"]
    torch.testing.assert_close(alone, run(model)["logits"], rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    edges: Any = {"from_positions": "last", "to_positions": 0}
    for wrong, named in (
        ({"scale": -0.5}, r"scale is -0\.5: expected a number from 0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"share": 1.2}, r"share is 1\.2: .* from 0 to 1"),
        ({}, "either scale= .* or share="),
        ({"scale": 1, "share": 1}, "either scale= .* or share="),
    ):
        with pytest.raises(OptionError, match=named):
            ac.steer_attention(1, **edges, **wrong)
    with pytest.raises(OptionError, match="steer_attention needs from_positions"):
        ac.steer_attention(1, from_positions=None, to_positions=0, scale=2)
    with pytest.raises(EditError, match="attention steering at layer 1 changes nothing"):
        run(tiny_model("llama"), ac.steer_attention(1, from_positions=1, to_positions=4, scale=2))


def test_what_is_stored_is_told_apart() -> None:
    edges: Any = {"from_positions": "last", "to_positions": 0}
    told = [
        ac.steer_attention(1, **edges, **option).identity() for option in ({"scale": 2}, {"scale": 3}, {"share": 0.5})
    ] + [ac.knockout(1, **edges).identity()]
    assert len({str(one) for one in told}) == 4
    assert ac.steer_attention(1, **edges, scale=2).identity() == told[0]
