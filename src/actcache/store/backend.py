"""Where the objects of a store lie: the little that a store needs of any place.

A store keeps immutable objects: each is put whole under a name that nobody else uses, read in ranges, and deleted. A
backend is held against what is said here by `actcache.testing.CacheBackendTests`.
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import OptionError
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
    `check_name`). Whoever puts never puts other bytes under a name that is taken.

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

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose name begins with `prefix` (whole parts, with "/" at the end, or ""), in no order.

        An object that was put or deleted just now may be missing, or still there.
        """

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes `start` to `stop` of an object (None: to its end), never those of another one.

        ``stop - start`` of them, or as many as there are where the object ends before.

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


def check_name(name: str) -> str:
    """`name` where it is one that a backend takes; OptionError otherwise, so that no name leads out of its place."""
    if not name or not all(_PART.fullmatch(part) for part in name.split("/")):
        raise OptionError(
            f"{name!r} is no name of an object: expected parts of letters, digits, '.', '_' and '-' that do not begin "
            "with '.', joined by '/'."
        )
    return name


class LocalBackend(CacheBackend):
    """A folder of this machine, or one that it has mounted; each object is a file.

    A `Store` of a folder does not go through its methods: it maps the files themselves.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()

    def __repr__(self) -> str:
        return f"LocalBackend({str(self.folder)!r})"

    @property
    def url(self) -> str:
        return str(self.folder)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        top = self.folder / check_name(prefix.removesuffix("/")) if prefix else self.folder
        yield from self._below(top, prefix)

    def _below(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if not _PART.fullmatch(entry.name) or TEMP_NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        yield from self._below(folder / entry.name, f"{prefix}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        yield ObjectInfo(prefix + entry.name, status.st_size, status.st_mtime_ns)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        fd = open_plain(self.folder / check_name(name))
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
        with translated(self.folder):
            make_folder(path.parent)
            sweep(path.parent)
            size = source.stat().st_size if isinstance(source, Path) else len(source)
            with atomic_file(path.parent, path.name, needed=size) as fd:
                if isinstance(source, Path):
                    _copy(source, fd)
                else:
                    write_all(fd, [memoryview(source).cast("B")], 0)

    def delete(self, name: str) -> None:
        with translated(self.folder), contextlib.suppress(FileNotFoundError):
            (self.folder / check_name(name)).unlink()


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

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for name, data in list(self._objects.items()):
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
