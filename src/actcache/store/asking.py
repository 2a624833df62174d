"""Finding prompts as people give them: texts, token ids, chats, or a table."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError, OptionError, did_you_mean, nearest
from actcache.model.sites import POOLINGS, SITE_NAMES, Site
from actcache.store import tensors
from actcache.store.index import SpaceIndex
from actcache.store.joined_places import Joining
from actcache.store.keys import Ints
from actcache.store.lookup import locate, locate_all, pulled
from actcache.store.placement import Placement
from actcache.store.prompts import IDS, TEXT, PromptTable
from actcache.store.queries import Query
from actcache.store.records import COMPLETION, DERIVED, LABEL, METADATA, PULLED, SPARSE, TOKENS, is_result
from actcache.store.reports import stored_prompts
from actcache.store.site_names import in_order
from actcache.store.sparse import SparseSite, sites_among, sparse_name

_SHOWN = 12
# Texts are encoded, and their keys made, so many at a time.
_AT_ONCE = 1 << 13
_LAYOUTS = {TOKENS, SPARSE, *POOLINGS, DERIVED, COMPLETION, LABEL, METADATA}
_TEXT = np.array(TEXT, np.uint8)


def locate_any(
    index: SpaceIndex, prompts: Any, site: str, layout: str, *, check: bool
) -> tuple[list[tuple[Placement, Ints]], npt.NDArray[np.bool_]]:
    """Placements and whose they are, and which of `prompts` (None: all that have the site) were found, bool ``[B]``.

    Texts are looked for under every text context the space knows. Where something is missing, what lies elsewhere is
    listed once.
    """
    began = time.monotonic()
    located, found = locate_here(index, prompts, site, layout, check=check)
    if not is_complete(located, found) and pulled(index, began):
        return locate_here(index, prompts, site, layout, check=check)
    return located, found


def is_complete(located: Sequence[tuple[Placement, Ints]], found: npt.NDArray[np.bool_]) -> bool:
    """Whether something was asked for, and all of it found; as `locate_any` gives it."""
    if len(located) == 1 and found is located[0][0].found:
        # Of what is kept that was looked at before.
        return len(found) > 0 and located[0][0].all_found
    return len(found) > 0 and bool(found.all())


def locate_here(
    index: SpaceIndex, prompts: Any, site: str, layout: str, *, check: bool
) -> tuple[list[tuple[Placement, Ints]], npt.NDArray[np.bool_]]:
    """`locate_any` among what this host knows of."""
    if prompts is None:
        everything = locate_all(index, site, layout, check)
        if everything is not None:
            return [(everything, everything.every)], everything.found
        prompts = stored_prompts(index, site, layout)
    if isinstance(prompts, PromptTable):
        placement = locate(index, Query.by_tokens(prompts), [site], layout, check, pull=False)
        return [(placement, np.arange(len(prompts)))], placement.found
    given = tensors.as_list(prompts)
    index.refresh()
    located = []
    found = np.zeros(len(given), bool)
    # Nothing but texts is the usual case, and looking at each prompt in turn would take longer than finding it.
    plain = set(map(type, given)) == {str} and all(given)
    kind = np.broadcast_to(_TEXT, (len(given),))
    texts: Sequence[Any] = given
    if not plain:
        kind, texts = _kinds_and_texts(given)
    members = np.empty(0, np.int64) if plain else np.flatnonzero(kind == IDS)
    if len(members):
        table = PromptTable.build([given[i] for i in members])
        placement = locate(index, Query.by_tokens(table), [site], layout, check, pull=False)
        located.append((placement, members))
        found[members] = placement.found
    for context in index.contexts():
        members = np.flatnonzero((kind != IDS) & ~found)
        if len(members):
            some = texts if len(members) == len(given) else [texts[i] for i in members.tolist()]
            query = Query.by_text(some, TEXT if plain else kind[members], context)
            placement = locate(index, query, [site], layout, check, pull=False)
            located.append((placement, members))
            found[members] = placement.found
    return located, found


def stored(
    index: SpaceIndex, prompts: Any, site: str | None, pooling: str | None, offered: bool
) -> npt.NDArray[np.bool_]:
    """What `Store.contains` gives; `offered`: what is registered at the site can be fetched in that layout."""
    given = prompts if isinstance(prompts, PromptTable) else tensors.as_list(prompts)
    if site is None:
        found = contains_any(index, given, pooling)
    else:
        found = locate_any(index, given, site, pooling or TOKENS, check=False)[1]
        if offered and not found.all():
            found = found | locate_any(index, given, f"{PULLED}.{site}", PULLED, check=False)[1]
        for sparse in sparse_sites(index, site, pooling) if not found.all() else ():
            found = found | locate_any(index, given, sparse.columns[2], SPARSE, check=False)[1]
    if not found.any():
        require_known(index, site, pooling)
    return found


def sparse_sites(index: SpaceIndex, name: str, pooling: str | None) -> list[SparseSite]:
    """The sparse matrices that a space has under `name`, of whatever width."""
    with index.lock:
        held = {site for group in index.groups(SPARSE) for site in group.sites}
    wanted = sparse_name(name, pooling)
    return [site for site in sites_among(held) if wanted in (site.name, f"{site.name}.of{site.size}")]


def contains_any(index: SpaceIndex, given: Any, layout: str | None) -> npt.NDArray[np.bool_]:
    """Which prompts have anything stored (in `layout`, where given), bool ``[B]``."""
    began = time.monotonic()
    found = _contains(index, given, layout)
    if not found.all() and pulled(index, began):
        found = _contains(index, given, layout)
    return found


def _contains(index: SpaceIndex, given: Any, layout: str | None) -> npt.NDArray[np.bool_]:
    index.refresh()
    with index.lock:
        groups = index.all_groups() if layout is None else index.groups(layout)
        held = {(g.layout, next(iter(g.sites))) for g in groups}
    found = np.zeros(len(given), bool)
    for its_layout, any_site in sorted(held):
        found |= locate_here(index, given, any_site, its_layout, check=False)[1]
    return found


@dataclass
class Located:
    """Where prompts are, in the placements that know them: those given as ids, and those of each text context.

    `owner` int32 ``[B]``: the placement of each prompt (-1: none), `local`: its number there. `found` bool
    ``[B, sites]``.
    """

    placements: list[Placement]
    owner: npt.NDArray[np.int32]
    local: Ints
    found: npt.NDArray[np.bool_]

    def select(self, order: Ints) -> Located:
        """The prompts at `order`."""
        return Located(self.placements, self.owner[order], self.local[order], self.found[order])


def locate_sites(
    index: SpaceIndex, prompts: Sequence[Any], sites: Sequence[str], layout: str, *, check: bool
) -> Located:
    """Where `prompts` (texts, token ids, chats) are. A text of several contexts counts in the one that knows most."""
    began = time.monotonic()
    located = _locate_sites(index, prompts, sites, layout, check)
    if not located.found.all() and pulled(index, began):
        return _locate_sites(index, prompts, sites, layout, check)
    return located


def _locate_sites(index: SpaceIndex, prompts: Sequence[Any], sites: Sequence[str], layout: str, check: bool) -> Located:
    index.refresh()
    if 0 < len(prompts) <= _AT_ONCE:
        # A slice: prompts that lie in the store are read together much faster than one by one.
        return _locate_some(index, prompts[:], sites, layout, check)
    count, spill = len(prompts), index.spill
    owner, local = spill.full(count, -1, np.int32), spill.zeros(count, np.int64)
    located = Located([], owner, local, spill.zeros((count, len(sites)), bool))
    joining = Joining(sites, layout, spill)
    for start in range(0, count, _AT_ONCE):
        some = _locate_some(index, prompts[start : start + _AT_ONCE], sites, layout, check)
        located.found[start : start + _AT_ONCE] = some.found
        for number, placement in enumerate(some.placements):
            whose, begin = joining.add(placement)
            members = np.flatnonzero(some.owner == number)
            owner[start + members], local[start + members] = whose, begin + some.local[members]
    located.placements = joining.placements()
    return located


def _locate_some(index: SpaceIndex, prompts: Sequence[Any], sites: Sequence[str], layout: str, check: bool) -> Located:
    kind, texts = _kinds_and_texts(prompts)
    queries = []
    members = np.flatnonzero(kind == IDS)
    if len(members):
        queries.append((Query.by_tokens(PromptTable.build([prompts[i] for i in members.tolist()])), members))
    members = np.flatnonzero(kind != IDS)
    of_members = [texts[i] for i in members.tolist()]
    queries += [(Query.by_text(of_members, kind[members], c), members) for c in index.contexts() if of_members]
    count = len(prompts)
    found = np.zeros((count, len(sites)), bool)
    located = Located([], np.full(count, -1, np.int32), np.zeros(count, np.int64), found)
    for query, members in queries:
        placement = locate(index, query, list(sites), layout, check, pull=False)
        better = placement.found_each.sum(axis=1) > located.found[members].sum(axis=1)
        located.owner[members[better]] = len(located.placements)
        located.local[members[better]] = np.flatnonzero(better)
        located.found[members[better]] = placement.found_each[better]
        located.placements.append(placement)
    return located


def given_prompts(index: SpaceIndex, prompts: Any, sites: Sequence[str], layout: str) -> PromptTable:
    """What is stored of `prompts` (texts, token ids, chats), each different one once, in their order.

    Raises:
        NotCachedError: one of them is not stored at all `sites`.
    """
    given = tensors.as_list(prompts)
    located = locate_sites(index, given, sites, layout, check=False)
    missing = np.flatnonzero(~located.found.all(axis=1))
    if len(missing):
        raise NotCachedError(
            f"{len(missing)} of {len(given)} prompts have no {' and '.join(map(repr, sites))} in the store (the first "
            f"is prompt {int(missing[0])}): extract them first, or leave them out"
        )
    tables, order = [], []
    for number, placement in enumerate(located.placements):
        members = np.flatnonzero(located.owner == number)
        if len(members):
            local, back = np.unique(located.local[members], return_inverse=True)
            tables.append(placement.prompts(local).select(back))
            order.append(members)
    table = PromptTable.concatenate(tables, mixed=True).select(np.argsort(np.concatenate(order), kind="stable"))
    first = np.unique(np.ascontiguousarray(table.token_key).view("V16").reshape(-1), return_index=True)[1]
    return table if len(first) == len(table) else table.select(np.sort(first))


def _kinds_and_texts(given: Sequence[Any]) -> tuple[npt.NDArray[np.uint8], Sequence[Any]]:
    kinds, texts = zip(*(tensors.kind_of(prompt, i) for i, prompt in enumerate(given)), strict=True)
    return np.array(kinds, np.uint8), texts


def require_known(index: SpaceIndex, site: str | None, pooling: str | None) -> None:
    """OptionError for a site or a pooling (of one alone where the other is None) by which nobody could have stored
    anything, as far as can be told: neither a name of ours, nor like one that is stored in this space. Where nothing is
    stored every name may be meant."""
    with index.lock:
        groups = index.all_groups()
        layouts = {group.layout for group in groups}
        sites = {name for group in groups for name in group.sites}
    if not sites:
        return
    sites |= {matrix.name.rpartition(".")[2] for matrix in sites_among(sites)}
    if pooling is not None and pooling not in layouts and pooling not in _LAYOUTS:
        hint = did_you_mean(pooling, (layouts | _LAYOUTS) - {TOKENS})
        raise OptionError(
            f"pooling is {pooling!r}, which is none, and nothing is stored with it in space {index.folder.name}."
            f"{hint} Stored: {', '.join(map(_as_asked, sorted(layouts)))}."
        )
    if site is None:
        return
    named = Site.parse(site) if Site.looks_like(site) else None
    ours = is_result(site) or (named is not None and str(named) == site and named.complete and (named.layer or 0) >= 0)
    if not ours and _form(site) not in map(_form, sites):
        other = named is not None and str(named) != site
        hint = did_you_mean(site, [str(named)] if other else sites) or did_you_mean(site, SITE_NAMES)
        raise OptionError(
            f"{site!r} is not how a store names a site, and nothing is stored under it in space {index.folder.name}."
            f"{hint or _listed(in_order(sites))}"
        )


def _form(site: str) -> str:
    """A name without its numbers: of sites in which people have numbered something, some may be to come."""
    return re.sub(r"\d+", "0", site)


def _listed(sites: Sequence[str]) -> str:
    return f" Stored: {', '.join(sites[:_SHOWN])}{', ...' if len(sites) > _SHOWN else ''}."


def why_absent(index: SpaceIndex, site: str, layout: str) -> str:
    """Why nothing is found at `site` of `layout`, with the nearest that there is; empty where some prompts have it."""
    index.refresh()
    with index.lock:
        held: dict[str, set[str]] = {}
        for group in index.all_groups():
            held.setdefault(group.layout, set()).update(group.sites)
    space = f"space {index.folder.name}"
    if not held:
        return f"there is no {site!r}, since nothing is stored in {space}."
    if site in held.get(layout, ()):
        return ""
    there = sorted(other for other, sites in held.items() if site in sites)
    if there:
        return f"{site!r} is stored in {space} {' and '.join(map(_as_asked, there))}, not {_as_asked(layout)}."
    if layout not in held:
        near = nearest(layout, held.keys() - {TOKENS}, limit=1)
        hint = f" Did you mean {_as_asked(near[0])}?" if near else ""
        stored = ", ".join(map(_as_asked, sorted(held)))
        return f"nothing is stored {_as_asked(layout)} in {space}.{hint} Stored: {stored}."
    sites = in_order(held[layout])
    return f"no {site!r} is stored {_as_asked(layout)} in {space}.{did_you_mean(site, sites) or _listed(sites)}"


def _as_asked(layout: str) -> str:
    return "for every token (pooling=None)" if layout == TOKENS else f"with pooling={layout!r}"
