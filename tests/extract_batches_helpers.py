"""Prompts, the batches a loader makes of them, and what each gives alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from actcache.testing.tiny import BOS, PAD

RNG = random.Random(3)
PROMPTS = [[BOS, *(RNG.randrange(3, 259) for _ in range(n))] for n in (4, 16, 2, 9, 9, 1, 20)]


def padded(prompts: list[list[int]], side: str, *, longest: int | None = None) -> dict[str, Tensor]:
    longest = longest or max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), PAD), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def in_batches(prompts: list[list[int]], form: str) -> Iterator[Any]:
    for start in (0, 3, 6):
        batch = prompts[start : start + 3]
        yield batch if form == "ids" else padded(batch, form, longest=24 if form == "far left" else None)


def alone(model: Any, prompt: list[int], path: str = "transformer.h.2") -> Tensor:
    """What a block returns for one prompt, by a hook of torch: [T, D]."""
    found: list[Tensor] = []

    def note(_m: Any, _a: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = model.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        model(torch.tensor([prompt]))
    handle.remove()
    return found[0][0]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
