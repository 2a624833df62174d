"""KV caches that are used again by hand: continuations belong to the pass that left their cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.testing.tiny import tiny_model

P, P2 = torch.tensor([[10, 11, 12, 13]]), torch.tensor([[20, 21, 22, 23]])
A, B = torch.tensor([[30, 31]]), torch.tensor([[40, 41]])
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@torch.no_grad()
def reference(model: Any, *parts: Tensor) -> Tensor:
    hidden: list[Tensor] = []
    block = model.transformer.h[2] if hasattr(model, "transformer") else model.model.layers[2]
    hook = block.register_forward_hook(
        lambda m, args, output: hidden.append(output[0] if isinstance(output, tuple) else output)
    )
    model(torch.cat(parts, 1))
    hook.remove()
    return hidden[0][0]


def check(cache: ac.ActivationCache, ids: list[Tensor], expected: list[Tensor]) -> None:
    assert [row[real].tolist() for row, real in zip(cache.input_ids, cache.attention_mask, strict=True)] == [
        row[0].tolist() for row in ids
    ]
    rows = cache.rows("resid_post.2")
    for mine, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
def test_continuations_on_copies_of_one_cache_are_rows_of_their_own(model: Any, inside: bool) -> None:
    left = None if inside else model(P, use_cache=True).past_key_values
    with ac.capture(model, sites="resid_post") as cache:
        if inside:
            left = model(P, use_cache=True).past_key_values
        for rest in (A, B):
            model(rest, past_key_values=copy.deepcopy(left))
    after = [reference(model, P, rest)[4:] for rest in (A, B)]
    prefix = [reference(model, P)] if inside else []
    check(cache, ([P] if inside else []) + [A, B], prefix + after)


@torch.no_grad()
def test_a_continuation_on_the_cache_and_one_on_a_copy(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache:
        left = model(P, use_cache=True).past_key_values
        copied = copy.deepcopy(left)
        model(A, past_key_values=left)
        model(B, past_key_values=copied)
        model(A, past_key_values=copied)
    whole = reference(model, P, B, A)
    check(cache, [torch.cat([P, A], 1), torch.cat([B, A], 1)], [reference(model, P, A), whole[4:]])


@torch.no_grad()
def test_each_continuation_goes_to_its_own_prefix(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache:
        one = model(P, use_cache=True).past_key_values
        other = model(P2, use_cache=True).past_key_values
        model(torch.cat([A, B], 1))
        model(A, past_key_values=one)
        assert cache.input_ids[0].tolist() == [10, 11, 12, 13, 30, 31]
        model(B, past_key_values=other)
        model(B, past_key_values=one)
    parts = [[P, A, B], [P2, B], [A, B]]
    check(cache, [torch.cat(part, 1) for part in parts], [reference(model, *part) for part in parts])


@torch.no_grad()
def test_rows_that_were_exchanged_in_one_of_two_caches(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache:
        one = model(torch.cat([P, P2]), use_cache=True).past_key_values
        model(torch.cat([A, B]), use_cache=True)
        one.reorder_cache(torch.tensor([1, 0]))
        model(torch.cat([A, B]), past_key_values=one)
    with pytest.raises(ac.errors.SiteUnavailableError, match="reordered"):
        cache["resid_post.0"]


@torch.no_grad()
def test_generate_goes_on_from_the_cache_it_is_given(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache:
        one = model(P, use_cache=True).past_key_values
        model(P2, use_cache=True)
        made = model.generate(torch.cat([P, A], 1), past_key_values=one, max_new_tokens=3, **GREEDY)
        copied = copy.deepcopy(one)
        again = model.generate(torch.cat([made, B], 1), past_key_values=copied, max_new_tokens=2, **GREEDY)
    # One token that was made and not run, and the new ones.
    rest = again[:, made.shape[1] - 1 : -1]
    check(
        cache,
        [made[:, :-1], P2, rest],
        [reference(model, made[:, :-1]), reference(model, P2), reference(model, again[:, :-1])[made.shape[1] - 1 :]],
    )


@torch.no_grad()
def test_a_cache_wrapped_anew_is_known_by_its_tensors(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as cache:
        left = model(P, use_cache=True).past_key_values
        model(P2)
        model(A, past_key_values=copy.copy(left))
    parts = [[P, A], [P2]]
    check(cache, [torch.cat(part, 1) for part in parts], [reference(model, *part) for part in parts])
