"""What changes a store as a whole: taking out, keeping to a size, merging, verifying."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

from actcache import config
from actcache.store import adoption, duplicates, eviction, locks, merging, removal, reports, tensors, verification
from actcache.store.catalog import Catalog
from actcache.store.discovered import none_of_that_name
from actcache.store.eviction import EvictionReport
from actcache.store.files import log, translated
from actcache.store.inspection import Inspection
from actcache.store.prompts import PromptTable
from actcache.store.spaces import SpaceInfo
from actcache.store.verification import VerifyReport


class Maintenance(Inspection):
    """The part of `Store` that takes out and puts in order."""

    _catalog: Catalog
    _known: dict[str, SpaceInfo]

    @property
    @abstractmethod
    def index_dir(self) -> Path:
        """Where this host keeps its index of this store."""

    @abstractmethod
    def _let_go(self) -> None: ...

    @abstractmethod
    def flush(self) -> None:
        """Return when all that was stored here is where the objects lie."""

    def invalidate(self, space: str | SpaceInfo, prompts: Any = None) -> int:
        """Forget prompts (texts, ids, chats, a `PromptTable`; None: all) of a space; how many there were.

        Durable when it returns. The bytes go when segments are merged.
        """
        self._look()
        index = self._index(self._space(space))
        if prompts is None:
            return removal.invalidate(index, None)
        index.refresh()
        if isinstance(prompts, PromptTable):
            return removal.invalidate(index, prompts.token_key)
        return removal.invalidate(index, reports.find_token_keys(index, tensors.as_list(prompts)))

    def clear(self, model: str | None = None) -> int:
        """Delete all spaces, or those of the model of that name or space id; the number of prompts deleted.

        Never touches a file that actcache did not write. Raises NotCachedError where nothing is stored under that name.
        """
        spaces = self.spaces()
        chosen = [space for space in spaces if model in (None, space.model_name, space.space)]
        if model is not None and not chosen:
            raise none_of_that_name(model, spaces, self)
        deleted = 0
        for space in chosen:
            deleted += space.num_prompts
            # A merge under way would bring back what it has read.
            with locks.exclusive(self.index_dir, space.space, wait_s=locks.LOCK_WAIT_S):
                removal.clear_space(self.root / space.space, self._copy)
            self._index(space.space).refresh(force=True)
        if model is None:
            for name in set(eviction.space_folders(self.root)) - {space.space for space in spaces}:
                # Tombs outlive what they are for; without a description nobody would find them any more.
                if removal.has_only_tombs(self.root / name):
                    removal.clear_space(self.root / name, self._copy)
        with contextlib.suppress(OSError):
            self.root.rmdir()
        return deleted

    def evict(self, limit_gb: float | None = None) -> EvictionReport:
        """Make the store smaller than `limit_gb` (default: its own limit); what was read longest ago goes first.

        What anybody has mapped stays readable for them. Without a limit, and where the limit in force is 0 ("store
        nothing", which says nothing of what is stored), nothing goes; ``evict(0)`` empties the store.

        Raises:
            OptionError: a limit that is no size.
            StoreAccessError: files that may not be removed.
        """
        limit = self.limit.value or None if limit_gb is None else config.limit_bytes(limit_gb, "limit_gb")
        self._look()
        indexes = [self._index(name) for name in eviction.space_folders(self.root)]
        if limit is None:
            return EvictionReport(0, 0, sum(map(eviction.bytes_on_disk, indexes)), 0, 0, None, {})
        with translated(self.folder):
            return eviction.evict(indexes, self.index_dir, limit)

    def keep_limit(self) -> EvictionReport | None:
        """`evict` when the store has grown beyond its limit; None when it has not."""
        limit = self.limit.value
        if not limit:
            return None
        self._look()
        indexes = [self._index(name) for name in eviction.space_folders(self.root)]
        return self.evict() if sum(map(eviction.bytes_on_disk, indexes)) > limit else None

    def merge(self, space: str | SpaceInfo) -> int:
        """Merge the small segments of a space now; the number of segments that were replaced, or dropped as copies."""
        self.flush()
        self._look()
        index = self._index(self._space(space))
        index.refresh()
        with translated(self.folder):
            merged = adoption.adopt(index, self.index_dir) + merging.merge_space(index, self.index_dir, few=2)
            return merged + duplicates.drop_twins(index, self.index_dir)

    def compact(self, space: str | SpaceInfo | None = None) -> int:
        """Merge small segments, and drop rows that are invalidated or have newer copies, of one space or of all; the
        number of segments replaced.

        Where the objects lie elsewhere what is to be merged is fetched, and what comes of it uploaded.
        """
        self.flush()
        self._look()
        names = eviction.space_folders(self.root) if space is None else [self._space(space)]
        replaced = 0
        for name in names:
            index = self._index(name)
            index.refresh()
            with translated(self.folder):
                replaced += adoption.adopt(index, self.index_dir)
                replaced += merging.merge_space(index, self.index_dir, few=2)
                replaced += merging.drop_dead(index, self.index_dir)
                replaced += duplicates.drop_copies(index, self.index_dir)
        return replaced

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read everything: every checksum, key, tomb and description, and every row of this host's index.

        With `repair`, what is damaged is dropped (it is computed again when asked for), what is left of its segment is
        written anew, and the index is built again. Files of a later format, and files we did not write, are left alone.
        """
        self._look()
        report = verification.verify(self.folder, self.root, self._catalog, self._known, repair=repair, copy=self._copy)
        if repair and report.damaged:
            self._let_go()
        for damage in report.damaged:
            log.warning("%s: %s%s", damage.segment, damage.reason, " (repaired)" if damage.repaired else "")
        return report
