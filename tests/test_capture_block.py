"""The block of a capture: where the pass ends, compiled models, what is read inside it, and opened again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import actcache as ac
from actcache.errors import MissedModuleError, UnknownKeyError
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
BLOCKS = [f"transformer.h.{i}" for i in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


def test_missed_modules_are_an_error(model: Any) -> None:
    with pytest.raises(MissedModuleError, match=r"1 of .*attn_dropout"), torch.no_grad():  # noqa: SIM117
        with ac.capture(model, ["transformer.h.0.attn.attn_dropout", "transformer.h.0"]) as cache:
            model(IDS)
    assert cache.missed == ["transformer.h.0.attn.attn_dropout"]
    assert cache["transformer.h.0"].hidden.shape == (2, 6, 32)
    with pytest.raises(MissedModuleError), ac.capture(model, sites="resid_post"):
        pass
    with pytest.raises(MissedModuleError, match="'model'"), ac.capture(model) as nothing:
        pass
    assert nothing.is_empty()


@torch.no_grad()
def test_stop_after_last(model: Any) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.transformer.h)]
    reference = model(IDS, output_hidden_states=True).hidden_states
    ran.clear()
    with ac.capture(model, ["transformer.h.1", "transformer.h.0.attn"], stop_after_last=True) as cache:
        assert model(IDS) is None
        assert model.transformer(IDS[:1]) is None
    assert ran == [0, 1, 0, 1]
    assert torch.equal(cache["transformer.h.1"][0].hidden, reference[2])
    assert len(cache["transformer.h.1"]) == 2
    with ac.capture(model, sites=["resid_pre.2"], stop_after_last=True) as cache:
        assert model(IDS) is None
    assert torch.equal(cache["resid_pre.2"], reference[2])
    with ac.capture(model.transformer, "h.1", stop_after_last=True) as cache:
        assert model.transformer(IDS) is None
    # A call from below the model: its block ends there.
    with ac.capture(model, "transformer.h.1", stop_after_last=True) as cache:
        model.transformer.h[1](reference[1])
        raise AssertionError("the pass was to end")
    assert torch.equal(cache["transformer.h.1"].hidden, reference[2])
    for handle in handles:
        handle.remove()
    assert model(IDS).logits.shape == (2, 6, 259)


@torch.no_grad()
def test_any_module() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(4), nn.GRU(4, 3))
    x = torch.randn(2, 1, 5, 5)
    model(x)
    with ac.capture(model, ["0", "3"], include_inputs=True) as cache:
        y, state = model(x)
    assert torch.equal(cache["0"].output, model[0](x))
    assert torch.equal(cache["3"].output[0], y)
    assert torch.equal(cache["3"].hidden, y)
    assert torch.equal(cache["3"].output[1], state)


@torch.no_grad()
def test_the_same_module_under_two_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    with ac.capture(model["a"]) as cache:
        model["a"](torch.ones(1, 2))
    assert list(cache) == [""]
    chain = nn.Sequential(shared, shared)
    with ac.capture(chain) as everything, ac.capture(chain, ["1"]) as second, ac.capture(chain, shared) as by_object:
        chain(torch.ones(1, 2))
    assert list(everything) == ["", "0"]
    assert len(everything["0"]) == len(second["1"]) == len(by_object["0"]) == 2


def test_the_stance_of_the_compiler_is_left_alone_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = pytest.importorskip("torch._dynamo.eval_frame")
    linear = nn.Linear(2, 2)

    def inside() -> str:
        with ac.capture(linear):
            linear(torch.ones(1, 2))
            return str(frames._stance.stance)

    # What is only kept from being compiled is there too.
    monkeypatch.setattr(frames, "cached_backends", {1: None, 2: False})
    assert inside() == "default"
    monkeypatch.setattr(frames, "cached_backends", {1: None, 2: lambda graph, inputs: graph})
    assert inside() == "force_eager"
    monkeypatch.delattr(frames, "cached_backends")
    assert inside() == "force_eager"


@torch.no_grad()
def test_compiled_models_run_their_original(model: Any) -> None:
    reference = model(IDS, output_hidden_states=True).hidden_states
    compiled = torch.compile(model, backend="eager")
    compiled(IDS)
    with ac.capture(compiled, "transformer.h.0", sites="resid_post") as cache:
        compiled(IDS)
    with ac.capture(model, "transformer.h.0") as by_original:
        compiled(IDS)
    assert torch.equal(cache["resid_post.1"], reference[2])
    assert torch.equal(by_original[BLOCKS[0]].hidden, reference[1])
    fresh = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    torch._dynamo.reset()
    with ac.capture(fresh) as inside:
        torch.compile(fresh, backend="eager")(torch.ones(1, 2))
    assert torch.equal(inside["1"].output, inside["0"].output.relu())
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inner[0].compile(backend="eager")
    x = torch.ones(1, 2)
    inner(x)
    compiled_call = inner[0]._compiled_call_impl
    with ac.capture(inner) as parts:
        inner(x)
    assert torch.equal(parts["1"].output, parts["0"].output.relu())
    assert inner[0]._compiled_call_impl is compiled_call
    calls = []
    tracked = torch.compile(nn.Linear(2, 2), backend=lambda graph, inputs: calls.append(1) or graph.forward)
    tracked(x)
    assert calls == [1]


@torch.no_grad()
def test_reading_inside_the_block(model: Any) -> None:
    with ac.capture(model, BLOCKS[:1], sites="resid_post.1") as cache:
        assert cache.is_empty()
        with pytest.raises(UnknownKeyError):
            cache[BLOCKS[0]]
        model(IDS)
        assert len(cache[BLOCKS[0]]) == 1
        assert cache["resid_post.1"].shape == (2, 6, 32)
        model(IDS[:1])
        assert len(cache[BLOCKS[0]]) == 2
        assert cache["resid_post.1"].shape == (3, 6, 32)
    assert cache["resid_post.1"].shape == (3, 6, 32)


def test_a_block_can_be_opened_again(model: Any) -> None:
    block = ac.capture(model, BLOCKS)
    with block as first:
        model(IDS)
        with pytest.raises(RuntimeError, match="already open"):
            block.__enter__()
    with block as second:
        model(IDS)
    assert first == second
    assert first is not second


def test_help_shows_the_function() -> None:
    assert "stop_after_last" in str(ac.capture.__doc__)
    assert "max_tokens" in str(ac.selftest.__doc__)
