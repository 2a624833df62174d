"""Joining caches: batches become one cache that says of every row what it is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.capture.entry import Entry
from actcache.errors import JoinError, OptionError
from actcache.testing.tiny import tiny_model
from aggregation_helpers import WAYS, joined, keep_old, of

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [100, 3], [4, 200, 31, 6, 77, 2], [1, 2]]


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_batches_of_a_model_are_the_whole(gpt2: Any, how: str, cut: int) -> None:
    parts = [PROMPTS[i : i + cut] for i in range(0, len(PROMPTS), cut)]
    caches = [ac.run_with_cache(gpt2, part, ["transformer.h.1"], sites=["resid_post", "logits"])[1] for part in parts]
    both = joined(caches, how)
    assert both.attention_mask.sum(1).tolist() == [len(ids) for ids in PROMPTS]
    assert [row[real].tolist() for row, real in zip(both.input_ids, both.attention_mask, strict=True)] == PROMPTS
    assert both.seq_len() == 6
    for i, ids in enumerate(PROMPTS):
        alone = ac.run_with_cache(gpt2, ids, sites=["resid_post", "logits"])[1]
        for key in alone:
            torch.testing.assert_close(both.rows(key)[i], alone[key][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both.get_position(2, -1)[i], alone["resid_post.2"][0, -1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both.rows("transformer.h.1")[i], alone["resid_post.1"][0], rtol=1e-5, atol=1e-5)
    assert len(both["transformer.h.1"]) == 1
    assert both == joined(caches, "concatenate")


@torch.no_grad()
def test_generated_logits_keep_to_their_tokens(gpt2: Any) -> None:
    caches = []
    for ids in ([5, 6, 7], [8, 9, 10, 11, 12, 4]):
        with ac.capture(gpt2, sites=["resid_post", "logits"]) as cache:
            gpt2.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        caches.append(cache)
    both = ac.ActivationCache.concatenate(caches)
    for row, cache in enumerate(caches):
        for key in ("resid_post.3", "logits"):
            assert torch.equal(both.rows(key)[row], cache.rows(key)[0]), key


def test_encoder_decoder_keys_keep_their_stack() -> None:
    model = tiny_model("t5")
    caches = [
        ac.run_with_cache(model, part, sites=["encoder.resid_post", "decoder.resid_post"])[1]
        for part in (PROMPTS[:2], PROMPTS[2:4])
    ]
    both = ac.ActivationCache.concatenate(caches)
    for site in ("encoder.resid_post.1", "decoder.resid_post.1"):
        rows = [row for cache in caches for row in cache.rows(site)]
        assert all(torch.equal(a, b) for a, b in zip(both.rows(site), rows, strict=True))
        assert [len(row) for row in both.rows(site)] == [3, 5, 2, 6]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("lengths", [(5, 5, 7), (5, 7, 5), (7, 5, 5), (5, 7, 5, 2)])
def test_the_order_of_lengths_does_not_matter(how: str, lengths: tuple[int, ...]) -> None:
    tensors = [torch.randn(1 + i, length, 4) for i, length in enumerate(lengths)]
    both = joined([of(x=tensor) for tensor in tensors], how)
    rows = [row for tensor in tensors for row in tensor]
    assert both["x"].shape == (len(rows), max(lengths), 4)
    assert both.attention_mask.sum(1).tolist() == [len(row) for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(both.rows("x"), rows, strict=True))
    ragged = joined([of(x=tensor) for tensor in tensors], how, pad=False)
    assert [tuple(part.shape) for part in ragged["x"]] == [tuple(tensor.shape) for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(ragged.rows("x"), rows, strict=True))


@pytest.mark.parametrize("how", WAYS)
def test_values_that_are_no_tensors_are_not_added_up(how: str) -> None:
    labels = np.array([1.5, 2.5])
    batches = [
        of(
            label=i, name=f"ex{i}", flag=i == 1, pair=(i, i), numbers=[i, i], array=labels + i,
            scalar=torch.tensor(float(i)), nothing=None, nested={"mean": torch.full((2, 3), float(i)), "n": i},
        )
        for i in range(4)
    ]  # fmt: skip
    both = joined(batches, how)
    assert both["label"] == [0, 1, 2, 3]
    assert both["name"] == ["ex0", "ex1", "ex2", "ex3"]
    assert both["flag"] == [False, True, False, False]
    assert both["pair"] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert both["numbers"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both["nothing"] == [None] * 4
    assert both["array"].tolist() == [1.5, 2.5, 2.5, 3.5, 3.5, 4.5, 4.5, 5.5]
    assert both["scalar"].tolist() == [0, 1, 2, 3]
    assert both["nested"]["mean"][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both["nested"]["n"] == [0, 1, 2, 3]


@given(
    batches=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=6),
    cut=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_joining_is_associative(batches: list[list[int]], cut: int) -> None:
    caches = []
    for number, lengths in enumerate(batches):
        cache = of(x=torch.randn(len(lengths), max(lengths), 2), label=f"{number}", n=torch.tensor(number))
        cache.columns["length"] = list(lengths)
        caches.append(cache)
    whole = ac.ActivationCache.concatenate(caches)
    parts = [ac.ActivationCache.concatenate(part) for part in (caches[:cut], caches[cut:])]
    halves = ac.ActivationCache.concatenate(parts)
    one_by_one = joined(caches, "read in between")
    for other in (halves, one_by_one):
        assert other == whole
        assert [r.shape for r in other.rows("x")] == [r.shape for r in whole.rows("x")]
        assert other.columns == whole.columns == {"length": [n for lengths in batches for n in lengths]}


def test_nothing_is_shared_with_what_was_added() -> None:
    source, later = of(x=torch.ones(1, 2), list=[torch.ones(1)]), of(x=torch.zeros(1, 2), list=[])
    first, second = ac.ActivationCache().cat(source), ac.ActivationCache.concatenate([source])
    third = ac.ActivationCache().cat(source).cat(later)
    fourth = ac.ActivationCache.concatenate([ac.ActivationCache(), source])
    assert first == second == fourth == source
    later["x"].fill_(9)
    source["x"].zero_()
    source["list"][0].zero_()
    for cache in (first, second, third, fourth):
        assert cache["x"][0].tolist() == [1, 1]
        assert cache["list"][0].tolist() == [1]
    assert third["x"][1].tolist() == [0, 0]
    twice = of(x=torch.ones(1, 2))
    assert twice.cat(twice)["x"].shape == (2, 2)
    assert twice.cat(ac.ActivationCache())["x"].shape == (2, 2)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"x": torch.ones(1, 2), "y": 1}, {"x": torch.ones(1, 2), "z": 1}, "'y' only in what there is; 'z' only in wh"),
        ({"x": torch.ones(1)}, {"x": torch.ones(1, dtype=torch.bfloat16)}, "float32 tensor .* bfloat16 tensor"),
        ({"x": torch.ones(1, 2, 3)}, {"x": torch.ones(1, 2, 4)}, r"sizes \[3\].*sizes \[4\]"),
        ({"x": torch.ones(1, 2)}, {"x": torch.ones(1, 2, 4)}, "2 dimensions"),
        ({"x": torch.ones(1, 2)}, {"x": None}, "tensor .* a value in another"),
        ({"x": None}, {"x": torch.ones(1, 2)}, "a value in one batch"),
        ({"x": np.ones(2)}, {"x": np.ones(2, dtype=np.int64)}, "float64 array"),
        ({"x": {"a": 1}}, {"x": {"b": 1}}, "'a', 'b' in one batch only"),
        ({"x": {"a": torch.ones(1)}}, {"x": {"a": torch.ones(1).long()}}, r"x\['a'\]"),
        ({"x": ac.ValueWithInfo(1, 2)}, {"x": 1}, "a value with info"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(one: Any, other: Any, message: str) -> None:
    cache = ac.ActivationCache({"first": torch.ones(1, 2), **one})
    before = copy.deepcopy(cache)
    added = ac.ActivationCache({"first": torch.ones(1, 2), **other})
    with pytest.raises(JoinError, match=message) as caught:
        cache.cat(added)
    assert isinstance(caught.value, ValueError)
    assert cache == before
    with cache.deferred_mode(), pytest.raises(JoinError, match=message):
        cache.cat(added)
    assert cache == before
    if "only in what" not in message and one["x"] is not None:
        cache.register_aggregation("x", ac.aggregate.collect)
        assert len(cache.cat(added)["x"]) >= 2


def test_other_things_that_are_refused() -> None:
    cache = of(x=torch.ones(1, 2))
    with pytest.raises(OptionError, match="dict"):
        cache.cat({"x": torch.ones(1, 2)})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="missing"):
        cache.cat(cache, missing="ignore")
    with pytest.raises(JoinError, match="none is shared"):
        cache.cat(of(y=1), missing="drop")
    model = torch.nn.Linear(2, 2)
    with ac.capture(model, "") as open_one:
        model(torch.ones(1, 2))
        with pytest.raises(JoinError, match="still open"):
            open_one.cat(cache)


def test_keys_that_come_late() -> None:
    first = of(x=torch.ones(2, 3, 4), label=["a", "b"], gone=torch.ones(2, 5))
    second = of(x=torch.ones(1, 2, 4), label=["c"], late=torch.full((1, 2, 4), 7.0), note="late")
    both = copy.deepcopy(first).cat(second, missing="drop")
    assert sorted(both) == ["label", "x"]
    for how in WAYS:
        padded = joined([first, second, second], how, missing="pad")
        assert [len(row) for row in padded.rows("late")] == [0, 0, 2, 2], how
        assert torch.equal(padded.rows("late")[3], second["late"][0])
        assert [len(row) for row in padded.rows("gone")] == [5, 5, 0, 0]
        assert padded["gone"].shape == (4, 5)
        assert padded["note"] == [None, "late", "late"]
        assert [len(row) for row in padded.rows("x")] == [3, 3, 2, 2]


def test_columns_follow_their_prompts(gpt2: Any) -> None:
    caches = []
    for start in (0, 2):
        cache = ac.run_with_cache(gpt2, PROMPTS[start : start + 2], sites="resid_post")[1]
        cache.columns["label"] = [f"p{start}", f"p{start + 1}"]
        cache.columns["score"] = torch.tensor([start, start + 1])
        cache.columns["array"] = np.array([start, start + 1])
        caches.append(cache)
    both = ac.ActivationCache.concatenate(caches)
    assert both.columns["label"] == ["p0", "p1", "p2", "p3"]
    assert both.columns["score"].tolist() == both.columns["array"].tolist() == [0, 1, 2, 3]
    chosen = both.select(prompts=[3, 0])
    assert chosen.columns["label"] == ["p3", "p0"]
    assert chosen.columns["score"].tolist() == chosen.columns["array"].tolist() == [3, 0]
    assert both.select(prompts=slice(1, 3)).columns["label"] == ["p1", "p2"]
    assert [len(row) for row in chosen.rows("resid_post.0")] == [6, 3]
    caches[0].columns["label"] = ["just one"]
    with pytest.raises(JoinError, match="one value for each of the 2 prompts"):
        ac.ActivationCache.concatenate(caches)
    del caches[0].columns["label"]
    with pytest.raises(JoinError, match="different columns: 'label' only in what is added"):
        ac.ActivationCache.concatenate(caches)
    assert ac.ActivationCache.concatenate(caches, missing="pad").columns["label"] == [None, None, "p2", "p3"]


def test_unions_keep_each_values_mask(gpt2: Any) -> None:
    left = ac.run_with_cache(gpt2, PROMPTS[:2], sites="resid_post", layers=[0, 1])[1]
    right = ac.run_with_cache(gpt2, PROMPTS[3:5], sites="resid_post", layers=[1, 2])[1]
    both = left | right
    assert isinstance(both, ac.ActivationCache)
    assert both == left + right == ac.ActivationCache({**left, **right})
    assert [len(row) for row in both.rows("resid_post.0")] == [3, 5]
    assert [len(row) for row in both.rows("resid_post.1")] == [6, 2]
    assert torch.equal(both.get_position(0, -1), left.get_position(0, -1))
    assert torch.equal(both.input_ids, right.input_ids)
    assert list({"mine": 1} | left) == ["mine", "resid_post.0", "resid_post.1"]
    assert list({"mine": 1} + left) == list({"mine": 1} | left)
    left |= {"mine": 2}
    assert left["mine"] == 2
    with pytest.raises(TypeError):
        left | 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_whole_models_with_their_inputs_join(family: str) -> None:
    model = tiny_model(family)
    caches = [ac.run_with_cache(model, part, include_inputs=True)[1] for part in (PROMPTS[:2], PROMPTS[3:])]
    both = ac.ActivationCache.concatenate(caches)
    assert list(both) == list(caches[0])
    logits = both[""].output.logits
    assert logits.shape[:2] == (4, 6)
    assert torch.equal(logits[1], torch.nn.functional.pad(caches[0][""].output.logits[1], (0, 0, 0, 1)))
    assert type(both[""].output) is type(caches[0][""].output)
    assert both[""].inputs[1]["input_ids"].shape == (4, 6)
    with ac.capture(model) as twice, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]), **({"labels": torch.tensor([[5, 6]])} if family == "t5" else {}))
        model(input_ids=torch.tensor([[5, 6]]), **({"labels": torch.tensor([[5, 6]])} if family == "t5" else {}))
    outputs_only = ac.run_with_cache(model, PROMPTS[:1], [key for key in twice if key in caches[0]])[1]
    with pytest.raises(JoinError, match=r"an entry of 1 visits .* an entry of [24] visits"):
        outputs_only.cat(ac.ActivationCache({key: twice[key] for key in outputs_only}))


def test_tensors_of_modules_with_four_dimensions() -> None:
    """Masks, biases and heads inside modules: whichever dimensions are positions, those that differ are padded."""
    shapes = [((2, 4, 5, 5), (1, 4, 6, 6)), ((2, 1, 1, 5), (2, 1, 1, 6)), ((2, 1, 3, 5), (1, 1, 1, 6)),
              ((2, 4, 8, 8), (2, 4, 5, 8)), ((2, 5, 4, 8), (1, 3, 4, 8))]  # fmt: skip
    one, other = ([torch.randn(pair[i]) for pair in shapes] for i in (0, 1))
    both = ac.ActivationCache({"m": Entry([tuple(one)], None)}).cat(
        ac.ActivationCache({"m": Entry([tuple(other)], None)})
    )
    for a, b, joined_ in zip(one, other, both["m"].output, strict=True):
        assert joined_.shape == (len(a) + len(b), *map(max, zip(a.shape[1:], b.shape[1:], strict=True)))
        for rows, part in ((joined_[: len(a)], a), (joined_[len(a) :], b)):
            here = tuple(map(slice, part.shape))
            assert torch.equal(rows[here], part)
            assert rows.abs().sum().item() == pytest.approx(part.abs().sum().item())


def test_known_and_unknown_masks(gpt2: Any) -> None:
    known = ac.run_with_cache(gpt2, PROMPTS[:2], sites="resid_post", layers=[1])[1]
    unknown = ac.ActivationCache({"resid_post.1": torch.ones(1, 4, 32)})
    for caches, lengths in (([known, unknown], [3, 5, 4]), ([unknown, known], [4, 3, 5])):
        both = ac.ActivationCache.concatenate(caches)
        assert [len(row) for row in both.rows("resid_post.1")] == lengths
        assert both.attention_mask.sum(1).tolist() == lengths
        assert both.input_ids is None


def test_columns_written_while_joining() -> None:
    cache = of(x=torch.ones(1, 2))
    batch = of(x=torch.ones(1, 2))
    batch.columns["label"] = ["b"]
    with cache.deferred_mode():
        cache.columns["label"] = ["a"]
        cache.add_metadata(model_name="tiny")
        cache.cat(batch)
        cache.cat(batch)
    assert cache.columns == {"label": ["a", "b", "b"]}
    assert cache.metadata["model_name"] == "tiny"
    part = cache.select(prompts=[0])
    part.register_aggregation("x", keep_old)
    assert len(cache.cat(cache)["x"]) == 6
