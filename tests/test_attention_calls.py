"""Which softmax is the attention's: only that one, whatever else takes softmaxes in its call.

Reference: what transformers returns as the attention probabilities of the same pass, with plain torch hooks in the
place of edits. Sizes coincide on purpose: as many tokens, or prompts, as heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import EditError, SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.testing.tiny import tiny_model
from reference import relative_error

HEADS = 4
LENGTHS = (3, HEADS, 6)
CUT = ac.knockout(0, from_positions="last", to_positions=0)


def made(**options: Any) -> Any:
    return tiny_model("llama", attn_implementation="eager", **options)


@pytest.fixture(scope="module")
def model() -> Any:
    return made(num_hidden_layers=2)


def tokens(rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 89 + 3


@torch.no_grad()
def theirs(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False, output_attentions=True).attentions[0]
    return found


@torch.no_grad()
def ours(model: Any, ids: Tensor) -> Tensor:
    with ac.capture(model, sites=["pattern.0"]) as cache:
        model(input_ids=ids, use_cache=False)
    return cache["pattern.0"]


@torch.no_grad()
def cut(model: Any, ids: Tensor) -> Tensor:
    """What is left where the last token no longer sees the first."""
    with ac.edit(model, CUT):
        return ours(model, ids)


def without_first(pattern: Tensor) -> Tensor:
    left = pattern.clone()
    left[:, :, -1, 0] = 0
    return left / left.sum(-1, keepdim=True)


def hold(model: Any, ids: Tensor, pattern: Tensor) -> None:
    assert relative_error(ours(model, ids), pattern) < 1e-5
    assert relative_error(cut(model, ids), without_first(pattern)) < 1e-5


# -- what callers put there


def softer(value: Tensor) -> Tensor:
    return value + 3 * value.softmax(-1)


def by_hand(value: Tensor) -> Tensor:
    return value + 3 * torch.exp(value - value.logsumexp(-1, keepdim=True))


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output.unflatten(-1, (-1, 8))).flatten(-2)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("rows", [2, HEADS])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_softmaxes_of_edits_are_not_the_attention_s(model: Any, part: str, length: int, rows: int) -> None:
    ids = tokens(rows, length)
    projection = model.model.layers[0].self_attn.get_submodule(f"{part}_proj")
    with hooked(projection, by_hand):
        pattern = theirs(model, ids)
    with ac.edit(model, {f"{part}.0": softer}):
        hold(model, ids, pattern)
    if part != "v":
        assert relative_error(pattern, theirs(model, ids)) > 1e-3


@pytest.mark.parametrize("rows", [2, HEADS])
def test_softmaxes_of_hooks_inside_attention_are_not_its_own(model: Any, rows: int) -> None:
    attention = model.model.layers[0].self_attn
    ids = tokens(rows, HEADS)
    pattern = theirs(model, ids)
    for name in ("q_proj", "k_proj", "o_proj"):
        seen: list[Tensor] = []
        handle = attention.get_submodule(name).register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(out.unflatten(-1, (HEADS, -1)).softmax(-1))
        )
        hold(model, ids, pattern)
        handle.remove()
        assert len(seen) == 2


def test_hooks_and_edits_of_attention_itself_may_take_softmaxes(model: Any) -> None:
    """As they do that compute attention once more, from what it is given or behind it."""
    ids = tokens(2, HEADS)
    pattern = theirs(model, ids)
    # transformers leaves hooks where it was asked for probabilities.
    fresh = made(num_hidden_layers=2)
    attention = fresh.model.layers[0].self_attn
    scores = torch.randn(2, HEADS, HEADS, HEADS)

    def look(*_: Any) -> None:
        torch.softmax(scores, -1)

    def change(output: Any) -> Any:
        look()
        return output

    for place in (attention.register_forward_pre_hook, attention.register_forward_hook):
        handle = place(look)
        hold(fresh, ids, pattern)
        handle.remove()
    for target in ("model.layers.0.self_attn", "attn_in.0", "pattern.0"):
        with ac.edit(fresh, {target: change}):
            hold(fresh, ids, pattern)


@torch.no_grad()
def test_an_edit_may_capture_patterns_itself(model: Any) -> None:
    """Of another model or of the same one: neither pass is taken for the other."""
    ids, other = tokens(2, HEADS), made(num_hidden_layers=2, seed=1)
    inside: list[Tensor] = []

    def look(q: Tensor) -> None:
        inside.append(ours(other, ids))

    with ac.edit(model, {"q.0": look}):
        hold(model, ids, theirs(model, ids))
    assert len(inside) >= 2
    assert all(relative_error(one, theirs(other, ids)) < 1e-5 for one in inside)


# -- what models take besides


class Gate(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 32, generator=torch.Generator().manual_seed(5)))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.softmax(hidden @ self.weight.T, -1)


def own_rows(attention: Any, hidden: Tensor) -> Tensor:
    """``[B, S, 6]``."""
    return torch.softmax(hidden @ attention.gate.weight[:6].T, -1).sum(-1, keepdim=True)


def own_heads(attention: Any, hidden: Tensor) -> Tensor:
    """``[B, S, H, 6]``: like probabilities where there are as many tokens as heads."""
    return torch.softmax((hidden @ attention.gate.weight.T).unflatten(-1, (HEADS, 6)), -1).sum((-1, -2))[..., None]


def own_keys(attention: Any, hidden: Tensor) -> Tensor:
    """``[B, H, S, S]``, the shape of probabilities everywhere."""
    values = (hidden @ attention.gate.weight.T).unflatten(-1, (HEADS, 6)).transpose(1, 2)
    return torch.softmax(values @ values.mT, -1).sum((1, -1))[..., None]


def of_a_part(attention: Any, hidden: Tensor) -> Tensor:
    found: Tensor = attention.gate(hidden).sum(-1, keepdim=True)
    return found


def gated(first: Callable[[Any, Tensor], Tensor] | None, last: Callable[[Any, Tensor], Tensor] | None) -> Any:
    """A model whose attention takes other softmaxes before or behind its own, which change nothing."""
    model = made(num_hidden_layers=2)
    for layer in model.model.layers:
        layer.self_attn.gate = Gate(HEADS * 6)
        own = layer.self_attn.forward

        def forward(self: Any, hidden_states: Tensor, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            if first is not None:
                hidden_states = hidden_states + 0 * first(self, hidden_states)
            output, pattern = own(hidden_states, *args, **kwargs)
            if last is not None:
                output = output + 0 * last(self, hidden_states)
            return output, pattern

        layer.self_attn.forward = MethodType(forward, layer.self_attn)
    return model


@pytest.mark.parametrize("gate", [own_rows, own_heads, own_keys, of_a_part])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_softmaxes_that_attention_takes_besides_are_told_apart(
    gate: Callable[[Any, Tensor], Tensor], attention: str
) -> None:
    plain = made(num_hidden_layers=2)
    for first, last in ((gate, None), (None, gate), (gate, gate)):
        model = gated(first, last)
        model.set_attn_implementation(attention)
        for rows, length in ((2, 6), (HEADS, HEADS)):
            ids = tokens(rows, length)
            hold(model, ids, theirs(plain, ids))


def test_another_way_through_attention_is_refused() -> None:
    """Where it takes another number of softmaxes than when it was looked at, none of them is known to be the one."""
    model, ids = made(num_hidden_layers=2), tokens(2, 5)
    assert describe(model).inner
    ours(model, ids)
    attention = model.model.layers[0].self_attn
    attention.gate = Gate(HEADS * 6)
    own = attention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(hidden_states + 0 * own_keys(self, hidden_states), *args, **kwargs)

    attention.forward = MethodType(forward, attention)
    with pytest.raises(SiteUnavailableError, match=r"takes 2 softmaxes in this pass and took 1 .*load the model anew"):
        ours(model, ids)
    with pytest.raises(EditError, match="takes 2 softmaxes in this pass"), ac.edit(model, CUT):
        model(ids)
    with ac.capture(model, sites=["pattern.1"]) as cache:
        model(ids)
    assert cache["pattern.1"].shape == (2, HEADS, 5, 5)


def test_scores_of_another_shape_are_refused() -> None:
    """As where attention goes block by block through a longer prompt."""
    model, ids = made(num_hidden_layers=2), tokens(2, 5)
    ours(model, ids)
    attention = model.model.layers[0].self_attn

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.softmax(torch.zeros(2, HEADS, 10, 5), -1)
        return hidden_states, None

    attention.forward = MethodType(forward, attention)
    with pytest.raises(SiteUnavailableError, match=r"\[2, 4, 10, 5\] in this pass, which is no \[2, 4, 5, keys\]"):
        ours(model, ids)
    with pytest.raises(EditError, match=r"cannot be made: .* \[2, 4, 10, 5\]"), ac.edit(model, CUT):
        model(ids)
