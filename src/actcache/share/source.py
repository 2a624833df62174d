"""The place where the files of a dataset lie: what reading needs of it."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING

from actcache.errors import DatasetNotFoundError, OptionError
from actcache.share.exchange import recover
from actcache.share.location import local_folder

if TYPE_CHECKING:
    from typing import Self


class Stream(ABC):
    """Some bytes of a file, read once from their beginning to their end; a context manager."""

    size: int
    """Bytes of the whole file."""

    @abstractmethod
    def readinto(self, view: memoryview) -> None:
        """Fill `view` with the next bytes; `DatasetFormatError` when there are fewer."""

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        into = bytearray(count)
        self.readinto(memoryview(into))
        return bytes(into)

    @abstractmethod
    def close(self) -> None:
        """Let go of the file. What was not read is not transferred."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NoFileError(DatasetNotFoundError):
    """A dataset that is there and has no file of the name that was looked for."""


class Source(ABC):
    """A folder or a repository; its files are named by paths inside it, with "/" between the parts.

    Attributes:
        name: what people call it.
        commit: which commit of a repository is read, once any file of it was; None for a folder.
        stop: set when what is read is wanted no more; nobody waits for anything then.
        gap: how many bytes are sooner read in vain than left out by a request of their own.
        concurrency: how many streams are worth having at the same time.
    """

    name: str
    commit: str | None = None
    gap: int
    concurrency: int

    def __init__(self) -> None:
        self.stop = threading.Event()

    @abstractmethod
    def open(self, path: str, start: int = 0, stop: int | None = None) -> Stream:
        """Bytes `start` to `stop` of a file (None: to its end; less where it ends before).

        Raises:
            NoFileError: there is no such file.
            DatasetNotFoundError: there is no such dataset.
            DatasetFormatError: what has that name is no ordinary file of the dataset.
            DatasetAccessError: the place cannot be reached, or goes on failing.
        """


def open_source(
    dataset: str | os.PathLike[str], *, token: str | bool | None = None, revision: str | None = None
) -> Source:
    """The place that `dataset` names; `revision`: a branch, a tag or a commit, for repositories alone."""
    folder = local_folder(dataset)
    if folder is None:
        from actcache.share.repository import Repository

        return Repository(str(dataset), token=token, revision=revision)
    if revision is not None:
        raise OptionError(f"revision={revision!r:.60} has no meaning for the folder {str(dataset)!r}: leave it out.")
    from actcache.share.folder import Folder

    recover(folder)
    return Folder(folder)
