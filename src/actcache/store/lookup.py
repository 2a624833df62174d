"""Finding prompts: by key in the index, then by content in the segment, then by checksum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from actcache.store.files import log
from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.placement import Part, Placement
from actcache.store.prompts import PromptTable, encode_texts, text_digests

_ATTEMPTS = 16


class Query:
    """Prompts to look for: their keys, and the bytes that a hit must equal."""

    def __init__(self, kind: str, keys: npt.NDArray[np.uint8], content: list[bytes]) -> None:
        self.kind = kind
        self.keys = keys
        self.content = content
        self.kinds: npt.NDArray[np.uint8] | None = None
        self.context = ""

    @classmethod
    def by_text(cls, texts: Sequence[str], kinds: Sequence[int] | npt.NDArray[np.uint8] | int, context: str) -> Query:
        content = encode_texts(texts)
        query = cls("text", text_digests(content, kinds, context), content)
        query.kinds = np.broadcast_to(np.asarray(kinds, np.uint8), (len(texts),))
        query.context = context
        return query

    @classmethod
    def by_tokens(cls, table: PromptTable) -> Query:
        data = np.ascontiguousarray(table.token_ids, "<i4").tobytes()
        ends = (table.token_offset * 4).tolist()
        return cls("token", table.token_key, [data[a:b] for a, b in pairwise(ends)])

    def __len__(self) -> int:
        return len(self.content)

    def matches(self, segment: Segment, members: Ints, prompts: Ints) -> npt.NDArray[np.bool_]:
        """Which of the queries `members` are exactly what `segment` holds as `prompts`."""
        if self.kind == "token":
            return segment.holds("token", prompts, [self.content[i] for i in members.tolist()])
        if segment.prompts.text_context != self.context:
            return np.zeros(len(members), bool)
        same = segment.holds("text", prompts, [self.content[i] for i in members.tolist()])
        assert self.kinds is not None
        return np.asarray(same & (segment.prompts.kind[prompts] == self.kinds[members]))


class _Changed(Exception):
    """A segment went away or turned out damaged while it was looked up: look again."""


def locate(index: SpaceIndex, query: Query, sites: Sequence[str], layout: str, check: bool) -> Placement:
    """Where each prompt of `query` is. Segments that vanish meanwhile are forgotten and it looks again."""
    with index.lock:
        index.refresh()
        for _ in range(_ATTEMPTS):
            try:
                return _locate(index, query, sites, layout, check)
            except _Changed:
                index.refresh()
        return Placement(len(query), sites, layout, [], [])


def _locate(index: SpaceIndex, query: Query, sites: Sequence[str], layout: str, check: bool) -> Placement:
    groups = index.groups(layout)
    together: dict[tuple[int, ...], list[int]] = {}
    for j, site in enumerate(sites):
        holders = tuple(g for g, group in enumerate(groups) if site in group.sites)
        together.setdefault(holders, []).append(j)
    answers = {g: index.find(groups[g], query.kind, query.keys) for holders in together for g in holders}
    slots: dict[int, int] = {}
    segments: list[Segment] = []
    parts = []
    changed = False
    for holders, columns in together.items():
        number = np.full(len(query), -1, np.int32)
        prompt = np.full(len(query), -1, np.int64)
        for g in holders:
            new, row = answers[g]
            better = (new >= 0) & ((number < 0) | (index.rank[new] > index.rank[number]))
            number[better], prompt[better] = new[better], row[better]
        slot = np.full(len(query), -1, np.int32)
        for n in np.unique(number[number >= 0]).tolist():
            members = np.flatnonzero(number == n)
            segment = index.open(n)
            if segment is None:
                changed = True
                continue
            right = query.matches(segment, members, prompt[members])
            if check:
                intact = _intact(index, n, segment, [sites[j] for j in columns], prompt[members])
                changed = changed or not intact.all()
                right &= intact
            if n not in slots:
                slots[n] = len(segments)
                segments.append(segment)
            slot[members[right]] = slots[n]
        parts.append(Part(tuple(columns), slot, prompt))
    if changed:
        # An older, intact copy may be there, or the merged one.
        raise _Changed
    return Placement(len(query), sites, layout, parts, segments)


def _intact(index: SpaceIndex, number: int, segment: Segment, sites: list[str], prompts: Ints) -> npt.NDArray[np.bool_]:
    good = np.ones(len(prompts), bool)
    if segment.is_verified(sites):
        return good
    starts, stops = segment.row_offset[prompts], segment.row_offset[prompts + 1]
    for site in sites:
        intact = segment.verify(site, starts, stops)
        if not intact.all():
            bad = np.flatnonzero(~intact)
            log.warning(
                "%s: %s of %d prompts is damaged (checksum); they count as not stored", segment.path, site, len(bad)
            )
            good &= intact
    if not good.all():
        index.mark_damaged(number, prompts[~good])
    return good
