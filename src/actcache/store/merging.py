"""Many small segments into few large ones: durable first, then the old ones go."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.container import DTYPES
from actcache.store.files import TOMB_NAME, is_ours, log, remove, sync_folder
from actcache.store.index import Mask, SpaceIndex
from actcache.store.mapping import Segment
from actcache.store.prompts import PromptTable
from actcache.store.records import SegmentInfo
from actcache.store.statistics import Moments
from actcache.store.writing import Column, write_columns

TARGET = 256 << 20
FEW, MANY = 8, 32
"""Segments of one size class that may pile up: after a run, and while one is under way."""
_TIERS = (1 << 20, 16 << 20, TARGET // 2)
_MOST = 1024
_TOMB_GRACE_S = 3600.0


@dataclass
class _Source:
    number: int
    info: SegmentInfo
    segment: Segment
    keep: Mask
    tombs: tuple[str, ...]


def plan(index: SpaceIndex, *, few: int = FEW) -> list[list[int]]:
    """Numbers of segments to merge with each other, oldest first in each group.

    Segments of one signature and size class (1, 16, 128 MB) are taken when at least `few` of them exist,
    so that however many batches are written, each byte is rewritten at most once per class.
    """
    classes: dict[tuple[Any, ...], list[tuple[int, SegmentInfo]]] = {}
    for number, info in index.segments():
        tier = sum(info.size > limit for limit in _TIERS)
        if tier < len(_TIERS):
            # When everything is to be merged, size does not matter.
            classes.setdefault((info.signature, tier if few > 2 else 0), []).append((number, info))
    groups = []
    for members in classes.values():
        if len(members) < few:
            continue
        members.sort(key=lambda m: (m[1].created_ns, m[1].name))
        group: list[int] = []
        size = 0
        for number, info in members:
            if group and (size + info.size > TARGET or len(group) == _MOST):
                groups.append(group)
                group, size = [], 0
            group.append(number)
            size += info.size
        groups.append(group)
    return [g for g in groups if len(g) > 1]


def merge_space(index: SpaceIndex, lock_folder: Path, *, few: int = FEW) -> int:
    """Merge what `plan` finds; the number of segments that went. Another process at it: 0, its turn."""
    if not plan(index, few=few):
        return 0
    with _only_one(lock_folder, index.folder.name) as mine:
        if not mine:
            return 0
        index.refresh(force=True)
        merged = sum(_merge(index, group) for group in plan(index, few=few))
        if merged:
            _drop_orphan_tombs(index)
    return merged


def _merge(index: SpaceIndex, numbers: Sequence[int]) -> int:
    sources = _in_order(index, _sources(index, numbers))
    if len(sources) < 2:
        return 0
    _drop_duplicates(sources)
    kept = [s for s in sources if s.keep.any()]
    if kept:
        prompts = PromptTable.concatenate(
            [s.segment.prompts if s.keep.all() else s.segment.prompts.select(s.keep) for s in kept]
        )
        first = kept[0].info
        columns = [Column(site, DTYPES[code], dim, _pieces(kept, site)) for site, code, dim in first.columns]
        info = write_columns(
            index.folder, prompts, first.layout, columns, space=first.space,
            created_ns=max(s.info.created_ns for s in sources), replaces={s.info.name: s.tombs for s in sources},
        )  # fmt: skip
        index.add(info)
    for source in sources:
        # The name pattern was checked when the folder was listed, the header when the segment was opened.
        remove(index.path(source.info.name))
    with contextlib.suppress(OSError):
        sync_folder(index.folder)
    index.refresh(force=True)
    return len(sources)


def _sources(index: SpaceIndex, numbers: Sequence[int]) -> list[_Source]:
    """The segments, with the prompts that are neither tombed nor damaged; every block is read and checked."""
    sources = []
    for number in numbers:
        with index.lock:
            segment, info = index.open(number), index.info(number)
        if segment is None or info is None:
            continue
        all_rows = segment.row_offset[:-1], segment.row_offset[1:]
        intact = np.ones(info.prompts, bool)
        for site in info.sites:
            intact &= segment.verify(site, *all_rows)
        if not intact.all():
            log.warning("%s: %d damaged prompts are dropped while merging", segment.path, int((~intact).sum()))
        with index.lock:
            live = index.live(number)
            tombs = index.tombs_of(info)
        if any(keys is None for keys in tombs.values()):
            # What an unreadable tomb named is unknown; its segment is left for a person to look at.
            continue
        sources.append(_Source(number, info, segment, intact if live is None else intact & live, tuple(sorted(tombs))))
    return sources


def _in_order(index: SpaceIndex, sources: list[_Source]) -> list[_Source]:
    """The sources that may be merged: what is merged counts as being as new as the newest of them.

    A source stays as it is where it holds a prompt of which a newer copy, older than that, lies in a segment that
    stays apart (it has other sites, or another size): that copy would be read no more.
    """
    while len(sources) > 1:
        with index.lock:
            overtaken = _overtaken(index, sources)
        if not overtaken:
            break
        sources = [source for k, source in enumerate(sources) if k not in overtaken]
    return sources


def _overtaken(index: SpaceIndex, sources: Sequence[_Source]) -> set[int]:
    numbers = np.array([s.number for s in sources])
    owner = np.repeat(np.arange(len(sources)), [int(s.keep.sum()) for s in sources])
    sites = set(sources[0].info.sites)
    found: set[int] = set()
    for kind in ("token", "text"):
        keys = np.concatenate([(s.info.prompt_key if kind == "token" else s.info.text_key)[s.keep] for s in sources])
        for group in index.groups(sources[0].info.layout):
            if group.sites.isdisjoint(sites):
                continue
            newest = index.find(group, kind, keys)[0]
            age = np.where(newest >= 0, index.rank[newest], -1)
            between = (age > index.rank[numbers[owner]]) & (age < index.rank[numbers].max())
            found.update(owner[between & ~np.isin(newest, numbers)].tolist())
    return found


def _drop_duplicates(sources: Sequence[_Source]) -> None:
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


def _pieces(sources: Sequence[_Source], site: str) -> Iterator[tuple[npt.NDArray[Any], Moments | None]]:
    for source in sources:
        matrix, offset = source.segment.matrix(site), source.segment.row_offset
        if source.keep.all():
            yield matrix, source.segment.moments(site)
            continue
        change = np.flatnonzero(np.diff(np.concatenate([[False], source.keep, [False]])))
        for start, stop in change.reshape(-1, 2).tolist():
            yield matrix[int(offset[start]) : int(offset[stop])], None


def _drop_orphan_tombs(index: SpaceIndex) -> None:
    """Remove tombs of segments that are gone, once no merge that began before them can still be under way."""
    with index.lock:
        if index.has_refused:
            # A later version may read what this one cannot, and needs its tombs.
            return
        infos = [info for _, info in index.segments()]
    alive = {i.name for i in infos}
    pending = {name for i in infos for name in i.replaces}
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(index.folder)):
            match = TOMB_NAME.fullmatch(entry.name)
            if match and match[1] not in alive | pending:
                path = index.folder / entry.name
                if time.time() - entry.stat().st_mtime > _TOMB_GRACE_S and is_ours(path, TOMB_NAME):
                    remove(path)


@contextlib.contextmanager
def _only_one(folder: Path, space: str) -> Iterator[bool]:
    """Whether no other process of this host merges `space`; merging twice is only a waste."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"merge-{space}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
    finally:
        os.close(fd)
