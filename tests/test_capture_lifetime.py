"""What capture leaves behind (nothing), and where it stands among other hooks (last)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import actcache as ac
from actcache.capture.entry import hidden_of
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7]])
H0, H1 = "transformer.h.0", "transformer.h.1"


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def state(model: nn.Module) -> list[Any]:
    """Everything on every module: attributes by identity, hooks by content."""
    return [
        {name: dict(value) if isinstance(value, dict) else id(value) for name, value in module.__dict__.items()}
        for module in model.modules()
    ]


@torch.no_grad()
def test_nothing_is_left_after_many_captures() -> None:
    model = tiny_model("gpt2", n_layer=1)
    calls: list[str] = []
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = state(model)
    for i in range(200):
        with ac.capture(model, include_inputs=i % 2 == 0), ac.capture(model, sites=["resid_post", "resid_mid"]):
            model(IDS)
    assert state(model) == before
    assert len(calls) == 200


@torch.no_grad()
def test_captured_tensors_are_freed_with_their_cache(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache, ac.capture(model, include_inputs=True) as modules:
        model(IDS)
    kept = [weakref.ref(cache["resid_post.1"]), weakref.ref(modules[""].output.logits), weakref.ref(modules[H0].input)]
    gc.disable()
    try:
        del cache, modules
        assert [one() for one in kept] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block(model: Any, error: type[BaseException]) -> None:
    before = state(model)
    with pytest.raises(error), ac.capture(model, [H0, H1], sites="resid_post", layers=[0, 2]) as cache:  # noqa: PT012
        model(IDS)
        raise error("stop")
    assert state(model) == before
    assert cache[H1].hidden.shape == (1, 4, 32)
    assert cache["resid_post.2"].shape == (1, 4, 32)
    assert cache.missed == []


def test_an_exception_inside_the_model(model: Any) -> None:
    before = state(model)

    def fail(*_: Any) -> None:
        raise ValueError("inside")

    handle = model.transformer.h[2].register_forward_hook(fail)
    with pytest.raises(ValueError, match="inside"), ac.capture(model, include_inputs=True) as cache:
        model(IDS)
    handle.remove()
    assert state(model) == before
    assert torch.equal(cache[H1].hidden, model(IDS, output_hidden_states=True).hidden_states[2])
    # What the failing block was given is known, what it returned is not.
    assert torch.equal(cache["transformer.h.2"].input, cache[H1].hidden)
    assert cache["transformer.h.2"].hidden is None
    assert "transformer.h.3" not in cache
    assert len(model(IDS).logits) == 1


def test_an_exception_caught_inside_the_block(model: Any) -> None:
    calls: list[int] = []

    def fail_once(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("once")

    handle = model.transformer.h[1].register_forward_pre_hook(fail_once)
    with torch.no_grad(), ac.capture(model, [H0, H1], include_inputs=True) as cache:
        with pytest.raises(ValueError, match="once"):
            model(IDS)
        model(IDS)
    handle.remove()
    assert len(cache[H0]) == 2
    # The pre-hook raised before the block was called: there was no run.
    assert len(cache[H1]) == 1


def changed(output: Any, function: Any) -> Any:
    """A block's output with its tensor changed: transformers returns it bare or in a tuple."""
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)


@torch.no_grad()
def test_values_are_after_all_hooks_in_any_order(model: Any) -> None:
    block = model.transformer.h[1]
    plain = model(IDS, output_hidden_states=True).hidden_states

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return changed(output, lambda x: x * 2)

    def plus_one(module: nn.Module, args: Any) -> Any:
        return (args[0] + 1, *args[1:])

    def plus_two(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] + 2, *args[1:]), kwargs

    before = block.register_forward_hook(double)
    with ac.capture(model, H1, include_inputs=True) as cache:
        after = block.register_forward_hook(lambda m, a, out: changed(out, lambda x: x + 3))
        pre = block.register_forward_pre_hook(plus_one)
        pre_keyword = block.register_forward_pre_hook(plus_two, with_kwargs=True)
        first = block.register_forward_pre_hook(plus_one, prepend=True)
        with ac.capture(model, H1, include_inputs=True) as inner:
            everywhere = nn.modules.module.register_module_forward_hook(
                lambda m, a, out: changed(out, lambda x: x + 5) if m is block else None
            )
            model(IDS)
            everywhere.remove()
    for handle in (before, after, pre, pre_keyword, first):
        handle.remove()
    given = plain[1] + 1 + 1 + 2
    assert torch.equal(cache[H1].input, given)
    out = hidden_of(block(given))
    # A hook on all modules runs before the module's own.
    assert torch.equal(cache[H1].hidden, (out + 5) * 2 + 3)
    assert inner == cache
    assert not block._forward_pre_hooks


@torch.no_grad()
def test_global_pre_hooks_are_seen(model: Any) -> None:
    block = model.transformer.h[1]
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]) if m is block else None)
    with ac.capture(model, [H0, H1], include_inputs=True) as cache:
        model(IDS)
    handle.remove()
    assert torch.equal(cache[H1].input, cache[H0].hidden * 2)


@torch.no_grad()
def test_a_replaced_forward_is_recorded(model: Any) -> None:
    forward = model.transformer.h[1].forward
    model.transformer.h[1].forward = lambda *args, **kwargs: changed(forward(*args, **kwargs), lambda x: x * 0 + 7)
    with ac.capture(model, H1, include_inputs=True) as cache:
        model(IDS)
    assert bool((cache[H1].hidden == 7).all())


@torch.no_grad()
def test_captures_may_close_in_any_order(model: Any) -> None:
    before = state(model)
    one, two = ac.capture(model, "**.attn"), ac.capture(model, ["transformer.h.0.attn", "**.mlp"])
    first = one.__enter__()
    second = two.__enter__()
    model(IDS)
    one.__exit__(None, None, None)
    model(IDS)
    two.__exit__(None, None, None)
    assert state(model) == before
    assert [len(e) for e in first.values()] == [1] * 4
    assert [len(e) for e in second.values()] == [2] * 5
    assert not set(first) & {f"transformer.h.{i}.mlp" for i in range(4)}


@torch.no_grad()
def test_a_capture_does_not_see_later_runs(model: Any) -> None:
    with ac.capture(model, H0) as cache:
        model(IDS)
    model(IDS)
    assert len(cache[H0]) == 1


def test_gradients_and_modes_are_untouched(model: Any) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with ac.capture(model, include_inputs=True):
        captured = gradients()
    assert all(map(torch.equal, plain, captured))
    model.train()
    torch.manual_seed(0)
    expected = model(IDS).logits
    torch.manual_seed(0)
    with ac.capture(model):
        assert torch.equal(model(IDS).logits, expected)
    assert model.training


@torch.no_grad()
def test_the_model_is_freed_when_the_cache_stays(model: Any) -> None:
    own = tiny_model("gpt2", seed=1)
    with (
        ac.capture(own, include_inputs=True, sites="resid_post") as sites,
        ac.capture(own, include_inputs=True) as cache,
    ):
        own(IDS, use_cache=False)
    gone = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert gone() is None
    finally:
        gc.enable()
    assert cache.transformer.h[-1].hidden.shape == sites["resid_post.3"].shape


@torch.no_grad()
def test_a_copy_of_the_model_made_inside_a_block_is_a_plain_model(model: Any) -> None:
    plain = [set(vars(module)) for module in model.modules()]
    with ac.capture(model, [H0, "*"]) as cache, ac.edit(model, {"resid_post.1": lambda value: None}):
        twin, parts = copy.deepcopy(model), copy.deepcopy([model.transformer.h[0], model])
        assert parts[0] is parts[1].transformer.h[0]
        for one in (twin, parts[1], copy.deepcopy(twin)):
            assert [set(vars(module)) for module in one.modules()] == plain
        twin.transformer.h[0].mlp.c_fc.weight.zero_()
        changed = twin(IDS).logits
        blob = pickle.dumps(model)
        model(IDS)
    assert len(cache[H0]) == 1
    assert not torch.equal(changed, model(IDS).logits)
    assert torch.equal(pickle.loads(blob)(IDS).logits, model(IDS).logits)


def test_what_the_caller_put_in_the_place_of_a_call_is_copied_too() -> None:
    def doubled(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * type(self)._call_impl(self, x)

    net, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    net[0]._call_impl = MethodType(doubled, net[0])
    expected = net(x)
    with ac.capture(net, "0"):
        twin = copy.deepcopy(net)
        net(x)
    net[0].weight.data.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(net(x), expected)


def test_blocks_run_again_in_the_backward_pass(model: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    class Rerun(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    x = torch.randn(2, 3, requires_grad=True)
    rerun = Rerun()
    with ac.capture(rerun, "inner") as cache:
        rerun(x).sum().backward()
    assert len(cache["inner"]) == 2
    assert torch.equal(*cache["inner"].output)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with ac.capture(model, sites="resid_post") as sites:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    # What a second run gives is the same value: one for the site, not two.
    assert sites["resid_post.0"].shape == (1, 4, 32)
