"""`Store`: put, find, read."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache import config
from actcache.errors import NotCachedError
from actcache.store import segment as segments
from actcache.store.catalog import Catalog
from actcache.store.files import access_error, sweep, translated
from actcache.store.index import SpaceIndex
from actcache.store.lookup import Query, locate
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.records import Records, SegmentInfo
from actcache.store.spaces import ROOT, SpaceInfo, space_id, write_space


class Store:
    """A durable cache in a folder. Any number of threads and processes may use the same one.

    `index_dir`: where this host keeps its disposable index (default: the user's cache folder). Nothing is
    created before the first write; a folder that can only be read works for reading.
    """

    def __init__(self, location: str | Path, *, index_dir: Path | None = None) -> None:
        self.location = Path(location).expanduser()
        self.root = self.location / ROOT
        if index_dir is None:
            real = os.path.realpath(self.location)
            index_dir = config.host_state_path() / "index" / xxhash.xxh3_64_hexdigest(os.fsencode(real))
        self._catalog = Catalog(Path(index_dir))
        self._indexes: dict[str, SpaceIndex] = {}
        self._known: dict[str, SpaceInfo] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Store({str(self.location)!r})"

    # -- spaces ----------------------------------------------------------------------------------------

    def open_space(self, identity: Mapping[str, Any], label: Mapping[str, Any]) -> str:
        """The id of the space of `identity` (what makes two activations the same), described there by `label`.

        Touches the disk only when something is written.
        """
        space = space_id(identity)
        self._known.setdefault(space, SpaceInfo(space, dict(identity), dict(label)))
        return space

    def check_writable(self) -> None:
        """StoreAccessError with the remedy when this store cannot be written; creates its folder."""
        with translated(self.location):
            self.root.mkdir(parents=True, exist_ok=True)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise access_error(self.location, PermissionError(13, "Permission denied"))

    # -- writing ---------------------------------------------------------------------------------------

    def append(self, space: str, records: Records | Sequence[Records]) -> SegmentInfo:
        """Store `records` as one segment: durable and visible to everyone when this returns, or not at all.

        Raises DiskFullError or StoreAccessError, naming the folder; nothing stored before is lost.
        """
        self._ensure(space)
        index = self._index(space)
        with translated(self.location):
            info = segments.write(self.root / space, records, space=space)
        index.add(info)
        return info

    def _ensure(self, space: str) -> None:
        """space.json of `space`, also when someone cleared the store meanwhile."""
        folder = self.root / space
        if (folder / "space.json").exists():
            return
        if space not in self._known:
            raise NotCachedError(f"store {self.location} has no space {space!r}: make it with open_space()")
        with translated(self.location):
            write_space(self.root, self._known[space])

    def _index(self, space: str) -> SpaceIndex:
        with self._lock:
            if space not in self._indexes:
                self._indexes[space] = SpaceIndex(self.root / space, self._catalog)
                sweep(self.root / space)
            return self._indexes[space]

    # -- finding and reading ---------------------------------------------------------------------------

    def locate(
        self,
        space: str,
        *,
        texts: Sequence[str] | None = None,
        kinds: Sequence[int] | npt.NDArray[np.uint8] | int = 1,
        text_context: str = "",
        table: PromptTable | None = None,
        sites: Sequence[str],
        layout: str,
        check: bool = True,
    ) -> Placement:
        """Where prompts are, given by text (`texts`, `kinds`, `text_context`) or by token ids (`table`).

        The newest copy wins; what is stored is compared with what was asked, not only its key. With `check`
        every block that will be read is verified (once per process); damaged prompts are logged and count
        as not found.
        """
        if (texts is None) == (table is None):
            raise ValueError("locate() takes either texts or a table of token ids")
        query = Query.by_tokens(table) if table is not None else Query.by_text(texts or (), kinds, text_context)
        return locate(self._index(space), query, list(sites), layout, check)

    def refresh(self) -> None:
        """Take notice at once of what other processes have written or removed."""
        for index in list(self._indexes.values()):
            index.refresh(force=True)

    def close(self) -> None:
        """Let go of the index and of mapped segments; placements in use stay readable."""
        with self._lock:
            self._indexes.clear()
        self._catalog.close()
