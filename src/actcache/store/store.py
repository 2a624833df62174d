"""`Store`: put, find, read."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from actcache import config
from actcache.errors import FormatError, NotCachedError, did_you_mean, require_choice
from actcache.store import given, reading, tensors, trimming
from actcache.store import segment as segments
from actcache.store.appending import Appender
from actcache.store.asking import stored
from actcache.store.backend import CacheBackend
from actcache.store.casting import Overflow, fitting, screened
from actcache.store.catalog import Catalog
from actcache.store.discovered import CachedPromptInfo, CachedVariant, listed
from actcache.store.eviction import EvictionReport
from actcache.store.files import SPACE_NAME, log, require_writable, translated
from actcache.store.index import SpaceIndex
from actcache.store.indexes import Indexes
from actcache.store.locations import Place
from actcache.store.lookup import locate
from actcache.store.maintenance import Maintenance
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.queries import Query
from actcache.store.records import Records, SegmentInfo
from actcache.store.reports import CacheInfo, ModelCacheInfo
from actcache.store.spaces import ROOT, SpaceInfo, read_space, space_id, write_space
from actcache.store.statistics import Moments
from actcache.store.uploading import Uploader
from actcache.store.verification import VerifyReport
from actcache.store.writer import SegmentWriter

__all__ = [
    "CacheInfo",
    "CachedPromptInfo",
    "CachedVariant",
    "EvictionReport",
    "ModelCacheInfo",
    "Moments",
    "Placement",
    "Records",
    "SegmentWriter",
    "SpaceInfo",
    "Store",
    "VerifyReport",
]


class Store(Maintenance):
    """A durable cache; a context manager. Any number of threads, processes and machines may use the same one.

    `location`: a folder; the URL of what lies elsewhere ("s3://bucket/prefix", "gs://...", "az://..."); or a
    `CacheBackend`. `limit_gb`: the size to keep to, in GB (2**30 bytes); 0 stores nothing, None and infinity are no
    limit. `dtype`: what new floating values are stored in, "float16", "bfloat16", "float32", "int8" or "float8_e4m3";
    without it they are stored as they come. Limit and dtype of the process (`set_cache_limit`, `set_cache_dtype`,
    ``ACTCACHE_MAX_GB``, ``ACTCACHE_DTYPE``) are those of the default store alone. `index_dir`: where this host keeps
    its index, and its working copy of what lies elsewhere (default: a part of the user's cache folder); `local_gb`: how
    large the part of that may be that can be read again (``ACTCACHE_LOCAL_GB``, else 20).
    Nothing is created before the first write; a place that can only be read works for reading.

    Raises:
        OptionError: a limit that is no size, an unknown dtype, a URL of an unknown kind, a file.
    """

    def __init__(
        self,
        location: str | Path | CacheBackend,
        *,
        limit_gb: float | None = None,
        dtype: str | None = None,
        index_dir: Path | None = None,
        local_gb: float | None = None,
    ) -> None:
        config.heed_log_variable()
        if dtype is not None:
            dtype = require_choice(dtype, config.STORAGE_DTYPES, "dtype")
        self._dtype = None if dtype is None else config.Setting(dtype, "Store()")
        self._limit = None if limit_gb is None else config.Setting(config.limit_bytes(limit_gb, "limit_gb"), "Store()")
        self.is_default = False
        """Whether the process's limit and dtype are meant for this store, unless it has its own."""
        place = Place(location, index_dir, local_gb)
        self.backend, self.location, self.folder, self._copy = place.backend, place.location, place.folder, place.copy
        self.local_limit = place.local_limit
        """How many bytes of what lies elsewhere this host keeps (None: no limit), and where that comes from."""
        self.root = self.folder / ROOT
        self._catalog = Catalog(place.index_dir)
        self._indexes = Indexes(self.root, self._catalog, self._copy)
        self._uploader = None if self._copy is None else Uploader(self._copy, self._indexes.of, place.index_dir)
        self._known: dict[str, SpaceInfo] = {}
        if self._copy is not None:
            self._copy.trim = partial(trimming.trim, self._copy, self._catalog, self._indexes, self._copy.local_bytes)
        # Also at exit, while there still is an interpreter to do it with, and never twice.
        weakref.finalize(self, _end, self._indexes, self._uploader)
        _alive.add(self)

    def __repr__(self) -> str:
        return f"Store({str(self.location)!r})"

    @property
    def index_dir(self) -> Path:
        """Where this host keeps its index of this store."""
        return self._catalog.path.parent

    @property
    def limit(self) -> config.Setting:
        """The size limit in force, in bytes (None: no limit), and where it comes from."""
        return self._limit or (config.cache_limit() if self.is_default else config.Setting(None, "default"))

    def beside(self, folder: Path) -> Store:
        """A store in `folder` that works as this one does, without a limit."""
        return Store(folder / "store", limit_gb=math.inf, dtype=self.dtype.value, index_dir=folder / "index")

    @property
    def dtype(self) -> config.Setting:
        """The dtype in which new floating values are stored (None: as they come), and where it comes from."""
        return self._dtype or (config.cache_dtype() if self.is_default else config.Setting(None, "default"))

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
        require_writable(self.root, self.folder)

    # -- writing ---------------------------------------------------------------------------------------

    def append(self, space: str, records: Records | Sequence[Records]) -> SegmentInfo:
        """Store `records` as one segment: durable and visible to everyone when this returns, or not at all.

        Where the objects lie elsewhere: to this host; it is uploaded within seconds, and by `flush` and `close`. Raises
        DiskFullError or StoreAccessError, naming the folder; nothing stored before is lost. BackendError when an upload
        before it failed. ValueOverflowError when records that were not screened hold what this store's dtype does not.
        """
        if self._uploader is not None:
            self._uploader.check()
        return self._append(space, records, linger=True)

    def _append(self, space: str, records: Records | Sequence[Records], *, linger: bool = False) -> SegmentInfo:
        records = self._prepared(space, [records] if isinstance(records, Records) else records)
        index = self._index(space)
        with translated(self.folder):
            info = self._keeping_room(lambda: segments.write(self.root / space, records, space=space))
        # Without its description, which someone may have cleared just now, nobody would find or delete it.
        self._ensure(space)
        index.add(info)
        if self._uploader is not None:
            self._uploader.note(space, linger=linger, written=index.path(info.name))
        log.info("stored %d prompts, %d bytes, in %s", info.prompts, info.size, index.path(info.name))
        return info

    def _prepared(self, space: str, parts: Sequence[Records]) -> list[Records]:
        """`parts` as this store's dtype can hold them; sees to it that the space is described."""
        records = [part if part.screened else fitting(part, self.dtype.value) for part in parts]
        if self._copy is not None:
            self._copy.begin_writing(space)
        self._ensure(space)
        return given.in_turn(self._index(space), records)

    def screen(self, records: Records, *, allow_inf: bool = False) -> tuple[Records | None, list[Overflow]]:
        """`records` as this store's dtype can hold them, and the prompts left out because it cannot.

        Left out are prompts of which a finite value would become inf; for int8 and float8_e4m3, which have no inf, also
        those with inf or nan. With `allow_inf` nothing is: such values become inf or nan. None when nothing is left.
        """
        return screened(records, self.dtype.value, allow_inf=allow_inf)

    def _ensure(self, space: str) -> None:
        """space.json of `space`, also when someone cleared the store meanwhile."""
        folder = self.root / space
        if os.path.exists(folder / "space.json"):
            if space not in self._known:
                with contextlib.suppress(FormatError, OSError):
                    self._known[space] = read_space(folder)
            return
        if space not in self._known:
            raise NotCachedError(f"store {self.location} has no space {space!r}: make it with open_space()")
        with translated(self.folder):
            write_space(self.root, self._known[space])

    def _index(self, space: str) -> SpaceIndex:
        if self._uploader is not None:
            self._uploader.begin()
        return self._indexes.of(space)

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
        as not found. ValueError unless one of `texts` and `table` is given.
        """
        if (texts is None) == (table is None):
            raise ValueError("locate() takes either texts or a table of token ids")
        query = Query.by_tokens(table) if table is not None else Query.by_text(texts or (), kinds, text_context)
        return self._keeping_room(lambda: locate(self._index(space), query, list(sites), layout, check))

    # -- for people: texts in, tensors out ---------------------------------------------------------------

    def write(
        self,
        space: str | SpaceInfo,
        prompts: Any,
        values: Mapping[str, Sequence[Any]],
        *,
        pooling: str | None = None,
        text_context: str = "external",
        allow_inf: bool = False,
    ) -> int:
        """Store ``{site: [tensor [T, D], ...]}``, or ``[D]`` with `pooling`; the number of prompts stored (a limit of 0
        stores none).

        `prompts`: texts, lists of token ids, chats, or a `PromptTable`. `space`: an id, a `SpaceInfo`, or
        ``ac.new_space(model_name, **identity)``. Values that this store's dtype cannot hold raise ValueOverflowError
        before anything is written; with `allow_inf` they become inf (in int8 and float8_e4m3 nan).
        """
        records = tensors.records(prompts, values, pooling, text_context)
        if self.limit.value == 0:
            return 0
        if allow_inf:
            records = self.screen(records, allow_inf=True)[0] or records
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
        allow_inf: bool = False,
    ) -> Any:
        """What is at `site` (of a pulled dataset: fetched), a tensor ``[B, D]`` with `pooling`, else a list ``[T, D]``.

        `prompts`: texts, token ids, chats, or None for all that have the site, in stored order. `positions`
        cuts rows: "last", "first", an int (negative from the end), a ``(start, stop)`` pair, or a list of these.
        `dtype`: the floating dtype to return them in (default: as stored; float32 for int8 and float8_e4m3). `out`: a
        tensor ``[B, D]`` to write into, with `pooling`, and to return; of a floating dtype, or of integers where such
        are stored. What is too large for either is refused, or becomes inf with `allow_inf`.
        Tensors of a list may lie together in memory, 2 to 4 MB of them: clone() what is kept without the others.

        Raises:
            OptionError: a dtype that is not floating, an `out` that does not fit; nothing was read.
            NotCachedError: a prompt is not stored, or turns out damaged.
            ValueOverflowError: a finite value would become inf; prompt, site and value are named.
        """
        index = self._index(self._fetched(space, prompts, site, pooling))
        how = {"pooling": pooling, "positions": positions, "dtype": dtype, "out": out, "allow_inf": allow_inf}
        return self._keeping_room(lambda: reading.read(index, prompts, site, **how))

    def contains(
        self, space: str | SpaceInfo, prompts: Any, site: str | None = None, *, pooling: str | None = None
    ) -> npt.NDArray[np.bool_]:
        """Which of `prompts` are stored, bool ``[B]``: at `site` (with that pooling), or anything of them (with it).

        Reads no vectors, so that what is damaged counts until somebody has come across it.

        Raises:
            OptionError: nothing is stored at that site, or with that pooling, and it is the name of none.
        """
        return stored(self._index(self._space(space)), prompts, site, pooling, self._is_offered(space, site, pooling))

    def _space(self, space: str | SpaceInfo) -> str:
        if isinstance(space, str):
            if space not in self._known and not self._is_there(space):
                raise NotCachedError(f"store {self.location} has no space {space!r}.{self._nearest_space(space)}")
            return space
        self._known.setdefault(space.space, space)
        return space.space

    def _is_there(self, space: str) -> bool:
        named = SPACE_NAME.fullmatch(space) is not None
        if named and self._copy is not None and not (self.root / space).is_dir():
            self._copy.pull(space)
        return named and (self.root / space).is_dir()

    def _nearest_space(self, wanted: str) -> str:
        spaces = self.spaces()
        if named := [s for s in spaces if s.model_name == wanted]:
            return f" That is a model, stored as {listed(named)}."
        hint = did_you_mean(wanted, [s.space for s in spaces])
        return hint or f" Stored: {'; '.join(f'{s.space} ({s.model_name})' for s in spaces) or 'nothing'}."

    # -- behind a running model, and at the end ---------------------------------------------------------

    def writer(self, space: str | SpaceInfo, *, max_bytes: int = 64 << 20, linger: float = 0.25) -> SegmentWriter:
        """A `SegmentWriter` for a space: writes in a thread of its own; use it in a ``with`` block."""
        space_id = self._space(space)
        write = self.append if self._uploader is None else self._append
        appender = Appender(
            partial(write, space_id), partial(self._prepared, space_id), partial(self._index, space_id),
            self.index_dir, self._uploader,
        )  # fmt: skip
        return SegmentWriter(appender.append, appender.finish, max_bytes=max_bytes, linger=linger)

    def refresh(self) -> None:
        """Take notice at once of what other processes, and other machines, have written or removed."""
        if self._copy is not None:
            self._copy.pull()
        for index in list(self._indexes.values()):
            index.refresh(force=True)

    def flush(self) -> None:
        """Return when all that was stored on this host is uploaded; with files there is nothing to wait for.

        Raises BackendError or StoreAccessError: it stays on this host, and is tried again.
        """
        if self._uploader is not None:
            self._uploader.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            # The caller's own error says more; what was not uploaded stays.
            if kind is None:
                raise
            log.warning("and not everything could be uploaded: %s", error)

    def close(self) -> None:
        """`flush`, and let go of the index and of mapped segments; placements in use stay readable.

        Also the end of ``with``. A store that is used again opens them again.
        """
        try:
            if self._uploader is not None and self._uploader.has_written:
                self._uploader.flush()
        finally:
            self._let_go()
            self._catalog.close()

    def _let_go(self) -> None:
        self._indexes.let_go()
        if self._copy is not None:
            self._copy.forget()

    def _after_fork(self) -> None:
        self._catalog.after_fork()
        if self._copy is not None and self._uploader is not None:
            self._copy.after_fork()
            self._uploader.after_fork()
        self._indexes.after_fork()


_alive: weakref.WeakSet[Store] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_alive):
        store._after_fork()


def _end(indexes: Indexes, uploader: Uploader | None) -> None:
    indexes.write_reads()
    if uploader is not None:
        uploader.hurry()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
