"""What `stream_activations` takes as a source, and the tokens there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from actcache.errors import OptionError
from actcache.extract.cached import CachedExtractor
from actcache.store.default import store_at
from actcache.store.records import TOKENS
from actcache.store.spaces import SpaceInfo, space_id
from actcache.store.store import Store
from actcache.stream.elsewhere import TokensElsewhere
from actcache.stream.stored import Address, StoredTokens, Tokens
from actcache.stream.tokens import Exclusion, asks_for_bos, exclusion


def opened(
    source: Any, sites: Sequence[str], *, space: Any, prompts: Any, pooling: str | None, exclude: Any
) -> tuple[list[Tokens], list[float] | None]:
    """The tokens of every source, and their weights where `source` gives some."""
    weights = None
    sources = [source]
    if isinstance(source, Mapping):
        sources, weights = list(source), list(source.values())
    elif isinstance(source, list | tuple):
        sources = list(source)
    if not sources:
        raise OptionError("no source to stream from: give one, a list of them, or {source: weight}.")
    if len(sources) > 1 and prompts is not None:
        raise OptionError("prompts= chooses among those of one source: stream several without.")
    return [_opened(one, tuple(sites), space, prompts, pooling, exclude) for one in sources], weights


def _opened(source: Any, sites: tuple[str, ...], space: Any, prompts: Any, pooling: str | None, exclude: Any) -> Tokens:
    cached = source if isinstance(source, CachedExtractor) else getattr(source, "cached", None)
    if isinstance(cached, CachedExtractor):
        return _of_cache(cached, sites, space, prompts, pooling, exclude)
    if isinstance(source, str | os.PathLike):
        return _of_dataset(source, sites, space, prompts, pooling, exclude)
    if not isinstance(source, Store):
        raise OptionError(
            f"source is a {type(source).__name__}: expected an ac.Store, an ac.UnifiedCache, or the name or folder of "
            "a dataset."
        )
    if space is None:
        known = source.spaces()
        if len(known) != 1:
            shown = "; ".join(f"{one.space} ({one.model_name})" for one in known) or "none"
            raise OptionError(f"space= says which space of the store is streamed. It has: {shown}.")
        space = known[0].space
    name = space.space if isinstance(space, SpaceInfo) else space
    leave_out = exclusion(exclude, None, known=False)
    _check_pooled(leave_out, pooling)
    return _tokens(source, Address(name, sites, pooling or TOKENS), prompts, leave_out)


def _of_dataset(
    dataset: Any, sites: tuple[str, ...], space: Any, prompts: Any, pooling: str | None, exclude: Any
) -> Tokens:
    """Of what a dataset has at `sites`, all of which is fetched into the default store first."""
    from actcache.share.pull import pull

    if space is not None:
        raise OptionError("space= is for an ac.Store: a dataset has its own.")
    leave_out = exclusion(exclude, None, known=False)
    _check_pooled(leave_out, pooling)
    store = store_at(None)
    info = pull(
        store, dataset, tensors=list(sites), layers=None, target_prompts=prompts, overwrite=False, token=None,
        materialize=True, num_workers=0, show=None, trust_names=False, revision=None,
    )[0]  # fmt: skip
    return _tokens(store, Address(info.space, sites, pooling or TOKENS), prompts, leave_out)


def _tokens(store: Store, address: Address, prompts: Any, leave_out: Exclusion) -> Tokens:
    table = store.common_prompts(address.space, address.sites, pooling=address.pooling, prompts=prompts)
    kind = TokensElsewhere if store.is_elsewhere else StoredTokens
    return kind(store, address, table, leave_out)


def _of_cache(
    cached: CachedExtractor, sites: tuple[str, ...], space: Any, prompts: Any, pooling: str | None, exclude: Any
) -> Tokens:
    if space is not None or pooling is not None:
        given = "space" if space is not None else "pooling"
        raise OptionError(f"{given}= is for an ac.Store: a UnifiedCache has its own.")
    source = cached.extractor.source
    own = None if cached.layout == TOKENS else cached.layout
    bos = getattr(source.tokenizer(), "bos_token_id", None) if asks_for_bos(exclude) else None
    leave_out = exclusion(exclude, bos, known=True)
    _check_pooled(leave_out, own)
    address = Address(space_id(source.identity().values), sites, cached.layout)
    return _tokens(cached.store, address, prompts, leave_out)


def _check_pooled(leave_out: object, pooling: str | None) -> None:
    if leave_out and pooling is not None:
        raise OptionError(f"exclude= leaves out tokens: vectors pooled by {pooling!r} belong to no single one.")
