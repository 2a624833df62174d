"""The caches that were saved in a folder: what each is, without reading its values."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from actcache.capture.saving import FORMAT, Reader
from actcache.capture.values import same_content
from actcache.errors import MissingFileError

if TYPE_CHECKING:
    from actcache.capture.cache import ActivationCache

C = TypeVar("C", bound="ActivationCache")


@dataclass(frozen=True)
class SavedCache(Generic[C]):
    """One saved cache.

    Attributes: `path`, `saved_at` (when), `metadata` (as given to `add_metadata`), `keys` (of its values).
    """

    path: Path
    saved_at: datetime
    metadata: dict[str, Any]
    keys: list[str]
    _kind: type[C] = field(repr=False)

    def load(self) -> C:
        """The cache itself; see `ActivationCache.load`."""
        return self._kind.load(self.path)


def saved_in(kind: type[C], folder: str | os.PathLike[str], fields: Mapping[str, Any]) -> list[SavedCache[C]]:
    """See `ActivationCache.saved`."""
    place = Path(folder)
    if not place.is_dir():
        raise MissingFileError(f"there is no folder {os.fspath(folder)!r}: expected one that caches were saved in")
    found = [one for path in place.rglob("*") if path.is_file() and (one := _read(kind, path)) is not None]
    found.sort(key=lambda one: (one.saved_at, one.path))
    return [
        one
        for one in found
        if all(name in one.metadata and same_content(one.metadata[name], value) for name, value in fields.items())
    ]


def new_file(folder: Path) -> Path:
    """A name that no other file in `folder` has, in the order in which they are made."""
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.safetensors"


def _read(kind: type[C], path: Path) -> SavedCache[C] | None:
    """What is said of the cache in a file; None for any other file."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            described = (file.metadata() or {}).get(FORMAT)
            if described is None:
                return None
            header = json.loads(described)
            # Metadata may hold tensors, which are all that is read.
            decode = Reader(file.get_tensor).decode
            metadata = {name: decode(value) for name, value in header["metadata"].items()}
    except (SafetensorError, OSError):
        return None
    at = datetime.fromtimestamp(header["saved"]).astimezone()
    return SavedCache(path, at, metadata, [key for key, _ in header["items"]], kind)
