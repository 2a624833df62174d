"""The prompts of a space by when they were last read."""

from __future__ import annotations

import numpy as np

from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints
from actcache.store.placement import Placement
from actcache.store.reports import stored_places


def last_reads(index: SpaceIndex) -> tuple[Placement, Ints]:
    """The distinct prompts of a space, and for each when any copy of it was last read, int64 ``[n]`` nanoseconds since
    the epoch; when it was written, where it was not read since this host knows of it."""
    places = stored_places(index)
    segment, prompt = places.where("")
    held = [np.empty((len(places), 16), np.uint8)]
    for number in np.unique(segment).tolist():
        members = np.flatnonzero(segment == number)
        held[0][members] = places.segments[number].info.prompt_key[prompt[members]]
    times = [np.zeros(len(places), np.int64)]
    with index.lock:
        for number, info in index.parts():
            live = index.live(number)
            chosen = slice(None) if live is None else live
            held.append(info.prompt_key[chosen])
            times.append(index.reads.times(info)[chosen])
    words = np.ascontiguousarray(np.concatenate(held)).view(np.uint64)
    when = np.concatenate(times)
    order = np.lexsort((words[:, 1], words[:, 0]))
    begins = np.ones(len(order), bool)
    begins[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    latest = np.empty(len(order), np.int64)
    if len(order):
        latest[order] = np.repeat(
            np.maximum.reduceat(when[order], np.flatnonzero(begins)),
            np.diff(np.append(np.flatnonzero(begins), len(order))),
        )
    return places, latest[: len(places)]
