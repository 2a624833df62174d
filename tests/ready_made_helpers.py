"""Prompts, a vector, and what a tiny model gives under ready-made edits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actcache.testing.tiny import PAD
from edit_helpers import run

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
OTHER = torch.tensor([[31, 12, 77, 60], [22, 90, 41, 17]])
LEFT = torch.tensor([[PAD, PAD, 9, 100, 7], [8, 3, 4, 50, 6]])
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 2


def captured(
    model: Any, edits: Any, ids: Tensor = IDS, sites: Any = ("resid_pre", "resid_mid", "resid_post"), **kwargs: Any
) -> Any:
    return run(model, edits, [*sites, "logits"], ids, **kwargs)
