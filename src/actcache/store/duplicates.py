"""Copies that nobody reads any more, since there are newer ones, in segments that are not merged with each other.

They come of work done twice: of two hosts that merge the same segments at once, or of one that computes again what is
stored.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actcache.store import merging
from actcache.store.files import log, sync_folder
from actcache.store.index import SpaceIndex
from actcache.store.locks import exclusive
from actcache.store.merging import Overtaken, open_source, replace_segments
from actcache.store.sources import Source


def drop_twins(index: SpaceIndex, lock_folder: Path) -> int:
    """`drop_copies` among segments that were made of the same ones; where there are none nothing is read.

    Hosts do not know of each other's merges. But what another one has made of the same is there to be seen for the
    last of them that is done.
    """
    index.refresh(force=True)
    with index.lock:
        infos = [info for _, info in index.sealed() if info.replaces]
    times = Counter(name for info in infos for name in info.replaces)
    twins = {info.name for info in infos if any(times[name] > 1 for name in info.replaces)}
    return drop_copies(index, lock_folder, twins) if twins else 0


def drop_copies(index: SpaceIndex, lock_folder: Path, among: set[str] | None = None) -> int:
    """Drop prompts of segments (`among` those names, where given) of which another one with the same sites has a newer
    copy that is intact; how many segments went or were written anew. Another process at it: 0, its turn.
    """
    with exclusive(lock_folder, index.folder.name) as mine:
        if not mine:
            return 0
        index.refresh(force=True)
        if index.copy is not None:
            # Whoever has just put one made of others takes it back where those were gone meanwhile.
            settled = {
                info.name for _, info in index.sealed() if index.copy.spool.is_settled(index.path(info.name), info)
            }
            among = settled if among is None else among & settled
        changed = 0
        for numbers in _sharing_prompts(index, among):
            sources = [source for number in numbers if (source := open_source(index, number)) is not None]
            # What is left of damaged prompts is put in order when segments are merged.
            changed += _drop(index, [source for source in sources if not source.remnants])
        if changed:
            with contextlib.suppress(OSError):
                sync_folder(index.folder)
            index.refresh(force=True)
    return changed


def _sharing_prompts(index: SpaceIndex, among: set[str] | None) -> list[list[int]]:
    """Numbers of segments that have a prompt in common with another one of the same sites, oldest first."""
    groups: dict[tuple[str, frozenset[str]], list[tuple[int, str, int, npt.NDArray[np.uint8]]]] = {}
    with index.lock:
        for number, info in index.sealed():
            if among is None or info.name in among:
                keys = np.hstack([info.prompt_key, info.text_key])[index.untombed(number)]
                group = groups.setdefault((info.layout, frozenset(info.sites)), [])
                group.append((info.created_ns, info.name, number, keys))
    return [_repeating(sorted(group, key=lambda held: held[:2])) for group in groups.values()]


def _repeating(held: Sequence[tuple[int, str, int, npt.NDArray[np.uint8]]]) -> list[int]:
    owner = np.repeat(np.arange(len(held)), [len(keys) for *_, keys in held])
    words = np.concatenate([keys for *_, keys in held]).view(np.uint64)
    order = np.lexsort((owner, *words.T))
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    both = same & (owner[order[1:]] != owner[order[:-1]])
    concerned = np.unique(np.concatenate([owner[order[1:]][both], owner[order[:-1]][both]]))
    return [held[k][2] for k in concerned.tolist()]


def _drop(index: SpaceIndex, sources: list[Source]) -> int:
    if len(sources) < 2:
        return 0
    before = [source.keep for source in sources]
    merging.drop_duplicates(sources)
    changed = 0
    for k, (source, kept) in enumerate(zip(sources, before, strict=True)):
        # What has newer copies has them in segments that follow; who replaced or evicted one of those decides anew.
        if not np.array_equal(source.keep, kept) and _are_there(index, sources[k:]):
            with contextlib.suppress(Overtaken):
                replace_segments(index, [source])
                changed += 1
                log.info("%s: %d prompts have newer copies", source.segment.path, int((kept & ~source.keep).sum()))
    return changed


def _are_there(index: SpaceIndex, sources: Sequence[Source]) -> bool:
    paths = [index.path(source.info.name) for source in sources]
    return all(path.exists() for path in paths) if index.copy is None else index.copy.spool.are_there(paths)
