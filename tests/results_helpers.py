"""Perplexity and logits of a model alone, and what a cache gives held against them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import actcache as ac
import zoo

# How far logits may be from the model's own, relative to the largest.
LOGITS = 1e-5
PROMPTS = zoo.prompts_of(0, [1, 2, 7, 8, 13, 17])


def logits_alone(family: str, prompt: list[int]) -> Tensor:
    """The model's own logits of one prompt ``[T, V]``."""
    return zoo.reference(family, 0, tuple(prompt))["logits"].double()


def perplexity_alone(family: str, prompt: list[int]) -> np.ndarray[Any, Any]:
    """exp of the cross-entropy of each token but the first, in float64."""
    if len(prompt) == 1:
        return np.empty(0)
    given = logits_alone(family, prompt)[:-1]
    return torch.nn.functional.cross_entropy(given, torch.tensor(prompt[1:]), reduction="none").exp().numpy()


def features(each: np.ndarray[Any, Any]) -> list[float]:
    return [float(np.exp(np.log(each).mean())), each.min(), each.max()] if len(each) else [1.0, 1.0, 1.0]


def check_perplexity(cache: ac.UnifiedCache, family: str, tolerance: float = 1e-4) -> None:
    """Against the model alone, `tolerance` relative."""
    found, each = cache.get_perplexity(PROMPTS), cache.get_token_perplexity(PROMPTS)
    assert found.shape == (len(PROMPTS), 3)
    assert found.dtype == np.float32
    for prompt, three, tokens in zip(PROMPTS, found, each, strict=True):
        expected = perplexity_alone(family, prompt)
        assert tokens.shape == expected.shape
        np.testing.assert_allclose(tokens, expected, rtol=tolerance)
        np.testing.assert_allclose(three, features(expected), rtol=tolerance)


def check_logits(found: ac.CachedLogits, family: str, tolerance: float = LOGITS) -> None:
    for i, prompt in enumerate(PROMPTS):
        expected = logits_alone(family, prompt)
        expected = expected if found.positions == "all" else expected[-1:]
        size = float(expected.abs().max())
        values, mask = found.values[i].double(), found.mask[i]
        assert mask.tolist() == [k < len(expected) for k in range(mask.shape[0])]
        assert not values[~mask].any()
        values = values[mask]
        if found.top_k is None:
            assert found.indices is None
            assert float((values - expected).abs().max()) <= tolerance * size
            best = expected.topk(2).values
            clear = best[:, 0] - best[:, 1] > 2 * tolerance * size
            assert torch.equal(values.argmax(-1)[clear], expected.argmax(-1)[clear])
        else:
            assert found.indices is not None
            assert found.indices.dtype is torch.int32
            assert (found.indices[i][~mask] == -1).all()
            indices = found.indices[i][mask].long()
            assert float((values - expected.topk(found.top_k).values).abs().max()) <= tolerance * size
            # Which tokens these are is told by their own logits: near ties may come in either order.
            assert float((expected.gather(-1, indices) - values).abs().max()) <= tolerance * size
            assert all(len(set(row)) == found.top_k for row in indices.tolist())
