"""Finding prompts: by key in the index, then by content in the segment, then by checksum."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actcache.store.bringing import receive_together
from actcache.store.by_segment import by_segment
from actcache.store.checks import BlockChecks
from actcache.store.everything import everything
from actcache.store.fetching import Vanished
from actcache.store.files import log
from actcache.store.gather import THREAD_BYTES, allowed_threads
from actcache.store.index import SpaceIndex
from actcache.store.keys import KEY_WORDS, Group, Ints
from actcache.store.mapping import Segment
from actcache.store.opening import look_again
from actcache.store.placement import Placement
from actcache.store.places import Part
from actcache.store.queries import Query
from actcache.store.receiving import Received

_ATTEMPTS = 16
_AHEAD_BYTES = 128 << 20


def locate(
    index: SpaceIndex, query: Query, sites: Sequence[str], layout: str, check: bool, *, pull: bool = True
) -> Placement:
    """Where each prompt of `query` is. Segments that vanish meanwhile are forgotten and it looks again.

    Where something vanishes each time it looks, what it held counts as absent in the end, the rest is found. With
    `pull` it looks once more, where some are missing, after taking notice of what lies elsewhere.
    """
    if index.copy is not None:
        return _locate_elsewhere(index, query, sites, layout, check, pull)
    with index.lock:
        index.refresh()
        if len(query) == 1 and (placement := locate_one(index, query, sites, layout, check)) is not None:
            return placement
        for _ in range(_ATTEMPTS):
            found, changed = _locate(index, query, sites, layout, check)
            if not changed:
                break
            # An older, intact copy may be there, or the merged one.
            index.refresh()
        return found


def _locate_elsewhere(
    index: SpaceIndex, query: Query, sites: Sequence[str], layout: str, check: bool, pull: bool
) -> Placement:
    """`locate`, where the objects do not lie in the folder of the index. Others may use it while something comes."""
    began = time.monotonic()
    with index.lock:
        index.refresh()
        one = locate_one(index, query, sites, layout, check) if len(query) == 1 else None
    if one is not None and (one.found.all() or not (pull and pulled(index, began))):
        return one
    found, changed = Placement(0, sites, layout, [], []), True
    for attempt in range(_ATTEMPTS):
        try:
            with index.lock:
                holders = _find(index, query, sites, layout)
            received = _received_together(holders.wanted()) if check else {}
            with index.lock:
                found, changed = _placed(index, query, holders, layout, check, received)
        except Vanished as vanished:
            if attempt == _ATTEMPTS - 1:
                raise
            look_again(index, vanished)
            changed = True
        if not changed and (found.found.all() or not (pull and pulled(index, began))):
            break
        index.refresh()
    return found


def pulled(index: SpaceIndex, began: float) -> bool:
    """See to it that the objects have been listed since the moment `began`; whether that has changed anything."""
    if index.copy is None or index.copy.pulled_since(index.folder.name, began):
        return False
    changed = index.copy.pull(index.folder.name)
    index.refresh()
    return changed


def locate_all(index: SpaceIndex, site: str, layout: str, check: bool = True) -> Placement | None:
    """Where every live prompt that has `site` is, oldest first; None where the keys of two agree, as those of two
    copies of one do: then look closer. Damaged ones count as not found, with `check` those not known of, too."""
    for _ in range(_ATTEMPTS):
        try:
            return _locate_all(index, site, layout, check)
        except Vanished as vanished:
            look_again(index, vanished)
    return None


def _locate_all(index: SpaceIndex, site: str, layout: str, check: bool) -> Placement | None:
    with index.lock:
        index.refresh()
        if index.copy is None:
            _ask_together(index, site, layout)
        every = everything(index, site, layout)
    if every is None:
        return None
    found, numbers = every.placement.beside(site), every.numbers
    if not check:
        return found
    segment, prompt = found.where(site)
    wanted = [(held, [site], prompts) for held, prompts in found.held]
    # Others may use the index while it comes.
    received = _received_together(wanted) if index.copy is not None else {}
    with index.lock:
        _check_together(wanted, received)
        right = np.ones(len(segment), bool)
        for slot, members in by_segment(segment):
            held, prompts = found.segments[slot], prompt[members]
            intact = _intact(index, numbers[slot], held, [site], prompts, received)
            if not intact.all():
                right[members], prompts = intact, prompts[intact]
            index.note_read(numbers[slot], prompts)
        if right.all():
            return every.placement.beside(site, received)
        part = Part((0,), np.where(right, segment, np.int32(-1)), prompt)
        return Placement(len(segment), [site], layout, [part], found.segments, received)


def _ask_together(index: SpaceIndex, site: str, layout: str) -> None:
    """Open every segment that has `site`, and ask the disk for it at once: it works while the next one is opened."""
    numbers = [n for n, info in index.segments() if info.layout == layout and site in info.sites]
    index.ask_for(numbers)
    left = _AHEAD_BYTES
    for number in numbers:
        segment = index.open(number)
        if segment is None:
            # It is forgotten now, so that nobody would notice that what it held may lie in another one.
            index.refresh()
            break
        if left > 0 and not segment.checks.all_good([site]):
            left -= segment.checks.ask([site], segment.row_offset[:-1], segment.row_offset[1:], left)


def _received_together(wanted: Sequence[tuple[Segment, Sequence[str], Ints]]) -> dict[BlockChecks, Received]:
    """Fetch prompts of several segments that are not here, all at the same time; those that are right, and in no file
    yet."""
    return receive_together(
        (segment.checks, sites, segment.row_offset[prompts], segment.row_offset[prompts + 1])
        for segment, sites, prompts in wanted
        if segment.source is not None
    )


def _check_together(
    wanted: Sequence[tuple[Segment, Sequence[str], Ints]], received: Mapping[BlockChecks, Received]
) -> list[bool]:
    """Check prompts of several segments, of which the disk is asked at once; what is found is kept for `_intact`.

    Of which segments they were all known to be good.
    """
    left = _AHEAD_BYTES
    jobs, good = [], []
    for segment, sites, prompts in wanted:
        good.append(segment.checks in received or segment.checks.all_good(sites) or segment.knows(sites, prompts))
        if left <= 0 or good[-1]:
            continue
        starts, stops = segment.row_offset[prompts], segment.row_offset[prompts + 1]
        left -= segment.checks.ask(sites, starts, stops, left)
        jobs.append((segment.checks, sites, starts, stops))
    threads = min(allowed_threads(), (_AHEAD_BYTES - left) // THREAD_BYTES, len(jobs)) if jobs else 0
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            for job in [pool.submit(checks.verify, sites, starts, stops) for checks, sites, starts, stops in jobs]:
                job.result()
    return good


def locate_one(index: SpaceIndex, query: Query, sites: Sequence[str], layout: str, check: bool) -> Placement | None:
    """Where the only prompt of `query` is, without arrays, which cost more than the search; None: look closer."""
    groups = index.holders(layout, tuple(sites))
    if groups is None:
        return None
    high, low = KEY_WORDS.unpack(query.key_of_one())
    number = row = -1
    for group in groups:
        new, new_row = index.find_one(group, query.kind, high, low)
        if new >= 0 and (number < 0 or index.rank[new] > index.rank[number]):
            number, row = new, new_row
    if number < 0:
        return Placement.of_one(sites, layout, None, -1)
    segment = index.open(number)
    if segment is None or not query.matches_one(segment, row):
        return None
    if check:
        if not segment.checks.all_good(sites) and not segment.knows(sites, np.array([row])):
            return None
        index.note_read(number, row)
    return Placement.of_one(sites, layout, segment, row)


@dataclass
class _Sites:
    """Sites that lie together: their numbers and names, which prompt of its segment each query is, and the segments,
    each with its number, the queries that it may hold, and as which of its prompts."""

    columns: list[int]
    names: list[str]
    prompt: Ints
    opened: list[tuple[int, Segment, Ints, Ints]]


@dataclass
class _Holders:
    """Where prompts may be, by their keys. `changed`: a segment went away meanwhile."""

    sites: list[str]
    groups: list[_Sites]
    changed: bool

    def wanted(self) -> list[tuple[Segment, Sequence[str], Ints]]:
        return [(s, group.names, prompts) for group in self.groups for _, s, _, prompts in group.opened]


def _locate(index: SpaceIndex, query: Query, sites: Sequence[str], layout: str, check: bool) -> tuple[Placement, bool]:
    """Where each prompt is, and whether a segment went away or turned out damaged meanwhile."""
    return _placed(index, query, _find(index, query, sites, layout), layout, check, {})


def _find(index: SpaceIndex, query: Query, sites: Sequence[str], layout: str) -> _Holders:
    """Where each prompt may be, as its key says."""
    answers: dict[Group, tuple[npt.NDArray[np.int32], Ints]] = {}
    chosen = _Holders(list(sites), [], False)
    for holders, columns in _together(index, sites, layout):
        answers.update((g, index.find(g, query.kind, query.keys)) for g in holders if g not in answers)
        if len(holders) == 1:
            number, prompt = answers[holders[0]]
        else:
            number, prompt = np.full(len(query), -1, np.int32), np.full(len(query), -1, np.int64)
        for new, row in (answers[g] for g in holders if len(holders) > 1):
            better = (new >= 0) & ((number < 0) | (index.rank[new] > index.rank[number]))
            number[better], prompt[better] = new[better], row[better]
        found = by_segment(number)
        index.ask_for([n for n, _ in found])
        opened = [(n, s, members, prompt[members]) for n, members in found if (s := index.open(n)) is not None]
        chosen.changed |= len(opened) < len(found)
        chosen.groups.append(_Sites(columns, [sites[j] for j in columns], prompt, opened))
    return chosen


def _together(index: SpaceIndex, sites: Sequence[str], layout: str) -> list[tuple[list[Group], list[int]]]:
    """The numbers of sites that the same groups have, with these groups."""
    whole = index.holders(layout, tuple(sites))
    if whole is not None:
        return [(whole, list(range(len(sites))))]
    groups = index.groups(layout)
    found: dict[tuple[int, ...], list[int]] = {}
    for j, site in enumerate(sites):
        found.setdefault(tuple(g for g, group in enumerate(groups) if site in group.sites), []).append(j)
    return [([groups[g] for g in holders], columns) for holders, columns in found.items()]


def _placed(
    index: SpaceIndex,
    query: Query,
    holders: _Holders,
    layout: str,
    check: bool,
    received: Mapping[BlockChecks, Received],
) -> tuple[Placement, bool]:
    """Where each prompt is: what is held is compared with it, and with `check` its blocks with their checksums."""
    slots: dict[int, int] = {}
    segments: list[Segment] = []
    parts = []
    changed = holders.changed
    for group in holders.groups:
        prompt, opened = group.prompt, group.opened
        slot = np.empty(len(query), np.int32)
        slot.fill(-1)
        good = [False] * len(opened)
        if check and len(opened) > 1:
            good = _check_together([(segment, group.names, prompts) for _, segment, _, prompts in opened], received)
        for (n, segment, members, prompts), known in zip(opened, good, strict=True):
            right = query.matches(segment, members, prompts)
            if check and not known:
                intact = _intact(index, n, segment, group.names, prompts, received)
                changed = changed or not intact.all()
                right = intact if right is None else right & intact
            if right is not None:
                members, prompts = members[right], prompts[right]
            if n not in slots:
                slots[n] = len(segments)
                segments.append(segment)
            slot[members] = slots[n]
            if check:
                index.note_read(n, prompts)
        parts.append(Part(tuple(group.columns), slot, prompt))
    return Placement(len(query), holders.sites, layout, parts, segments, received), changed


def _intact(
    index: SpaceIndex,
    number: int,
    segment: Segment,
    sites: list[str],
    prompts: Ints,
    received: Mapping[BlockChecks, Received],
) -> npt.NDArray[np.bool_]:
    if segment.checks in received or segment.checks.all_good(sites) or segment.knows(sites, prompts):
        return np.ones(len(prompts), bool)
    starts, stops = segment.row_offset[prompts], segment.row_offset[prompts + 1]
    intact = segment.checks.verify(sites, starts, stops)
    good: npt.NDArray[np.bool_] = np.logical_and.reduce(intact)
    if not good.all():
        for site, bad in zip(sites, (~intact).sum(axis=1).tolist(), strict=True):
            if bad:
                log.warning(
                    "%s: %s of %d prompts is damaged (checksum); they count as not stored", segment.path, site, bad
                )
        index.mark_damaged(number, sites, prompts[~good], intact[:, ~good])
    return good
