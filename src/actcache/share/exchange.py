"""A folder takes the place of another one, whole: whoever looks finds the old dataset or the new one.

Where a file system cannot let two folders change places at once, the old one is put aside first. A process that is
killed just then leaves no folder of the name: whoever asks for the dataset next brings it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shlex
import sys
import time
from pathlib import Path

from actcache.errors import DatasetAccessError
from actcache.share.location import folder_exists
from actcache.store.files import log, sync_folder

_EXCHANGE = 2
_AT_CWD = {"linux": -100, "darwin": -2}
_ASIDE = re.compile(r"([0-9a-f]{16})\.([0-9]+)\.old")
_PATIENCE_S = 20.0


def staging_root(folder: Path) -> Path:
    """Where the new folder is made, and the old one put aside: beside it."""
    return folder.parent / f".{folder.name}.migrating"


def change_places(new: Path, old: Path, owner: str) -> Path:
    """`new` and `old` take one another's names; where the system cannot do that at once, `old` is put aside meanwhile.

    Args:
        owner: the beginning of the name of the lock that is held, in the folder `staging_root`.

    Returns:
        Where the old one is now: outside of what a staging folder may drop, unless it is `new`.

    Raises `DatasetAccessError`, and has changed nothing, where these folders cannot be renamed.
    """
    try:
        if _exchange(new, old):
            _sync_changed(old, new.parent)
            return new
        # By the number of the folder that is to come it is known afterwards whether that has come.
        aside = staging_root(old) / f"{owner}.{new.stat().st_ino}.old"
        os.rename(old, aside)
        try:
            _sync(aside.parent, old.parent)
            os.rename(new, old)
        except BaseException:
            os.rename(aside, old)
            raise
        _sync_changed(old, new.parent)
        return aside
    except OSError as error:
        raise DatasetAccessError(
            f"{old} cannot be replaced where it is ({os.strerror(error.errno or 0)}), and nothing was changed: copy "
            "the dataset elsewhere, and do it there."
        ) from None


def recover(folder: Path) -> None:
    """Bring back the dataset `folder` where it lies aside, since the process that changed it was killed.

    Raises `DatasetAccessError`, which says where it lies, where that cannot be done.
    """
    try:
        if folder_exists(folder):
            return
        real = folder.resolve()
        found = [path for path in staging_root(real).iterdir() if _ASIDE.fullmatch(path.name)]
    except (OSError, RuntimeError):
        # There is nothing, or nothing that one may look at, which will be said of it.
        return
    if not found:
        return
    if len(found) > 1:
        raise _lies_aside(real, found)
    owner = _ASIDE.fullmatch(found[0].name)
    assert owner is not None
    end = time.monotonic() + _PATIENCE_S
    while not folder_exists(real):
        try:
            lock = os.open(staging_root(real) / f"{owner[1]}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            if folder_exists(real):
                # Whoever was at work on it has just done it, and cleared up.
                return
            raise _lies_aside(real, found) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not folder_exists(real) and found[0].is_dir():
                os.rename(found[0], real)
                _sync_changed(real, staging_root(real))
                log.warning("%s: a change of it was cut, and the dataset of before is back", real)
                _clear(staging_root(real), owner[1])
                return
        except BlockingIOError:
            # Whoever is at work on it is between two renames.
            if time.monotonic() > end:
                raise _lies_aside(real, found) from None
            time.sleep(0.02)
        except OSError:
            raise _lies_aside(real, found) from None
        finally:
            os.close(lock)


def drop_aside(folder: Path, into: Path) -> None:
    """Put what lies aside, and was replaced, into the folder `into`, with which it goes; the lock is held.

    Raises `DatasetAccessError` where something else than the new dataset has come into its place.
    """
    for path in list(staging_root(folder).iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2]) != folder.stat().st_ino:
            raise DatasetAccessError(
                f"{path} is what {folder} was before a change of it that was cut, and {folder} is something else now: "
                f"remove {path}, or put it in its place, then do it again."
            )
        os.rename(path, into / path.name)


def _lies_aside(folder: Path, found: list[Path]) -> DatasetAccessError:
    places = " or ".join(map(str, found))
    return DatasetAccessError(
        f"{folder} lies in {places}, since a change of it was cut, and cannot be brought back by itself: "
        f"`mv {shlex.quote(str(found[0]))} {shlex.quote(str(folder))}` does it."
    )


def _exchange(one: Path, other: Path) -> bool:
    """Whether two folders could change places at once."""
    library = ctypes.CDLL(None, use_errno=True)
    at = _AT_CWD.get(sys.platform)
    names = os.fsencode(one), os.fsencode(other)
    if at is not None and hasattr(library, "renameat2"):
        failed = library.renameat2(at, names[0], at, names[1], _EXCHANGE)
    elif at is not None and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    reason = ctypes.get_errno()
    if reason in (0, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(reason, os.strerror(reason), str(other))


def _clear(root: Path, owner: str) -> None:
    """Remove the staging folder where nothing is left in it but the lock, which is held."""
    with contextlib.suppress(OSError):
        if [path.name for path in root.iterdir()] == [f"{owner}.lock"]:
            (root / f"{owner}.lock").unlink()
            root.rmdir()


def _sync_changed(folder: Path, other: Path) -> None:
    """Make durable what is done: where that fails it is done all the same."""
    try:
        _sync(other, folder.parent)
    except OSError as error:
        log.warning(
            "%s is the new one, but whether it would be after a power failure is not known (%s)",
            folder, os.strerror(error.errno or 0),
        )  # fmt: skip


def _sync(*folders: Path) -> None:
    for folder in folders:
        sync_folder(folder)
