"""The difference of means, against numpy and against vectors that are read one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import OptionError
from actcache.testing.tiny import tiny_model

POSITIVE = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2]]
NEGATIVE = [[9, 8, 7, 6, 5], [3, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2", seed=2, n_layer=3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_arrays_of_any_dtype(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    # Large common parts are lost where sums are not taken in float64.
    a, b = (rng.standard_normal((n, 3, 5)).astype(np.float64) + 1000 for n in (700, 90))
    a, b = a.astype(dtype), b.astype(dtype)
    found = ac.mean_difference(a, b)
    expected = [
        [np.mean([float(v) for v in a[:, k, d]]) - np.mean([float(v) for v in b[:, k, d]]) for d in range(5)]
        for k in range(3)
    ]
    assert found.dtype == np.float32 and found.shape == (3, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    as_mapping = ac.mean_difference({k: a[:, k] for k in range(3)}, {k: b[:, k] for k in range(3)})
    np.testing.assert_array_equal(as_mapping, found)


def test_tensors_and_lists() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 2, 4).bfloat16(), torch.randn(3, 2, 4).bfloat16().requires_grad_()
    found = ac.mean_difference(a, b)
    np.testing.assert_allclose(found, (a.double().mean(0) - b.double().mean(0)).detach().numpy(), rtol=1e-6, atol=1e-7)
    # Of lists each token counts the same.
    np.testing.assert_array_equal(ac.mean_difference([a[:1], a[1:]], [b]), found)


@pytest.mark.parametrize("pooled", [True, False])
def test_prompts_of_a_cache(folder: Path, tmp_path: Path, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actcache.probing.difference._PROMPTS_AT_ONCE", 3)
    cache = ac.UnifiedCache(folder, store=tmp_path, cache_pooled=pooled)
    found = ac.mean_difference(POSITIVE, NEGATIVE, cache=cache)
    pooling = "last_token" if pooled else None
    means = []
    for prompts in (POSITIVE, NEGATIVE):
        rows = [ac.activations(folder, [p], pooling=pooling, store=tmp_path)[0] for p in prompts]
        rows = [row[None] for row in rows] if pooled else rows
        means.append(np.concatenate(rows).astype(np.float64).mean(0))
    np.testing.assert_allclose(found, means[0] - means[1], rtol=1e-5, atol=1e-7)
    some = ac.mean_difference(POSITIVE, NEGATIVE, cache=cache, layers=[2, 0])
    np.testing.assert_array_equal(some, found[[2, 0]])


def test_a_row_steers(folder: Path, tmp_path: Path) -> None:
    direction = ac.mean_difference(POSITIVE, NEGATIVE, cache=ac.UnifiedCache(folder, store=tmp_path))
    model = tiny_model("gpt2", seed=2, n_layer=3)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    plain = ac.run_with_cache(model, inputs, sites="resid_post.1")[1]
    with ac.edit(model, ac.steer("resid_post.1", direction[1])):
        steered = ac.run_with_cache(model, inputs, sites="resid_post.1")[1]
    change = (steered["resid_post.1"] - plain["resid_post.1"])[0]
    assert torch.allclose(change, torch.from_numpy(direction[1]).expand_as(change), atol=1e-5)


def test_several_sites_need_a_choice(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, store=tmp_path, sites=("resid_post", "attn_out"))
    with pytest.raises(OptionError, match="site="):
        ac.mean_difference(POSITIVE, NEGATIVE, cache=cache)
    found = ac.mean_difference(POSITIVE, NEGATIVE, cache=cache, site="attn_out")
    alone = ac.UnifiedCache(folder, store=tmp_path, sites="attn_out")
    np.testing.assert_array_equal(found, ac.mean_difference(POSITIVE, NEGATIVE, cache=alone))
    assert not alone.model_loaded


X = np.zeros((4, 2, 3))


@pytest.mark.parametrize(
    ("positive", "negative", "options", "message"),
    [
        (X, np.zeros((4, 3, 3)), {}, "layers"),
        (X, np.zeros((4, 2, 5)), {}, "wide"),
        (X[0], X, {}, r"\(2, 3\)"),
        (X[:0], X, {}, "empty"),
        ([X[0]], X, {}, r"\[T, L, D\]"),
        ([X, np.zeros((1, 2, 4))], X, {}, r"\[T, L, D\]"),
        ([], X, {}, r"\[T, L, D\]"),
        ({0: X[:, 0]}, {1: X[:, 0]}, {}, "layers"),
        ({}, X, {}, "mapping"),
        (np.where(np.arange(4)[:, None, None] == 2, np.nan, X), X, {}, "row 2"),
        (X.astype(str), X, {}, "numbers"),
        (X, X, {"layers": [0]}, "cache="),
        (["a text"], ["another"], {}, "positive holds texts: pass cache="),
        (["a"], ["b"], {"cache": "gpt2"}, "cache is 'gpt2': expected an ac.UnifiedCache"),
    ],
)
def test_what_does_not_fit_is_said(positive: Any, negative: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ac.mean_difference(positive, negative, **options)


def test_no_prompts_have_no_mean(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, store=tmp_path)
    with pytest.raises(OptionError, match="negative has no prompts"):
        ac.mean_difference(["a"], [], cache=cache)
    assert not cache.model_loaded and not list(tmp_path.rglob("*.safetensors"))
