"""Keeping to a size what a working copy holds of objects: the mirrors read longest ago are left with their heads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from actcache.errors import DiskFullError, FormatError
from actcache.store import behind, mirror
from actcache.store.catalog import Catalog
from actcache.store.eviction import space_folders
from actcache.store.files import SEGMENT_NAME, log, open_locked, write_all
from actcache.store.index import SpaceIndex
from actcache.store.mapping import Segment
from actcache.store.pulling import Unfinished
from actcache.store.working_copy import WorkingCopy

# Down to this part of the limit, so that it is not done again for every block.
_ENOUGH = 0.9
_PAGE = 4096

Found = TypeVar("Found")


@dataclass
class _Mirror:
    path: Path
    size: int
    """Bytes on this host's disk."""
    heat: int
    """When half of its prompts had been read for the last time, in nanoseconds."""


def within(copy: WorkingCopy, catalog: Catalog, indexes: Mapping[str, SpaceIndex], work: Callable[[], Found]) -> Found:
    """What `work` gives, which may fetch; where the disk is full, or the limit passed, mirrors make room."""
    if copy.lacks_room:
        copy.lacks_room = False
        trim(copy, catalog, indexes, 0)
    try:
        found = work()
    except DiskFullError:
        if not trim(copy, catalog, indexes, 0):
            raise
        found = work()
    copy.keep_size()
    return found


def trim(copy: WorkingCopy, catalog: Catalog, indexes: Mapping[str, SpaceIndex], limit: int | None) -> int:
    """Bring what mirrors take on the disk below `limit` bytes (None: no limit), as far as it is not heads; bytes freed.

    What anybody has mapped stays readable for them.
    """
    copy.note_trimmed()
    if limit is None:
        return 0
    # What is still to be written to them counts, too.
    behind.settle()
    held = _mirrors(copy, catalog, indexes)
    total = sum(one.size for one in held)
    freed = 0
    if total > limit:
        for one in sorted(held, key=lambda one: one.heat):
            if total - freed <= _ENOUGH * limit:
                break
            if gain := _strip(copy, one):
                freed += gain
                _unmap(indexes.get(one.path.parent.name), one.path)
        log.info("%s: %d bytes of what was read are let go", copy.folder, freed)
    return freed


def _mirrors(copy: WorkingCopy, catalog: Catalog, indexes: Mapping[str, SpaceIndex]) -> list[_Mirror]:
    for index in list(indexes.values()):
        index.write_reads()
    found = []
    for space in space_folders(copy.root):
        medians = catalog.read_medians(space)
        # Each may go while it is looked at: with its space, or merged away.
        with contextlib.suppress(FileNotFoundError):
            for name in filter(SEGMENT_NAME.fullmatch, os.listdir(copy.root / space)):
                path = copy.root / space / name
                with contextlib.suppress(FileNotFoundError):
                    fetched = mirror.sidecar_of(path).stat().st_mtime_ns
                    size = 512 * path.lstat().st_blocks
                    found.append(_Mirror(path, size, max(fetched, medians.get(name[:32], 0))))
    return found


def _strip(copy: WorkingCopy, one: _Mirror) -> int:
    """Leave a mirror with its head; the bytes that makes free."""
    try:
        segment = Segment(one.path)
    except (FormatError, FileNotFoundError):
        return 0
    head = min(segment.start_of(site) for site in segment.info.sites)
    with copy.locked(one.path.parent.name):
        said = mirror.read_sidecar(one.path)
        if not mirror.is_mirror(one.path) or one.size - head < _PAGE:
            return 0
        temporary, fd = open_locked(one.path.parent, ".tmp")
        put_ns = 0 if said is None else said.put_ns
        bare = Unfinished(temporary, fd, mirror.Sidecar(segment.info.size, segment.checks.blocks, put_ns))
        try:
            os.ftruncate(fd, segment.info.size)
            write_all(fd, [segment.raw[:head]], 0)
            bare.link(one.path)
        finally:
            bare.discard()
    return one.size - head


def _unmap(index: SpaceIndex | None, path: Path) -> None:
    # Only where that needs no waiting: whoever holds the lock of another space may wait for that of this one.
    if index is not None and index.lock.acquire(blocking=False):
        try:
            index.unmap(path.name[:32])
        finally:
            index.lock.release()
