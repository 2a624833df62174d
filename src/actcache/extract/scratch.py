"""Folders for the time of a request, and those of processes that were killed: whoever comes next removes them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from actcache.store.files import log

# What is in such a folder, besides nothing: a store and its index.
_CONTENTS = {"store", "index"}
_NAME = re.compile(r"actcache-request-[0-9a-f]{32}")
_ATTEMPTS = 16


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder of this process, in memory unless there is more room elsewhere; it goes when the block ends."""
    folder, fd = _made(_roomiest())
    try:
        yield folder
    finally:
        # Before its lock goes: what is begun with it is ended by nobody else.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


@functools.cache
def sweep_once() -> None:
    """Remove what processes that were killed have left, at the first request of a process."""
    for place in _places():
        sweep(place)


def sweep(place: str) -> None:
    """Remove the folders in `place` that this user's processes made and did not live to remove. Never raises."""
    with contextlib.suppress(OSError):
        for name in [name for name in os.listdir(place) if _NAME.fullmatch(name)]:
            with contextlib.suppress(OSError):
                _sweep_one(Path(place, name))


def _sweep_one(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            return
        # Held for as long as the process lives that made it; whatever a file system says that has no locks, it stays.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if set(os.listdir(fd)) <= _CONTENTS:
            log.info("removing %s, which a process that was killed has left", folder)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)


def _made(place: str) -> tuple[Path, int]:
    """A new folder in `place`, and the descriptor that holds its lock."""
    for _ in range(_ATTEMPTS):
        folder = Path(place, f"actcache-request-{uuid.uuid4().hex}")
        folder.mkdir(mode=0o700)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            # Taken for litter in the instant before it was locked.
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return folder, fd
        os.close(fd)
    raise FileNotFoundError(f"folders made in {place} go at once")


def _places() -> list[str]:
    return [place for place in ("/dev/shm", tempfile.gettempdir()) if os.access(place, os.W_OK)]


def _roomiest() -> str:
    return max(_places(), key=lambda place: shutil.disk_usage(place).free)
