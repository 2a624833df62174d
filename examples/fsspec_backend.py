"""A backend of one's own: anything that fsspec reaches (SFTP, WebDAV, HDFS, Dropbox, ...) as the place of a store.

    import actcache as ac
    from fsspec_backend import FsspecBackend

    ac.set_cache_backend(FsspecBackend("sftp://host/scratch/activations"))

`tests/test_fsspec_backend.py` holds it against `actcache.testing.CacheBackendTests`, as yours should be held.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from actcache import CacheBackend
from actcache.store.backend import ObjectInfo, check_name, check_prefix


class FsspecBackend(CacheBackend):
    """A folder of a file system that fsspec knows; `options` are the file system's, such as credentials."""

    def __init__(self, url: str, **options: Any) -> None:
        self._fs, folder = fsspec.url_to_fs(url, **options)
        self._folder = folder.rstrip("/")
        self._url = self._fs.unstrip_protocol(self._folder)  # without passwords, which are among the options

    @property
    def url(self) -> str:
        return self._url

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        top = f"{self._folder}/{check_prefix(prefix)}".rstrip("/")
        self._fs.invalidate_cache()  # somebody else may have put something
        try:
            found = self._fs.find(top, detail=True)
        except FileNotFoundError:
            return
        for path, about in found.items():
            name = path.removeprefix(self._folder + "/")
            with contextlib.suppress(ValueError):  # what was not put by us
                if name.startswith(prefix):
                    yield ObjectInfo(check_name(name), about["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        path = f"{self._folder}/{check_name(name)}"
        if not self._fs.isfile(path):
            raise FileNotFoundError(path)
        size = self._fs.size(path)
        stop = size if stop is None else min(stop, size)
        return self._fs.cat_file(path, start, stop) if start < stop else b""

    def put(self, name: str, source: bytes | bytearray | memoryview | Path) -> None:
        path = f"{self._folder}/{check_name(name)}"
        data = source.read_bytes() if isinstance(source, Path) else bytes(source)
        hidden = f"{self._folder}/.{uuid.uuid4().hex}"  # nobody is to see a part of an object
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(hidden, data)
        self._fs.mv(hidden, path)

    def delete(self, name: str) -> None:
        path = f"{self._folder}/{check_name(name)}"
        with contextlib.suppress(FileNotFoundError):
            if self._fs.isfile(path):
                self._fs.rm_file(path)
