"""Where the objects of a store lie: the little that a store needs of any place.

A store keeps immutable objects: each is put whole under a name that nobody else uses, read in ranges, and deleted. A
backend is held against what is said here by `actcache.testing.CacheBackendTests`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from actcache.errors import ActCacheError, BackendError, FormatError, OptionError, StoreAccessError
from actcache.store.files import TEMP_NAME, atomic_file, make_folder, open_plain, sweep, translated, write_all

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_PIECE = 8 << 20

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its `name`, its `size` in bytes, and when it was put, in nanoseconds since 1970 (0: unknown)."""

    name: str
    size: int
    modified_ns: int = 0


class CacheBackend(ABC):
    """A place that keeps immutable objects by name, for a `Store`; any number of threads and machines may use it.

    A name is parts joined by "/", each of ASCII letters, digits, ".", "_" and "-", not beginning with "." (see
    `check_name`). Whoever puts never puts other bytes under a name that is taken, and never uses a name both of an
    object and before a "/".

    Raises, beside what a method says:
        StoreAccessError: the place refuses these credentials, or this user.
        BackendError: the place cannot be reached, or goes on failing, after a backend's own retries.
    """

    concurrency = 16
    """How many reads a store has under way at the same time."""

    @property
    @abstractmethod
    def url(self) -> str:
        """What people call this place, such as ``s3://bucket/prefix``: the same for the same objects, and no secret."""

    @property
    def identity(self) -> str:
        """What no other place has: its `url`, and more where that means different objects at different servers.

        What a host keeps of the place lies in a folder named after it.
        """
        return self.url

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose name begins with `prefix` (whole parts, with "/" at the end, or ""), in no order.

        An object that was put or deleted just now may be missing, or still there. What lies there under a name that is
        none (see `check_name`) is left out.
        """

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes `start` to `stop` of an object (None: to its end), never those of another one.

        ``stop - start`` of them, or as many as there are where the object ends before: none where it ends before
        `start`, or where `stop` is not above it. Neither is negative. What is given is not written to afterwards:
        answers are views of it.

        Raises FileNotFoundError: there is no such object.
        """

    @abstractmethod
    def put(self, name: str, source: Bytes | Path) -> None:
        """Store the bytes of `source`, or those of the file there, as `name`.

        Durable, and there for everyone to read, when this returns. Nobody ever sees a part of it: after an error all of
        it is there or nothing. Putting the same bytes again does no harm.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; where there is none nothing happens."""


@lru_cache(maxsize=4096)
def is_name(name: str) -> bool:
    """Whether `name` is one that a backend takes; a temporary file of `LocalBackend` has none."""
    parts = name.split("/")
    return all(_PART.fullmatch(part) for part in parts) and not TEMP_NAME.fullmatch(parts[-1])


def check_name(name: str) -> str:
    """`name` where it is one that a backend takes; OptionError otherwise, so that no name leads out of its place."""
    if not is_name(name):
        raise OptionError(
            f"{name!r} is no name of an object: expected parts of letters, digits, '.', '_' and '-' that do not begin "
            "with '.', joined by '/'."
        )
    return name


def check_prefix(prefix: str) -> str:
    """`prefix` where it is one that `CacheBackend.list` takes; OptionError otherwise."""
    if prefix and not (prefix.endswith("/") and is_name(prefix[:-1])):
        raise OptionError(f"{prefix!r} is no beginning of names: expected whole parts with '/' behind each, or ''.")
    return prefix


class LocalBackend(CacheBackend):
    """A folder of this machine, or one that it has mounted; each object is a file.

    A `Store` of a folder does not go through its methods: it maps the files themselves.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._swept: set[Path] = set()

    def __repr__(self) -> str:
        return f"LocalBackend({str(self.folder)!r})"

    @property
    def url(self) -> str:
        return str(self.folder)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._translated("list", prefix or "objects"):
            yield from self._below(self.folder / check_prefix(prefix), prefix)

    def _below(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if is_name(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        yield from self._below(folder / entry.name, f"{prefix}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        yield ObjectInfo(prefix + entry.name, status.st_size, status.st_mtime_ns)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        path = self.folder / check_name(name)
        with self._translated("read", name):
            try:
                fd = open_plain(path)
            except (NotADirectoryError, FormatError):
                # A link may lead out of this place, and a folder is part of a name.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
            try:
                size = os.fstat(fd).st_size
                left, at, parts = max(0, min(size if stop is None else stop, size) - start), start, []
                while left and (part := os.pread(fd, min(left, _PIECE), at)):
                    parts.append(part)
                    at, left = at + len(part), left - len(part)
                return parts[0] if len(parts) == 1 else b"".join(parts)
            finally:
                os.close(fd)

    def put(self, name: str, source: Bytes | Path) -> None:
        path = self.folder / check_name(name)
        size = source.stat().st_size if isinstance(source, Path) else memoryview(source).nbytes
        with self._translated("put", name):
            make_folder(path.parent)
            if path.parent not in self._swept:
                sweep(path.parent)
                self._swept.add(path.parent)
            with atomic_file(path.parent, path.name, needed=size) as fd:
                if isinstance(source, Path):
                    _copy(source, fd)
                else:
                    write_all(fd, [memoryview(source).cast("B")], 0)

    def delete(self, name: str) -> None:
        path = self.folder / check_name(name)
        with self._translated("delete", name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if not path.is_dir():
                path.unlink()

    @contextlib.contextmanager
    def _translated(self, verb: str, name: str) -> Iterator[None]:
        """Turn errors of the operating system into those that a backend raises."""
        try:
            with contextlib.nullcontext() if verb in ("list", "read") else translated(self.folder):
                yield
        except (ActCacheError, FileNotFoundError):
            raise
        except OSError as error:
            kind = StoreAccessError if isinstance(error, PermissionError) else BackendError
            raise kind(f"cannot {verb} {name} in {self.folder}: {error}") from error


def _copy(source: Path, fd: int) -> None:
    at = 0
    with source.open("rb") as file:
        while part := file.read(_PIECE):
            at = write_all(fd, [memoryview(part)], at)


class MemoryBackend(CacheBackend):
    """Objects in the memory of this process, for tests and for work that is to leave nothing behind."""

    def __init__(self, name: str = "") -> None:
        self._name = name or f"{id(self):x}"
        self._objects: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"MemoryBackend({self._name!r})"

    def __reduce__(self) -> Any:
        raise TypeError("its objects are in the memory of one process")

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        # A copy of a dictionary is made in one step; a walk through it would notice other threads.
        for name, data in self._objects.copy().items():
            if name.startswith(prefix):
                yield ObjectInfo(name, len(data))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = self._objects.get(check_name(name))
        if data is None:
            raise FileNotFoundError(f"{self.url} has no object {name}")
        return memoryview(data)[start:stop]

    def put(self, name: str, source: Bytes | Path) -> None:
        self._objects[check_name(name)] = source.read_bytes() if isinstance(source, Path) else bytes(source)

    def delete(self, name: str) -> None:
        self._objects.pop(check_name(name), None)
