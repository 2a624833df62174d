"""Prompts, architectures with attention, and a pass of one with edits of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import edit_helpers
from actcache.testing.tiny import FAMILIES, PAD

IDS = torch.tensor([[5, 9, 100, 7, 60, 41], [8, 3, 4, 50, 11, 90]])
OTHER = torch.tensor([[31, 12, 77, 60, 8, 5], [22, 90, 41, 17, 3, 44]])
LEFT = torch.tensor([[PAD, PAD, 9, 100, 7, 41], [8, 3, 4, 50, 6, 90]])
MIXERS = ("mamba", "mamba2")
ATTENTIVE = [family for family in FAMILIES if family not in MIXERS]


def run(model: Any, edits: Any = None, sites: Any = "logits", ids: Tensor = IDS, **kwargs: Any) -> Any:
    return edit_helpers.run(model, edits, sites, ids, **kwargs)
