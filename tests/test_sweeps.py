"""Batches of a model with offloaded weights run block by block: right values, each weight read once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import actcache as ac
import zoo
from actcache import errors
from actcache.extract.backends import interleaved
from actcache.extract.backends.local import LocalSession
from actcache.testing.tiny import tiny_model
from sweeps_helpers import BUDGET, FLOAT32, PROMPTS, accelerate, in_memory, no_thread_left, offloaded, swept_batches

FAMILIES = ["gpt2", "llama-tied", "gemma2", "gemma3", "opt", "bloom", "falcon", "mixtral", "t5", "qwen3_next", "bert"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_thread_left():
        yield


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return swept_batches(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_gives_what_it_gives_alone(family: str, swept: list[bool]) -> None:
    model, _ = offloaded(family)
    stacks = ("encoder.", "decoder.") if zoo.FAMILIES[family].encoder_decoder else ("",)
    absent = zoo.FAMILIES[family].absent
    names = [name for name in ("attn_out", "mlp_out", "resid_post", "resid_pre") if name not in absent]
    sites = [f"{stack}{name}" for stack in stacks for name in names]
    found = ac.ActivationExtractor(model, sites=sites, **BUDGET).extract(PROMPTS)
    assert len(swept) > 3
    assert all(swept)
    for i, prompt in enumerate(PROMPTS):
        expected = zoo.reference(family, 0, tuple(prompt))
        for site in found:
            assert zoo.relative_error(found[site][i], expected[site]) < FLOAT32, (site, prompt)
    assert in_memory(model) == set()


@pytest.mark.parametrize("pooling", ["last_token", "mean", lambda rows: rows[0] * 2])
def test_pooled_rows(pooling: Any, swept: list[bool]) -> None:
    model, _ = offloaded()
    options: dict[str, Any] = {"sites": ["resid_post", "final_norm", "logits"], "pooling": pooling, **BUDGET}
    found = ac.ActivationExtractor(model, **options).extract(PROMPTS)
    plain = ac.ActivationExtractor(tiny_model("llama"), **{**options, "batch_size": 1}).extract(PROMPTS)
    assert all(swept)
    assert len(swept) > 3
    for site in plain:
        for ours, theirs in zip(found[site], plain[site], strict=True):
            assert zoo.relative_error(ours, theirs) < FLOAT32


def test_perplexity_logits_and_positions_through_the_store(swept: list[bool]) -> None:
    model, _ = offloaded()
    options: dict[str, Any] = {"layers": [1, 2], "compute_perplexity": True, "cache_logits": True}
    cache = ac.UnifiedCache(model, **options, **BUDGET)
    cache.warmup(PROMPTS)
    assert all(swept)
    assert len(swept) > 3
    plain = ac.UnifiedCache(tiny_model("llama"), **options)
    # The same identity, so nothing is computed again: read from the store, held against a bare model.
    assert plain.plan(PROMPTS).missing == 0
    for prompt, each in zip(PROMPTS, cache.get_token_perplexity(PROMPTS), strict=True):
        logits = zoo.reference("llama", 0, tuple(prompt))["logits"].double()[:-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt[1:]).long(), reduction="none").exp()
        assert torch.allclose(torch.as_tensor(each).double(), expected, rtol=1e-4)


class TestReads:
    """What is read of the weights, and what is in memory meanwhile."""

    def test_each_weight_once_for_all_batches(self, swept: list[bool]) -> None:
        model, state = offloaded()
        extractor = ac.ActivationExtractor(model, **BUDGET)
        extractor.extract(PROMPTS)
        state.reads.clear()
        extractor.extract(PROMPTS)
        assert len(swept) > 6
        assert set(state.reads.values()) == {1}
        assert sum(name.startswith("model.layers.3.") for name in state.reads) == 9
        assert "lm_head.weight" not in state.reads

    def test_nothing_behind_the_deepest_site(self) -> None:
        model, state = offloaded()
        extractor = ac.ActivationExtractor(model, sites=["attn_out"], layers=1, **BUDGET)
        extractor.extract(PROMPTS)
        state.reads.clear()
        extractor.extract(PROMPTS)
        blocks = {name.split(".")[2] for name in state.reads if name.startswith("model.layers.")}
        assert blocks == {"0", "1"}
        assert not any("layers.1.mlp" in name for name in state.reads)
        assert in_memory(model) == set()

    def test_no_two_blocks_at_a_time(self) -> None:
        model, _ = offloaded()
        held: list[set[str]] = []

        def note(*_: Any) -> None:
            held.append(in_memory(model))

        for block in model.model.layers:
            block.register_forward_hook(note)
        extractor = ac.ActivationExtractor(model, allow_hooks=[note.__qualname__], **BUDGET)
        extractor.extract(PROMPTS)
        # From here on nothing is held against a pass of its own.
        held.clear()
        extractor.extract(PROMPTS)
        # Names of what is in memory are "model.layers.<number>...." and nothing else.
        assert held
        for names in held:
            blocks = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
            assert len(blocks) == 1
            assert not any(name.startswith(("model.embed_tokens", "lm_head")) for name in names)

    def test_as_many_batches_at_once_as_the_limit_takes(
        self, monkeypatch: pytest.MonkeyPatch, swept: list[bool]
    ) -> None:
        model, state = offloaded()
        extractor = ac.ActivationExtractor(model, layers="last", **BUDGET)
        whole = extractor.extract(PROMPTS)
        batches = len(swept)
        together: list[list[interleaved.Pass]] = []
        plain = LocalSession._sweep

        def noting(self: LocalSession, begun: Any) -> list[interleaved.Pass]:
            together.append(plain(self, begun))
            return together[-1]

        monkeypatch.setattr(LocalSession, "_sweep", noting)
        # Hidden states of a batch of 40 tokens take 5 KB, its rows as much, masks and angles a few more.
        monkeypatch.setenv("ACTCACHE_SWEEP_GB", str(30_000 / 2**30))
        state.reads.clear()
        parts = extractor.extract(PROMPTS)
        sizes = [len(passes) for passes in together]
        assert sizes[-1] == 0
        assert sum(sizes) == batches
        assert len(sizes) > 2
        assert max(sizes) >= 2
        # What is held by all but the one that went past it is below the limit.
        assert all(sum(one.bytes for one in passes[:-1]) < 30_000 for passes in together if passes)
        assert max(state.reads.values()) == len(sizes) - 1
        assert all(torch.equal(a, b) for a, b in zip(whole["resid_post.3"], parts["resid_post.3"], strict=True))
        monkeypatch.setenv("ACTCACHE_SWEEP_GB", "much")
        with pytest.raises(errors.OptionError, match="ACTCACHE_SWEEP_GB is 'much'"):
            extractor.extract(PROMPTS)

    def test_rows_that_were_handed_over_are_let_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(interleaved, "MOST_PASSES", 2)
        model, _ = offloaded()
        extractor = ac.ActivationExtractor(model, layers="last", **BUDGET)
        ids = [np.asarray(prompt, np.int32) for prompt in PROMPTS]
        seen: list[weakref.ref[Tensor]] = []
        for _, rows in extractor.batches(ids, extractor.sites):
            seen.append(weakref.ref(rows["resid_post.3"]))
            del rows
            # The two of this sweep, and one that is on its way.
            assert sum(ref() is not None for ref in seen) <= 3
        assert len(seen) > 4

    def test_only_so_many_passes(self, monkeypatch: pytest.MonkeyPatch, swept: list[bool]) -> None:
        monkeypatch.setattr(interleaved, "MOST_PASSES", 3)
        model, _ = offloaded()
        found = ac.ActivationExtractor(model, layers=[0], **BUDGET).extract(PROMPTS)
        assert len(swept) > 3
        assert all(swept)
        expected = zoo.reference("llama", 0, tuple(PROMPTS[-1]))["resid_post.0"]
        assert zoo.relative_error(found["resid_post.0"][-1], expected) < FLOAT32


class Remembering(nn.Module):
    """A norm in the first block that keeps what it was given, for one in a later block."""

    def __init__(self, norm: nn.Module, before: Remembering | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.__dict__["before"] = before
        self.kept: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        before = self.__dict__["before"]
        if before is None:
            self.kept = hidden
            return self.norm(hidden)
        kept = before.kept
        return self.norm(hidden + kept.mean() * 3)


def test_a_model_that_keeps_something_on_its_modules(swept: list[bool], caplog: pytest.LogCaptureFixture) -> None:
    def changed() -> Any:
        model = tiny_model("llama")
        first, third = model.model.layers[0], model.model.layers[2]
        first.input_layernorm = Remembering(first.input_layernorm)
        third.input_layernorm = Remembering(third.input_layernorm, first.input_layernorm)
        return model

    plain = ac.ActivationExtractor(changed(), batch_size=1).extract(PROMPTS[-6:])
    model = changed()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, "cpu", state_dict=state)
    options: dict[str, Any] = {"batch_size": 1}
    # In the first block it makes no difference, which says nothing of the others.
    shallow = ac.ActivationExtractor(model, layers=[0], **options).extract(PROMPTS[-6:])
    assert zoo.relative_error(shallow["resid_post.0"][0], plain["resid_post.0"][0]) < FLOAT32
    assert all(swept) and swept
    swept.clear()
    extractor = ac.ActivationExtractor(model, **options)
    with caplog.at_level(logging.WARNING, "actcache"):
        for _ in range(2):
            found = extractor.extract(PROMPTS[-6:])
            for site in plain:
                for ours, theirs in zip(found[site], plain[site], strict=True):
                    assert zoo.relative_error(ours, theirs) < FLOAT32
    assert "LlamaForCausalLM keeps something between its blocks" in caplog.text
    assert not any(swept)
    assert in_memory(model) == set()


class Measuring(Remembering):
    """The same, which keeps nothing but how long the batch is."""

    def forward(self, hidden: Tensor) -> Tensor:
        before = self.__dict__["before"]
        self.kept = torch.tensor(float(hidden.shape[1]))
        return self.norm(hidden if before is None else hidden + before.kept / 10)


def test_a_model_that_keeps_lengths_is_found_out_when_they_differ(swept: list[bool]) -> None:
    def changed() -> Any:
        model = tiny_model("llama")
        first, third = model.model.layers[0], model.model.layers[2]
        first.input_layernorm = Measuring(first.input_layernorm)
        third.input_layernorm = Measuring(third.input_layernorm, first.input_layernorm)
        return model

    model = changed()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, "cpu", state_dict=state)
    for prompts, together in (([p for p in zoo.prompts_of(4, [9, 9, 9]) if len(p) == 9], True), (PROMPTS[-6:], False)):
        plain = ac.ActivationExtractor(changed(), batch_size=1).extract(prompts)
        swept.clear()
        found = ac.ActivationExtractor(model, batch_size=1).extract(prompts)
        assert swept == [together] * len(prompts)
        for site in plain:
            for ours, theirs in zip(found[site], plain[site], strict=True):
                assert zoo.relative_error(ours, theirs) < FLOAT32


def test_edits_run_one_batch_after_the_other(swept: list[bool]) -> None:
    model, _ = offloaded()
    edits = [ac.ablate("mlp_out.1")]
    found = ac.ActivationExtractor(model, layers="last", edits=edits, **BUDGET).extract(PROMPTS)
    plain = ac.ActivationExtractor(tiny_model("llama"), layers="last", edits=edits, **BUDGET).extract(PROMPTS)
    assert not swept
    for ours, theirs in zip(found["resid_post.3"], plain["resid_post.3"], strict=True):
        assert zoo.relative_error(ours, theirs) < FLOAT32


def test_a_hook_of_accelerate_that_is_not_known(swept: list[bool]) -> None:
    model = tiny_model("llama")
    accelerate.cpu_offload_with_hook(model, "cpu")
    found = ac.ActivationExtractor(model, layers="last", **BUDGET).extract(PROMPTS)
    assert not swept
    expected = zoo.reference("llama", 0, tuple(PROMPTS[0]))["resid_post.3"]
    assert zoo.relative_error(found["resid_post.3"][0], expected) < FLOAT32
