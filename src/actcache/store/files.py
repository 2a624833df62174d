"""Durable files: atomic creation, error translation, and what is ours to delete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import DiskFullError, StoreAccessError

log = logging.getLogger("actcache.store")

SEGMENT_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
TOMB_NAME = re.compile(r"([0-9a-f]{32})-[0-9a-f]{16}\.tomb")
TEMP_NAME = re.compile(r"[0-9a-f]{32}\.tmp")
SPACE_FILE = re.compile(r"space\.json")
SPACE_NAME = re.compile(r"[0-9a-f]{32}")

SIGNATURE = b'{"__metadata__":{"format":"actcache-'
"""What every file of ours begins with, the binary ones after 8 bytes of length."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
_TEMP_GRACE_S = 60.0
_TEMP_OLD_S = 24 * 3600.0
_IOV_MAX = 512
_ATTEMPTS = 64


@contextlib.contextmanager
def translated(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn errors of the operating system inside the block into ours, naming `folder` and what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (DiskFullError, StoreAccessError)):
            raise
        if error.errno in _FULL:
            raise DiskFullError(
                f"no room in {folder} for {needed:,} more bytes ({os.strerror(error.errno)}): free space there, "
                "raise the quota, or choose another folder with ACTCACHE_DIR or set_cache_backend(path)"
            ) from error
        if error.errno in _DENIED:
            raise access_error(folder, error) from error
        raise


def access_error(folder: Path, error: OSError) -> StoreAccessError:
    """The error for a folder that cannot be created, read or written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StoreAccessError(
        f"cannot write to the store folder {folder} ({reason}): choose a folder you may write to with "
        "ACTCACHE_DIR or set_cache_backend(path)"
    )


def write_all(fd: int, buffers: Sequence[Any], offset: int) -> int:
    """Write all `buffers` (flat memoryviews of bytes) at `offset`; the offset behind them."""
    queue = [b for b in buffers if len(b)]
    while queue:
        written = os.pwritev(fd, queue[:_IOV_MAX], offset)
        offset += written
        done = 0
        while done < len(queue) and written >= len(queue[done]):
            written -= len(queue[done])
            done += 1
        del queue[:done]
        if written:
            queue[0] = memoryview(queue[0])[written:]
    return offset


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create `folder` and what is missing above it, durably: a synced file in a folder that is lost is lost."""
    missing = []
    while not folder.is_dir() and folder.parent != folder:
        missing.append(folder)
        folder = folder.parent
    if missing:
        missing[0].mkdir(parents=True, exist_ok=True)
    for made in missing:
        # A parent that may be passed but not read cannot be synced.
        with contextlib.suppress(PermissionError):
            sync_folder(made.parent)


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """A new empty file under a temporary name, and its locked descriptor."""
    for _ in range(_ATTEMPTS):
        path = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # Whoever clears the store removes folders that are empty.
            make_folder(folder)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Taken for litter in the instant before it was locked.
            os.close(fd)
            continue
        except OSError:
            # A file system without locks.
            pass
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


@contextlib.contextmanager
def atomic_file(folder: Path, name: str, *, needed: int = 0) -> Iterator[int]:
    """A descriptor of a new file that becomes ``folder/name``, whole and durable, when the block ends.

    Until then it has a temporary name and an advisory lock, by which `sweep` knows that its writer lives.
    When the block raises, nothing is left.
    """
    with translated(folder, needed):
        make_folder(folder)
        temporary, fd = _open_temporary(folder)
        try:
            yield fd
            os.fsync(fd)
            os.rename(temporary, folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        sync_folder(folder)


def is_ours(path: Path, pattern: re.Pattern[str], *, may_be_empty: bool = False) -> bool:
    """Whether the file carries our name pattern and begins as our files do (no links followed)."""
    if not pattern.fullmatch(path.name):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        head = os.pread(fd, 8 + len(SIGNATURE), 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return SIGNATURE in (head[8:], head[: len(SIGNATURE)]) or (may_be_empty and not head)


def remove(path: Path) -> int:
    """Unlink a file of ours; the bytes it had, 0 when it was gone already."""
    try:
        size = path.lstat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def sweep(folder: Path) -> None:
    """Remove temporary files whose writer is gone. Never raises: this is housekeeping."""
    now = time.time()
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if TEMP_NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _sweep_one(folder / entry.name, now - entry.stat(follow_symlinks=False).st_mtime)


def _sweep_one(path: Path, age: float) -> None:
    # The grace covers the instant between a writer's open and its lock.
    if age < _TEMP_GRACE_S or not is_ours(path, TEMP_NAME, may_be_empty=True):
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            # A file system without locks: only age can tell.
            if age < _TEMP_OLD_S:
                return
        log.info("removing the unfinished file %s", path)
        path.unlink()
    finally:
        os.close(fd)
