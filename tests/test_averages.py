"""Means over examples: by example, in float64, without padding, in constant memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache.capture.averaging import Means
from actcache.capture.tokens import Tokens
from actcache.errors import JoinError, LayerRangeError
from actcache.testing.tiny import BOS, tiny_model

RNG = random.Random(5)
PROMPTS = [[BOS, *(RNG.randrange(3, 259) for _ in range(n))] for n in (4, 16, 5, 9, 7)]
SITES = ["resid_post.1", "attn_out.0", "logits"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


def uneven(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Batches of 2, 2 and 1."""
    for start in (0, 2, 4):
        yield prompts[start : start + 2]


def singly(site: str, prompts: list[list[int]] = PROMPTS, family: str = "gpt2") -> list[Tensor]:
    """Each prompt's values by hooks of torch, in float64."""
    return [zoo.reference(family, 0, tuple(prompt))[site].double() for prompt in prompts]


def same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert one.dtype == torch.float32
    # The passes themselves differ by float32 rounding; a wrong weight would be far off.
    assert zoo.relative_error(one.double(), other) < 2e-6


@pytest.mark.parametrize(
    ("positions", "value"),
    [
        ("last", lambda x: x[-1]),
        ("first", lambda x: x[0]),
        (-2, lambda x: x[-2]),
        ((0, 3), lambda x: x[0:3]),
        ((-3, -1), lambda x: x[-3:-1]),
        ([0, -1], lambda x: x[[0, -1]]),
        ([0, (1, 3), "last"], lambda x: x[[0, 1, 2, -1]]),
        (["last"], lambda x: x[[-1]]),
        # As many tokens as the prompt has: the example's mean counts once.
        ("all", lambda x: x.mean(0)),
        (None, lambda x: x.mean(0)),
        ((2, -1), lambda x: x[2:-1].mean(0)),
        (["all"], lambda x: x.mean(0)),
        (["last", (1, -1)], lambda x: x[[-1, *range(1, len(x) - 1)]].mean(0)),
    ],
)
def test_one_value_per_example(model: Any, positions: Any, value: Any) -> None:
    cache = ac.extract_batches(model, uneven(PROMPTS), sites=SITES, positions=positions, reduce="mean")
    assert list(cache) == SITES
    for site in SITES:
        same(cache[site], torch.stack([value(x) for x in singly(site)]).mean(0))
    assert cache.metadata == {"reduce": "mean", "examples": 5}
    assert cache.attention_mask is None


def test_what_is_told_apart(model: Any) -> None:
    """The numbers above would also be those of nothing in particular if these were equal."""
    values = singly("resid_post.1")
    by_example = torch.stack([x.mean(0) for x in values]).mean(0)
    assert zoo.relative_error(torch.cat(values).mean(0), by_example) > 1e-2
    batches = [torch.stack([x[-1] for x in values[i : i + 2]]).mean(0) for i in (0, 2, 4)]
    assert zoo.relative_error(torch.stack(batches).mean(0), torch.stack([x[-1] for x in values]).mean(0)) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_named_positions(model: Any, side: str) -> None:
    subjects = [[1, 2], [3], [0, 4, 5], [-1], [2, 3]]
    batches = []
    for start in (0, 2, 4):
        prompts = PROMPTS[start : start + 2]
        longest = max(map(len, prompts)) + 3
        ids, mask = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest)
        for row, prompt in enumerate(prompts):
            at = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
            ids[row, at], mask[row, at] = torch.tensor(prompt), 1
        batches.append({"input_ids": ids, "attention_mask": mask, "subject": subjects[start : start + 2]})
    cache = ac.extract_batches(
        model, batches, sites=SITES, reduce="mean",
        positions=lambda batch: {"subject": batch["subject"], "last": -1, "start": (0, 2), "everything": "all"},
    )  # fmt: skip
    for site in SITES:
        values = singly(site)
        assert list(cache[site]) == ["subject", "last", "start", "everything"]
        expected = torch.stack([x[at].mean(0) for x, at in zip(values, subjects, strict=True)]).mean(0)
        same(cache[site]["subject"], expected)
        same(cache[site]["last"], torch.stack([x[-1] for x in values]).mean(0))
        same(cache[site]["start"], torch.stack([x[:2] for x in values]).mean(0))
        same(cache[site]["everything"], torch.stack([x.mean(0) for x in values]).mean(0))


@pytest.mark.parametrize("family", ["llama-dynamic", "mamba", "bert", "t5"])
def test_prompts_that_run_apart(family: str) -> None:
    model = tiny_model(family)
    site = "decoder.resid_post.1" if family == "t5" else "resid_post.1"
    cache = ac.extract_batches(model, uneven(PROMPTS), sites=site, positions={"last": -1, "all": "all"}, reduce="mean")
    values = singly(site, family=family)
    same(cache[site]["last"], torch.stack([x[-1] for x in values]).mean(0))
    same(cache[site]["all"], torch.stack([x.mean(0) for x in values]).mean(0))


def test_two_equal_examples_and_one(model: Any) -> None:
    once = ac.extract_batches(model, [[PROMPTS[0]]], sites="resid_post.1", positions=(0, 5), reduce="mean")
    twice = ac.extract_batches(model, [[PROMPTS[0]] * 2], sites="resid_post.1", positions=(0, 5), reduce="mean")
    assert once["resid_post.1"].shape == (5, 32)
    torch.testing.assert_close(once["resid_post.1"], twice["resid_post.1"], rtol=1e-6, atol=1e-6)
    same(once["resid_post.1"], singly("resid_post.1", PROMPTS[:1])[0])


def test_sums_do_not_lose_what_is_small() -> None:
    """In float32 a million examples of 1 + 1e-3 add up to something else; and in bfloat16 257 of 1 do."""
    means = Means()
    for _ in range(1000):
        means.add_sites(ac.ActivationCache({"resid_post.0": torch.full((1000, 1, 2), 1.001)}), "last")
        means.add_sites(ac.ActivationCache({"mlp_out.0": torch.ones(1, 1, 2, dtype=torch.bfloat16)}), "last")
    result = means.result()
    assert result["resid_post.0"].tolist() == torch.full((2,), 1.001).tolist()
    assert result["mlp_out.0"].tolist() == [1, 1]
    assert result["mlp_out.0"].dtype == torch.float32


def test_a_mean_is_rounded_once(model: Any) -> None:
    """To the dtype asked for, after everything was added up."""
    made = {
        dtype: ac.extract_batches(model, uneven(PROMPTS), sites="resid_post.1", reduce="mean", dtype=dtype)[
            "resid_post.1"
        ]
        for dtype in (None, "bfloat16", "float64")
    }
    assert made["float64"].dtype == torch.float64
    assert torch.equal(made[None], made["float64"].to(torch.float32))
    assert torch.equal(made["bfloat16"], made["float64"].to(torch.bfloat16))
    assert not torch.equal(made[None].double(), made["float64"])


def test_what_is_not_a_number_is_shown(model: Any) -> None:
    means = Means()
    values = torch.tensor([[1.0, float("nan"), float("inf")], [2.0, 3.0, 1.0]])
    means.add_sites(ac.ActivationCache({"resid_post.0": values[:, None]}), "last")
    mean = means.result()["resid_post.0"]
    assert mean[0] == 1.5
    assert mean[1].isnan()
    assert mean[2].isinf()


def test_a_mean_ablates(model: Any) -> None:
    means = ac.extract_batches(
        model, uneven(PROMPTS), sites="attn_out", positions={"last": -1, "two": [0, 1]}, reduce="mean"
    )
    found = means["attn_out.2"]
    edits = [
        ac.ablate("attn_out.2", mean=found["last"], positions="last"),
        ac.ablate("attn_out.2", mean=found["two"], positions=[0, 1]),
    ]
    with ac.edit(model, edits), ac.capture(model, sites="attn_out") as cache:
        model(torch.tensor([PROMPTS[0]]))
    assert torch.equal(cache["attn_out.2"][0, -1], found["last"])
    assert torch.equal(cache["attn_out.2"][0, :2], found["two"])


def test_memory_does_not_grow_with_the_examples(model: Any) -> None:
    import gc

    def bytes_alive() -> int:
        gc.collect()
        return sum(t.nbytes for t in gc.get_objects() if type(t) is Tensor)

    seen: list[int] = []

    def batches(n: int) -> Iterator[list[list[int]]]:
        for _ in range(n):
            seen.append(bytes_alive())
            yield PROMPTS[:2]

    # What other tests left behind is none of this one's: frozen objects are neither collected nor found.
    gc.freeze()
    try:
        ac.extract_batches(model, batches(30), sites="resid_post", reduce="mean")
    finally:
        gc.unfreeze()
    assert 0 < seen[2] == seen[-1]


def test_shapes_that_differ_are_refused(model: Any) -> None:
    with pytest.raises(JoinError, match=r"batch 1: 'resid_post.1' cannot be averaged .* \[3, 32\] .* \[2, 32\]"):
        ac.extract_batches(
            model, uneven(PROMPTS), sites="resid_post.1", reduce="mean",
            positions=lambda batch: (0, 3) if batch[0] == PROMPTS[0] else (0, 2),
        )  # fmt: skip
    with pytest.raises(LayerRangeError, match="batch 0: position 6 is out of range: the prompt has 5 tokens"):
        ac.extract_batches(model, uneven(PROMPTS), sites="resid_post.1", reduce="mean", positions=6)


def patterns(
    *lengths: int, at: Any = None, pad: int = 0, side: str = "right"
) -> tuple[ac.ActivationCache, list[Tensor]]:
    """A cache as a pass leaves it, with made-up attention of prompts of these lengths, and each prompt's own.

    `at`: the queries that are kept of each prompt; None keeps all.
    """
    own = [torch.rand(2, n, n) for n in lengths]
    longest, width = max(lengths) + pad, max(map(len, at)) if at is not None else max(lengths) + pad
    values, keys = torch.full((len(own), 2, width, longest), 7.0), torch.zeros(len(own), longest, dtype=torch.bool)
    mask = torch.zeros(len(own), width, dtype=torch.bool)
    for row, pattern in enumerate(own):
        n = pattern.shape[-1]
        here = slice(longest - n, None) if side == "left" else slice(n)
        queries = here if at is None else slice(len(at[row]))
        values[row, :, queries, here] = pattern if at is None else pattern[:, at[row]]
        keys[row, here], mask[row, queries] = True, True
    cache = ac.ActivationCache({"pattern.0": values, "pattern.1.1": values[:, 1]})
    cache._tokens = {None: Tokens(None, mask, {}, keys)}
    return cache, own


class TestPatterns:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_of_one_length(self, side: str) -> None:
        choices: list[tuple[Any, Any, Any]] = [
            ("all", None, lambda x, i: x),
            ("last", [[3]] * 3, lambda x, i: x[:, -1]),
            ((0, 2), [[0, 1]] * 3, lambda x, i: x[:, :2]),
            ([[0, 1], [2], [3]], [[0, 1], [2], [3]], lambda x, i: x[:, [[0, 1], [2], [3]][i]].mean(1)),
        ]
        for choice, at, value in choices:
            means = Means()
            one, first = patterns(4, 4, at=at and at[:2], pad=3, side=side)
            two, second = patterns(4, at=at and at[2:], side=side)
            means.add_sites(one, choice)
            means.add_sites(two, choice)
            result = means.result()
            expected = torch.stack([value(x, i) for i, x in enumerate([*first, *second])]).mean(0)
            torch.testing.assert_close(result["pattern.0"], expected)
            torch.testing.assert_close(result["pattern.1.1"], expected[1])

    def test_of_other_lengths(self) -> None:
        means = Means()
        cache, _ = patterns(4, 5)
        with pytest.raises(JoinError, match=r"'pattern.0' cannot be averaged .*AttentionBlocks"):
            means.add_sites(cache, "all")
