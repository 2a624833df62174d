"""Segments and batches that others are made of: what of them is kept, and whether they may be replaced together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actcache.store.damage import Remnant
from actcache.store.index import SpaceIndex
from actcache.store.keys import Mask
from actcache.store.mapping import Segment
from actcache.store.records import SegmentInfo


@dataclass
class Part:
    """A segment or a batch, by its number (-1 where the index knows none), and which of its prompts are kept."""

    number: int
    info: SegmentInfo
    keep: Mask


@dataclass
class Source(Part):
    """A segment that is to be replaced: what of it is kept, and the tombs that count for it.

    `keep`: the prompts of which all is intact; `remnants`: of which a part is.
    """

    segment: Segment
    tombs: tuple[str, ...]
    remnants: list[Remnant] = field(default_factory=list)

    @property
    def kept(self) -> Mask:
        """The prompts of which something is kept."""
        kept = self.keep.copy()
        for remnant in self.remnants:
            kept |= remnant.keep
        return kept


def in_order(index: SpaceIndex, sources: list[Source]) -> list[Source]:
    """The sources that may be merged: what is merged counts as being as new as the newest of them.

    A source stays as it is where it holds a prompt of which a newer copy, older than that, lies in a segment that
    stays apart (it has other sites, or another size): that copy would be read no more.
    """
    while len(sources) > 1:
        with index.lock:
            # What has vanished while the sources were opened may lie in a segment that is not known yet.
            index.refresh()
            overtaken = overtaken_by_others(index, sources)
        if not overtaken:
            break
        sources = [source for k, source in enumerate(sources) if k not in overtaken]
    return sources


def overtaken_by_others(index: SpaceIndex, sources: Sequence[Part]) -> set[int]:
    """Which of the sources hold a prompt of which a newer copy lies elsewhere, not newer than the newest source.

    Of the same time, too: between two merged segments that share their newest source chance decides.
    """
    mine = {s.number for s in sources}
    counts = [int(s.keep.sum()) for s in sources]
    owner = np.repeat(np.arange(len(sources)), counts)
    own = np.repeat([s.info.created_ns for s in sources], counts)
    oldest, latest = (bound(s.info.created_ns for s in sources) for bound in (min, max))
    # Not by rank in the index, which a source may have left since it was opened. The last one is for what is not found.
    known = dict(index.parts())
    if not any(oldest <= info.created_ns <= latest for number, info in known.items() if number not in mine):
        return set()
    created = np.full(max(known, default=0) + 2, -1, np.int64)
    created[list(known)] = [info.created_ns for info in known.values()]
    sites = set(sources[0].info.sites)
    found: set[int] = set()
    for kind in ("token", "text"):
        keys = np.concatenate([(s.info.prompt_key if kind == "token" else s.info.text_key)[s.keep] for s in sources])
        for group in index.groups(sources[0].info.layout):
            if group.sites.isdisjoint(sites):
                continue
            newest = index.find(group, kind, keys)[0]
            age = created[newest]
            between = (age >= own) & (age <= latest)
            found.update(owner[between & ~np.isin(newest, list(mine))].tolist())
    return found
