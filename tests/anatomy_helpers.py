"""Models of a family never seen, and what a model captures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import actcache as ac

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])


def captured(model: nn.Module, *sites: str) -> ac.ActivationCache:
    with torch.no_grad(), ac.capture(model, sites=list(sites)) as cache:
        model(IDS)
    return cache


class Unheard(nn.Module):
    """A block of no family, with names that say nothing but which branch is attention."""

    def __init__(self, width: int, *, order: str) -> None:
        super().__init__()
        self.looking_attn = nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.rate = 0.25
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "post":
            x = self.one(x + self.looking_attn(x.cumsum(1)))
            return self.two(x + self.wide(x))
        mixed = self.looking_attn(self.one(x).cumsum(1))
        if self.order == "pre":
            x = x + mixed
            return x + self.wide(self.two(x))
        if self.order == "scaled":
            x = x + mixed * self.rate
            return x + self.wide(self.two(x)) * self.rate
        if self.order == "parallel":
            return x + (mixed + self.wide(self.two(x)))
        if self.order == "branch in place":
            wide = self.wide(self.two(x))
            wide += mixed
            return x + wide
        assert self.order == "gated"
        return x + mixed * torch.sigmoid(self.wide(self.two(x)))


class Unseen(nn.Module):
    """A language model of no family of transformers."""

    def __init__(self, order: str, width: int = 16) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 3, "vocab_size": 50, "hidden_size": width})()
        self.table = nn.Embedding(50, width)
        self.storeys = nn.ModuleList(Unheard(width, order=order) for _ in range(3))
        self.closing_norm = nn.LayerNorm(width)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for storey in self.storeys:
            x = storey(x)
        out: Tensor = self.closing_norm(x)
        return out
