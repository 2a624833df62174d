"""Prompts that are generated from, and every row of what is captured held against its sequence run alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actcache.testing.tiny import PAD
from reference import alone, relative_error

# Ends are made likely: with 259 tokens at random, a row would hardly ever meet its end by itself.
ENDS = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]
PROMPTS = [[5, 9, 100], [8, 8, 4, 200, 31], [7], [90, 91, 92, 93, 94, 95]]
SITES = ["attn_out.2", "resid_post.3", "logits"]


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def hold(cache: Any, model: Any, sequences: Tensor, prompts: list[list[int]], ends: list[int]) -> list[int]:
    """Every row of every site against its sequence run alone; returns the number of rows of each sequence."""
    width, per_prompt = max(map(len, prompts)), len(sequences) // len(prompts)
    assert torch.equal(cache.input_ids[cache.attention_mask], sequences[:, :-1][cache.attention_mask])
    lengths = []
    for row, sequence in enumerate(sequences.tolist()):
        prompt = prompts[row // per_prompt]
        made = sequence[width:]
        n_made = next((i + 1 for i, token in enumerate(made) if token in ends), len(made))
        ids = [*prompt, *made[:n_made]][:-1]
        mask = cache.attention_mask[row].tolist()
        assert mask[:width] == [False] * (width - len(prompt)) + [True] * len(prompt)
        for site in SITES:
            got, reference = cache.rows(site)[row], alone(model, ids, site)
            if site == "logits":
                # generate asks for the logits of the last position only.
                got, reference = got[: len(reference) - len(prompt) + 1], reference[len(prompt) - 1 :]
            elif len(got) > len(reference):
                # A sampled row's own end was fed once more before its padding: a row beyond the reference.
                assert len(got) == len(reference) + 1
                got = got[: len(reference)]
            assert relative_error(got, reference) < 1e-5, (row, site)
        lengths.append(len(ids))
    return lengths


def blocks(model: Any) -> str:
    return "transformer.h" if hasattr(model, "transformer") else "model.layers"
