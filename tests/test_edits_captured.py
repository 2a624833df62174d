"""What captures see of edits, whichever was asked for first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import tiny_model
from edit_helpers import in_place, plain

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
H1 = "transformer.h.1"


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


@torch.no_grad()
def test_in_place_edits_change_nothing_that_was_read_before(model: Any) -> None:
    """A module that hands on what it was given: editing its output must not change its input."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Identity())
    x = torch.randn(2, 3)
    expected = net(x)
    for copies in (True, False):
        with ac.edit(net, {"1": in_place(lambda y: y.data.zero_())}), ac.capture(net, copy=copies) as cache:
            net(x)
        assert torch.equal(cache["0"].output, expected)
        assert not cache["1"].output.any()
    with ac.capture(model, sites=["resid_pre", "resid_mid", "attn_out"]) as before:
        model(IDS)
    with (
        ac.capture(model, sites=["resid_pre", "resid_mid", "attn_out"]) as cache,
        ac.edit(model, {"resid_mid.1": in_place(Tensor.zero_)}),
    ):
        model(IDS)
    assert torch.equal(cache["attn_out.1"], before["attn_out.1"])
    assert torch.equal(cache["resid_pre.1"], before["resid_pre.1"])
    assert not cache["resid_mid.1"].any()


@torch.no_grad()
def test_a_module_that_is_replaced_by_zeros_is_captured_as_zeros(model: Any) -> None:
    for target in (H1, f"{H1}.mlp"):
        with ac.edit(model, {target: in_place(lambda x: plain(x).zero_())}), ac.capture(model, target) as cache:
            model(IDS)
        value = plain(cache[target].output)
        assert value.shape == (2, 4, 32)
        assert not bool(value.any())


@torch.no_grad()
def test_a_module_whose_body_is_skipped_is_captured_with_what_takes_its_place(model: Any) -> None:
    replacement = torch.randn(2, 4, 32)
    block = model.transformer.h[1]
    ran: list[Any] = []
    handle = block.mlp.register_forward_hook(lambda *a: ran.append(a))
    whole = type(block).forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return replacement if not isinstance(before, tuple) else (replacement, *before[1:])

    before = whole(block, model.transformer.wte(IDS))
    ran.clear()
    block.forward = forward
    with ac.capture(model, [H1], sites=["resid_post.1", "resid_pre.2"]) as cache:
        logits = model(IDS).logits
    del block.forward
    handle.remove()
    assert not ran
    for value in (plain(cache[H1].output), cache["resid_post.1"], cache["resid_pre.2"]):
        assert torch.equal(value, replacement)
    with ac.edit(model, {"resid_post.1": lambda x: replacement}):
        assert torch.equal(model(IDS).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "target", ["resid_pre.1", "resid_mid.1", "resid_post.1", "attn_out.1", "head_out.1", "mlp_act.1"]
)
def test_captures_see_edits_whichever_was_asked_for_first(model: Any, target: str) -> None:
    """One rule for every site: values are after edits."""
    seen = []
    zero = ac.ablate(target)
    with ac.edit(model, zero), ac.capture(model, sites=target) as cache:
        model(IDS)
    seen.append(cache[target])
    with ac.capture(model, sites=target) as cache, ac.edit(model, zero):
        model(IDS)
    seen.append(cache[target])
    with ac.capture(model, sites=target) as outer, ac.edit(model, zero), ac.capture(model, sites=target) as inner:
        model(IDS)
    seen += [outer[target], inner[target]]
    with ac.edit(model, zero):
        _, cache = ac.run_with_cache(model, IDS, sites=target)
    seen.append(cache[target])
    assert not any(bool(value.any()) for value in seen)
