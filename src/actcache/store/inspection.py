"""What a store says of itself: spaces, prompts, sizes, statistics."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actcache import config
from actcache.errors import FormatError, NotCachedError
from actcache.store import reports, sparse_numbered, sparse_reading, trimming
from actcache.store.asking import Located, given_prompts, locate_sites, why_absent
from actcache.store.backend import CacheBackend
from actcache.store.catalog import Catalog
from actcache.store.discovered import CachedPromptInfo, agreeing, prompt_info, variant_of
from actcache.store.eviction import bytes_on_disk
from actcache.store.index import SpaceIndex
from actcache.store.indexes import Indexes
from actcache.store.keys import Ints
from actcache.store.last_reads import last_reads
from actcache.store.locations import place_of
from actcache.store.lookup import locate
from actcache.store.numbered import NumberedRows, numbered
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.pulled import Pulled, bring, expanded, forms_of, pulled_for
from actcache.store.queries import Query
from actcache.store.records import SPARSE, TOKENS
from actcache.store.reports import CacheInfo
from actcache.store.site_names import in_order
from actcache.store.spaces import SpaceInfo, list_spaces, read_space
from actcache.store.sparse import SparseSite
from actcache.store.sparse_numbered import SparseNumbered
from actcache.store.statistics import SiteStatistics
from actcache.store.summaries import SiteSummary, summarise
from actcache.store.variants import by_preference, variant_names
from actcache.store.working_copy import WorkingCopy

_Found = TypeVar("_Found")


class Inspection(ABC):
    """The part of `Store` that describes; nothing here changes anything."""

    location: str | Path
    folder: Path
    root: Path
    _catalog: Catalog
    _copy: WorkingCopy | None
    _indexes: Indexes
    _known: dict[str, SpaceInfo]

    @property
    @abstractmethod
    def limit(self) -> config.Setting:
        """The size limit in force, in bytes (None: no limit), and where it comes from."""

    @abstractmethod
    def _index(self, space: str) -> SpaceIndex: ...

    @abstractmethod
    def _space(self, space: str | SpaceInfo) -> str: ...

    @property
    def is_elsewhere(self) -> bool:
        """Whether its objects are not files of this host, which has a working copy of them."""
        return self._copy is not None

    @property
    def disk(self) -> Path | None:
        """The folder on whose disk all that is stored must have room; None where that lies elsewhere."""
        return self.folder if self._copy is None else None

    def _keeping_room(self, work: Callable[[], _Found]) -> _Found:
        """What `work` gives; a working copy is kept to its size around it."""
        return work() if self._copy is None else trimming.within(self._copy, self._catalog, self._indexes, work)

    def looking_once(self) -> AbstractContextManager[None]:
        """For what this thread asks in the block, what lies elsewhere is listed once where something is missing."""
        return nullcontext() if self._copy is None else self._copy.looking_once()

    def spaces(self) -> list[SpaceInfo]:
        """Every space, oldest first, with its number of prompts and its size on disk."""
        self._look()
        return [self._measured(space) for space in list_spaces(self.root)]

    def _look(self, *, begin: bool = False) -> bool:
        """Take notice of what others have put or deleted, where the objects lie elsewhere; whether there was any.

        With `begin` only where that was not done since the store was opened.
        """
        if self._copy is None or (begin and self._copy.pulled_since(None, 0.0)):
            return False
        return self._copy.pull()

    def _measured(self, space: SpaceInfo) -> SpaceInfo:
        index = self._index(space.space)
        index.refresh()
        return replace(space, num_prompts=reports.count_prompts(index), size_bytes=bytes_on_disk(index))

    def prompts(self, space: str | SpaceInfo, *, site: str | None = None, layout: str | None = None) -> PromptTable:
        """The distinct prompts of a space (those that have `site` and `layout`, where given), oldest first."""
        return reports.stored_prompts(self._index(self._space(space)), site, layout)

    def everything(self, space: str | SpaceInfo) -> Placement:
        """The prompts that `prompts` gives, as where they are: `Placement.prompts` reads some of them."""
        return reports.stored_places(self._index(self._space(space)))

    def last_reads(self, space: str | SpaceInfo) -> tuple[Placement, Ints]:
        """The prompts of a space, and when each was last read: int64 ``[n]``, nanoseconds since the epoch."""
        return last_reads(self._index(self._space(space)))

    def imports_of(self, model_name: str) -> list[tuple[str, list[str]]]:
        """The spaces imported under a model's name, newest first, each with the text contexts it has."""
        self._look(begin=True)
        found = [s for s in list_spaces(self.root) if s.imported and s.model_name == model_name]
        indexes = [(space.space, self._index(space.space)) for space in by_preference(found)]
        for _, index in indexes:
            index.refresh()
        return [(space, index.contexts()) for space, index in indexes]

    def pulled_for(self, space: str, model_name: str, *, names: Sequence[str] | None) -> list[Pulled]:
        """The spaces of pulled datasets that may answer for the model of `space`: see `actcache.store.pulled`."""
        self._look(begin=True)

        def contexts(pulled: str) -> list[str]:
            index = self._index(pulled)
            index.refresh()
            return index.contexts()

        return pulled_for(self.root, contexts, space, model_name, names=names)

    def _pulled(self, space: str | SpaceInfo) -> Pulled | None:
        """A space as a dataset that was pulled; None where it is none."""
        name = self._space(space)
        if name not in self._known:
            with contextlib.suppress(FormatError, OSError):
                self._known[name] = read_space(self.root / name)
        info = self._known.get(name)
        return Pulled(info, forms_of(info), ()) if info is not None and info.pulled else None

    def _is_offered(self, space: str | SpaceInfo, site: str | None, pooling: str | None) -> bool:
        pulled = None if site is None else self._pulled(space)
        return pulled is not None and pulled.offers([str(site)], pooling or TOKENS)

    def fetch(self, space: str | SpaceInfo, site: str, *, pooling: str | None = None) -> None:
        """See to it that all that a dataset which was pulled has at `site` is here; of other spaces it is."""
        self._fetched(space, None, site, pooling)

    def _fetched(self, space: str | SpaceInfo, prompts: Any, site: str, pooling: str | None) -> str:
        """The id of a space; what can be fetched of `prompts` is there."""
        if (pulled := self._pulled(space)) is not None:
            bring(self, pulled, prompts, site, pooling or TOKENS)
        return self._space(space)

    def find_prompt(self, space: str | SpaceInfo, prompt: Any) -> PromptTable | None:
        """One stored prompt, given as text, token ids or chat, as a table of its own; None when it is not there."""
        return reports.find_prompt(self._index(self._space(space)), prompt)

    def held(self, space: str | SpaceInfo) -> dict[str, list[str]]:
        """Every site of a space, by layout."""
        index = self._index(self._space(space))
        index.refresh()
        found: dict[str, set[str]] = {}
        with index.lock:
            for group in index.all_groups():
                found.setdefault(group.layout, set()).update(group.sites)
        return {layout: in_order(sites) for layout, sites in sorted(found.items())}

    def locate_sites(
        self, space: str | SpaceInfo, prompts: Sequence[Any], sites: Sequence[str], layout: str, *, check: bool = True
    ) -> Located:
        """Where `prompts` (texts, token ids, chats) have their rows at `sites`; `check` verifies what would be read."""
        index = self._index(self._space(space))
        return self._keeping_room(lambda: locate_sites(index, prompts, sites, layout, check=check))

    def sites_of(self, space: str | SpaceInfo, prompt: PromptTable) -> dict[str, list[str]]:
        """The sites at which the first prompt of a table is stored, by layout."""
        found = reports.sites_of(self._index(self._space(space)), prompt.token_key[:1])
        return {layout: in_order(sites) for layout, sites in sorted(found.items())}

    @property
    def place(self) -> tuple[Path | CacheBackend, Path, float | None]:
        """What opens this store in another process of this host, with `Store(location, index_dir=..., local_gb=...)`.

        Raises:
            OptionError: its objects are no files of this host, and only a backend that cannot be sent knows them.
        """
        if self._copy is None:
            return self.folder, self._catalog.path.parent, None
        return place_of(self._copy)

    def common_prompts(
        self, space: str | SpaceInfo, sites: Sequence[str], *, pooling: str | None = None, prompts: Any = None
    ) -> PromptTable:
        """The distinct prompts that have all `sites`, oldest first; with `prompts` (texts, token ids, chats) these, in
        their order.

        Raises:
            NotCachedError: no prompt has them, or one of `prompts` has not.
        """
        index, layout = self._index(self._space(space)), pooling or TOKENS
        self._look()
        if (sparse := _sparse(index, sites, pooling)) is not None:
            sites, layout = sparse.columns, SPARSE
        for site in sites:
            if why := why_absent(index, site, layout):
                raise NotCachedError(why)
        if prompts is not None:
            return self._keeping_room(lambda: given_prompts(index, prompts, list(sites), layout))
        table = reports.stored_prompts(index, sites[0], layout)
        if len(sites) > 1 and len(table):
            query = Query.by_tokens(table)
            found = self._keeping_room(lambda: locate(index, query, list(sites), layout, False)).found
            table = table if found.all() else table.select(found)
        if not len(table):
            raise NotCachedError(f"no prompt has {' and '.join(map(repr, sites))} in space {index.folder.name}.")
        return table

    def numbered(
        self,
        space: str | SpaceInfo,
        table: PromptTable,
        sites: Sequence[str],
        *,
        pooling: str | None = None,
        check: bool = False,
    ) -> NumberedRows | SparseNumbered:
        """The rows of the prompts of `table`, each with a number, at `sites`; nothing of them is read yet, or with
        `check` all of them: what lies elsewhere is here then. Of a sparse matrix the positions
        are read.

        Raises:
            NotCachedError: a prompt is not stored at one of the sites; with `check` also where it is damaged.
        """
        index = self._index(self._space(space))
        query = Query.by_tokens(table)
        sparse = _sparse(index, sites, pooling)
        columns, layout = (sites, pooling or TOKENS) if sparse is None else (sparse.columns, SPARSE)
        placement = self._keeping_room(lambda: locate(index, query, list(columns), layout, check))
        rows = numbered(placement, sites)
        with index.lock:
            for segment, prompts in placement.held:
                index.reads.note(segment.info, prompts)
        if sparse is None:
            return rows
        starts = np.arange(len(table) + 1) if pooling else table.token_offset
        return self._keeping_room(lambda: SparseNumbered(rows, sparse, starts))

    def info(self) -> CacheInfo:
        """What the store holds: one `ModelCacheInfo` per space, sizes, times."""
        spaces = self.spaces()
        names = variant_names(spaces)
        models, created = [], []
        for space in spaces:
            infos = [info for _, info in self._index(space.space).segments()]
            models.append(reports.describe_model(space, infos, names[space.space]))
            created += [info.created_ns / 1e9 for info in infos]
        return CacheInfo(
            self.location,
            sum(s.size_bytes for s in spaces),
            models,
            min(created, default=None),
            max(created, default=None),
            self.limit.value,
        )

    def discover(
        self,
        model_name: str,
        prompt: Any,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        space: str | None = None,
    ) -> CachedPromptInfo | None:
        """What is stored for one prompt (text, token ids or chat) of a model, None when nothing.

        The newest variant of the model as it is is described, all are listed; only those that agree with `revision`,
        `dtype` and `space`, where given.

        Raises:
            NotCachedError: something is stored of the model, but no variant of it agrees.
        """
        began = time.monotonic()
        self._look(begin=True)
        chosen = {"revision": revision, "dtype": dtype, "space": space}
        found = self._discovered(model_name, prompt, chosen)
        if found is None and self._copy is not None and not self._copy.pulled_since(None, began) and self._look():
            found = self._discovered(model_name, prompt, chosen)
        return found

    def _discovered(self, model_name: str, prompt: Any, chosen: Mapping[str, str | None]) -> CachedPromptInfo | None:
        named = [s for s in list_spaces(self.root) if s.model_name == model_name]
        names = variant_names(named)
        agree = agreeing(named, model_name, **chosen)
        variants, answers = [], []
        for one in by_preference(agree):
            found = reports.describe_prompt(self._index(one.space), prompt)
            if found is not None:
                found = (expanded(one, found[0]), found[1]) if one.pulled else found
                variants.append(variant_of(self._measured(one), names[one.space], *found))
                answers.append(found)
        if not variants:
            return None
        # What was computed with edits is not what the model gives, unless it is what was asked for.
        hidden = variants[0].edits and chosen["space"] is None
        return prompt_info(*(({}, None) if hidden else answers[0]), variants)

    def statistics(self, space: str | SpaceInfo, site: str, *, pooling: str | None = None) -> SiteStatistics:
        """Count, mean and spread of every dimension of a site, over all live prompts of the space.

        Exact, and merged from what segments say of themselves, without reading data except where prompts are tombed or
        stored twice. NotCachedError when no prompt has the site, or it holds integers.
        """
        index = self._index(self._space(space))
        if why := why_absent(index, site, pooling or TOKENS):
            raise NotCachedError(why)
        return self._keeping_room(lambda: SiteStatistics.of(reports.statistics(index, site, pooling or TOKENS)))

    def summaries(self, space: str | SpaceInfo) -> list[SiteSummary]:
        """Of every site of a space, in every layout: rows, size, statistics, and what storing changed."""
        return summarise(self._index(self._space(space)))

    def sparse_site(self, space: str | SpaceInfo, name: str, pooling: str | None = None) -> SparseSite | None:
        """The sparse matrix that is stored under `name`; None where there is none."""
        return sparse_reading.find_site(self._index(self._space(space)), name, pooling)

    def sparse_column(
        self, space: str | SpaceInfo, site: SparseSite, prompts: PromptTable, column: int
    ) -> tuple[Ints, Ints, npt.NDArray[Any]]:
        """Where `column` of a sparse matrix is not zero: numbers in `prompts`, positions and values, ``[k]`` each."""
        numbers = self._numbers(space, site, prompts)
        return self._keeping_room(lambda: sparse_numbered.occurrences(numbers, site, column))

    def sparse_counts(self, space: str | SpaceInfo, site: SparseSite, prompts: PromptTable) -> Ints:
        """In how many rows each column of a sparse matrix is not zero, int64 ``[n]``."""
        numbers = self._numbers(space, site, prompts)
        return self._keeping_room(lambda: sparse_numbered.counts(numbers, site))

    def _numbers(self, space: str | SpaceInfo, site: SparseSite, prompts: PromptTable) -> NumberedRows:
        index, query = self._index(self._space(space)), Query.by_tokens(prompts)
        placement = self._keeping_room(lambda: locate(index, query, list(site.columns), SPARSE, False))
        return numbered(placement, [site.name])


def _sparse(index: SpaceIndex, sites: Sequence[str], pooling: str | None) -> SparseSite | None:
    """The sparse matrix that is meant, where one site alone is named, and it is one."""
    return sparse_reading.find_site(index, sites[0], pooling) if len(sites) == 1 else None
