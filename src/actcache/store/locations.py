"""Where a store is, as people say it: a folder, a URL, or a backend of their own."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from actcache import config
from actcache.errors import OptionError, did_you_mean
from actcache.store.backend import CacheBackend, LocalBackend

SCHEMES = ("s3", "gs", "az")


def backend_at(location: str | Path | CacheBackend, source: str) -> CacheBackend:
    """The backend of a place: a `LocalBackend` for folders. `source` (a variable, an option) is named in errors.

    Raises:
        OptionError: a URL of an unknown kind, or a file.
    """
    if isinstance(location, CacheBackend):
        return location
    url = config.as_url(location)
    if url is None:
        return LocalBackend(config.local_folder(location, source))
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise OptionError(
            f"{source} is {url!r}: stores lie in folders, or in one of {', '.join(f'{s}://' for s in SCHEMES)}."
            f"{did_you_mean(scheme, SCHEMES)}"
        )
    raise OptionError(f"{source} is {url!r}: object stores are not supported yet, name a folder of this machine.")


def place_of(backend: CacheBackend) -> str | Path:
    """What people call it: a folder, or a URL."""
    return backend.folder if isinstance(backend, LocalBackend) else backend.url


def default_index(backend: CacheBackend) -> Path:
    """Where this host keeps its index of the store there, and a working copy of objects that lie elsewhere."""
    place = os.path.realpath(backend.folder) if isinstance(backend, LocalBackend) else backend.url
    return config.host_state_path() / "index" / xxhash.xxh3_64_hexdigest(os.fsencode(place))
