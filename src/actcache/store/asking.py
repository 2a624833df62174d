"""Finding prompts as people give them: texts, token ids, chats, or a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store import tensors
from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints
from actcache.store.lookup import Query, locate, locate_all
from actcache.store.placement import Placement
from actcache.store.prompts import IDS, TEXT, PromptTable
from actcache.store.reports import stored_prompts

_TEXT = np.array(TEXT, np.uint8)


def locate_any(
    index: SpaceIndex, prompts: Any, site: str, layout: str, *, check: bool
) -> tuple[list[tuple[Placement, Ints]], npt.NDArray[np.bool_]]:
    """Placements and whose they are, and which of `prompts` (None: all that have the site) were found, bool ``[B]``.

    Texts are looked for under every text context the space knows.
    """
    if prompts is None:
        everything = locate_all(index, site, layout)
        if everything is not None:
            return [(everything, np.arange(len(everything)))], everything.found
        prompts = stored_prompts(index, site, layout)
    if isinstance(prompts, PromptTable):
        placement = locate(index, Query.by_tokens(prompts), [site], layout, check)
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
        placement = locate(index, Query.by_tokens(table), [site], layout, check)
        located.append((placement, members))
        found[members] = placement.found
    for context in index.contexts():
        members = np.flatnonzero((kind != IDS) & ~found)
        if len(members):
            some = texts if len(members) == len(given) else [texts[i] for i in members.tolist()]
            query = Query.by_text(some, TEXT if plain else kind[members], context)
            placement = locate(index, query, [site], layout, check)
            located.append((placement, members))
            found[members] = placement.found
    return located, found


def _kinds_and_texts(given: Sequence[Any]) -> tuple[npt.NDArray[np.uint8], Sequence[Any]]:
    kinds, texts = zip(*(tensors.kind_of(prompt, i) for i, prompt in enumerate(given)), strict=True)
    return np.array(kinds, np.uint8), texts
