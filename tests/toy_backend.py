"""A backend that no package offers: rows out of the token ids themselves, and failures at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from actcache.derive.results import NOTHING, Asked
from actcache.errors import OptionError
from actcache.extract.backends import Reduction, Setting
from actcache.extract.backends.reducing import ArrivedRows, reduce_values
from actcache.model.invariance import BatchPolicy

WIDTH = 32


def value(site: str, token: int) -> list[float]:
    """What the toy says of one token."""
    layer = int(site.rpartition(".")[2])
    return [token + 1000.0 * layer + k / 64 for k in range(WIDTH)]


class Toy:
    """`fails` is asked before every pass, with the sequences, and may raise."""

    device = "cpu"
    identity: Mapping[str, Any] = {"name": "toy", "version": 1}
    retries = 0
    fails: Callable[[list[list[int]]], object] = staticmethod(lambda sequences: None)

    def __init__(self, setting: Setting) -> None:
        self.remote = setting.remote
        if setting.remote not in (False, True):
            raise OptionError(f"remote={setting.remote!r}: the toy knows True and False.")

    def check(self, sites: Sequence[str], asked: Asked = NOTHING) -> None:
        if asked:
            raise OptionError("the toy has no head: compute_perplexity=False")

    @contextmanager
    def session(self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING) -> Iterator[ToySession]:
        yield ToySession(sites, reduction)


class ToySession:
    policy = BatchPolicy()

    def __init__(self, sites: Sequence[str], reduction: Reduction) -> None:
        self._sites = sites
        self._reduction = reduction

    def run(self, sequences: Sequence[Any], positions: Sequence[Any] | None = None) -> ArrivedRows:
        Toy.fails([[int(token) for token in s] for s in sequences])
        lengths = [len(s) for s in sequences]
        rows = {}
        for site in self._sites:
            padded = torch.full((len(sequences), max(lengths), WIDTH), torch.nan)
            for row, tokens in zip(padded, sequences, strict=True):
                row[: len(tokens)] = torch.tensor([value(site, int(t)) for t in tokens])
            rows[site] = reduce_values(padded, lengths, self._reduction, positions)
        return ArrivedRows(rows)
