"""What merges and writers have left behind in the folder of a space, once nobody needs it."""

from __future__ import annotations

import contextlib
import os
import time

from actcache.store.files import TOMB_NAME, is_ours, sweep
from actcache.store.index import SpaceIndex
from actcache.store.replacing import discard

_TOMB_GRACE_S = 3600.0


def tidy(index: SpaceIndex) -> None:
    """Remove unfinished files of writers that are gone, and tombs of segments that are gone.

    Tombs only when no merge that began before them can still be under way.
    """
    sweep(index.folder)
    if index.copy is not None:
        # A tomb may have been put just after what it is for, which is not known here yet.
        index.copy.pull(index.folder.name)
        index.refresh(force=True)
    with index.lock:
        if index.refused:
            # A later version may read what this one cannot, and needs its tombs.
            return
        infos = [info for _, info in index.segments()]
    alive = {i.name for i in infos}

    def counts(tomb: str) -> bool:
        return tomb[:32] in alive or any(tomb not in i.replaces.get(tomb[:32], (tomb,)) for i in infos)

    with contextlib.suppress(OSError):
        for entry in list(os.scandir(index.folder)):
            if TOMB_NAME.fullmatch(entry.name) and not counts(entry.name):
                path = index.folder / entry.name
                if time.time() - entry.stat().st_mtime > _TOMB_GRACE_S and is_ours(path, TOMB_NAME):
                    discard(index.copy, path)
