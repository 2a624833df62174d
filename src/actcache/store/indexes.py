"""The indexes of the spaces of a store, made when they are first asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from actcache.store.catalog import Catalog
from actcache.store.files import sweep
from actcache.store.index import SpaceIndex
from actcache.store.working_copy import WorkingCopy


class Indexes(Mapping[str, SpaceIndex]):
    """Those that were asked for, by space; `of` gives any. Thread-safe.

    `root`: the folder of the spaces; `copy`: the working copy that it is part of, if it is.

    Knows nothing of the store, so that what works for one in the background does not keep it alive.
    """

    def __init__(self, root: Path, catalog: Catalog, copy: WorkingCopy | None) -> None:
        self._root, self._catalog, self._copy = root, catalog, copy
        self._indexes: dict[str, SpaceIndex] = {}
        self._lock = threading.Lock()

    def of(self, space: str) -> SpaceIndex:
        """The index of a space."""
        with self._lock:
            if space not in self._indexes:
                self._indexes[space] = SpaceIndex(self._root / space, self._catalog, self._copy)
                sweep(self._root / space)
            return self._indexes[space]

    def __getitem__(self, space: str) -> SpaceIndex:
        return self._indexes[space]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._indexes))

    def __len__(self) -> int:
        return len(self._indexes)

    def write_reads(self) -> None:
        """Write when prompts were last read, as far as it is gathered in memory."""
        for index in list(self._indexes.values()):
            index.write_reads()

    def let_go(self) -> None:
        """Write what is to be remembered, and forget them; who still holds one may go on using it."""
        self.write_reads()
        with self._lock:
            self._indexes.clear()

    def after_fork(self) -> None:
        """In a child process: another thread of the parent may have held these locks, which nobody will release."""
        self._lock = threading.Lock()
        # What a thread was changing at that moment may be half done: it is built anew.
        for space, index in list(self._indexes.items()):
            if index.lock.acquire(blocking=False):
                index.lock = threading.RLock()
            else:
                del self._indexes[space]
