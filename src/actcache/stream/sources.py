"""What `stream_activations` takes as a source, and the tokens there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import OptionError
from actcache.extract.cached import CachedExtractor
from actcache.store.records import TOKENS
from actcache.store.spaces import SpaceInfo, space_id
from actcache.store.store import Store
from actcache.stream.stored import Address, StoredTokens
from actcache.stream.tokens import asks_for_bos, exclusion


def opened(
    source: Any, sites: Sequence[str], *, space: Any, prompts: Any, pooling: str | None, exclude: Any
) -> tuple[list[StoredTokens], list[float] | None]:
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


def _opened(
    source: Any, sites: tuple[str, ...], space: Any, prompts: Any, pooling: str | None, exclude: Any
) -> StoredTokens:
    cached = source if isinstance(source, CachedExtractor) else getattr(source, "cached", None)
    if isinstance(cached, CachedExtractor):
        return _of_cache(cached, sites, space, prompts, pooling, exclude)
    if not isinstance(source, Store):
        raise OptionError(f"source is {_shown(source)}: expected an ac.Store or an ac.UnifiedCache.")
    if space is None:
        known = source.spaces()
        if len(known) != 1:
            shown = "; ".join(f"{one.space} ({one.model_name})" for one in known) or "none"
            raise OptionError(f"space= says which space of the store is streamed. It has: {shown}.")
        space = known[0].space
    name = space.space if isinstance(space, SpaceInfo) else space
    leave_out = exclusion(exclude, None, known=False)
    _check_pooled(leave_out, pooling)
    address = Address(name, sites, pooling or TOKENS)
    table = source.common_prompts(name, sites, pooling=pooling, prompts=prompts)
    return StoredTokens(source, address, table, leave_out)


def _of_cache(
    cached: CachedExtractor, sites: tuple[str, ...], space: Any, prompts: Any, pooling: str | None, exclude: Any
) -> StoredTokens:
    if space is not None or pooling is not None:
        given = "space" if space is not None else "pooling"
        raise OptionError(f"{given}= is for an ac.Store: a UnifiedCache has its own.")
    source = cached.extractor.source
    own = None if cached.layout == TOKENS else cached.layout
    bos = getattr(source.tokenizer(), "bos_token_id", None) if asks_for_bos(exclude) else None
    leave_out = exclusion(exclude, bos, known=True)
    _check_pooled(leave_out, own)
    address = Address(space_id(source.identity().values), sites, cached.layout)
    table = cached.store.common_prompts(address.space, sites, pooling=own, prompts=prompts)
    return StoredTokens(cached.store, address, table, leave_out)


def _check_pooled(leave_out: object, pooling: str | None) -> None:
    if leave_out and pooling is not None:
        raise OptionError(f"exclude= leaves out tokens: vectors pooled by {pooling!r} belong to no single one.")


def _shown(source: Any) -> str:
    return repr(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"
