"""A change of a dataset in a folder: whoever reads it, or is left with it after a kill, has the old one or the new one.

New vectors may take the names of old ones, so that a folder with them is made beside the old one, and the two change
places at once. What stays is in both, as links to the same file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from actcache.errors import DatasetAccessError, DiskFullError, OptionError
from actcache.progress import progress
from actcache.share.change import Change, damaged, made
from actcache.share.format import INDEX, INFO
from actcache.share.staging import Staging
from actcache.share.target import intact, sync_tree
from actcache.store.files import sync_folder, translated

_ROOM = 16 << 20
_EXCHANGE = 2
_AT_CWD = {"linux": -100, "darwin": -2}

Snapshot = dict[str, tuple[int, ...]]


def apply(change: Change, folder: Path, *, doing: str) -> str:
    """Make the change; the folder.

    Raises:
        OptionError: the folder cannot be replaced: it is where a disk is mounted, or a cache of the Hub's client.
        DatasetAccessError: somebody has changed it meanwhile.
        DiskFullError, StoreAccessError: no room for the new files, or no folder may be made beside it.
    """
    real = folder.resolve()
    if any((real / path).is_symlink() for path in (INDEX, *change.used)):
        raise OptionError(f"{folder} is a cache of the Hub's client: name the repository, or copy the folder.")
    if not change.files:
        _in_place(change, real)
        return str(folder)
    before = _snapshot(real)
    _check_place(real)
    content = change.digest({path: repr(before.get(path)) for path in change.used})
    with Staging(staging_root(real), str(real), content) as staging:
        staging.drop_others()
        _make(change, staging, doing, folder)
        small = change.finish(staging.done)
        with translated(real):
            _link_others(real, staging.files, {*staging.done, *small, *change.removed, *change.used})
            for path, file in small.items():
                (staging.files / path).parent.mkdir(parents=True, exist_ok=True)
                (staging.files / path).unlink(missing_ok=True)
                shutil.copyfile(file, staging.files / path)
            sync_tree(staging.files)
            if _snapshot(real) != before:
                raise DatasetAccessError(
                    f"somebody has changed {folder} meanwhile, so that nothing was changed: look at it, then do it "
                    "again."
                )
            _change_places(staging.files, real)
            sync_folder(real.parent)
        staging.remove()
    return str(folder)


def staging_root(folder: Path) -> Path:
    """Where the new folder is made: beside the old one."""
    return folder.parent / f".{folder.name}.migrating"


def forget(folder: Path) -> None:
    """Remove what is left of a change that is done."""
    real = folder.resolve()
    if staging_root(real).is_dir():
        with contextlib.suppress(DatasetAccessError), Staging(staging_root(real), str(real), "done") as staging:
            staging.drop_others()
            staging.remove()


def _in_place(change: Change, folder: Path) -> None:
    """Where no vectors move it is the index that decides what the dataset is: it takes its place at once.

    JSON that says the same comes behind it: whoever finds new JSON has the new index.
    """
    small = change.finish({})
    with translated(folder):
        mode = stat.S_IMODE((folder / INDEX).lstat().st_mode)
        for path in sorted(small, key=lambda path: (path == INFO, path == INDEX)):
            place = folder / path
            if place.parent.resolve() != place.parent:
                raise OptionError(f"{place.parent} is a link: what is in it is no part of the dataset.")
            temporary = place.with_name(f".{place.name}.new")
            # Of a process that was killed; or a link that somebody has put there, which is not followed.
            temporary.unlink(missing_ok=True)
            try:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
                with small[path].open("rb") as source, open(fd, "wb") as target:
                    shutil.copyfileobj(source, target)
                    target.flush()
                    os.fsync(fd)
                os.replace(temporary, place)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(place.parent)
        for path in change.removed:
            (folder / path).unlink(missing_ok=True)
        sync_folder(folder)


def _check_place(folder: Path) -> None:
    if os.path.ismount(folder) or folder.parent == folder:
        raise OptionError(f"{folder} is where a disk is mounted, and cannot be replaced: copy the dataset elsewhere.")
    with translated(folder.parent):
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder.parent))


def _make(change: Change, staging: Staging, doing: str, folder: Path) -> None:
    """All files of vectors; those of an earlier process are looked at first."""
    for staged in list(staging.done.values()):
        if not intact(staged):
            staging.forget(staged)
    for path in _files(staging.files):
        if path not in staging.done:
            # Of a process that ended while it put files together, or after the folders had changed places.
            (staging.files / path).unlink()
    left = [file for file in change.files if file.path not in staging.done]
    needed = sum(file.nbytes for file in left) + max(layer.aside_bytes for layer in change.layers)
    with translated(staging.folder, needed):
        free = shutil.disk_usage(staging.folder).free
    if free < needed + _ROOM:
        raise DiskFullError(f"{staging.folder} needs {needed:,} bytes for the new files, and {free:,} are free.")
    with progress(len(change.files), f"{doing} {folder}", unit="file") as bar:
        bar.update(len(change.files) - len(left))
        for batch in made(staging, change.layers, change.source):
            bar.update(sum(staged.fresh for staged in batch))
    if staging.done.keys() != {file.path for file in change.files}:
        raise damaged(staging.folder)


def _files(folder: Path) -> Iterator[str]:
    """The paths of all files, links among them."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*names, *links):
            yield os.path.relpath(os.path.join(place, name), folder)


def _snapshot(folder: Path) -> Snapshot:
    """What would be different if somebody changed a file."""
    found: Snapshot = {}
    for path in _files(folder):
        said = (folder / path).lstat()
        found[path] = said.st_ino, said.st_size, said.st_mtime_ns
    return found


def _link_others(old: Path, new: Path, but: set[str]) -> None:
    """Everything else that is in the old folder, in the new one too."""
    for place, folders, _ in os.walk(old):
        for name in folders:
            source = Path(place, name)
            if not source.is_symlink():
                (new / source.relative_to(old)).mkdir(parents=True, exist_ok=True)
    for path in _files(old):
        if path in but:
            continue
        source, target = old / path, new / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
            continue
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
                raise
            shutil.copy2(source, target)
    for place, folders, _ in os.walk(old, topdown=False):
        for name in (*folders, ""):
            source = Path(place, name)
            if not source.is_symlink():
                shutil.copystat(source, new / source.relative_to(old))


def _change_places(new: Path, old: Path) -> None:
    """Two folders take one another's names at once; where the system cannot do that, one after the other."""
    library = ctypes.CDLL(None, use_errno=True)
    at = _AT_CWD.get(sys.platform)
    names = os.fsencode(new), os.fsencode(old)
    if at is not None and hasattr(library, "renameat2"):
        failed = library.renameat2(at, names[0], at, names[1], _EXCHANGE)
    elif at is not None and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        failed, reason = -1, errno.ENOSYS
    if not failed:
        return
    reason = ctypes.get_errno() or errno.ENOSYS
    if reason not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(reason, os.strerror(reason), str(old))
    aside = new.with_name("old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
