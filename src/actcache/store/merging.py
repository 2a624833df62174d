"""Many small segments into few large ones: durable first, then the old ones go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actcache.store.copying import copied
from actcache.store.damage import intact_of, remnants
from actcache.store.fetching import Vanished
from actcache.store.files import log, remove, sweep, sync_folder
from actcache.store.index import SpaceIndex
from actcache.store.keys import Mask
from actcache.store.locks import exclusive
from actcache.store.memory import return_free_memory
from actcache.store.opening import look_again
from actcache.store.prompts import PromptTable, offsets
from actcache.store.records import LABEL, METADATA, SegmentInfo
from actcache.store.replacing import Replacing, discard
from actcache.store.sources import Source, in_order
from actcache.store.tidying import tidy
from actcache.store.writing import Measurements, write_columns

TARGET = 256 << 20
GATHERED = 64 << 20
"""What is uploaded as one object, where that happens behind a run."""
FEW, MANY = 8, 32
"""Segments of one size class that may pile up: after a run, and while one is under way."""
_TIERS = (1 << 20, 16 << 20, TARGET // 2)
_MOST = 1024
_MOST_PROMPTS = 1 << 14
"""Prompts of a merged segment that is made of little else: what is known of them is in memory while they merge."""
# What a host has stored, and others have not seen, is seldom older.
_SEEN_NS = 3600 * 10**9
_READS = 4


def plan(
    index: SpaceIndex, *, few: int = FEW, among: Container[str] | None = None, target: int = TARGET
) -> list[list[int]]:
    """Numbers of segments (`among` those names, where given) to merge with each other, oldest first in each group.

    What is merged has about `target` bytes at most.
    Segments of one signature and size class (1, 16, 128 MB) are taken when at least `few` of them exist,
    so that however many batches are written, each byte is rewritten at most once per class.
    """
    classes: dict[tuple[Any, ...], list[tuple[int, SegmentInfo]]] = {}
    for number, info in index.sealed():
        tier = sum(info.size > limit for limit in _TIERS)
        if tier < len(_TIERS) and (among is None or info.name in among):
            # When everything is to be merged, size does not matter.
            classes.setdefault((info.signature, tier if few > 2 else 0), []).append((number, info))
    groups = []
    for members in classes.values():
        if len(members) < few:
            continue
        members.sort(key=lambda m: (m[1].created_ns, m[1].name))
        group: list[int] = []
        size = prompts = 0
        for number, info in members:
            many = 2 * info.data_bytes < info.size and prompts + info.prompts > _MOST_PROMPTS
            if group and (many or size + info.size > target or len(group) == _MOST):
                groups.append(group)
                group, size, prompts = [], 0, 0
            group.append(number)
            size += info.size
            prompts += info.prompts
        groups.append(group)
    return [g for g in groups if len(g) > 1]


def merge_space(index: SpaceIndex, lock_folder: Path, *, few: int = FEW) -> int:
    """Merge what `plan` finds; the number of segments that went. Another process at it: 0, its turn."""
    if not plan(index, few=few):
        return 0
    with exclusive(lock_folder, index.folder.name) as mine:
        if not mine:
            return 0
        among = before_writes(index)
        if index.copy is not None:
            among &= _seen_by_all(index)
        merged = sum(_merge(index, group) for group in plan(index, few=few, among=among))
        if merged:
            tidy(index)
    return merged


def merge_spooled(index: SpaceIndex, lock_folder: Path, *, few: int = FEW) -> int:
    """`merge_space` for what of a working copy lies here alone, and is small: nothing is fetched, and nothing put."""
    if len(_small_here_alone(index)) < few:
        return 0
    with exclusive(lock_folder, index.folder.name) as mine:
        if not mine:
            return 0
        among = before_writes(index) & _small_here_alone(index)
        return sum(_merge(index, group) for group in plan(index, few=few, among=among, target=GATHERED))


def _small_here_alone(index: SpaceIndex) -> set[str]:
    copy = index.copy
    assert copy is not None
    with index.lock:
        index.refresh()
        small = [info.name for _, info in index.sealed() if info.size <= GATHERED // 2]
    return {name for name in small if copy.spool.is_here_alone(index.path(name))}


def _seen_by_all(index: SpaceIndex) -> set[str]:
    """The segments that may be merged though nobody knows what other hosts are writing.

    Of labels and metadata the newest copy counts. One that another host has stored and not put yet must not turn out
    older than what it was to take the place of.
    """
    oldest = time.time_ns() - _SEEN_NS
    said = (LABEL, METADATA)
    return {info.name for _, info in index.segments() if info.layout not in said or info.created_ns < oldest}


def before_writes(index: SpaceIndex) -> set[str]:
    """The names of segments and batches that are older than anything that others are writing.

    What is merged counts as being as new as the newest of it: a copy that is being written, and is older than that,
    would never be read, though it is newer than the one that was merged.
    """
    since, seen = writing_since(index)
    return {name for name, created_ns in seen.items() if created_ns < since}


def writing_since(index: SpaceIndex) -> tuple[int, dict[str, int]]:
    """When the oldest file was begun that others are writing; segments and batches that were there before that was
    looked for, by name, and when they were made. All in nanoseconds.
    """
    sweep(index.folder)
    index.refresh(force=True)
    since, seen = index.listing.writing_since, {info.name: info.created_ns for _, info in index.segments()}
    # Whatever was begun before one of these was finished is either finished by now, or still there to be listed.
    index.refresh(force=True)
    return min(since, index.listing.writing_since), seen


def drop_dead(index: SpaceIndex, lock_folder: Path) -> int:
    """Write the segments anew of which prompts were invalidated; their number."""
    with exclusive(lock_folder, index.folder.name) as mine:
        if not mine:
            return 0
        index.refresh(force=True)
        with index.lock:
            dead = [number for number, _ in index.sealed() if index.live(number) is not None]
        sources = [source for number in dead if (source := open_source(index, number)) is not None]
        for source in sources:
            with contextlib.suppress(Overtaken):
                replace_segments(index, [source])
        if sources:
            index.refresh(force=True)
        tidy(index)
    return len(sources)


def _merge(index: SpaceIndex, numbers: Sequence[int]) -> int:
    found = _sources(index, numbers)
    merged = 0
    for source in found:
        # On its own, so that what is left of a prompt is not taken for newer or older than it is.
        if source.remnants:
            with contextlib.suppress(Overtaken):
                replace_segments(index, [source])
                merged += 1
    sources = in_order(index, [source for source in found if not source.remnants])
    if len(sources) > 1:
        drop_duplicates(sources)
        with contextlib.suppress(Overtaken):
            replace_segments(index, sources)
            merged += len(sources)
    if merged:
        with contextlib.suppress(OSError):
            sync_folder(index.folder)
        index.refresh(force=True)
    if sum(source.info.prompts for source in found) > _MOST_PROMPTS // 4:
        return_free_memory()
    return merged


class Overtaken(Exception):
    """Somebody else has replaced or removed a segment that was to be replaced: nothing was done."""


def replace_segments(
    index: SpaceIndex, sources: Sequence[Source], measured: Callable[[], Measurements] = dict
) -> list[SegmentInfo]:
    """Make one segment of what is to be kept of `sources` (of one signature), then remove them. What was made.

    Of a source with remnants, which must be the only one, as many more as they are; of sources of which nothing is kept
    none.

    `measured`: what is known of all rows of all sources; asked where every prompt of them is kept.

    Raises `Overtaken` when one of them is gone by the time what is new is there.

    Needs memory for the prompts and a few blocks, and room on the disk for what is new before the old ones go.
    """
    whole = [(source, source.keep) for source in sources if source.keep.any()]
    parts = [(sources[0].info.sites, whole)] if whole else []
    parts += [(remnant.sites, [(source, remnant.keep)]) for source in sources for remnant in source.remnants]
    all_kept = len(whole) == len(sources) and all(keep.all() for _, keep in whole) and len(parts) == 1
    known = measured() if all_kept else {}
    made: list[SegmentInfo] = []
    told: set[str] = set()
    # The name pattern was checked when the folder was listed, the header when the segment was opened. A batch has no
    # file of its own: whoever replaces it removes that of all batches.
    paths = [index.path(s.info.name) for s in sources if s.info.name not in index.opened]
    with Replacing(index.copy, paths, remove) as old:
        for sites, kept in parts:
            made.append(_write_part(index, sources, kept, sites, told, known, old))
            told.update(sites)
        # Whoever invalidates must find the new segments or what they were made of: a tomb for what somebody else has
        # made of the same would not count for them. And what was evicted or cleared must not come back.
        if made and not _are_there(index, old, made):
            _withdraw(index, made)
            raise Overtaken(index.path(made[0].name))
        for info, (_, kept) in zip(made, parts, strict=True):
            with index.lock:
                index.reads.inherit(info, np.concatenate([index.reads.times(s.info)[keep] for s, keep in kept]))
            index.add(info)
            log.info("%d segments became %s, with %d prompts", len(sources), index.path(info.name), info.prompts)
        old.remove()
    return made


def _are_there(index: SpaceIndex, old: Replacing, made: Sequence[SegmentInfo]) -> bool:
    try:
        return old.are_there()
    except BaseException:
        # All that was stored is there without what is new.
        with contextlib.suppress(OSError):
            _withdraw(index, made)
        raise


def _withdraw(index: SpaceIndex, made: Sequence[SegmentInfo]) -> None:
    for info in made:
        discard(index.copy, index.path(info.name))


def _write_part(
    index: SpaceIndex,
    sources: Sequence[Source],
    kept: list[tuple[Source, Mask]],
    sites: Sequence[str],
    told: set[str],
    known: Measurements,
    old: Replacing,
) -> SegmentInfo:
    """One segment with `sites` of the prompts `kept`; of what storing changed nothing at sites that are `told`.

    `known`: what is known of all its rows, where that is known.
    """
    prompts = PromptTable.concatenate(
        [s.segment.prompts if keep.all() else s.segment.prompts.select(keep) for s, keep in kept],
        empty=index.spill.empty,
    )
    first = kept[0][0].info
    lengths = np.concatenate([np.diff(s.segment.row_offset)[keep] for s, keep in kept])
    columns, block_offset = copied([(s.segment, keep) for s, keep in kept], sites, told, known)
    return write_columns(
        index.folder, prompts, first.layout, columns, row_offset=offsets(lengths),
        space=first.space, created_ns=max(s.info.created_ns for s in sources), block_offset=block_offset,
        replaces={s.info.name: s.tombs for s in sources}, before=old.publish,
        measured=lambda: known,
        empty=index.spill.empty,
    )  # fmt: skip


def _sources(index: SpaceIndex, numbers: Sequence[int]) -> list[Source]:
    """The segments, with the prompts that are neither tombed nor damaged; every block is read and checked."""
    found = (open_source(index, number) for number in numbers)
    return [source for source in found if source is not None]


def open_source(index: SpaceIndex, number: int, wanted: Mask | None = None) -> Source | None:
    """A segment to be replaced by what is intact of its live prompts (those `wanted`), every block of theirs checked.

    None when it is gone, or when what is live is unknown: an unreadable tomb leaves it for a person to look at.
    """
    for _ in range(_READS):
        with index.lock:
            segment, info = index.open(number), index.info(number)
            if segment is None or info is None:
                return None
            keep = index.untombed(number)
            tombs = index.tombs_of(info)
        if any(keys is None for keys in tombs.values()):
            return None
        if wanted is not None:
            keep = keep & wanted
        try:
            intact = intact_of(segment, keep)
            break
        except Vanished as vanished:
            look_again(index, vanished)
    else:
        return None
    for site, good in zip(info.sites, intact, strict=True):
        if lost := int((keep & ~good).sum()):
            log.warning("%s: %s of %d prompts is damaged, and dropped", segment.path, site, lost)
    left = remnants(info.sites, intact, keep)
    return Source(number, info, keep & intact.all(axis=0), segment, tuple(sorted(tombs)), left)


def drop_duplicates(sources: Sequence[Source]) -> None:
    """Of prompts with the same ids and text keep the newest, of those in one segment the last."""
    keys = np.concatenate([np.hstack([s.info.prompt_key, s.info.text_key]) for s in sources])[::-1]
    keep = np.concatenate([s.keep for s in sources])[::-1]
    words = np.ascontiguousarray(keys).view(np.uint64)
    # Stable, dropped ones last: the first of equal keys is the newest that may be kept.
    order = np.lexsort((~keep, words[:, 3], words[:, 2], words[:, 1], words[:, 0]))
    repeated = np.zeros(len(keep), bool)
    repeated[order[1:]] = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    keep = (keep & ~repeated)[::-1]
    at = 0
    for source in sources:
        source.keep = keep[at : at + source.info.prompts]
        at += source.info.prompts
