"""What a store holds, in words and numbers: `CacheInfo`, its prompts, its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import NotCachedError
from actcache.store.bringing import fetch_together
from actcache.store.distinct import Distinct, count_keys
from actcache.store.dtypes import name_of
from actcache.store.index import SpaceIndex
from actcache.store.keys import Mask
from actcache.store.mapping import Segment
from actcache.store.placement import Placement
from actcache.store.places import Part
from actcache.store.prompts import PromptTable, text_keys
from actcache.store.pulled import expanded
from actcache.store.records import COMPLETION, DERIVED, SPARSE, TOKENS, SegmentInfo, is_result
from actcache.store.site_names import layers_of, logits_of
from actcache.store.spaces import SpaceInfo
from actcache.store.statistics import Moments
from actcache.store.tensors import kind_of
from actcache.store.tombs import Keys, is_member
from actcache.store.variants import edit_text

GB = 2**30


@dataclass(frozen=True)
class ModelCacheInfo:
    """One variant of a model in a store.

    Attributes:
        model_hash: the id of its space.
        revision, dtype, attn_implementation: of the model that was run; None where that is not known.
        num_layers: distinct layers held in any form.
        has_perplexity, has_logits: whether perplexity, and logits (all of a position, or its largest), can be read of
            some prompts.
        variant: what tells it from the other variants of the model, in words.
        edits: the ready-made edits it was run with, in words; none for the model as it is.
        imported: where it comes from when only its name is known; such entries are used only with `trust_names`.
        stored_dtypes: the dtypes in which vectors are stored.
        pulled: the dataset and commit that it was pulled from; what can be fetched of it counts as held.
    """

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
    variant: str = ""
    attn_implementation: str | None = None
    edits: list[str] = field(default_factory=list)
    imported: str | None = None
    stored_dtypes: list[str] = field(default_factory=list)
    pulled: str | None = None

    @property
    def size_gb(self) -> float:
        """The size in GB of 2**30 bytes."""
        return self.size_bytes / GB


@dataclass(frozen=True)
class CacheInfo:
    """What a store holds. Times are seconds since the epoch, None when it is empty.

    `cache_dir`: its folder, or the URL of what lies elsewhere.
    """

    cache_dir: str | Path
    total_size_bytes: int
    models: list[ModelCacheInfo]
    oldest_mtime: float | None = None
    newest_mtime: float | None = None
    cache_limit_bytes: int | None = None

    @property
    def total_size_gb(self) -> float:
        """The size of everything in GB of 2**30 bytes."""
        return self.total_size_bytes / GB


_AT_ONCE = 1 << 16


def describe_model(space: SpaceInfo, infos: Sequence[SegmentInfo], variant: str) -> ModelCacheInfo:
    """The line of one space in `CacheInfo`."""
    by_layout: dict[str, set[str]] = {}
    for info in infos:
        by_layout.setdefault(info.layout, set()).update(info.sites)
    if space.pulled:
        by_layout = expanded(space, by_layout)
    sites = {site for names in by_layout.values() for site in names}
    vectors = [(i.layout, code) for i in infos for site, code, _ in i.columns if not is_result(site)]
    return ModelCacheInfo(
        space.model_name, space.space, space.revision, space.dtype, space.size_bytes, space.num_prompts,
        len(layers_of(sites)), _has_pooled(by_layout),
        "perplexity" in by_layout.get(DERIVED, ()), bool(logits_of(by_layout)), variant, space.attn_implementation,
        [edit_text(e) for e in space.edits], space.imported,
        sorted({name_of(code) for _, code in vectors}), space.pulled,
    )  # fmt: skip


def _has_pooled(by_layout: Mapping[str, set[str]]) -> bool:
    return any(layout not in (TOKENS, SPARSE) and not all(map(is_result, sites)) for layout, sites in by_layout.items())


def count_prompts(index: SpaceIndex) -> int:
    """Distinct live prompts of a space. One that the model continued counts once, with what it became."""
    keys: dict[bool, list[tuple[Keys, Mask | None]]] = {}
    with index.lock:
        for number, info in index.parts():
            keys.setdefault(info.layout == COMPLETION, []).append((info.prompt_key, index.live(number)))
    # Completions lie under the prompts, all else of such a space under prompts with their completions.
    return max((count_keys(held, index.spill) for held in keys.values()), default=0)


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
            for number, info in index.parts():
                if info.text_context == context:
                    hit = is_member(info.text_key, keys)
                    live = index.live(number)
                    found.append(info.prompt_key[hit if live is None else hit & live])
    return np.concatenate(found)


def describe_prompt(index: SpaceIndex, prompt: Any) -> tuple[dict[str, set[str]], int | None] | None:
    """Sites per layout stored for `prompt`, and its number of tokens (None: unknown); None when it is not there."""
    index.refresh()
    keys = find_token_keys(index, [prompt])
    sites = sites_of(index, keys)
    found = _first_of(index, keys) if sites else None
    if found is None:
        return None
    # A text that came without a tokenizer has stand-ins for ids, whose number means nothing when pooled.
    known = TOKENS in sites or (found.token_ids >= 0).all()
    return sites, len(found.token_ids) if known else None


def sites_of(index: SpaceIndex, keys: Keys) -> dict[str, set[str]]:
    """The sites, by layout, at which live prompts with these token keys are stored."""
    sites: dict[str, set[str]] = {}
    index.refresh()
    with index.lock:
        for _, info, _ in index.open_all(lambda number, info: bool(_live_hits(index, number, info, keys).any())):
            sites.setdefault(info.layout, set()).update(info.sites)
    return sites


def find_prompt(index: SpaceIndex, prompt: Any) -> PromptTable | None:
    """The stored prompt that `prompt` names, with its text where any copy has it; None when it is not there."""
    index.refresh()
    return _first_of(index, find_token_keys(index, [prompt]))


def _first_of(index: SpaceIndex, keys: Keys) -> PromptTable | None:
    """A live prompt with one of these token keys; of several copies one of every token, then one that has its text."""
    best: tuple[tuple[bool, bool], PromptTable] | None = None
    with index.lock:
        held = index.open_all(lambda number, info: bool(_live_hits(index, number, info, keys).any()))
        for number, info, segment in held:
            table = segment.prompts.select(np.flatnonzero(_live_hits(index, number, info, keys))[:1])
            rank = info.layout == TOKENS, bool(table.kind[0])
            if best is None or rank > best[0]:
                best = rank, table
    return None if best is None else best[1]


def _live_hits(index: SpaceIndex, number: int, info: SegmentInfo, keys: Keys) -> Mask:
    if not len(keys):
        return np.zeros(info.prompts, bool)
    hit, live = is_member(info.prompt_key, keys), index.live(number)
    return hit if live is None else hit & live


def stored_prompts(index: SpaceIndex, site: str | None, layout: str | None) -> PromptTable:
    """Distinct live prompts, oldest first; of the same ids, a copy with its text is preferred."""
    index.refresh()
    tables = []
    with index.lock:
        held = index.open_all(lambda _, info: site in (None, *info.sites) and layout in (None, info.layout))
        for number, info, segment in sorted(held, key=lambda held: (held[1].created_ns, held[1].name)):
            live = index.live(number)
            tables.append(segment.prompts.select(np.ones(info.prompts, bool) if live is None else live))
    table = PromptTable.concatenate(tables, mixed=True)
    if not len(table):
        return table
    words = np.ascontiguousarray(table.token_key).view(np.uint64)
    order = np.lexsort((table.kind == 0, words[:, 1], words[:, 0]))
    first = np.ones(len(table), bool)
    first[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    return table.select(np.sort(order[first]))


def stored_places(index: SpaceIndex) -> Placement:
    """`stored_prompts` of a whole space as where they are: texts and ids stay in their segments."""
    index.refresh()
    with index.lock:
        held = index.open_all(lambda _, info: True)
        held.sort(key=lambda held: (held[1].created_ns, held[1].name))
        known = Distinct(sum(info.prompts for _, info, _ in held), index.spill)
        for number, info, segment in held:
            known.add(info.prompt_key, index.live(number), segment.prompts.kind == 0)
    first, start, at = known.first(), 0, 0
    count = sum(int(np.count_nonzero(first[i : i + _AT_ONCE])) for i in range(0, len(first), _AT_ONCE))
    part = Part((0,), index.spill.empty(count, np.int32), index.spill.empty(count, np.int64))
    for slot, (_, info, _) in enumerate(held):
        chosen = np.flatnonzero(first[start : start + info.prompts])
        part.segment[at : at + len(chosen)], part.prompt[at : at + len(chosen)] = slot, chosen
        start, at = start + info.prompts, at + len(chosen)
    everything = np.broadcast_to(True, count)
    return Placement(count, [""], "", [part], [segment for _, _, segment in held], found=everything)


def statistics(index: SpaceIndex, site: str, layout: str) -> Moments:
    """Moments of all live rows of `site`, each prompt once."""
    total: Moments | None = None
    held = counted(index, site, layout)
    _fetch_some(site, held)
    for segment, counts in held:
        known = segment.moments(site)
        if known is None:
            raise NotCachedError(f"{site!r} holds integers, which have no statistics")
        total = total or Moments.empty(len(known.mean))
        if counts.all():
            total.merge(known)
            continue
        offset = segment.row_offset
        change = np.flatnonzero(np.diff(np.concatenate([[False], counts, [False]])))
        for start, stop in offset[change].reshape(-1, 2).tolist():
            total.update(segment.values(site, start, stop))
    if total is None:
        raise NotCachedError(f"no {site!r} ({layout}) is stored in space {index.folder.name}")
    return total


def _fetch_some(site: str, held: Sequence[tuple[Segment, Mask]]) -> None:
    """Fetch the rows from which moments must be computed anew, all at the same time."""
    wanted = []
    for segment, counts in held:
        if segment.source is not None and not counts.all():
            prompts = np.flatnonzero(counts)
            wanted.append((segment.checks, [site], segment.row_offset[prompts], segment.row_offset[prompts + 1]))
    try:
        fetch_together(wanted)
    except FileNotFoundError as error:
        raise NotCachedError(f"some of it has gone meanwhile: ask again ({error})") from error


def counted(index: SpaceIndex, site: str, layout: str) -> list[tuple[Segment, Mask]]:
    """The segments that hold `site`, and which of their prompts count: live, and read from there."""
    index.refresh()
    with index.lock:
        held = index.open_all(lambda _, info: info.layout == layout and site in info.sites)
        held.sort(key=lambda held: index.rank[held[0]], reverse=True)
        counts = _counted(index, [(number, info) for number, info, _ in held]) if held else []
    return [(segment, mask) for (_, _, segment), mask in zip(held, counts, strict=True)]


def _counted(index: SpaceIndex, held: Sequence[tuple[int, SegmentInfo]]) -> list[Mask]:
    """For each segment, newest first, the live prompts that no newer one has, and no later row of its own."""
    keys = np.ascontiguousarray(np.concatenate([i.prompt_key[::-1] for _, i in held])).view(np.uint64)
    live = np.concatenate([np.ones(i.prompts, bool) if (m := index.live(n)) is None else m[::-1] for n, i in held])
    order = np.lexsort((~live, keys[:, 1], keys[:, 0]))
    repeated = np.zeros(len(live), bool)
    repeated[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    parts = np.split(live & ~repeated, np.cumsum([i.prompts for _, i in held])[:-1])
    return [part[::-1] for part in parts]
