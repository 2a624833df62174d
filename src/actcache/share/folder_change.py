"""A change of a dataset in a folder: whoever reads it, or is left with it after a kill, has the old one or the new one.

New vectors may take the names of old ones, and an index says nothing without the files that belong to it, so that a
new folder is made beside the old one, and the two change places at once. What stays is in both, as links to the same
file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from actcache.errors import DatasetAccessError, DiskFullError, OptionError
from actcache.progress import progress
from actcache.share.change import Change, damaged, made
from actcache.share.exchange import change_places, drop_aside, staging_root
from actcache.share.format import INDEX
from actcache.share.staging import Staging, writing_to
from actcache.share.target import intact, sync_tree
from actcache.store.files import log

_ROOM = 16 << 20
_FICLONE = 0x40049409

Snapshot = dict[str, tuple[int, ...]]


def apply(change: Change, folder: Path, before: Snapshot, *, doing: str) -> str:
    """Make the change; the folder. `before`: its `snapshot` from before anything of it was read.

    Raises:
        OptionError: the folder cannot be replaced: it is where a disk is mounted, or a cache of the Hub's client.
        DatasetAccessError: somebody has changed it meanwhile; no folder may be made beside it, or take its name.
        DiskFullError: no room for the new files.
    """
    real = folder.resolve()
    if any((real / path).is_symlink() for path in (INDEX, *change.used)):
        raise OptionError(f"{folder} is a cache of the Hub's client: name the repository, or copy the folder.")
    _check_place(real)
    content = change.digest({path: repr(before.get(path)) for path in change.used})
    with _staging(real, content) as staging:
        drop_aside(real, staging.folder)
        staging.drop_others()
        if snapshot(real) != before:
            raise _changed(folder)
        _make(change, staging, doing, folder)
        small = change.finish(staging.done, staging)
        with writing_to(real):
            _add_small(real, staging.files, small)
            for path in staging.done:
                _as_open(real / INDEX, staging.files / path)
            _link_others(real, staging.files, {*staging.done, *small, *change.removed, *change.used})
            sync_tree(staging.files)
            if snapshot(real) != before:
                raise _changed(folder)
            _replace(real, staging, before, folder)
        staging.remove()
    return str(folder)


def forget(folder: Path) -> None:
    """Remove what is left of a change that is done."""
    real = folder.resolve()
    if staging_root(real).is_dir():
        with contextlib.suppress(DatasetAccessError), _staging(real, "done") as staging:
            drop_aside(real, staging.folder)
            staging.drop_others()
            staging.remove()


def snapshot(folder: Path) -> Snapshot:
    """What would be different if somebody changed a file."""
    found: Snapshot = {}
    for path in _files(folder.resolve()):
        said = (folder / path).lstat()
        found[path] = said.st_ino, said.st_size, said.st_mtime_ns
    return found


def _staging(folder: Path, content: str) -> Staging:
    return Staging(staging_root(folder), str(folder), content)


def _changed(folder: Path) -> DatasetAccessError:
    return DatasetAccessError(
        f"somebody has changed {folder} meanwhile, so that nothing was changed: look at it, then do it again."
    )


def _replace(real: Path, staging: Staging, before: Snapshot, folder: Path) -> None:
    """Let the new folder take the place of the old one, which goes with what is staged."""
    here = _current_folder()
    old = change_places(staging.files, real, staging.owner)
    if old != staging.files:
        os.rename(old, staging.folder / "old")
    elif snapshot(old) != before:
        # Between the last look and the exchange.
        change_places(staging.files, real, staging.owner)
        raise _changed(folder)
    if here is not None and here.is_relative_to(real):
        # Else this process stands in the folder that is removed.
        with contextlib.suppress(OSError):
            os.chdir(here)
        log.warning("%s is a new folder now: a shell that stands in it finds it with `cd .`", folder)


def _current_folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:
        return None


def _add_small(old: Path, new: Path, small: Mapping[str, Path]) -> None:
    """Index, card and the like, as open to others as those that they replace."""
    for path, file in small.items():
        place = new / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        shutil.copyfile(file, place)
        _as_open(old / path if (old / path).is_file() else old / INDEX, place)


def _as_open(like: Path, place: Path) -> None:
    _give(like, place)
    place.chmod(stat.S_IMODE(like.lstat().st_mode))


def _give(like: Path, place: Path) -> None:
    """Let a new file or folder be of whom that one is, as far as one may."""
    said = like.lstat()
    with contextlib.suppress(OSError):
        os.chown(place, said.st_uid, said.st_gid, follow_symlinks=False)


def _check_place(folder: Path) -> None:
    if os.path.ismount(folder) or folder.parent == folder:
        raise OptionError(f"{folder} is where a disk is mounted, and cannot be replaced: copy the dataset elsewhere.")
    for place in (folder, folder.parent):
        if not os.access(place, os.W_OK | os.X_OK):
            raise DatasetAccessError(
                f"{folder} is replaced as a whole, and {place} may not be written to: change its permissions, or copy "
                "the dataset to a folder of yours."
            )


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
    needed = sum(file.nbytes for file in left) + max((layer.aside_bytes for layer in change.layers), default=0)
    with writing_to(staging.folder, needed):
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
    """The paths of all files, links among them; an error for a folder that cannot be looked into: its files would be
    left behind."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise DatasetAccessError(
                f"{error.filename} cannot be looked into ({os.strerror(error.errno or 0)}), and is part of the folder: "
                "change its permissions, or take it out."
            )

    for place, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*names, *links):
            yield os.path.relpath(os.path.join(place, name), folder)


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
            _give(source, target)
            continue
        _same_file(source, target)
    for place, folders, _ in os.walk(old, topdown=False):
        for name in (*folders, ""):
            source = Path(place, name)
            if not source.is_symlink():
                _give(source, new / source.relative_to(old))
                shutil.copystat(source, new / source.relative_to(old))


def _same_file(source: Path, target: Path) -> None:
    """The same bytes under another name, which take no room where the file system allows that."""
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
    said = source.lstat()
    if not stat.S_ISREG(said.st_mode):
        # A pipe would be waited for.
        raise OptionError(
            f"{source} is no ordinary file, and there are no links here to keep it by: take it out of the dataset's "
            "folder, then do it again."
        )
    if not _shares_blocks(source, target):
        free = shutil.disk_usage(target.parent).free
        if free < said.st_size + _ROOM:
            raise DiskFullError(f"{target} needs {said.st_size:,} bytes, and {free:,} are free.")
        shutil.copyfile(source, target)
    _give(source, target)
    shutil.copystat(source, target)


def _shares_blocks(source: Path, target: Path) -> bool:
    """Whether `target` has become a copy that shares the blocks of `source`, as Btrfs and XFS can."""
    if not sys.platform.startswith("linux"):
        return False
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            return False
    return True
