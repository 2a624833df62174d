"""Durable files: atomic creation, error translation, and what is ours to delete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actcache.errors import BackendError, DiskFullError, FormatError, StoreAccessError
from actcache.store.beside import Beside

log = logging.getLogger("actcache.store")

SEGMENT_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
TOMB_NAME = re.compile(r"([0-9a-f]{32})-[0-9a-f]{16}\.tomb")
OPEN_NAME = re.compile(r"[0-9a-f]{32}\.open")
TEMP_NAME = re.compile(r"[0-9a-f]{32}\.tmp")
SPACE_FILE = re.compile(r"space\.json")
BESIDE_NAME = re.compile(r"[0-9a-f]{32}\.(have|sent)|space\.have")
"""What lies beside the segments of a working copy, and beside its descriptions of spaces."""
SPACE_NAME = re.compile(r"[0-9a-f]{32}")

SIGNATURE = b'{"__metadata__":{"format":"actcache-'
"""What every file of ours begins with, the binary ones after 8 bytes of length."""

TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
"""Errors that say nothing of the file in question."""

ELSEWHERE = (BackendError, StoreAccessError, DiskFullError)
"""Errors of reading that say nothing of the object in question: of the way to it, or of the disk it is to come to."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a disk that has no room."""

DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors of a place that may not be written to, or is none."""

_TEMP_GRACE_S = 60.0
_TEMP_OLD_S = 24 * 3600.0
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0x2FC12FC1, 0xF2F52010, 0xCA451A4E}
"""What Linux calls ext4, XFS, Btrfs, tmpfs, overlays, ZFS, F2FS and bcachefs."""
_libc = ctypes.CDLL(None)
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
        if error.errno in FULL:
            raise DiskFullError(
                f"no room in {folder} for {needed:,} more bytes ({os.strerror(error.errno)}): free space there, "
                "raise the quota, or choose another folder with ACTCACHE_DIR or set_cache_backend(path)"
            ) from error
        if error.errno in DENIED:
            raise access_error(folder, error) from error
        raise


def access_error(folder: Path, error: OSError) -> StoreAccessError:
    """The error for a folder that cannot be created, read or written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StoreAccessError(
        f"cannot write to the store folder {folder} ({reason}): choose a folder you may write to with "
        "store= (--store), ACTCACHE_DIR or set_cache_backend(path)"
    )


def require_writable(folder: Path, store: Path) -> None:
    """StoreAccessError, which names the folder `store`, when `folder` in it cannot be written; it is made."""
    with translated(store):
        try:
            make_folder(folder)
        except FileNotFoundError as error:
            # Folders that cannot be made, such as those of /proc, are reported as missing.
            raise access_error(store, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise access_error(store, PermissionError(13, "Permission denied"))


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


def sync_data(fd: int) -> None:
    """Make what was written to `fd`, whose size stays as it is, durable."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable; nothing, where another process has removed all of it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
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
    with contextlib.ExitStack() as syncing:
        # The disk is waited for once, not once for each.
        for made in missing:
            syncing.enter_context(Beside(partial(_sync_readable, made.parent)))


def _sync_readable(folder: Path) -> None:
    # A parent that may be passed but not read cannot be synced.
    with contextlib.suppress(PermissionError):
        sync_folder(folder)


def _is_local(fd: int) -> bool:
    """Whether a file is on a file system that only this machine uses, as far as that is known."""
    if not sys.platform.startswith("linux"):
        return False
    described = (ctypes.c_long * 64)()
    return _libc.fstatfs(fd, described) == 0 and described[0] in _LOCAL


def open_locked(folder: Path, suffix: str, *, locks_needed: bool = False) -> tuple[Path, int]:
    """A new empty file whose name tells when it was made, and its locked descriptor, for reading and writing.

    Where the file system has no locks it is not locked; with `locks_needed` that is an OSError.
    """
    for _ in range(_ATTEMPTS):
        path = folder / f"{time.time_ns():016x}{uuid.uuid4().hex[:16]}{suffix}"
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
            if locks_needed:
                os.unlink(path)
                os.close(fd)
                raise
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


@contextlib.contextmanager
def atomic_file(
    folder: Path, name: str, *, needed: int = 0, before: Callable[[Path, Path], object] | None = None
) -> Iterator[int]:
    """A descriptor of a new file that becomes ``folder/name``, whole and durable, when the block ends.

    Until then it has a temporary name and an advisory lock, by which `sweep` knows that its writer lives.
    When the block raises, nothing is left. `before` is called with the temporary and the final path when the file is
    whole and durable, before it gets its name; when it raises, too.
    """
    with translated(folder, needed):
        make_folder(folder)
        temporary, fd = open_locked(folder, ".tmp")
        try:
            yield fd
            os.fsync(fd)
            if before is not None:
                before(temporary, folder / name)
            os.rename(temporary, folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        sync_folder(folder)


def named(path: Path, error: Exception) -> str:
    """What `error` says, and of which file, which errors of the operating system may leave out."""
    reason = str(error)
    return reason if str(path) in reason else f"{path}: {reason}"


def open_plain(path: Path) -> int:
    """A descriptor for reading an ordinary file; FormatError for links, folders, pipes, which a store has none of."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path}: a symbolic link") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{path}: not an ordinary file")
    return fd


def is_ours(path: Path, pattern: re.Pattern[str], *, may_be_empty: bool = False) -> bool:
    """Whether the file carries our name pattern and begins as our files do (no links followed).

    With `may_be_empty` also when nothing was written to its beginning yet.
    """
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
    return SIGNATURE in (head[8:], head[: len(SIGNATURE)]) or (may_be_empty and not any(head))


def names_in(folder: Path) -> set[str]:
    """The names of what is in `folder`; none where there is no such folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return set(os.listdir(folder))
    return set()


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
    if not is_ours(path, TEMP_NAME, may_be_empty=True):
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Locks of a network file system may be known to one host only: there a file may be at work that can be locked.
        if age < _TEMP_GRACE_S and not _is_local(fd):
            return
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
