"""Several passes in one block: those that fail, those that do not reach every site, and logits of other lengths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import MissedModuleError, OptionError
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
OTHER = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
# The first prompt has two real tokens.
MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


class OutOfMemory(RuntimeError):
    pass


def fail(*args: Any) -> None:
    raise OutOfMemory


def attempt(model: Any, place: Any, ids: Tensor, **kwargs: Any) -> None:
    """A pass during which `place` fails."""
    hook = place.register_forward_hook(fail)
    with pytest.raises(OutOfMemory):
        model(ids, **kwargs)
    hook.remove()


@contextmanager
def only(model: Any, numbers: list[int]) -> Iterator[None]:
    """The model with some of its blocks."""
    holder = model.transformer if hasattr(model, "transformer") else model.model
    name = "h" if hasattr(model, "transformer") else "layers"
    whole = getattr(holder, name)
    setattr(holder, name, torch.nn.ModuleList([whole[number] for number in numbers]))
    try:
        yield
    finally:
        setattr(holder, name, whole)


def same(one: ac.ActivationCache, other: ac.ActivationCache) -> None:
    assert set(one) == set(other)
    for key in other:
        for mine, theirs in zip(one.rows(key), other.rows(key), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* of the passes in this block were ended")
@torch.no_grad()
@pytest.mark.parametrize("where", ["block", "head"])
def test_a_pass_that_failed_counts_for_nothing(model: Any, where: str) -> None:
    sites = ["resid_post", "pattern", "logits"]
    with ac.capture(model, sites=sites) as alone:
        model(OTHER, attention_mask=MASK)
    with ac.capture(model, sites=sites) as cache:
        attempt(model, blocks(model)[1] if where == "block" else model.lm_head, IDS)
        assert len(cache["resid_post.0"]) == 2
        model(OTHER, attention_mask=MASK)
        assert cache["resid_post.0"].shape == (2, 5, 32)
    same(cache, alone)
    assert cache.attention_mask.tolist() == MASK.bool().tolist()
    assert torch.equal(cache.input_ids, OTHER)
    assert torch.equal(cache.get_position(2, -1), alone.get_position(2, -1))
    assert torch.equal(cache.vector("resid_post.2", 0, -1).value(), alone["resid_post.2"][0, 1])
    assert torch.equal(cache.select([1])["resid_post.3"], alone["resid_post.3"][1:])
    assert torch.equal(cache.stack(), alone.stack())


@pytest.mark.filterwarnings("ignore:.* of the passes in this block were ended")
@torch.no_grad()
def test_a_retry_between_good_passes(model: Any) -> None:
    with ac.capture(model, sites="resid_post") as alone:
        model(IDS)
        model(OTHER, attention_mask=MASK)
        model.generate(IDS, max_new_tokens=3, **GREEDY)
    with ac.capture(model, sites="resid_post") as cache:
        model(IDS)
        attempt(model, blocks(model)[2], OTHER, attention_mask=MASK)
        model(OTHER, attention_mask=MASK)
        attempt(model, blocks(model)[0], IDS[:1])
        model.generate(IDS, max_new_tokens=3, **GREEDY)
    same(cache, alone)
    assert torch.equal(cache.input_ids, alone.input_ids)
    assert torch.equal(cache.attention_mask, alone.attention_mask)


@torch.no_grad()
def test_what_only_a_failed_pass_reached_is_missing(model: Any) -> None:
    block = ac.capture(model, sites="resid_post")
    cache = block.__enter__()
    attempt(model, blocks(model)[2], IDS)
    assert {"resid_post.0", "resid_post.1"} <= set(cache)
    with only(model, [0, 2, 3]):
        model(IDS)
    with pytest.raises(MissedModuleError, match=r"1 of .*: 'resid_post\.1'"):
        block.__exit__(None, None, None)
    assert set(cache) == {"resid_post.0", "resid_post.2", "resid_post.3"}


@torch.no_grad()
def test_in_a_block_where_every_pass_failed_what_was_read_stays(model: Any) -> None:
    block = ac.capture(model, sites="resid_post")
    cache = block.__enter__()
    attempt(model, blocks(model)[2], IDS)
    attempt(model, blocks(model)[2], OTHER, attention_mask=MASK)
    with pytest.raises(MissedModuleError, match=r"resid_post\.3"):
        block.__exit__(None, None, None)
    with ac.capture(model, sites="resid_post") as alone:
        model(IDS)
        model(OTHER, attention_mask=MASK)
    assert [len(row) for row in cache.rows("resid_post.1")] == [6, 6, 2, 5]
    assert torch.equal(cache["resid_post.1"], alone["resid_post.1"])
    assert not {"resid_post.2", "resid_post.3"} & set(cache)


@torch.no_grad()
def test_a_site_that_a_pass_does_not_reach_has_the_rows_of_the_others(model: Any) -> None:
    with ac.capture(model, sites=["resid_post", "logits"]) as cache:
        model.base_model(IDS)
        logits = model(OTHER, attention_mask=MASK).logits
    assert [len(row) for row in cache.rows("logits")] == [2, 5]
    assert torch.equal(cache.rows("logits")[0], logits[0, :2])
    assert [len(row) for row in cache.rows("resid_post.1")] == [6, 6, 2, 5]
    for read in (lambda: cache.vector("logits", 0, -1), lambda: cache.select([0])):
        with pytest.raises(OptionError, match="'logits' has 2 rows and the cache 4 prompts"):
            read()


@torch.no_grad()
def test_layers_that_other_passes_reached(model: Any) -> None:
    with ac.capture(model, sites=["resid_post", "pattern"], layers=[0, 2]) as cache:
        model(IDS)
        with only(model, [0, 1]):
            model(OTHER, attention_mask=MASK)
        model(OTHER[1:])
    with ac.capture(model, sites=["resid_post", "pattern"], layers=[0, 2]) as alone:
        model(IDS)
        model(OTHER[1:])
    assert [len(row) for row in cache.rows("resid_post.0")] == [6, 6, 2, 5, 5]
    for key in ("resid_post.2", "pattern.2"):
        for mine, theirs in zip(cache.rows(key), alone.rows(key), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    last = torch.stack([row[-1] for row in alone.rows("resid_post.2")])
    torch.testing.assert_close(cache.get_position(2, -1), last, rtol=1e-5, atol=1e-5)
    with pytest.raises(OptionError, match="5 of layer 0, 3 of layer 2"):
        cache.stack()
    with pytest.raises(OptionError, match="has 3 rows and the cache 5 prompts"):
        cache.residual_stream(0)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_logits_of_generate_beside_other_calls(model: Any, beams: int) -> None:
    def capture(*calls: Any) -> ac.ActivationCache:
        with ac.capture(model, sites=["logits", "resid_post"]) as cache:
            for call in calls:
                call()
        return cache

    def generated(ids: Tensor, new: int) -> Any:
        return lambda: model.generate(ids, max_new_tokens=new, num_beams=beams, **GREEDY)

    calls = [generated(IDS, 3), lambda: model(OTHER, attention_mask=MASK), generated(OTHER, 6), generated(IDS, 1)]
    separate = [capture(call) for call in calls]
    cache = capture(*calls)
    same(cache, ac.ActivationCache.concatenate(separate))
    assert [len(row) for row in cache.rows("logits")] == [3, 3, 2, 5, 6, 6, 1, 1]
    expected = separate[2].rows("logits")[1][-1]
    torch.testing.assert_close(cache.vector("logits", 5, -1).value(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_masks_go_with_copies_parts_and_files(model: Any, tmp_path: Any) -> None:
    with ac.capture(model, sites="logits") as cache:
        model.generate(IDS, max_new_tokens=2, **GREEDY)
        model(OTHER, attention_mask=MASK)
    copied = copy.deepcopy(cache)
    lengths = [2, 2, 2, 5]
    assert [len(row) for row in copied.rows("logits")] == lengths
    assert [len(row) for row in cache.select([3, 0]).rows("logits")] == [5, 2]
    assert [len(row) for row in ac.ActivationCache.load(cache.save(tmp_path / "a")).rows("logits")] == lengths
    joined = ac.ActivationCache.concatenate([cache, cache])
    assert [len(row) for row in joined.rows("logits")] == lengths * 2


@torch.no_grad()
def test_logits_that_were_asked_for_one_by_one(model: Any) -> None:
    with ac.capture(model, sites="logits") as cache:
        model(OTHER, attention_mask=MASK, logits_to_keep=torch.tensor([1, 4]))
    # The fifth token of the first prompt is padding.
    assert [len(row) for row in cache.rows("logits")] == [1, 2]


@torch.no_grad()
def test_runs_of_a_module_are_not_joined_into_rows(model: Any) -> None:
    path = next(name for name, module in model.named_modules() if module is blocks(model)[0])
    with ac.capture(model, path, sites="resid_post") as cache:
        model.generate(IDS, max_new_tokens=3, **GREEDY)
    with pytest.raises(OptionError, match="ran 3 times"):
        cache.rows(path)


@torch.no_grad()
def test_passes_that_are_left_out_are_told_of(model: Any) -> None:
    block = ac.capture(model, sites="resid_post", layers=0)
    block.__enter__()
    attempt(model, blocks(model)[1], IDS)
    model(OTHER)
    with pytest.warns(UserWarning, match="1 of the passes.*ended by an exception.*block of its own"):
        block.__exit__(None, None, None)
    # Where all ended so, nothing is left out.
    with ac.capture(model, sites="resid_post", layers=0) as cache:
        attempt(model, blocks(model)[1], IDS)
        attempt(model, blocks(model)[1], IDS)
    assert cache["resid_post.0"].shape[0] == 4
