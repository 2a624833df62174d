"""A loss of a tiny model, whose gradients are captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IDS = torch.tensor([[5, 9, 100, 7, 31], [8, 3, 4, 50, 6]])
H1, H2 = "transformer.h.1", "transformer.h.2"


def loss_of(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids[:, :3]
    logits: Tensor = model(ids, **kwargs).logits
    # Every token and every word counts, each in its own way.
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits * weights).sin().sum()
