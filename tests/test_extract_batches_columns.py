"""Columns beside the ids of a loader's batches, and batches and arguments that cannot be taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import (
    JoinError,
    LayerRangeError,
    OptionError,
    PromptError,
    PromptTypeError,
    UnknownModuleError,
    UnknownSiteError,
)
from actcache.testing.tiny import tiny_model
from extract_batches_helpers import PROMPTS, close, padded


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


def test_columns_are_kept_row_by_row(model: Any) -> None:
    given = [
        {
            "n": [3, 4],
            "s": ("a", "bb"),
            "t": torch.tensor([[1.5], [2.5]]),
            "a": np.array(["x", "yyy"]),
            "o": [None, {}],
        },
        {"n": [5], "s": ["ccc"], "t": torch.tensor([[3.5]]), "a": np.array(["z"]), "o": [(1, 2)]},
    ]
    batches = zip([PROMPTS[:2], PROMPTS[2:3]], given, strict=True)
    cache = ac.extract_batches(model, batches, sites="resid_post.0", columns=lambda batch: batch[1])
    assert cache.columns["n"] == [3, 4, 5]
    assert cache.columns["s"] == ["a", "bb", "ccc"]
    assert torch.equal(cache.columns["t"], torch.tensor([[1.5], [2.5], [3.5]]))
    assert cache.columns["a"].tolist() == ["x", "yyy", "z"]
    assert cache.columns["o"] == [None, {}, (1, 2)]
    assert cache.select(prompts=[2, 0]).columns["n"] == [5, 3]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (lambda b: {"label": [1]}, OptionError, "batch 0: column 'label' has 1 values, and the batch has 2 prompts"),
        (lambda b: {"label": "ab"}, OptionError, "column 'label' is 'ab'"),
        (lambda b: {"label": 3}, OptionError, "column 'label' is 3"),
        (lambda b: {"label": torch.tensor(3)}, OptionError, "column 'label'"),
        (lambda b: [1, 2], OptionError, "returned a list"),
        (["lable"], OptionError, "column 'lable' is no field of the batch: .*Did you mean 'label'"),
        ("label", OptionError, "expected a function of the batch, or a list of field names"),
        ([], OptionError, "expected a function"),
        (lambda b: {"n": [1] * 2, "w": b["width"]}, JoinError, r"batch 1: column 'w' is a tensor of float32, .*int64"),
        (lambda b: {"n": [1] * 2, **b["more"]}, JoinError, "batch 1: column 'x' is not there"),
    ],
)
def test_columns_that_do_not_fit(model: Any, columns: Any, error: type[Exception], message: str) -> None:
    batches = [
        {**padded(PROMPTS[:2], "left"), "label": [1, 2], "width": torch.tensor([1, 2]), "more": {"x": [1, 2]}},
        {**padded(PROMPTS[:2], "left"), "label": [1, 2], "width": torch.tensor([1.0, 2]), "more": {}},
    ]
    with pytest.raises(error, match=message):
        ac.extract_batches(model, batches, sites="resid_post.0", columns=columns)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ("text", PromptTypeError, "dataloader is 'text': expected batches"),
        (7, PromptTypeError, "dataloader is 7"),
        ([], PromptError, "no batch"),
        ([PROMPTS[:1], [[300]]], PromptError, "batch 1: prompt 0 holds token id 300"),
        ([[[5] * 65]], PromptError, "65 tokens, the model's context is 64"),
        ([{"ids": torch.ones(1, 3).long()}], PromptTypeError, "fields 'ids', and GPT2LMHeadModel needs 'input_ids'"),
        ([{"text": ["a"], "label": [1]}], PromptTypeError, r"\(\(batch\['text'\], batch\) for batch in loader\)"),
        ([{"input_ids": torch.ones(3).long()}], PromptTypeError, r"'input_ids' of the batch is \[3\]: expected .*B, S"),
        (
            [{**padded(PROMPTS[:2], "left"), "attention_mask": torch.ones(2, 3)}],
            PromptTypeError,
            r"'attention_mask' of the batch is \[2, 3\], and 'input_ids' is \[2, 17\]",
        ),
        (
            [{**padded(PROMPTS[:2], "left"), "position_ids": torch.ones(3, 17)}],
            PromptTypeError,
            "'position_ids'.*3 rows",
        ),
        ([{"input_ids": torch.full((1, 2), 999)}], PromptError, "token id 999"),
        ([{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}], PromptError, "no tokens"),
        ([{"input_ids": [["a"]]}], PromptTypeError, "'input_ids' of the batch is no rectangle of numbers"),
        ([("a", "b")], PromptTypeError, r"read as \(inputs, anything\)"),
        ([([5, 6], [7, 8])], PromptTypeError, r"read as \(inputs, anything\)"),
        ([()], PromptError, "empty tuple"),
        ([[torch.ones(1, 3).long(), torch.ones(1, 2).long()]], PromptTypeError, "several prompts, or one and what"),
        ([3], PromptError, "batch 0: there is no prompt"),
    ],
)
def test_batches_that_cannot_be_read(model: Any, batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ac.extract_batches(model, batches, sites="resid_post.0")
    assert ac.extract_batches(model, [PROMPTS[:2]], sites="resid_post.0")["resid_post.0"].shape == (2, 17, 32)


def test_what_is_asked_for_is_checked_before_the_first_batch(model: Any) -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was taken")
        yield

    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, OptionError, "name sites=, modules= or both"),
        ({"sites": "resid_psot"}, UnknownSiteError, "resid_post"),
        ({"sites": "resid_post.9"}, LayerRangeError, "layer 9"),
        ({"modules": "transformer.k"}, UnknownModuleError, "transformer.k"),
        ({"sites": "resid_post", "positions": "lats"}, OptionError, "'last'"),
        ({"sites": "resid_post", "positions": {}}, OptionError, "empty dict"),
        ({"sites": "resid_post", "reduce": "maen"}, OptionError, "'mean'"),
        ({"sites": "resid_post", "reduce": "mean", "columns": ["x"]}, OptionError, "columns have no rows"),
        ({"modules": "transformer.h.0", "reduce": "mean"}, OptionError, "modules have no known positions"),
        ({"sites": "resid_post", "dtype": "float3"}, OptionError, "float32"),
        ({"sites": "resid_post", "into": {}}, OptionError, "into must be an ActivationCache"),
        ({"sites": "resid_post", "into": ac.ActivationCache(), "reduce": "mean"}, OptionError, "mean is not joined"),
        ({"sites": "resid_post", "edits": {"resid_psot.1": torch.relu}}, ac.ActCacheError, "resid_post"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            ac.extract_batches(model, never(), **options)
    with pytest.raises(OptionError, match="not str"):
        ac.extract_batches("gpt2", never(), sites="resid_post")  # type: ignore[arg-type]


def test_fields_that_cannot_be_taken_apart() -> None:
    model = tiny_model("llama-dynamic")
    batch = padded(PROMPTS[:2], "right")
    with pytest.raises(PromptError, match=r"depend on the longest prompt .* the field 'position_ids'"):
        ac.extract_batches(model, [{**batch, "position_ids": torch.arange(17)[None]}], sites="resid_post.0")
    embeds, mask = torch.randn(2, 17, 32), batch["attention_mask"]
    with pytest.raises(PromptError, match="'inputs_embeds'"):
        ac.extract_batches(model, [{"inputs_embeds": embeds, "attention_mask": mask}], sites="resid_post.0")
    cache = ac.extract_batches(model, [{"inputs_embeds": embeds}], sites="resid_post.0")
    with torch.no_grad():
        close(cache["resid_post.0"][1], _block(model, embeds[1:])[0])


def _block(model: Any, embeds: Tensor) -> Tensor:
    found: list[Any] = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, _a, output: found.append(output))
    model(inputs_embeds=embeds)
    handle.remove()
    return found[0] if isinstance(found[0], Tensor) else found[0][0]
