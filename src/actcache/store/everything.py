"""All that has a site: worked out once for all sites that lie together, and kept until something comes or goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actcache.store.index import KEEP_OPEN, SpaceIndex
from actcache.store.keys import Group
from actcache.store.placement import Placement
from actcache.store.places import Part

# Prompts of which it is kept where they lie: some 45 bytes for each.
_MOST_KEPT = 1 << 20


@dataclass(frozen=True)
class Everything:
    """Every live prompt of `groups`, oldest first, at one of their sites; `numbers`: of its segments, in the index."""

    groups: tuple[Group, ...]
    numbers: Sequence[int]
    placement: Placement


def everything(index: SpaceIndex, site: str, layout: str) -> Everything | None:
    """All that has `site`; None where the keys of two agree, as those of two copies of one do. With the index's lock.

    A segment that has vanished is forgotten, and what held the same then is looked for.
    """
    known = index.everything
    if known is not None and known.groups == _groups(index, site, layout):
        return known
    held = index.open_all(lambda _, info: info.layout == layout and site in info.sites)
    held.sort(key=lambda held: (held[1].created_ns, held[1].name))
    live = [index.live(number) for number, _, _ in held]
    if not _distinct([i.prompt_key if m is None else i.prompt_key[m] for (_, i, _), m in zip(held, live, strict=True)]):
        return None
    rows = [np.arange(i.prompts) if m is None else np.flatnonzero(m) for (_, i, _), m in zip(held, live, strict=True)]
    slots = np.repeat(np.arange(len(held), dtype=np.int32), [len(prompts) for prompts in rows])
    part = Part((0,), slots, np.concatenate([np.empty(0, np.int64), *rows]))
    placement = Placement(len(slots), [site], layout, [part], [segment for _, _, segment in held])
    placement.found.flags.writeable = False
    # Looked for now: opening one that has vanished takes notice of what came in its place.
    found = Everything(_groups(index, site, layout), [number for number, _, _ in held], placement)
    # To look for more takes little beside reading it, and what is kept keeps memory, and files mapped.
    if len(held) <= KEEP_OPEN and len(slots) <= _MOST_KEPT:
        index.everything = found
    return found


def _groups(index: SpaceIndex, site: str, layout: str) -> tuple[Group, ...]:
    return tuple(group for group in index.groups(layout) if site in group.sites)


def _distinct(keys: Sequence[npt.NDArray[np.uint8]]) -> bool:
    """Whether the first words of all keys differ."""
    words = [np.ascontiguousarray(k).view(np.uint64)[:, 0] for k in keys]
    ordered = np.sort(np.concatenate(words)) if words else np.empty(0, np.uint64)
    return not (ordered[1:] == ordered[:-1]).any()
