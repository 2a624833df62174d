"""An autoencoder of a few lines, and vectors that are stored for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import actcache as ac
from actcache.store.store import Store

WIDTH, N, SITE = 8, 32, "resid_post.1"
PROMPTS = [[i + 1, *range(i % 7)] for i in range(40)]
SPACE = ac.new_space("org/model", weights="abc")


class Sae(nn.Module):
    """An autoencoder of a few lines, which notes what it was given."""

    def __init__(self, seed: int = 0, width: int = WIDTH, threshold: float = 0.5, dtype: Any = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Linear(width, N, dtype=dtype)
        self.threshold = threshold
        # Not an attribute that says what it computes, as a list would.
        self.log = SimpleNamespace(seen=[])

    @property
    def seen(self) -> list[tuple[int, ...]]:
        return self.log.seen

    def encode(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(tuple(x.shape))
        return self.encode_of(x)

    def encode_of(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - self.threshold).relu()


def vectors(prompt: list[int]) -> Tensor:
    return torch.randn(len(prompt), WIDTH, generator=torch.Generator().manual_seed(prompt[0]))


def new_store(folder: Path, **options: Any) -> Store:
    store = Store(folder / "store", index_dir=folder / "index", **options)
    store.write(SPACE, PROMPTS, {SITE: [vectors(p) for p in PROMPTS]})
    return store


def same(features: ac.Features, sae: Sae, prompts: list[Any] = PROMPTS) -> None:
    with torch.no_grad():
        for found, prompt in zip(features.read(prompts), prompts, strict=True):
            torch.testing.assert_close(found.to_dense(), sae.encode_of(vectors(prompt)), rtol=1e-5, atol=1e-6)
