"""Where a store is, as people say it: a folder, a URL, or a backend of their own."""

from __future__ import annotations

import math
import os
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import xxhash

from actcache import config
from actcache.errors import OptionError
from actcache.store.backend import CacheBackend, LocalBackend
from actcache.store.object_urls import parse_url
from actcache.store.working_copy import WorkingCopy


def named_place(location: str | Path, source: str) -> str | Path:
    """A folder as an absolute path, a URL as it is written for everybody; `source` is named in errors.

    Raises:
        OptionError: a URL of an unknown kind, or a file.
    """
    if not config.is_url(location):
        return config.local_folder(location, source)
    try:
        scheme, bucket, prefix = parse_url(str(location))
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from None
    return f"{scheme}://{'/'.join(filter(None, (bucket, prefix)))}"


def _backend_at(location: str | Path | CacheBackend) -> CacheBackend:
    if isinstance(location, CacheBackend):
        return location
    place = named_place(location, "location of Store()")
    if isinstance(place, Path):
        return LocalBackend(place)
    from actcache.store.object_backend import ObjectBackend

    return ObjectBackend(place)


class Place:
    """Where a store is.

    Attributes:
        backend: where its objects lie.
        location: what people call it: a folder, or a URL.
        index_dir: where this host keeps its index.
        copy: the working copy of objects that lie elsewhere; None for a folder.
        local_limit: how many bytes of such objects this host keeps, and what says so.
        folder: where its files are on this host: the store itself, or the working copy.
    """

    def __init__(
        self, location: str | Path | CacheBackend, index_dir: Path | None = None, local_gb: float | None = None
    ) -> None:
        self.backend = _backend_at(location)
        self.copy: WorkingCopy | None = None
        self.local_limit = config.Setting(None, "default")
        # One that does something of its own wants to be asked.
        if type(self.backend) is LocalBackend:
            self.location: str | Path = self.backend.folder
            self.folder, name = self.backend.folder, os.path.realpath(self.backend.folder)
        else:
            self.location, name = self.backend.url, self.backend.identity
        default = config.host_state_path() / "index" / xxhash.xxh3_64_hexdigest(os.fsencode(name))
        self.index_dir = default if index_dir is None else Path(index_dir)
        if type(self.backend) is not LocalBackend:
            self.local_limit = config.local_limit(local_gb)
            self.copy = WorkingCopy(self.backend, self.index_dir, self.local_limit.value)
            self.folder = self.index_dir = self.copy.folder


def place_of(copy: WorkingCopy) -> tuple[CacheBackend, Path, float]:
    """What opens a store of which this host has a working copy in another of its processes, which shares the copy:
    the backend, `index_dir` and `local_gb`.

    Raises:
        OptionError: the backend cannot be sent there.
    """
    try:
        ForkingPickler.dumps(copy.backend)
    except Exception as error:  # whatever a backend of somebody else's raises
        raise OptionError(
            f"{copy.backend.url} cannot be opened in another process ({error}): start workers by fork, or give its "
            "backend what pickles it."
        ) from error
    kept = copy.local_bytes
    return copy.backend, copy.folder, math.inf if kept is None else kept / (1 << 30)
