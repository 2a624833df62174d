"""Taking things out: single prompts by tombs, whole spaces by deleting our own files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actcache.store.files import (
    BESIDE_NAME,
    OPEN_NAME,
    SEGMENT_NAME,
    TEMP_NAME,
    TOMB_NAME,
    is_ours,
    log,
    remove,
    translated,
)
from actcache.store.index import SpaceIndex
from actcache.store.replacing import bury, discard
from actcache.store.spaces import FILE, drop_if_empty
from actcache.store.tombs import count_distinct, is_member

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy

Keys = npt.NDArray[np.uint8]

_ATTEMPTS = 64


def invalidate(index: SpaceIndex, keys: Keys | None) -> int:
    """Declare the prompts with these token keys (None: all) gone from every segment; how many there were.

    Durable when it returns. A segment that another process merges meanwhile is followed to where it went.
    """
    gone: list[Keys] = []
    for _ in range(_ATTEMPTS):
        if index.copy is not None:
            index.copy.pull(index.folder.name)
            index.copy.spool.republish(index.folder.name)
        index.refresh(force=True)
        with index.lock:
            targets = []
            for number, info in index.segments():
                # Inherited tombs do not do: a merge under way may take rows from here and know this name only.
                hit = ~index.own_dead(info)
                if keys is not None:
                    hit &= is_member(info.prompt_key, keys)
                if hit.any():
                    targets.append((info.name, info.prompt_key[hit]))
                    gone.append(info.prompt_key[hit & index.untombed(number)])
        if not targets:
            break
        with translated(index.folder):
            bury(index.copy, index.folder, targets)
        # Without `keys` only what is there now is meant, not what others go on to write.
        if keys is None:
            keys = np.concatenate([found for _, found in targets])
    return count_distinct(gone)


def clear_space(folder: Path, copy: WorkingCopy | None = None) -> None:
    """Delete every file of ours in a space's folder, and the folder when nothing else is in it.

    A file goes only if it carries our name pattern and our header; unfinished files of living writers stay. Of a folder
    of the working copy `copy` the objects go, too.
    """
    with translated(folder):
        if copy is not None:
            _clear_objects(folder, copy)
        # A file that grows may get its final name between the look at the folder and its turn.
        while _removed(folder, copy):
            pass
        # Another process may have written meanwhile; its segment needs the description.
        drop_if_empty(folder, copy)


def has_only_tombs(folder: Path) -> bool:
    """Whether nothing of ours is left in a space's folder but tombs."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder)
        content = (SEGMENT_NAME, OPEN_NAME, TEMP_NAME)
        return any(map(TOMB_NAME.fullmatch, names)) and not any(p.fullmatch(n) for p in content for n in names)
    return False


def _clear_objects(folder: Path, copy: WorkingCopy) -> None:
    """Delete every object of ours of a space, until a listing shows none."""
    for _ in range(_ATTEMPTS):
        tombs = _ours(folder, TOMB_NAME)
        changed = copy.pull(folder.name)
        segments = _ours(folder, SEGMENT_NAME)
        copy.spool.remove_all(segments)
        # What others have merged meanwhile was put before what it was made of went. And a tomb goes only behind all
        # that it may be for, however new that is.
        if not segments:
            copy.spool.remove_all(tombs)
            if not changed:
                break
    for name in copy.spool.foreign(folder.name):
        log.info("leaving %s in %s: it was not written by actcache", name, copy.backend.url)


def _removed(folder: Path, copy: WorkingCopy | None) -> bool:
    """Remove what is ours; whether it must be looked at again."""
    again = False
    # Listed first, removed last: what a tomb is for is there to be listed before the tomb is.
    tombs = _ours(folder, TOMB_NAME)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            path = folder / name
            if is_ours(path, SEGMENT_NAME):
                discard(copy, path)
            elif is_ours(path, OPEN_NAME):
                again |= not remove(path)
            elif OPEN_NAME.fullmatch(name) and not os.path.lexists(path):
                again = True
            elif is_ours(path, TEMP_NAME, may_be_empty=True):
                _remove_unless_locked(path)
            elif not (name == FILE or is_ours(path, TOMB_NAME) or (copy is not None and BESIDE_NAME.fullmatch(name))):
                log.info("leaving %s: it was not written by actcache", path)
    for path in tombs:
        discard(copy, path)
    return again


def _ours(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of ours in a folder that are named so."""
    with contextlib.suppress(FileNotFoundError):
        return [path for name in os.listdir(folder) if is_ours(path := folder / name, pattern)]
    return []


def _remove_unless_locked(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(fd)
