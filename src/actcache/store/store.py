"""`Store`: put, find, read."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache import config
from actcache.errors import FormatError, NotCachedError
from actcache.store import merging, removal, reports, tensors
from actcache.store import segment as segments
from actcache.store.catalog import Catalog
from actcache.store.files import access_error, log, make_folder, sweep, translated
from actcache.store.index import SpaceIndex
from actcache.store.lookup import Query, locate
from actcache.store.placement import Placement
from actcache.store.prompts import IDS, PromptTable
from actcache.store.records import TOKENS, Records, SegmentInfo
from actcache.store.reports import CachedPromptInfo, CacheInfo, ModelCacheInfo
from actcache.store.spaces import ROOT, SpaceInfo, list_spaces, read_space, space_id, write_space
from actcache.store.statistics import Moments
from actcache.store.writer import SegmentWriter

__all__ = [
    "CacheInfo",
    "CachedPromptInfo",
    "ModelCacheInfo",
    "Moments",
    "Placement",
    "Records",
    "SegmentWriter",
    "SpaceInfo",
    "Store",
]


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
        _alive.add(self)

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
            try:
                make_folder(self.root)
            except FileNotFoundError as error:
                # Folders that cannot be made, such as those of /proc, are reported as missing.
                raise access_error(self.location, error) from error
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
        # Without its description, which someone may have cleared just now, nobody would find or delete it.
        self._ensure(space)
        index.add(info)
        return info

    def _ensure(self, space: str) -> None:
        """space.json of `space`, also when someone cleared the store meanwhile."""
        folder = self.root / space
        if (folder / "space.json").exists():
            if space not in self._known:
                with contextlib.suppress(FormatError, OSError):
                    self._known[space] = read_space(folder)
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

    # -- for people: texts in, tensors out ---------------------------------------------------------------

    def write(
        self,
        space: str | SpaceInfo,
        prompts: Any,
        values: Mapping[str, Sequence[Any]],
        *,
        pooling: str | None = None,
        text_context: str = "external",
    ) -> int:
        """Store ``{site: [tensor [T, D], ...]}``, or ``[D]`` with `pooling`; the number of prompts stored.

        `prompts`: texts, lists of token ids, chats, or a `PromptTable`. `space`: an id, a `SpaceInfo`, or
        ``ac.new_space(model_name, **identity)``.
        """
        records = tensors.records(prompts, values, pooling, text_context)
        self.append(self._space(space), records)
        return len(records.prompts)

    def read(
        self,
        space: str | SpaceInfo,
        prompts: Any,
        site: str,
        *,
        pooling: str | None = None,
        positions: Any = None,
        dtype: Any = None,
        out: Any = None,
    ) -> Any:
        """What is stored at `site`: a tensor ``[B, D]`` with `pooling`, else a list of tensors ``[T, D]``.

        `prompts`: texts, token ids, chats, or None for all that have the site, in stored order. `positions`
        cuts rows: "last", "first", an int (negative from the end), a ``(start, stop)`` pair, or a list of these.
        `out`: a tensor ``[B, D]`` to write into (pooled). NotCachedError when a prompt is not stored.
        """
        space_id, layout = self._space(space), pooling or TOKENS
        wanted = tensors.torch_dtype(dtype)
        if prompts is None:
            prompts = self.prompts(space_id, site=site, layout=layout)
            if not len(prompts):
                raise NotCachedError(f"no {site!r} ({layout}) is stored in space {space_id}: see Store.spaces()")
        located, found = self._locate_any(space_id, prompts, site, layout)
        if not found.all():
            raise NotCachedError(
                f"{int((~found).sum())} of {len(found)} prompts have no {site!r} ({layout}) in the store "
                f"(the first is prompt {int(np.flatnonzero(~found)[0])}): see Store.contains() and Store.discover()"
            )
        if not pooling:
            rows: list[Any] = [None] * len(found)
            for placement, members in located:
                for k in np.flatnonzero(placement.found).tolist():
                    rows[members[k]] = tensors.to_tensor(tensors.cut(placement.rows(k)[0], positions), wanted)
            return rows
        return tensors.stack_pooled(located, len(found), out, wanted)

    def contains(
        self, space: str | SpaceInfo, prompts: Any, site: str | None = None, *, pooling: str | None = None
    ) -> npt.NDArray[np.bool_]:
        """Which of `prompts` are stored, bool ``[B]``: at `site` (with that pooling), or anything of them."""
        space_id = self._space(space)
        given = prompts if isinstance(prompts, PromptTable) else tensors.as_list(prompts)
        if site is not None:
            return self._locate_any(space_id, given, site, pooling or TOKENS, check=False)[1]
        index = self._index(space_id)
        index.refresh()
        with index.lock:
            held = {(g.layout, next(iter(g.sites))) for g in index.all_groups()}
        found = np.zeros(len(given), bool)
        for layout, any_site in sorted(held):
            found |= self._locate_any(space_id, given, any_site, layout, check=False)[1]
        return found

    def _locate_any(
        self, space: str, prompts: Any, site: str, layout: str, *, check: bool = True
    ) -> tuple[list[tuple[Placement, npt.NDArray[np.int64]]], npt.NDArray[np.bool_]]:
        """Prompts in any form, texts under every context the space knows: placements and whose they are."""
        if isinstance(prompts, PromptTable):
            placement = self.locate(space, table=prompts, sites=[site], layout=layout, check=check)
            return [(placement, np.arange(len(prompts)))], placement.found
        given = tensors.as_list(prompts)
        kinds, texts = zip(*(tensors.kind_of(p, i) for i, p in enumerate(given)), strict=True)
        kind = np.array(kinds, np.uint8)
        located = []
        found = np.zeros(len(given), bool)
        members = np.flatnonzero(kind == IDS)
        if len(members):
            table = PromptTable.build([given[i] for i in members])
            placement = self.locate(space, table=table, sites=[site], layout=layout, check=check)
            located.append((placement, members))
            found[members] = placement.found
        index = self._index(space)
        index.refresh()
        for context in index.contexts():
            members = np.flatnonzero((kind != IDS) & ~found)
            if len(members):
                placement = self.locate(
                    space, texts=[texts[i] for i in members], kinds=kind[members], text_context=context,
                    sites=[site], layout=layout, check=check,
                )  # fmt: skip
                located.append((placement, members))
                found[members] = placement.found
        return located, found

    def _space(self, space: str | SpaceInfo) -> str:
        if isinstance(space, str):
            return space
        self._known.setdefault(space.space, space)
        return space.space

    # -- describing ------------------------------------------------------------------------------------

    def spaces(self) -> list[SpaceInfo]:
        """Every space, oldest first, with its number of prompts and its size on disk."""
        return [self._measured(space) for space in list_spaces(self.root)]

    def _measured(self, space: SpaceInfo) -> SpaceInfo:
        index = self._index(space.space)
        index.refresh()
        size = sum(info.size for _, info in index.segments())
        return replace(space, num_prompts=reports.count_prompts(index), size_bytes=size)

    def prompts(self, space: str | SpaceInfo, *, site: str | None = None, layout: str | None = None) -> PromptTable:
        """The distinct prompts of a space (those that have `site` and `layout`, where given), oldest first."""
        return reports.stored_prompts(self._index(self._space(space)), site, layout)

    def info(self) -> CacheInfo:
        """What the store holds: one `ModelCacheInfo` per space, sizes, times."""
        spaces = self.spaces()
        models, created = [], []
        for space in spaces:
            infos = [info for _, info in self._index(space.space).segments()]
            models.append(reports.describe_model(space, infos))
            created += [info.created_ns / 1e9 for info in infos]
        return CacheInfo(
            self.location,
            sum(s.size_bytes for s in spaces),
            models,
            min(created, default=None),
            max(created, default=None),
        )

    def discover(self, model_name: str, prompt: Any) -> CachedPromptInfo | None:
        """What is stored for one prompt (text, token ids or chat) of a model, None when nothing.

        The newest variant is described, all are listed.
        """
        holding = []
        answer = None
        for space in reversed([s for s in list_spaces(self.root) if s.model_name == model_name]):
            found = reports.describe_prompt(self._index(space.space), prompt)
            if found is not None:
                holding.append(self._measured(space))
                answer = answer or found
        return None if answer is None else reports.prompt_info(*answer, holding)

    def statistics(self, space: str | SpaceInfo, site: str, *, pooling: str | None = None) -> Moments:
        """Count, mean and spread of every dimension of a site, over all live prompts of the space.

        Exact, and without reading data except where prompts are tombed or stored twice.
        """
        return reports.statistics(self._index(self._space(space)), site, pooling or TOKENS)

    # -- taking out ------------------------------------------------------------------------------------

    def invalidate(self, space: str | SpaceInfo, prompts: Any = None) -> int:
        """Forget prompts (texts, ids, chats, a `PromptTable`; None: all) of a space; how many there were.

        Durable when it returns. The bytes go when segments are merged.
        """
        index = self._index(self._space(space))
        if prompts is None:
            return removal.invalidate(index, None)
        index.refresh()
        if isinstance(prompts, PromptTable):
            return removal.invalidate(index, prompts.token_key)
        return removal.invalidate(index, reports.find_token_keys(index, tensors.as_list(prompts)))

    def clear(self, model: str | None = None) -> int:
        """Delete all spaces, or those of the model of that name or space id; the number of prompts deleted.

        Never touches a file that actcache did not write.
        """
        deleted = 0
        for space in self.spaces():
            if model in (None, space.model_name, space.space):
                deleted += space.num_prompts
                removal.clear_space(self.root / space.space)
                self._index(space.space).refresh(force=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()
        return deleted

    def merge(self, space: str | SpaceInfo) -> int:
        """Merge the small segments of a space now; the number of segments that were replaced."""
        index = self._index(self._space(space))
        index.refresh()
        with translated(self.location):
            return merging.merge_space(index, self._catalog.path.parent, few=2)

    def writer(self, space: str | SpaceInfo, *, max_bytes: int = 64 << 20, linger: float = 0.25) -> SegmentWriter:
        """A `SegmentWriter` for a space: writes in a thread of its own; use it in a ``with`` block."""
        space_id = self._space(space)

        def merge(final: bool) -> None:
            few = merging.FEW if final else merging.MANY
            try:
                merging.merge_space(self._index(space_id), self._catalog.path.parent, few=few)
            except OSError as error:
                # Everything is stored; only not as compactly as could be.
                log.warning("merging small segments failed: %s", error)

        return SegmentWriter(lambda group: self.append(space_id, group), merge, max_bytes=max_bytes, linger=linger)

    def refresh(self) -> None:
        """Take notice at once of what other processes have written or removed."""
        for index in list(self._indexes.values()):
            index.refresh(force=True)

    def close(self) -> None:
        """Let go of the index and of mapped segments; placements in use stay readable."""
        with self._lock:
            self._indexes.clear()
        self._catalog.close()

    def _after_fork(self) -> None:
        # Another thread of the parent may have held these locks; nobody will release them here.
        self._lock = threading.Lock()
        self._catalog.after_fork()
        # What a thread was changing at that moment may be half done: it is built anew.
        self._indexes = {space: index for space, index in self._indexes.items() if index.lock.acquire(blocking=False)}
        for index in self._indexes.values():
            index.lock = threading.RLock()


_alive: weakref.WeakSet[Store] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_alive):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
