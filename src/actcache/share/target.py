"""Where a dataset is pushed to: what every place can do, and a folder as one."""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from actcache.errors import DatasetExistsError, OptionError
from actcache.share.exchange import recover
from actcache.share.format import INFO
from actcache.share.location import folder_exists
from actcache.share.staging import Staged, Staging, writing_to
from actcache.store.files import make_folder, sync_folder

_OF_A_DATASET = ("tensors/", "index/")
_OLD_FILES = (INFO, "_stage_complete")


def is_stale(path: str, wanted: Iterable[str]) -> bool:
    """Whether a file was part of a dataset, and is none of the files `wanted` of the one that takes its place."""
    return (path.startswith(_OF_A_DATASET) or path in _OLD_FILES) and path not in wanted


class Target(ABC):
    """A place for a dataset. Nothing is changed there before `begin`, and no index shows before `finish`."""

    name: str
    shown: str
    """As a card has it: a folder's path is nobody else's business."""
    url: str
    exist_ok: bool
    finished = False
    """Whether the very dataset that is pushed is there already, since only the answer to its last commit was lost."""
    incremental = False
    """Whether files may be made visible before all of them are there: nothing that is published is changed by them."""

    @abstractmethod
    def staging_root(self, store: Path) -> Path:
        """Where files on their way are kept; `store` is the folder of the store they come from."""

    @abstractmethod
    def look(self, staging: Staging) -> None:
        """See what is there; `DatasetExistsError` where that would be overwritten and was not asked for."""

    @abstractmethod
    def begin(self, paths: Sequence[str]) -> None:
        """Make the place for files of these paths; `OptionError` where it would not take all of them."""

    @abstractmethod
    def has(self, staged: Staged) -> bool:
        """Whether a file is there already, with the same bytes."""

    @abstractmethod
    def send(self, batch: Sequence[Staged]) -> list[Staged]:
        """Send files; those whose bytes turned out not to be what they were are given back, and not used."""

    @abstractmethod
    def commit(self, message: str) -> list[str]:
        """Make what was sent visible; the paths of files that are needed no more."""

    @abstractmethod
    def finish(self, small: Mapping[str, Path], wanted: Sequence[str], staging: Staging) -> None:
        """Make the dataset visible: the files `small`, what was sent and not committed, and no other of its files."""


class Folder(Target):
    """A folder of this machine. What is staged lies beside it, so that it only has to be renamed."""

    def __init__(self, folder: Path, *, exist_ok: bool) -> None:
        # What a link leads to is what is replaced, not the link.
        self.folder = folder.resolve()
        self.name = str(folder)
        self.shown = f"./{folder.name}"
        self.url = str(folder)
        self.exist_ok = exist_ok

    def staging_root(self, store: Path) -> Path:
        return self.folder.parent / f".{self.folder.name}.pushing"

    def look(self, staging: Staging) -> None:
        recover(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise OptionError(f"{self.folder} is a file: name a folder, which need not exist yet.")
        if folder_exists(self.folder) and not self.exist_ok and not self._is_half_moved():
            raise DatasetExistsError(
                f"{self.folder} is not empty: pass exist_ok=True to replace the dataset in it, or name another folder."
            )
        for path in self._foreign_folders():
            raise OptionError(
                f"{path} is a link or no folder, and files of the dataset would go through it: take it away, or name "
                "another folder."
            )

    def begin(self, paths: Sequence[str]) -> None:
        with writing_to(self.folder):
            make_folder(self.folder.parent)

    def has(self, staged: Staged) -> bool:
        return False

    def send(self, batch: Sequence[Staged]) -> list[Staged]:
        # They lie where they are needed; what a crash left half written was found by its checksum.
        return [staged for staged in batch if not staged.fresh and not intact(staged)]

    def commit(self, message: str) -> list[str]:
        return []

    def finish(self, small: Mapping[str, Path], wanted: Sequence[str], staging: Staging) -> None:
        with writing_to(self.folder):
            for path, file in small.items():
                if file != staging.files / path:
                    (staging.files / path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, staging.files / path)
            sync_tree(staging.files)
            if not folder_exists(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    self.folder.rmdir()
                os.rename(staging.files, self.folder)
                sync_folder(self.folder.parent)
                return
            self._replace(staging.files, list(small), wanted)

    def _replace(self, files: Path, last: list[str], wanted: Sequence[str]) -> None:
        """Put files in place one by one; without an index in between, so that nobody reads half of two datasets."""
        marker = self.folder / ".pushing"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        for path in self._paths():
            if path.startswith("index/") or path in _OLD_FILES:
                (self.folder / path).unlink(missing_ok=True)
        for path in [*(path for path in wanted if path not in last), *last]:
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(files / path, target)
        for path in self._paths():
            if is_stale(path, {*wanted, *last}):
                (self.folder / path).unlink(missing_ok=True)
        sync_tree(self.folder, files_too=False)
        marker.unlink(missing_ok=True)

    def _is_half_moved(self) -> bool:
        marker = self.folder / ".pushing"
        return marker.is_file() and not marker.is_symlink()

    def _foreign_folders(self) -> Iterator[Path]:
        """What stands where folders of a dataset are, and is none."""
        for name in _OF_A_DATASET:
            path = self.folder / name.rstrip("/")
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                yield path
            for place, folders, _ in os.walk(path):
                yield from (found for folder in folders if (found := Path(place, folder)).is_symlink())

    def _paths(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir()]


def intact(staged: Staged) -> bool:
    """Whether a file that another process made is what it was."""
    import hashlib

    assert staged.file is not None
    with staged.file.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == staged.sha256


def sync_tree(folder: Path, *, files_too: bool = True) -> None:
    """Make everything in a folder durable. Links are not followed, and what is no ordinary file has nothing to lose."""
    for place, _, names in os.walk(folder):
        for name in names if files_too else ():
            path = os.path.join(place, name)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(place))
