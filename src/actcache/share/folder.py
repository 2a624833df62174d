"""Datasets in a folder: nothing outside it is read, whatever it holds."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from actcache.errors import DatasetAccessError, DatasetFormatError, DatasetNotFoundError
from actcache.share.location import folder_exists
from actcache.share.source import NoFileError, Source, Stream

# The Hub client keeps each file once, under its digest, and links to it from the folder of a commit.
_BLOB_LINK = re.compile(r"(?:\.\./){2,20}blobs/([0-9a-f]{40,64})")
_DIGEST = re.compile(r"[0-9a-f]{40,64}")


class FileStream(Stream):
    """A range of an open file, whose descriptor it closes. `what` names the file in errors."""

    def __init__(self, fd: int, what: str, start: int, stop: int | None) -> None:
        self.size = os.fstat(fd).st_size
        self._fd = fd
        self._what = what
        self._at = start
        self._stop = self.size if stop is None else min(stop, self.size)

    def readinto(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            wanted = min(len(view) - done, self._stop - self._at)
            got = os.preadv(self._fd, [view[done : done + wanted]], self._at) if wanted > 0 else 0
            if got == 0:
                raise DatasetFormatError(f"{self._what} ends at byte {self._at:,}, before what it should hold.")
            done += got
            self._at += got

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Folder(Source):
    """A dataset in a folder of this machine."""

    gap = 1 << 16
    concurrency = 4

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.name = str(folder)

    def __repr__(self) -> str:
        return f"Folder({self.name!r})"

    def open(self, path: str, start: int = 0, stop: int | None = None) -> Stream:
        if not self.folder.is_dir() or not folder_exists(self.folder):
            raise DatasetNotFoundError(
                f"{self.name} is no folder of a dataset: expected one with an index, or 'org/name' of the Hub."
            )
        try:
            return FileStream(self._descriptor(path), f"{path} of {self.name}", start, stop)
        except FileNotFoundError:
            raise NoFileError(f"{self.name} has no file {path}.") from None
        except OSError as error:
            raise DatasetAccessError(
                f"{path} of {self.name} cannot be read: {os.strerror(error.errno or 0)}."
            ) from None

    def _descriptor(self, path: str) -> int:
        """An open file, found without following a link on the way."""
        *folders, name = path.split("/")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        # The folder itself may be a link: it is the caller who named it.
        at = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            for folder in folders:
                below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            # A pipe would be waited for.
            fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=at)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            blob = self._blob(path) if error.errno == errno.ELOOP else None
            if blob is None:
                raise DatasetFormatError(
                    f"{path} of {self.name} is a link, or leads through one or through a file."
                ) from None
            fd = os.open(blob, flags | os.O_NONBLOCK)
        finally:
            os.close(at)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise DatasetFormatError(f"{path} of {self.name} is no ordinary file.")
        return fd

    def _blob(self, path: str) -> Path | None:
        """What a link in a snapshot of the Hub client's cache stands for; None for any other link."""
        snapshot = self.folder.resolve()
        link = snapshot / path
        match = _BLOB_LINK.fullmatch(os.readlink(link)) if link.is_symlink() else None
        repository = snapshot.parent.parent
        if match is None or snapshot.parent.name != "snapshots" or link.parent.resolve() != link.parent:
            return None
        target = link.resolve()
        # Newer clients share files between repositories, in a folder beside them.
        places = {repository / "blobs", repository.parent / "blobs" / target.name[:2]}
        return target if target.parent in places and _DIGEST.fullmatch(target.name) else None
