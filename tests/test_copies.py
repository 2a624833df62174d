"""Copies that go on behind the pass: the order of things on a device that is late, made up where the CUDA calls are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
import zoo
from actcache.extract.backends import copies
from actcache.extract.backends.copies import CopiedRows
from actcache.testing.tiny import tiny_model

FLOAT32 = 5e-6
PROMPTS = zoo.prompts_of(5, [6, 6, 12, 12, 17, 17, 20, 20])[:-1]


class Late:
    """A device whose copies are made when somebody waits for an event behind them, and not before."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: list[Callable[[], object]] = []
        self.done_at_once = False

    def begin_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        target = torch.full_like(tensor, float("nan") if tensor.dtype.is_floating_point else -1)
        # What it holds when the copy is made, as on a device: whoever changes it before that is found out.
        self.pending.append(lambda: target.copy_(tensor))
        return target

    def event_behind(self, device: torch.device) -> Any:
        work, self.pending = self.pending, []
        late, number = self, sum(line.startswith("event") for line in self.log)
        self.log.append(f"event {number} behind {len(work)}")

        class Event:
            def query(self) -> bool:
                if late.done_at_once:
                    self.synchronize()
                return not work

            def synchronize(self) -> None:
                late.log.append(f"waited {number}")
                while work:
                    work.pop(0)()

        return Event()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    device = Late()
    monkeypatch.setattr(copies, "copies_behind", lambda tensor: True)
    monkeypatch.setattr(copies, "begin_copy", device.begin_copy)
    monkeypatch.setattr(copies, "event_behind", device.event_behind)
    return device


def passes_in(log: list[str], model: Any) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda *_: log.append("pass"))


@pytest.mark.parametrize("pooling", [None, "last_token", "mean"])
def test_values_are_those_of_each_prompt_alone(late: Late, pooling: str | None) -> None:
    model = tiny_model("llama")
    extractor = ac.ActivationExtractor(model, sites=["resid_post", "attn_out"], pooling=pooling, max_batch_tokens=24)
    found = extractor.extract(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        expected = zoo.reference("llama", 0, tuple(prompt))
        for site in found:
            rows = expected[site]
            wanted = {None: rows, "last_token": rows[-1], "mean": rows.mean(0)}[pooling]
            assert zoo.relative_error(found[site][i], wanted) < FLOAT32
    assert not late.pending


def test_a_batch_is_waited_for_while_the_next_one_runs(late: Late) -> None:
    model = tiny_model("llama")
    extractor = ac.ActivationExtractor(model, batch_size=2, allow_hooks=["passes_in.<locals>.<lambda>"])
    extractor.extract(PROMPTS[:1])
    late.log.clear()
    passes_in(late.log, model)
    ids = [np.asarray(prompt, np.int32) for prompt in PROMPTS]
    for batch, _ in extractor.batches(ids, extractor.sites):
        late.log.append(f"given {len(batch.indices)}")
    # One event for all four sites of a batch, and never a wait before the next pass has begun.
    assert late.log == [
        "pass", "event 0 behind 4",
        "pass", "event 1 behind 4", "waited 0", "given 2",
        "pass", "event 2 behind 4", "waited 1", "given 2",
        "pass", "event 3 behind 4", "waited 2", "given 2",
        "waited 3", "given 2",
    ]  # fmt: skip


def test_what_has_arrived_goes_out_at_once(late: Late) -> None:
    late.done_at_once = True
    model = tiny_model("llama")
    extractor = ac.ActivationExtractor(model, batch_size=2, allow_hooks=["passes_in.<locals>.<lambda>"])
    extractor.extract(PROMPTS[:1])
    late.log.clear()
    passes_in(late.log, model)
    for batch, _ in extractor.batches([np.asarray(prompt, np.int32) for prompt in PROMPTS], extractor.sites):
        late.log.append(f"given {len(batch.indices)}")
    kept = [line.split()[0] for line in late.log if not line.startswith(("event", "waited"))]
    assert kept == ["pass", "given"] * 4


def test_through_the_store_with_logits_and_perplexity(late: Late) -> None:
    model = tiny_model("llama")
    cache = ac.UnifiedCache(model, layers="last", compute_perplexity=True, cache_logits=True, max_batch_tokens=24)
    cache.warmup(PROMPTS)
    for prompt, each in zip(PROMPTS, cache.get_token_perplexity(PROMPTS), strict=True):
        logits = zoo.reference("llama", 0, tuple(prompt))["logits"].double()[:-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt[1:]), reduction="none").exp()
        assert torch.allclose(torch.as_tensor(each).double(), expected, rtol=1e-4)


def test_offloaded_models_copy_as_rows_come(late: Late) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_model("llama")
    accelerate.cpu_offload(model, "cpu")
    extractor = ac.ActivationExtractor(model, sites=["resid_post", "mlp_out"], max_batch_tokens=24)
    before = threading.active_count()
    found = extractor.extract(PROMPTS)
    assert threading.active_count() == before
    assert sum(line.endswith("behind 8") for line in late.log) >= 4
    for i, prompt in enumerate(PROMPTS):
        expected = zoo.reference("llama", 0, tuple(prompt))
        for site in found:
            assert zoo.relative_error(found[site][i], expected[site]) < FLOAT32


def test_without_an_accelerator_nothing_is_pending() -> None:
    rows = CopiedRows({"a": torch.ones(2)})
    assert rows.ready
    assert torch.equal(rows.wait()["a"], torch.ones(2))
