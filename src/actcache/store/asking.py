"""Finding prompts as people give them: texts, token ids, chats, or a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import did_you_mean, nearest
from actcache.store import tensors
from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints
from actcache.store.lookup import Query, locate, locate_all, pulled
from actcache.store.placement import Placement
from actcache.store.prompts import IDS, TEXT, PromptTable
from actcache.store.records import TOKENS
from actcache.store.reports import stored_prompts
from actcache.store.site_names import in_order

_SHOWN = 12
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
    if not (len(found) and found.all()) and pulled(index, began):
        return locate_here(index, prompts, site, layout, check=check)
    return located, found


def locate_here(
    index: SpaceIndex, prompts: Any, site: str, layout: str, *, check: bool
) -> tuple[list[tuple[Placement, Ints]], npt.NDArray[np.bool_]]:
    """`locate_any` among what this host knows of."""
    if prompts is None:
        everything = locate_all(index, site, layout)
        if everything is not None:
            return [(everything, np.arange(len(everything)))], everything.found
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


def contains_any(index: SpaceIndex, given: Any) -> npt.NDArray[np.bool_]:
    """Which prompts have anything stored, bool ``[B]``."""
    began = time.monotonic()
    found = _contains(index, given)
    if not found.all() and pulled(index, began):
        found = _contains(index, given)
    return found


def _contains(index: SpaceIndex, given: Any) -> npt.NDArray[np.bool_]:
    index.refresh()
    with index.lock:
        held = {(g.layout, next(iter(g.sites))) for g in index.all_groups()}
    found = np.zeros(len(given), bool)
    for layout, any_site in sorted(held):
        found |= locate_here(index, given, any_site, layout, check=False)[1]
    return found


def _kinds_and_texts(given: Sequence[Any]) -> tuple[npt.NDArray[np.uint8], Sequence[Any]]:
    kinds, texts = zip(*(tensors.kind_of(prompt, i) for i, prompt in enumerate(given)), strict=True)
    return np.array(kinds, np.uint8), texts


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
    hint = did_you_mean(site, sites) or f" Stored: {', '.join(sites[:_SHOWN])}{', ...' if len(sites) > _SHOWN else ''}."
    return f"no {site!r} is stored {_as_asked(layout)} in {space}.{hint}"


def _as_asked(layout: str) -> str:
    return "for every token (pooling=None)" if layout == TOKENS else f"with pooling={layout!r}"
