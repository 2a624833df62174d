"""Edits beside captures, hooks and each other; gradients; what a block leaves behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.model.taps import Tap
from actcache.testing.tiny import tiny_model
from edit_helpers import in_place, moved, plain, state

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
H1 = "transformer.h.1"


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


# -- order


@torch.no_grad()
def test_captures_see_the_edited_value_whatever_the_order(model: Any) -> None:
    block = model.transformer.h[1]
    before = plain(model(IDS, output_hidden_states=True).hidden_states[2])

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

    expected = (before + 1) * 2
    double = {"resid_post.1": lambda x: x * 2}
    handle = block.register_forward_hook(hook)
    with ac.edit(model, double), ac.capture(model, H1, sites="resid_post") as inside:
        model(IDS)
    with ac.capture(model, H1, sites="resid_post") as outside, ac.edit(model, double):
        model(IDS)
    handle.remove()
    with ac.capture(model, H1, sites="resid_post") as late, ac.edit(model, double):
        handle = block.register_forward_hook(hook)
        model(IDS)
        handle.remove()
    for cache in (inside, outside, late):
        assert torch.equal(cache["resid_post.1"], expected)
        assert torch.equal(cache[H1].hidden, expected)
    # The next block starts with it.
    with ac.edit(model, double), ac.capture(model, sites="resid_pre", include_inputs=True) as inputs:
        model(IDS)
    assert torch.equal(inputs["resid_pre.2"], before * 2)


@torch.no_grad()
def test_edits_follow_each_other_as_their_blocks_were_opened(model: Any) -> None:
    before = plain(model(IDS, output_hidden_states=True).hidden_states[2])
    with (
        ac.edit(model, {"resid_post.1": lambda x: x + 1}),
        ac.edit(model, {H1: double_any}),
        ac.capture(model, sites="resid_post.1") as cache,
    ):
        model(IDS)
    assert torch.equal(cache["resid_post.1"], (before + 1) * 2)
    with (
        ac.edit(model, {H1: double_any}),
        ac.edit(model, {"resid_post.1": lambda x: x + 1}),
        ac.capture(model, sites="resid_post.1") as cache,
    ):
        model(IDS)
    assert torch.equal(cache["resid_post.1"], before * 2 + 1)
    # In one block too; and a block that closes takes only its own edit away.
    outer = ac.edit(model, {"resid_post.1": lambda x: x + 1, H1: double_any})
    with outer:
        with ac.edit(model, {"resid_post.1": lambda x: x * 0}):
            model(IDS)
        with ac.capture(model, sites="resid_post.1") as cache:
            model(IDS)
    assert torch.equal(cache["resid_post.1"], (before + 1) * 2)


def double_any(output: Any) -> Any:
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


@torch.no_grad()
def test_inputs_are_edited_behind_the_callers_pre_hooks(model: Any) -> None:
    block = model.transformer.h[1]
    before = plain(model(IDS, output_hidden_states=True).hidden_states[1])
    handle = block.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    with (
        ac.capture(model, H1, sites="resid_pre", layers=1, include_inputs=True) as cache,
        ac.edit(model, {"resid_pre.1": lambda x: x * 2}),
    ):
        model(IDS)
    handle.remove()
    assert torch.equal(cache["resid_pre.1"], (before + 1) * 2)
    assert torch.equal(cache[H1].input, (before + 1) * 2)


@torch.no_grad()
def test_stop_after_last(model: Any) -> None:
    with (
        ac.edit(model, {"resid_post.0": moved}),
        ac.capture(model, sites="resid_post", layers=[0, 1], stop_after_last=True) as cache,
    ):
        assert model(IDS) is None
    with ac.edit(model, {"resid_post.0": moved}), ac.capture(model, sites="resid_post") as whole:
        model(IDS)
    assert torch.equal(cache["resid_post.1"], whole["resid_post.1"])


# -- gradients


def test_gradients_flow_through_edits(model: Any) -> None:
    vector = torch.zeros(32, requires_grad=True)
    with ac.edit(model, {"resid_mid.1": lambda x: x + vector, "attn_out.2": lambda x: x * 1}):
        model(IDS).logits.square().mean().backward()
    block, given = model.transformer.h[1], torch.zeros(32, requires_grad=True)
    # resid_mid + v is what a bias at the end of the attention adds.
    handle = block.attn.c_proj.register_forward_hook(lambda m, a, output: output + given)
    model(IDS).logits.square().mean().backward()
    handle.remove()
    torch.testing.assert_close(vector.grad, given.grad)
    assert vector.grad is not None and vector.grad.abs().max() > 1e-3


def test_in_place_edits_keep_the_gradient_right() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 1))
    x = torch.randn(4, 3)

    # The sigmoid needs its own output for its gradient.
    with ac.edit(net, {"1": in_place(lambda y: y.mul_(2))}):
        net(x).sum().backward()
    grad = net[0].weight.grad.clone()
    net.zero_grad()
    net[2](torch.sigmoid(net[0](x)) * 2).sum().backward()
    torch.testing.assert_close(grad, net[0].weight.grad)


# -- what is left behind


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block(model: Any, error: type[BaseException]) -> None:
    before = state(model)
    plain_logits = model(IDS).logits
    with pytest.raises(error), ac.edit(model, {"resid_mid.1": moved, "resid_pre.2": moved, H1: double_any}):  # noqa: PT012
        model(IDS)
        raise error("stop")
    assert state(model) == before
    assert torch.equal(model(IDS).logits, plain_logits)


def test_an_exception_in_the_function(model: Any) -> None:
    before = state(model)

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError("in the function")

    with pytest.raises(ZeroDivisionError, match="in the function"), ac.edit(model, {"resid_mid.1": fail}):
        model(IDS)
    assert state(model) == before


def test_a_generator_that_is_closed_early(model: Any) -> None:
    before = state(model)

    def steps() -> Iterator[Tensor]:
        with ac.edit(model, {"resid_post.1": moved}):
            while True:
                yield model(IDS).logits

    running = steps()
    next(running)
    assert state(model) != before
    running.close()
    assert state(model) == before


def test_copies_made_inside_a_block_are_plain(model: Any) -> None:
    expected = model(IDS).logits
    with ac.edit(model, {"resid_post.1": moved, "resid_mid.2": moved}):
        copied = copy.deepcopy(model)
        model(IDS)
    assert torch.equal(copied(IDS).logits, expected)
    assert not any(isinstance(value, Tap) for module in copied.modules() for value in vars(module).values())


def test_a_block_opens_once_at_a_time_and_again_after(model: Any) -> None:
    block = ac.edit(model, {"resid_post.1": moved})
    with block:
        first = model(IDS).logits
        with pytest.raises(RuntimeError, match="already open"):
            block.__enter__()
    with block:
        assert torch.equal(model(IDS).logits, first)
    assert not torch.equal(model(IDS).logits, first)


@torch.no_grad()
def test_nothing_is_left_after_many_edits(model: Any) -> None:
    before = state(model)
    for _ in range(50):
        with ac.capture(model, sites="resid_post"), ac.edit(model, {"resid_mid.1": moved, "logits": moved}):
            model(IDS)
    assert state(model) == before


@torch.no_grad()
def test_compiled_models_run_their_original() -> None:
    model = tiny_model("gpt2")
    with ac.edit(model, {"resid_post.1": moved}):
        expected = model(IDS).logits
    compiled: Any = torch.compile(model, backend="eager")
    compiled(IDS)
    with ac.edit(compiled, {"resid_post.1": moved}):
        assert torch.equal(compiled(IDS).logits, expected)
    assert not torch.equal(compiled(IDS).logits, expected)
    in_place = tiny_model("gpt2")
    in_place.transformer.h[1].compile(backend="eager")
    in_place(IDS)
    with ac.edit(in_place, {"resid_post.1": moved}):
        assert torch.equal(in_place(IDS).logits, expected)


@torch.no_grad()
def test_other_models_and_threads_are_not_touched(model: Any) -> None:
    other = copy.deepcopy(model)
    expected = other(IDS).logits
    results: list[Tensor] = []
    with ac.edit(model, {"resid_post.1": moved}):
        thread = threading.Thread(target=lambda: results.append(other(IDS).logits))
        thread.start()
        thread.join()
        model(IDS)
    assert torch.equal(results[0], expected)
