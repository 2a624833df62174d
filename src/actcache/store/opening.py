"""Opening a segment by its name: as one of its space, as the one that is known, its head healed where it can be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.errors import FormatError, NewerFormatError
from actcache.store.fetching import Vanished
from actcache.store.mapping import Segment
from actcache.store.records import SegmentInfo
from actcache.store.working_copy import WorkingCopy

if TYPE_CHECKING:
    from actcache.store.index import SpaceIndex


def open_segment(path: Path, copy: WorkingCopy | None) -> Segment:
    """The segment at `path`, mapped. The head of a mirror that is none is read once more before it is refused.

    Raises as `Segment`; BackendError where a head cannot be read.
    """
    try:
        return Segment(path, copy)
    except NewerFormatError:
        raise
    except FormatError:
        if copy is None or not copy.renew(path):
            raise
        return Segment(path, copy)


def read_info(path: Path, copy: WorkingCopy | None) -> SegmentInfo:
    """What the segment at `path` holds; FormatError where it is not one of the space whose folder it is in."""
    info = open_segment(path, copy).info
    if info.space != path.parent.name:
        raise FormatError(f"{path} belongs to space {info.space!r}")
    return info


def open_known(path: Path, info: SegmentInfo, copy: WorkingCopy | None) -> Segment:
    """The segment at `path`, mapped; FormatError where it does not hold what `info` says."""
    segment = open_segment(path, copy)
    same = segment.info.columns == info.columns and segment.info.prompts == info.prompts
    if not same or not np.array_equal(segment.info.prompt_key, info.prompt_key):
        raise FormatError(f"{segment.path} is not the file it was when it was indexed")
    return segment


def look_again(index: SpaceIndex, vanished: Vanished) -> None:
    """Take notice that objects are gone, or that their mirrors are other files by now, and of what took their place."""
    assert index.copy is not None
    # Listed from now on, since what was listed before this look, or early in it, may have gone since.
    index.copy.pull(index.folder.name, unless_since=time.monotonic())
    # Only now, and also what a late listing still shows: other processes of this host, too, are to find it, or what it
    # was merged into.
    for path in vanished.gone:
        index.copy.drop(path)
    with index.lock:
        for path in (*vanished.gone, *vanished.replaced):
            index.unmap(path.name[:32])
        index.refresh()
