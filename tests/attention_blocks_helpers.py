"""Attention between groups of tokens, summed over pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def places(choice: Any, n: int) -> list[int]:
    """The positions of a group, by hand."""
    if isinstance(choice, tuple):
        return list(range(n))[slice(*choice)]
    return sorted({range(n)[p] for p in (choice if isinstance(choice, list) else [choice])})


def by_hand(pattern: Tensor, queries: Any, keys: Any, reduce: str, seen: Any) -> Tensor:
    n = pattern.shape[-1]
    pairs = [(q, k) for q in places(queries, n) for k in places(keys, n)]
    total = sum((pattern[:, q, k].double() for q, k in pairs), torch.zeros(len(pattern), dtype=torch.float64))
    if reduce == "sum":
        return total
    if reduce == "mean":
        return total / len(pairs)
    even = sum(1 / sum(seen(q, j) for j in range(n)) for q, k in pairs if seen(q, k))
    return total / even if even else torch.full((len(pattern),), math.nan, dtype=torch.float64)


def causal(q: int, k: int) -> bool:
    return k <= q
