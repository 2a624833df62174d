"""Sweeps that fail, end early or are interrupted: one batch takes no other with it, and the model is as it was."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actcache as ac
import zoo
from actcache import errors
from actcache.extract.backends.local import LocalSession
from actcache.model.offload import hooks_of
from sweeps_helpers import BUDGET, FLOAT32, PROMPTS, in_memory, no_thread_left, offloaded, swept_batches


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with no_thread_left():
        yield


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return swept_batches(monkeypatch)


class TestWhatGoesWrong:
    def test_one_batch_takes_no_other_with_it(self) -> None:
        model, _ = offloaded()

        def failing(module: nn.Module, args: Any) -> None:
            if args[0].shape[1] == 23:
                raise FloatingPointError("not this one")

        model.model.layers[2].register_forward_pre_hook(failing)
        cache = ac.UnifiedCache(model, layers="last", allow_hooks=[failing.__qualname__], batch_size=1)
        with pytest.raises(errors.PartialWarmupError, match=r"1 prompt was not stored .*not this one"):
            cache.warmup(PROMPTS)
        assert cache.plan(PROMPTS).missing == 1
        assert in_memory(model) == set()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_ends_it_and_leaves_the_model_as_it_was(self, error: type[BaseException]) -> None:
        model, _ = offloaded()
        hooks = {path: hooks_of(module) for path, module in model.named_modules()}
        times = itertools.count()

        def interrupting(*_: Any) -> None:
            if next(times) == 3:
                raise error

        handle = model.model.layers[2].mlp.register_forward_hook(interrupting)
        name = interrupting.__qualname__
        extractor = ac.ActivationExtractor(model, allow_hooks=[name], **BUDGET)
        with pytest.raises(error):
            extractor.extract(PROMPTS)
        assert next(times) == 4
        assert in_memory(model) == set()
        assert {path: hooks_of(module) for path, module in model.named_modules()} == hooks
        handle.remove()
        found = extractor.extract(PROMPTS)
        expected = zoo.reference("llama", 0, tuple(PROMPTS[0]))["resid_post.3"]
        assert zoo.relative_error(found["resid_post.3"][0], expected) < FLOAT32

    def test_who_stops_listening(self) -> None:
        model, _ = offloaded()
        extractor = ac.ActivationExtractor(model, layers="last", **BUDGET)
        ids = [np.asarray(prompt, np.int32) for prompt in PROMPTS]
        batches = extractor.batches(ids, extractor.sites)
        next(batches)
        batches.close()
        assert in_memory(model) == set()
        assert not any("_call_impl" in module.__dict__ for module in model.modules())

    def test_a_weight_that_cannot_be_read(self) -> None:
        model, state = offloaded()
        extractor = ac.ActivationExtractor(model, **BUDGET)
        extractor.extract(PROMPTS)
        gone = state.data.pop("model.layers.2.mlp.up_proj.weight")
        with pytest.raises(KeyError):
            extractor.extract(PROMPTS)
        assert not any(name.startswith("model.layers.1") for name in in_memory(model))
        state.data["model.layers.2.mlp.up_proj.weight"] = gone
        found = extractor.extract(PROMPTS)
        expected = zoo.reference("llama", 0, tuple(PROMPTS[0]))["resid_post.3"]
        assert zoo.relative_error(found["resid_post.3"][0], expected) < FLOAT32

    def test_no_more_threads(self, monkeypatch: pytest.MonkeyPatch, swept: list[bool]) -> None:
        model, _ = offloaded()
        extractor = ac.ActivationExtractor(model, layers="last", **BUDGET)
        whole = extractor.extract(PROMPTS)
        plain, started = threading.Thread.start, itertools.count()

        def start(self: threading.Thread) -> None:
            if self.name == "actcache-pass" and next(started) >= 2:
                raise RuntimeError("can't start new thread")
            plain(self)

        monkeypatch.setattr(threading.Thread, "start", start)
        swept.clear()
        found = extractor.extract(PROMPTS)
        assert swept.count(True) == 2
        assert swept.count(False) > 1
        for ours, theirs in zip(found["resid_post.3"], whole["resid_post.3"], strict=True):
            assert torch.equal(ours, theirs)


def test_what_is_finished_is_stored_before_the_next_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses what runs together, and what the next run does is the rest."""
    monkeypatch.setenv("ACTCACHE_SWEEP_GB", str(10_000 / 2**30))
    model, _ = offloaded()
    cache = ac.UnifiedCache(model, layers="last", **BUDGET)
    plain, sweeps = LocalSession._sweep, itertools.count()

    def ending(self: LocalSession, begun: Any) -> Any:
        if next(sweeps) == 2:
            raise KeyboardInterrupt
        return plain(self, begun)

    monkeypatch.setattr(LocalSession, "_sweep", ending)
    with pytest.raises(KeyboardInterrupt):
        cache.warmup(PROMPTS)
    missing = cache.plan(PROMPTS).missing
    assert 0 < missing < len(PROMPTS)
    again = ac.UnifiedCache(model, layers="last", **BUDGET).warmup(PROMPTS)
    assert f"{missing}" in str(again)
    assert cache.plan(PROMPTS).missing == 0
