"""What a store holds, in words and numbers: `CacheInfo`, `CachedPromptInfo`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import NotCachedError
from actcache.store.index import SpaceIndex
from actcache.store.prompts import PromptTable, text_keys
from actcache.store.records import TOKENS, SegmentInfo
from actcache.store.removal import count_distinct
from actcache.store.spaces import SpaceInfo
from actcache.store.statistics import Moments
from actcache.store.tensors import kind_of
from actcache.store.tombs import Keys, is_member

GB = 2**30


@dataclass(frozen=True)
class ModelCacheInfo:
    """One variant of a model in a store. `num_layers`: distinct layers held in any form."""

    model_name: str
    model_hash: str
    revision: str | None
    dtype: str | None
    size_bytes: int
    num_prompts: int
    num_layers: int
    has_pooled: bool
    has_perplexity: bool
    has_logits: bool

    @property
    def size_gb(self) -> float:
        return self.size_bytes / GB


@dataclass(frozen=True)
class CacheInfo:
    """What a store holds. Times are seconds since the epoch, None when it is empty."""

    cache_dir: Path
    total_size_bytes: int
    models: list[ModelCacheInfo]
    oldest_mtime: float | None = None
    newest_mtime: float | None = None
    cache_limit_bytes: int | None = None

    @property
    def total_size_gb(self) -> float:
        return self.total_size_bytes / GB


@dataclass(frozen=True)
class CachedPromptInfo:
    """What is stored for one prompt.

    `raw_layers`: layers whose residual stream is there for every token; `pooled`: pooling -> layers; `sites`:
    every stored site by layout ("tokens" or the pooling); `num_tokens` of the prompt, None where unknown;
    `variants`: every space of that model that holds it, newest first (the other fields describe the first).
    """

    raw_layers: list[int]
    pooled: dict[str, list[int]]
    sites: dict[str, list[str]]
    num_tokens: int | None
    variants: list[SpaceInfo]
    has_logits: bool = False
    logits_top_k: int | None = None
    has_perplexity: bool = False
    has_token_perplexity: bool = False
    router_layers: list[int] = field(default_factory=list)


def layers_of(sites: Iterable[str], name: str | None = None) -> list[int]:
    """The layers in site names like "resid_post.5" (of the site `name` only, where given)."""
    found = set()
    for site in sites:
        match = re.fullmatch(r"(?:\w+\.)?([a-z_]+)\.(\d+)(?:\.\d+)?", site)
        if match and name in (None, match[1]):
            found.add(int(match[2]))
    return sorted(found)


def describe_model(space: SpaceInfo, infos: Sequence[SegmentInfo]) -> ModelCacheInfo:
    """The line of one space in `CacheInfo`."""
    sites = {s for i in infos for s in i.sites}
    return ModelCacheInfo(
        space.model_name, space.space, space.revision, space.dtype, space.size_bytes, space.num_prompts,
        len(layers_of(sites)), any(i.layout != TOKENS for i in infos), "perplexity" in sites,
        any(s == "logits" or s.startswith("logits.") for s in sites),
    )  # fmt: skip


def count_prompts(index: SpaceIndex) -> int:
    """Distinct live prompts of a space."""
    with index.lock:
        keys = []
        for number, info in index.segments():
            live = index.live(number)
            keys.append(info.prompt_key if live is None else info.prompt_key[live])
    return count_distinct(keys)


def find_token_keys(index: SpaceIndex, prompts: Sequence[Any]) -> Keys:
    """Token keys uint8 ``[k, 16]`` of the stored prompts that `prompts` (texts, ids or chats) name.

    Texts are looked for under every text context of the space, so no tokenizer is needed.
    """
    ids, texts, kinds = [], [], []
    for i, prompt in enumerate(prompts):
        kind, text = kind_of(prompt, i)
        if text is None:
            ids.append(prompt)
        else:
            texts.append(text)
            kinds.append(kind)
    found = [PromptTable.build(ids).token_key]
    with index.lock:
        for context in index.contexts() if texts else ():
            keys = text_keys(texts, np.array(kinds, np.uint8), context)
            for number, info in index.segments():
                if info.text_context == context:
                    hit = is_member(info.text_key, keys)
                    live = index.live(number)
                    found.append(info.prompt_key[hit if live is None else hit & live])
    return np.concatenate(found)


def describe_prompt(index: SpaceIndex, prompt: Any) -> tuple[dict[str, set[str]], int | None] | None:
    """Sites per layout stored for `prompt`, and its number of tokens (None: unknown); None when it is not there."""
    index.refresh()
    keys = find_token_keys(index, [prompt])
    sites: dict[str, set[str]] = {}
    tokens: int | None = None
    with index.lock:
        for number, info in index.segments() if len(keys) else ():
            hit = is_member(info.prompt_key, keys)
            live = index.live(number)
            hit = hit if live is None else hit & live
            segment = index.open(number) if hit.any() else None
            if segment is not None:
                sites.setdefault(info.layout, set()).update(info.sites)
                ids = segment.prompts.tokens(int(np.flatnonzero(hit)[0]))
                # A text that came without a tokenizer has stand-ins for ids, whose number means nothing when pooled.
                if info.layout == TOKENS or (ids >= 0).all():
                    tokens = len(ids)
    return (sites, tokens) if sites else None


def prompt_info(sites: Mapping[str, set[str]], tokens: int | None, variants: list[SpaceInfo]) -> CachedPromptInfo:
    """The answer of `discover` from the sites of each layout."""
    everything = {s for names in sites.values() for s in names}
    return CachedPromptInfo(
        raw_layers=layers_of(sites.get(TOKENS, ()), "resid_post"),
        pooled={layout: layers_of(names, "resid_post") for layout, names in sorted(sites.items()) if layout != TOKENS},
        sites={layout: sorted(names) for layout, names in sorted(sites.items())},
        num_tokens=tokens,
        variants=variants,
        has_logits="logits" in everything,
        has_perplexity="perplexity" in everything,
        has_token_perplexity="token_nll" in everything,
        router_layers=layers_of(everything, "router_logits"),
    )


def stored_prompts(index: SpaceIndex, site: str | None, layout: str | None) -> PromptTable:
    """Distinct live prompts, oldest first; of the same ids, a copy with its text is preferred."""
    index.refresh()
    tables = []
    with index.lock:
        held = sorted(index.segments(), key=lambda held: (held[1].created_ns, held[1].name))
        for number, info in held:
            if (site is not None and site not in info.sites) or layout not in (None, info.layout):
                continue
            segment, live = index.open(number), index.live(number)
            if segment is not None:
                everything = np.ones(info.prompts, bool) if live is None else live
                tables.append(segment.prompts.select(everything))
    table = PromptTable.concatenate(tables, mixed=True)
    if not len(table):
        return table
    words = np.ascontiguousarray(table.token_key).view(np.uint64)
    order = np.lexsort((table.kind == 0, words[:, 1], words[:, 0]))
    first = np.ones(len(table), bool)
    first[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    return table.select(np.sort(order[first]))


def statistics(index: SpaceIndex, site: str, layout: str) -> Moments:
    """Moments of all live rows of `site`, each prompt once."""
    index.refresh()
    total: Moments | None = None
    with index.lock:
        held = [(n, i) for n, i in index.segments() if i.layout == layout and site in i.sites]
        held.sort(key=lambda held: index.rank[held[0]], reverse=True)
        if not held:
            raise NotCachedError(f"no {site!r} ({layout}) is stored in space {index.folder.name}")
        for (number, _), counts in zip(held, _counted(index, held), strict=True):
            segment = index.open(number)
            if segment is None:
                continue
            known = segment.moments(site)
            if known is None:
                raise NotCachedError(f"{site!r} holds integers, which have no statistics")
            total = total or Moments.empty(len(known.mean))
            if counts.all():
                total.merge(known.count, known.mean, known.m2)
                continue
            offset, matrix = segment.row_offset, segment.matrix(site)
            for prompt in np.flatnonzero(counts).tolist():
                total.update(matrix[int(offset[prompt]) : int(offset[prompt + 1])])
    assert total is not None
    return total


def _counted(index: SpaceIndex, held: Sequence[tuple[int, SegmentInfo]]) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
    """For each segment, newest first, the live prompts that no newer one has, and no later row of its own."""
    keys = np.ascontiguousarray(np.concatenate([i.prompt_key[::-1] for _, i in held])).view(np.uint64)
    live = np.concatenate([np.ones(i.prompts, bool) if (m := index.live(n)) is None else m[::-1] for n, i in held])
    order = np.lexsort((~live, keys[:, 1], keys[:, 0]))
    repeated = np.zeros(len(live), bool)
    repeated[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    parts = np.split(live & ~repeated, np.cumsum([i.prompts for _, i in held])[:-1])
    return [part[::-1] for part in parts]
