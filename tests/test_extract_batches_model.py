"""The model under a loop over batches: what of it runs, what is kept of each pass, and how it is left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache.capture import extract_batches as module
from actcache.errors import (
    PromptError,
)
from actcache.testing.tiny import tiny_model
from extract_batches_helpers import PROMPTS, alone, close, in_batches, padded


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


def test_modules_are_joined_per_visit(model: Any) -> None:
    cache = ac.extract_batches(model, in_batches(PROMPTS, "ids"), modules=["transformer.h.2", "transformer.h.*.mlp"])
    assert len(cache) == 5
    for row, prompt in zip(cache.rows("transformer.h.2"), PROMPTS, strict=True):
        close(row, alone(model, prompt))
    assert len(cache["transformer.h.2"]) == 1
    cache = ac.extract_batches(
        model, in_batches(PROMPTS, "ids"), modules="transformer.h.0.mlp", include_inputs=True, include_output=False
    )
    assert cache["transformer.h.0.mlp"].input.shape == (7, 21, 32)
    assert cache["transformer.h.0.mlp"].output is None


def test_the_head_does_not_run_unless_logits_are_asked_for(model: Any) -> None:
    runs: list[str] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: runs.append(path))
        for path in ("transformer.h.3", "lm_head")
    ]
    cache = ac.extract_batches(model, [PROMPTS[:2]], sites="resid_post", layers=[0, 1])
    assert runs == []
    assert sorted(cache) == ["resid_post.0", "resid_post.1"]
    cache = ac.extract_batches(model, [PROMPTS[:2], PROMPTS[2:3]], sites=["logits"], positions="last")
    for handle in handles:
        handle.remove()
    assert runs == ["transformer.h.3", "lm_head"] * 2
    with torch.no_grad():
        close(cache["logits"][2, 0], model(torch.tensor([PROMPTS[2]])).logits[0, -1])


def test_values_leave_with_their_batch_in_the_dtype_asked_for(model: Any) -> None:
    seen: list[torch.dtype] = []

    def batches() -> Iterator[Any]:
        for prompt in PROMPTS:
            yield [prompt]

    cache = ac.extract_batches(model, batches(), sites="resid_post.1", dtype=torch.bfloat16)
    seen.append(cache["resid_post.1"].dtype)
    assert seen == [torch.bfloat16]
    assert cache["resid_post.1"].shape == (7, 21, 32)
    assert cache["resid_post.1"].is_contiguous()
    # Only what was asked for is kept: one tensor, without what it was joined from.
    assert cache.nbytes == 7 * 21 * 32 * 2
    assert not cache["resid_post.1"].requires_grad


def test_the_model_is_as_before(model: Any) -> None:
    model.train()
    try:
        quiet = ac.run_with_cache(model, PROMPTS[0], sites="resid_post.3")[1]
        before = [(dict(m._forward_hooks), m.training, list(m.__dict__)) for m in model.modules()]
        cache = ac.extract_batches(model, [PROMPTS[:1]], sites="resid_post.3")
        assert torch.equal(cache["resid_post.3"], quiet["resid_post.3"])
        with pytest.raises(PromptError):
            ac.extract_batches(model, [PROMPTS[:1], [[999]]], sites="resid_post.3")
        assert [(dict(m._forward_hooks), m.training, list(m.__dict__)) for m in model.modules()] == before
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


class TestInterrupts:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
    def test_in_a_pass(self, model: Any, error: type[BaseException]) -> None:
        passes: list[int] = []

        def interrupt(*_: Any) -> None:
            passes.append(1)
            if len(passes) == 3:
                raise error("now")

        handle = model.transformer.h[2].register_forward_hook(interrupt)
        collected = ac.ActivationCache()
        before = [list(m.__dict__) for m in model.modules()]
        try:
            with pytest.raises(error, match="now") as raised:
                ac.extract_batches(
                    model, ([prompt] for prompt in PROMPTS), sites="resid_post.1", modules="transformer.h.2",
                    into=collected, columns=lambda batch: {"length": [len(batch[0])]},
                )  # fmt: skip
        finally:
            handle.remove()
        if error is RuntimeError:
            assert raised.value.__notes__ == ["This was batch 2, counted from 0."]
        assert [list(m.__dict__) for m in model.modules()] == before
        # What was finished is there, and the run goes on behind it.
        assert collected.columns["length"] == [5, 17]
        ac.extract_batches(
            model, [PROMPTS[2:]], sites="resid_post.1", modules="transformer.h.2", into=collected,
            columns=lambda batch: {"length": list(map(len, batch))},
        )  # fmt: skip
        assert collected.columns["length"] == list(map(len, PROMPTS))
        for row, prompt in zip(collected.rows("resid_post.1"), PROMPTS, strict=True):
            close(row, alone(model, prompt, "transformer.h.1"))
        assert collected.input_ids[:2, :5].tolist() == [PROMPTS[0], PROMPTS[1][:5]]

    def test_in_the_loader(self, model: Any) -> None:
        def batches() -> Iterator[Any]:
            yield PROMPTS[:2]
            raise KeyboardInterrupt

        collected = ac.ActivationCache()
        with pytest.raises(KeyboardInterrupt):
            ac.extract_batches(model, batches(), sites="resid_post.1", into=collected)
        assert collected["resid_post.1"].shape == (2, 17, 32)


def test_edits_of_every_pass(model: Any) -> None:
    edits = [ac.ablate("mlp_out.1"), ac.steer("resid_post.0", torch.ones(32), positions="last")]
    cache = ac.extract_batches(model, in_batches(PROMPTS, "left"), sites="resid_post.2", edits=edits)
    for row, prompt in zip(cache.rows("resid_post.2"), PROMPTS, strict=True):
        with ac.edit(model, edits):
            close(row, alone(model, prompt))
    assert zoo.relative_error(cache.rows("resid_post.2")[0], alone(model, PROMPTS[0])) > 0.1
    # Behind the last site an edit changes nothing that is kept, and is no mistake.
    behind = ac.extract_batches(model, [PROMPTS[:1]], sites="resid_post.0", edits=ac.ablate("mlp_out.3"))
    close(behind["resid_post.0"][0], alone(model, PROMPTS[0], "transformer.h.0"))
    apart = tiny_model("llama-dynamic")
    assert ac.extract_batches(apart, [PROMPTS[:2]], sites="resid_post.2", edits=edits)["resid_post.2"].shape[0] == 2
    for edits_of_batch in ({"mlp_out.1": lambda x: x * 0}, ac.ablate("mlp_out.1", positions=[[0], [1]])):
        with pytest.raises(PromptError, match="its edits may belong to the batch as a whole"):
            ac.extract_batches(apart, [PROMPTS[:2]], sites="resid_post.2", edits=edits_of_batch)


def test_batches_are_let_go_and_shown(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch at a time is alive, and the bar counts them."""
    shown: list[Any] = []

    class Bar:
        def update(self, n: int = 1) -> None:
            shown.append(n)

    class Progress:
        def __init__(self, total: Any, description: str, *, unit: str) -> None:
            shown.append((total, unit))

        def __enter__(self) -> Bar:
            return Bar()

        def __exit__(self, *_: Any) -> None:
            shown.append("closed")

    monkeypatch.setattr(module, "progress", Progress)

    class Batch(dict[str, Tensor]):
        pass

    alive: weakref.WeakSet[Batch] = weakref.WeakSet()
    most = 0

    def batches() -> Iterator[Batch]:
        nonlocal most
        for prompt in PROMPTS:
            batch = Batch(padded([prompt], "right"))
            # A dict has no hash.
            Batch.__hash__ = object.__hash__  # type: ignore[assignment]
            alive.add(batch)
            gc.collect()
            most = max(most, len(alive))
            yield batch
            del batch

    ac.extract_batches(model, batches(), sites="resid_post.0")
    assert shown == [(None, "batch"), *[1] * 7, "closed"]
    # The one that is being made, and the one before.
    assert most <= 2
    ac.extract_batches(model, [PROMPTS[:1]] * 3, sites="resid_post.0")
    assert shown[9] == (3, "batch")
