"""Generation whose rows cannot be told, and what is left of a model that generated: errors, threads, copies."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import SiteUnavailableError
from actcache.testing.tiny import PAD, tiny_model
from beam_helpers import blocks, left_padded
from reference import alone, relative_error


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def reordering_loop(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
    """A decoding loop of somebody's own that exchanges rows."""
    out = model(input_ids, use_cache=True)
    for _step in range(3):
        out.past_key_values.reorder_cache(torch.arange(input_ids.shape[0]).flip(0))
        token = out.logits[:, -1].argmax(-1).flip(0)
        input_ids = torch.cat([input_ids.flip(0), token[:, None]], 1)
        out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat([input_ids, out.logits[:, -1].argmax(-1)[:, None]], 1)


@torch.no_grad()
@pytest.mark.parametrize("how", ["by hand", "custom_generate"])
def test_rows_exchanged_by_somebody_else_are_refused(model: Any, how: str) -> None:
    ids = torch.tensor([[5, 9, 100], [8, 8, 4]])
    path = f"{blocks(model)}.3"
    with ac.capture(model, path, sites="resid_post") as cache:
        if how == "by hand":
            reordering_loop(model, ids)
        else:
            model.generate(ids, custom_generate=reordering_loop, max_new_tokens=4, pad_token_id=PAD)
        with pytest.raises(SiteUnavailableError, match="reordered"):
            cache["resid_post.3"]
    for read in (lambda: cache["resid_post.-1"], lambda: cache.get_layer(3), lambda: cache.stack(), lambda: cache.rows("resid_post.3")):  # fmt: skip  # noqa: E501
        with pytest.raises(SiteUnavailableError, match=r"site 'resid_post\.\d' cannot be joined.*by module path"):
            read()
    assert len(cache[path]) == 4
    assert cache.input_ids is None
    assert "Refused" in repr(cache)


@torch.no_grad()
def test_a_decoding_loop_that_keeps_its_rows_is_joined(model: Any) -> None:
    def loop(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        cache = None
        given = input_ids
        for _step in range(3):
            out = model(given, past_key_values=cache, use_cache=True)
            given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            input_ids = torch.cat([input_ids, given], 1)
        return input_ids

    with ac.capture(model, sites="resid_post.3") as cache:
        made = model.generate(
            torch.tensor([[5, 9, 100], [8, 8, 4]]), custom_generate=loop, max_new_tokens=3, pad_token_id=PAD
        )
    for row, ids in enumerate(made[:, :-1].tolist()):
        assert relative_error(cache.rows("resid_post.3")[row], alone(model, ids, "resid_post.3")) < 1e-5


@torch.no_grad()
def test_what_generate_returns_must_be_what_it_ran(model: Any) -> None:
    def liar(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        out = model(input_ids, use_cache=True)
        model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
        return torch.cat([input_ids, torch.full((len(input_ids), 2), 250)], 1)

    with ac.capture(model, sites="resid_post.3") as cache:
        model.generate(torch.tensor([[5, 9, 100]]), custom_generate=liar, max_new_tokens=2, pad_token_id=PAD)
    with pytest.raises(SiteUnavailableError, match="cannot be matched to what generate"):
        cache["resid_post.3"]


@torch.no_grad()
def test_generating_with_a_model_of_which_a_part_is_captured(model: Any) -> None:
    """The part does not know what the whole returns: greedy steps join, searched ones are refused."""
    part = model.base_model
    with ac.capture(part, sites="resid_post.3") as cache:
        made = model.generate(torch.tensor([[5, 9, 100]]), max_new_tokens=4, min_new_tokens=4, pad_token_id=PAD)
    assert relative_error(cache.rows("resid_post.3")[0], alone(model, made[0, :-1].tolist(), "resid_post.3")) < 1e-5
    with ac.capture(part, sites="resid_post.3") as cache:
        model.generate(torch.tensor([[5, 9, 100]]), num_beams=3, max_new_tokens=4, pad_token_id=PAD)
    with pytest.raises(SiteUnavailableError, match="capture the model that generates"):
        cache["resid_post.3"]


def test_nested_blocks_threads_and_errors_leave_the_model_as_it_was(model: Any) -> None:
    before = dict(model.__dict__)
    inputs = left_padded([[5, 9], [8, 8]])
    options = {"num_beams": 2, "max_new_tokens": 3, "pad_token_id": PAD}
    one, two = ac.capture(model, sites="resid_post.1"), ac.capture(model, sites="resid_post.3")
    first = one.__enter__()
    second = two.__enter__()
    made = model.generate(**inputs, **options)
    one.__exit__(None, None, None)
    model.generate(**inputs, **options)
    two.__exit__(None, None, None)
    assert model.__dict__ == before
    assert first["resid_post.1"].shape[0] == 2
    assert second["resid_post.3"].shape[0] == 4
    for row, sequence in enumerate(made.tolist()):
        reference = alone(model, sequence[:-1], "resid_post.3")
        assert relative_error(second.rows("resid_post.3")[row], reference) < 1e-5
        assert relative_error(second.rows("resid_post.3")[row + 2], reference) < 1e-5

    with pytest.raises(ValueError, match="greater than 0"), ac.capture(model, sites="resid_post.1") as failed:  # noqa: PT012
        model(inputs["input_ids"])
        model.generate(**inputs, max_new_tokens=0, pad_token_id=PAD)
    assert model.__dict__ == before
    assert failed["resid_post.1"].shape[0] == 2

    results: dict[int, Any] = {}
    # Not in the threads: they would draw from one generator, and a model of chance may end a sequence at once.
    models = [tiny_model("gpt2", seed=number) for number in range(3)]

    def work(number: int) -> None:
        own = models[number]
        with ac.capture(own, sites="resid_post.3") as cache:
            made = own.generate(**inputs, **options)
        results[number] = own, made, cache

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, made, cache in results.values():
        for row, sequence in enumerate(made.tolist()):
            assert relative_error(cache.rows("resid_post.3")[row], alone(own, sequence[:-1], "resid_post.3")) < 1e-5


def test_a_copy_made_inside_a_block_generates_on_its_own(model: Any) -> None:
    with ac.capture(model, sites="resid_post.1") as cache:
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        for own in (twin, again):
            own.generate(torch.tensor([[5, 9]]), num_beams=2, max_new_tokens=2, pad_token_id=PAD)
        model.generate(torch.tensor([[5, 9]]), num_beams=2, max_new_tokens=3, min_new_tokens=3, pad_token_id=PAD)
    assert cache["resid_post.1"].shape == (1, 4, 32)
