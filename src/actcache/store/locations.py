"""Where a store is, as people say it: a folder, a URL, or a backend of their own."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from actcache import config
from actcache.errors import OptionError
from actcache.store.backend import CacheBackend, LocalBackend
from actcache.store.working_copy import WorkingCopy


def backend_at(location: str | Path | CacheBackend, source: str) -> CacheBackend:
    """The backend of a place: a `LocalBackend` for folders. `source` (a variable, an option) is named in errors.

    Raises:
        OptionError: a URL of an unknown kind, or a file.
    """
    if isinstance(location, CacheBackend):
        return location
    if not config.is_url(location):
        return LocalBackend(config.local_folder(location, source))
    from actcache.store.object_backend import ObjectBackend

    try:
        return ObjectBackend(str(location))
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from None


class Place:
    """Where a store is.

    Attributes:
        backend: where its objects lie.
        location: what people call it: a folder, or a URL.
        index_dir: where this host keeps its index.
        copy: the working copy of objects that lie elsewhere; None for a folder.
        folder: where its files are on this host: the store itself, or the working copy.
    """

    def __init__(
        self, location: str | Path | CacheBackend, index_dir: Path | None = None, local_gb: float | None = None
    ) -> None:
        self.backend = backend_at(location, "location of Store()")
        self.copy: WorkingCopy | None = None
        # One that does something of its own wants to be asked.
        if type(self.backend) is LocalBackend:
            self.location: str | Path = self.backend.folder
            self.folder, name = self.backend.folder, os.path.realpath(self.backend.folder)
        else:
            self.location = name = self.backend.url
        default = config.host_state_path() / "index" / xxhash.xxh3_64_hexdigest(os.fsencode(name))
        self.index_dir = default if index_dir is None else Path(index_dir)
        if type(self.backend) is not LocalBackend:
            self.copy = WorkingCopy(self.backend, self.index_dir, config.local_limit(local_gb))
            self.folder = self.index_dir = self.copy.folder
