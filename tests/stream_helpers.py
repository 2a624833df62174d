"""A store to stream from, and which tokens with which values come out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actcache as ac
from store_helpers import SITES, every_token, make_store, vector

SITE = SITES[0]
Token = tuple[int, int]


def streamed(folder: Path) -> tuple[ac.Store, str]:
    """Prompts 0 to 59, a few of them twice, in three segments."""
    store, space = make_store(folder)
    store.append(space, every_token(range(20)))
    store.append(space, every_token(range(15, 45)))
    store.append(space, every_token(range(45, 60)))
    return store, space


ALL = [(i, position) for i in range(60) for position in range(1 + i % 7)]


def expected(token: Token, site: str = SITE) -> npt.NDArray[np.float32]:
    return vector(token[0], site) + np.float32(token[1])


def tokens_of(stream: ac.ActivationStream, tokens: ac.TokenBatch) -> list[Token]:
    """The first id of each of these prompts, which is its number, and the positions."""
    first = [int(stream.prompts.tokens(i)[0]) for i in range(len(stream.prompts))]
    return [(first[p], q) for p, q in zip(tokens.prompt.tolist(), tokens.position.tolist(), strict=True)]


def taken(stream: ac.ActivationStream, batches: Any = None) -> list[Token]:
    """The tokens of an epoch in their order; each must have its own values."""
    found: list[Token] = []
    for batch, tokens in stream if batches is None else batches:
        names = tokens_of(stream, tokens)
        of_site = batch if isinstance(batch, dict) else {SITE: batch}
        for site, vectors in of_site.items():
            np.testing.assert_array_equal(vectors.numpy(), np.stack([expected(name, site) for name in names]))
        ids = [([i, *range(i % 7)])[q] for i, q in names]
        assert tokens.token_id.tolist() == ids
        found += names
    return found


def stream_of(made: tuple[ac.Store, str], sites: str | Sequence[str] = SITE, **options: Any) -> ac.ActivationStream:
    given = {"batch_size": 16, "with_tokens": True, **options}
    return ac.stream_activations(made[0], sites, space=made[1], **given)


def values_of(tokens: Sequence[Token], site: str = SITE) -> npt.NDArray[np.float64]:
    return np.stack([expected(token, site) for token in tokens]).astype(np.float64)
