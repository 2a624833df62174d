"""Edits beside the store: functions never reach it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actcache as ac
from actcache.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["The sky", "Snow is white", "a", "Grass is green"]


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def test_a_model_inside_an_edit_block_is_not_extracted(model: Any) -> None:
    cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), layers=[1])
    cache.get_activations(PROMPTS)
    for edits in ({"resid_post.0": lambda x: x * 2}, ac.ablate("resid_post.0")):
        message = r"inside an ac\.edit block.*'transformer\.h\.0'"
        with pytest.raises(ac.errors.ForeignHooksError, match=message), ac.edit(model, edits):
            cache.get_activations(["another"])
    # A capture changes nothing.
    with ac.capture(model, sites="resid_post", layers=1) as captured:
        assert torch.equal(cache.get_activations(["another"])[0], captured["resid_post.1"][:, -1])
