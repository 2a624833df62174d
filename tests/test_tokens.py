"""Named positions: the same tokens of every prompt, whatever the padding, the batch and the pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import actcache as ac
from actcache.capture.tokens import Mask, TokenState, joined_mask, position_axes, real_rows
from actcache.errors import LayerRangeError, OptionError, UnknownKeyError
from actcache.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [8, 9, 10, 11, 12, 13, 14], [3, 4, 1]]
# Per-prompt spans of 2, 3 and 1 tokens.
POSITIONS = {"subject": [[(1, 3)], [(2, 5)], [(0, 1)]], "last": -1, "ends": ["first", "last"], "first": "first"}


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def whole(gpt2: Any) -> list[torch.Tensor]:
    return [ac.run_with_cache(gpt2, ids, sites="resid_post")[1]["resid_post.1"][0] for ids in PROMPTS]


def check(cache: ac.ActivationCache, whole: list[torch.Tensor], key: str = "resid_post.1") -> None:
    close = {"rtol": 1e-5, "atol": 1e-5}
    parts = cache.map_to_dict(key)
    assert list(parts) == ["subject", "last", "ends", "first"]
    assert parts["subject"].shape == (3, 3, 32)
    assert parts["last"].shape == parts["first"].shape == (3, 32)
    for row, (start, stop) in enumerate(((1, 3), (2, 5), (0, 1))):
        torch.testing.assert_close(parts["subject"][row, : stop - start], whole[row][start:stop], **close)
        assert not parts["subject"][row, stop - start :].any()
        torch.testing.assert_close(cache.at("subject").rows(key)[row], whole[row][start:stop], **close)
    for row, values in enumerate(whole):
        torch.testing.assert_close(parts["last"][row], values[-1], **close)
        torch.testing.assert_close(parts["first"][row], values[0], **close)
        torch.testing.assert_close(parts["ends"][row], values[[0, -1]], **close)


def test_names_of_a_batch(gpt2: Any, whole: list[torch.Tensor]) -> None:
    cache = ac.run_with_cache(
        gpt2, PROMPTS, ["transformer.h.1"], sites="resid_post", positions=POSITIONS, tokenizer=tiny_tokenizer()
    )[1]
    check(cache, whole)
    check(cache, whole, "transformer.h.1")
    check(cache, whole, "blocks.1.hook_resid_post")
    assert cache["resid_post.1"].shape == (3, 3 + 1 + 2 + 1, 32)
    part = cache.at("subject")
    assert part.attention_mask.sum(1).tolist() == [2, 3, 1]
    assert [row[real].tolist() for row, real in zip(part.input_ids, part.attention_mask, strict=True)] == [
        [6, 7], [10, 11, 12], [3],
    ]  # fmt: skip
    assert part.at("subject") == part
    assert torch.equal(part["transformer.h.1"].hidden, part["resid_post.1"])
    assert part.get_position(1, -1).shape == (3, 32)
    assert cache.tokens is not None
    assert [len(row) for row in cache.tokens] == [2 + 4, 3 + 4, 1 + 4]


def test_padding_on_the_left(gpt2: Any, whole: list[torch.Tensor]) -> None:
    ids = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 7 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 7 - len(prompt) :] = 1
    cache = ac.run_with_cache(
        gpt2, {"input_ids": ids, "attention_mask": mask}, sites="resid_post", positions=POSITIONS
    )[1]
    check(cache, whole)


def test_several_passes_in_one_block(gpt2: Any, whole: list[torch.Tensor]) -> None:
    positions = {"last": -1, "all": "all"}
    with torch.no_grad(), ac.capture(gpt2, sites="resid_post", positions=positions) as cache:
        for ids in PROMPTS:
            gpt2(torch.tensor([ids]))
    assert torch.equal(cache.map_to_dict("resid_post.1")["last"], torch.stack([values[-1] for values in whole]))
    assert cache.at("all").attention_mask.sum(1).tolist() == [5, 7, 3]
    for one, other in zip(cache.at("all").rows("resid_post.1"), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "concatenate"])
def test_names_of_every_batch_stay(gpt2: Any, whole: list[torch.Tensor], how: str) -> None:
    caches = []
    for row, ids in enumerate(PROMPTS):
        positions = {**POSITIONS, "subject": POSITIONS["subject"][row]}
        caches.append(ac.run_with_cache(gpt2, ids, sites="resid_post", positions=positions)[1])
        assert caches[-1].map_to_dict("resid_post.1")["last"].shape == (1, 32)
    if how == "cat":
        both = copy.deepcopy(caches[0]).cat(caches[1]).cat(caches[2])
    else:
        both = ac.ActivationCache.concatenate(caches)
    check(both, whole)
    check(both.select(prompts=[2, 1, 0]).select(prompts=[2, 1, 0]), whole)


@torch.no_grad()
def test_names_over_generation(gpt2: Any) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    plain = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 4}
    with ac.capture(gpt2, sites="resid_post") as whole:
        gpt2.generate(ids, **plain)
    with ac.capture(gpt2, sites="resid_post", positions={"all": "all", "last": -1}) as cache:
        gpt2.generate(ids, **plain)
    parts = cache.map_to_dict("resid_post.1")
    torch.testing.assert_close(parts["all"], whole["resid_post.1"])
    # The last token of the prompt, and each new one.
    torch.testing.assert_close(parts["last"], whole["resid_post.1"][:, 2:])


def test_names_of_both_stacks() -> None:
    model = tiny_model("t5")
    sites = ["encoder.resid_post", "decoder.resid_post"]
    whole = ac.run_with_cache(model, PROMPTS, sites=sites)[1]
    cache = ac.run_with_cache(model, PROMPTS, sites=sites, positions={"last": -1})[1]
    for site in ("encoder.resid_post.1", "decoder.resid_post.1"):
        expected = torch.stack([row[-1] for row in whole.rows(site)])
        torch.testing.assert_close(cache.map_to_dict(site)["last"], expected)
    assert list(cache.at("last")) == list(cache)


def test_a_width_of_one_keeps_its_axes(gpt2: Any) -> None:
    cache = ac.run_with_cache(gpt2, [[5]], sites="resid_post", positions={"span": (0, 1), "last": -1, "list": [0]})[1]
    shapes = {name: tuple(part.shape) for name, part in cache.map_to_dict("resid_post.1").items()}
    assert shapes == {"span": (1, 1, 32), "last": (1, 32), "list": (1, 1, 32)}


def test_what_has_no_named_positions(gpt2: Any) -> None:
    cache = ac.run_with_cache(gpt2, PROMPTS, sites="resid_post", positions={"last": -1})[1]
    cache["label"] = 3
    cache.add_with_info("noted", cache["resid_post.0"] * 2, "twice")
    assert torch.equal(cache.map_to_dict("noted")["last"], cache.map_to_dict("resid_post.0")["last"] * 2)
    assert cache.at("last").info("noted") == "twice"
    assert "label" not in cache.at("last")
    with pytest.raises(UnknownKeyError, match=r"'label' cannot be mapped .* no positions"):
        cache.map_to_dict("label")
    with pytest.raises(UnknownKeyError, match=r"no positions are called 'lats'.*Did you mean 'last'"):
        cache.at("lats")
    plain = ac.run_with_cache(gpt2, PROMPTS, sites="resid_post")[1]
    with pytest.raises(UnknownKeyError, match="no positions were named"):
        plain.map_to_dict("resid_post.0")
    with pytest.raises(UnknownKeyError, match="none: capture with positions"):
        plain.at("last")


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ({}, OptionError, "empty dict"),
        ({"": -1}, OptionError, "has no name"),
        ({3: -1}, OptionError, "has no name"),
        ({"last": None}, OptionError, "'last' is None"),
        ({"last": "end"}, OptionError, "unknown position 'end'"),
        ({"last": []}, OptionError, "positions is"),
        ({"far": 9}, LayerRangeError, "position 9 is out of range"),
        ({"two": [[0], [1]]}, OptionError, "lists for 2 prompts, the batch has 3"),
    ],
)
def test_bad_names(gpt2: Any, positions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ac.run_with_cache(gpt2, PROMPTS, sites="resid_post", positions=positions)


def test_extraction_takes_no_names() -> None:
    with pytest.raises(OptionError):
        ac.ActivationExtractor(tiny_model("gpt2"), positions={"last": -1})


def test_patterns_have_two_axes_of_positions() -> None:
    assert position_axes("pattern.0") == position_axes("blocks.0.attn.hook_pattern") == (2, 3)
    assert position_axes("pattern.0.1") == position_axes("pattern_L0H1") == (1, 2)
    assert position_axes("my pattern") == position_axes("resid_post.0") == (1,)
    small, large = torch.rand(1, 2, 3, 3), torch.rand(2, 2, 5, 5)
    both = ac.ActivationCache.concatenate(
        [ac.ActivationCache({"pattern.0": small}), ac.ActivationCache({"pattern.0": large})]
    )
    assert both["pattern.0"].shape == (3, 2, 5, 5)
    rows = both.rows("pattern.0")
    assert torch.equal(rows[0], small[0])
    assert torch.equal(rows[2], large[1])


def test_rows_with_holes_are_gathered() -> None:
    value = torch.arange(5.0)[None, :, None]
    mask = torch.tensor([[True, False, True, True, False]])
    assert real_rows("x", value, mask)[0][:, 0].tolist() == [0, 2, 3]
    assert joined_mask("x", [value, value], [], {}) is None
    state = TokenState({}, {"x": Mask(mask)})
    both = joined_mask("x", [value, value], [state, TokenState()], {})
    assert both is not None and both.positions.tolist() == [mask[0].tolist(), [True] * 5]
