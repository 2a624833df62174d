"""What is left of a segment whose bytes have rotted before it was uploaded."""

from __future__ import annotations

import contextlib
from pathlib import Path

from actcache.store.files import sync_folder
from actcache.store.index import SpaceIndex
from actcache.store.locks import LOCK_WAIT_S, exclusive
from actcache.store.merging import Overtaken, open_source, replace_segments


def salvage(index: SpaceIndex, lock_folder: Path, name: str) -> list[str]:
    """Replace a damaged segment by what is intact of it; the names of what is made. Another process at it: none."""
    with exclusive(lock_folder, index.folder.name, wait_s=LOCK_WAIT_S) as mine:
        index.refresh(force=True)
        with index.lock:
            # What was intact when it was looked at before may not be any more.
            index.unmap(name)
            number = next((number for number, info in index.sealed() if info.name == name), None)
        source = open_source(index, number) if mine and number is not None else None
        if source is None:
            return []
        try:
            made = replace_segments(index, [source])
        except Overtaken:
            return []
        with contextlib.suppress(OSError):
            sync_folder(index.folder)
        index.refresh(force=True)
    return [info.name for info in made]
