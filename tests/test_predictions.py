"""Losses and logits of many rows: the numbers of torch's own functions, in the memory that was said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from actcache.model.head import find_head
from actcache.model.predictions import predict


def rows_and_logits(n: int) -> tuple[Tensor, Tensor]:
    model: Any = zoo.model_of("gpt2")
    rows = torch.randn(n, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return rows, model.lm_head(model.transformer.ln_f(rows)).double()


@pytest.mark.parametrize("max_bytes", [1, 4 * 259 * 4, None])
@pytest.mark.parametrize("top_k", [None, 5])
def test_losses_and_logits_are_torchs(max_bytes: int | None, top_k: int | None) -> None:
    rows, logits = rows_and_logits(11)
    targets = torch.tensor([3, -1, 258, 0, -1, 7, 8, -1, 9, 10, 11])
    keep = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    made = predict(find_head(zoo.model_of("gpt2")), rows, targets, keep, top_k=top_k, max_bytes=max_bytes)
    known = targets >= 0
    expected = torch.nn.functional.cross_entropy(logits[known], targets[known], reduction="none")
    assert torch.allclose(made.losses[known].double(), expected, rtol=1e-5)
    assert made.losses[~known].isnan().all()
    assert made.values is not None
    if top_k is None:
        assert made.indices is None
        assert zoo.relative_error(made.values, logits[keep]) < 1e-6
    else:
        assert made.indices is not None
        best = logits[keep].topk(top_k)
        assert zoo.relative_error(made.values, best.values) < 1e-6
        assert torch.equal(made.indices.long(), best.indices)


def test_rows_that_nobody_asks_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = find_head(zoo.model_of("gpt2"))
    sizes: list[int] = []
    run = type(head.way).run

    def counted(way: Any, model: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(value.shape[1])
        return run(way, model, value, *args, **kwargs)

    monkeypatch.setattr(type(head.way), "run", counted)
    rows, _ = rows_and_logits(10)
    targets = torch.full((10,), -1)
    made = predict(head, rows, targets)
    assert made.values is None
    assert made.losses.isnan().all()
    targets[[2, 5, 9]] = 1
    predict(head, rows, targets, max_bytes=2 * 4 * 259)
    assert sizes in ([2, 1], [0, 2, 1])


def test_what_the_final_norm_returned_goes_on_from_there() -> None:
    model: Any = zoo.model_of("gpt2")
    rows, _ = rows_and_logits(4)
    targets = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        normed = model.transformer.ln_f(rows)
    head = find_head(model)
    assert torch.equal(predict(head, normed, targets, normalised=True).losses, predict(head, rows, targets).losses)
