"""Rows of a dataset that was pulled, on their way into the store: only those that are not there."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import (
    DatasetAccessError,
    DatasetFormatError,
    DatasetNotFoundError,
    NotCachedError,
    ValueOverflowError,
)
from actcache.share.blocks import DamagedFileError
from actcache.share.format import TensorGroup
from actcache.share.index import Index
from actcache.share.index_prompts import lengths_of, results_of
from actcache.share.location import local_folder
from actcache.share.offered import Column, Offered
from actcache.share.rows import Ints, Runs, every_row, one_row
from actcache.share.shards import ShardReader
from actcache.share.source import open_source
from actcache.share.unchanged import check_unchanged, files_of
from actcache.store.dtypes import FLOATING, common_dtype
from actcache.store.files import log
from actcache.store.locks import exclusive
from actcache.store.memory import return_free_memory
from actcache.store.prompts import IDS, PromptTable
from actcache.store.pulled import PROMPT
from actcache.store.records import PULLED, TOKENS, Records, is_result
from actcache.store.spill import Spill

if TYPE_CHECKING:
    from actcache.store.spaces import SpaceInfo
    from actcache.store.store import Store
    from actcache.store.writer import SegmentWriter

SLICE_BYTES = 32 << 20
"""Bytes of rows that are read together, while as many are written."""
_PER_PROMPT = 4 << 10
"""Bytes that count for each prompt beside its rows: what is known of it while it is fetched is in memory as well."""
_OPEN = 4
_WAIT_S = 600.0

Array = npt.NDArray[Any]
Told = Callable[[int], object]


class Dataset:
    """A dataset at the commit that was pulled, opened for reading rows of it by their numbers in the index."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.offered = Offered(index)
        self.lock = threading.Lock()
        self._runs: dict[tuple[str, str], Runs] = {}
        self._readers: dict[str, ShardReader] = {}

    def runs(self, group: TensorGroup, layout: str) -> Runs:
        """Where the rows of each prompt of the index are: all of them, or the one of a pooling."""
        key = group.name, layout
        if key not in self._runs:
            if layout == TOKENS:
                self._runs[key] = every_row(self.index, group)
            else:
                first = group.pooling is None and layout == "first_token"
                self._runs[key] = one_row(self.index, group, first=first)
        return self._runs[key]

    def read(
        self, rows: Ints, columns: Sequence[Column], layout: str, *, most: int = SLICE_BYTES
    ) -> Iterator[tuple[Ints, dict[str, Array]]]:
        """What prompts (`rows` of the index) have at `columns` of one tensor, in the order of the files, a slice of
        `most` bytes at a time: which of `rows`, and ``[rows, D]`` of each site."""
        group = columns[0].group
        assert group is not None
        reader = self._reader(group)
        runs = self.runs(group, layout).take(rows)
        for members in _slices(runs, self._row_bytes(reader, runs, columns), most):
            part = runs.take(members)
            made = self._room(reader, part, columns, most)
            reader.read(part, [(c.layer, c.key, made[c.site]) for c in columns])
            if self.index.source.stop.is_set():
                # Whoever stopped it left rows that nobody has read.
                raise DatasetAccessError(f"{self.index.source.name}: reading was stopped.")
            for column in columns:
                if column.site.endswith(".indices"):
                    made[column.site] = self._indices(column, made[column.site])
            yield members, made

    def _room(self, reader: ShardReader, part: Runs, columns: Sequence[Column], most: int) -> dict[str, Array]:
        """New arrays for the rows of `part`, by site. What is more than `most` bytes is not taken on trust."""
        count, shapes = int(part.length.sum()), self._shapes(reader, part, columns)
        nbytes = count * sum(width * kind.itemsize for _, width, kind in shapes)
        if nbytes > most:
            reader.verify(np.unique(part.shard).tolist(), [(column.layer, column.key) for column in columns])
        return {column.site: np.empty((count, width), kind) for column, width, kind in shapes}

    def verify(self, column: Column) -> None:
        """Check that the files of a column hold as many rows as the dataset says."""
        group = column.group
        assert group is not None
        filled = [number for number, shard in enumerate(group.shards) if shard.rows]
        self._reader(group).verify(filled, [(column.layer, column.key)])

    def in_order(self, rows: Ints, columns: Sequence[Column], layout: str, most: int) -> list[Ints]:
        """Which of `rows` to ask for together, `most` bytes each time, so that files are read from front to back."""
        group = columns[0].group
        assert group is not None
        runs = self.runs(group, layout).take(rows)
        return _slices(runs, self._row_bytes(self._reader(group), runs, columns), most)

    def of_file(self, path: str) -> Ints:
        """The rows of the index of which anything is in a file."""
        found = np.zeros(self.index.num_rows, bool)
        for group in {c.group.name: c.group for c in self.offered.columns.values() if c.group is not None}.values():
            holds = [number for number, _, file in files_of(group) if file == path]
            if holds:
                # Whatever other processes have read of it, in whichever layout, is among these.
                runs = self.runs(group, TOKENS if group.pooling is None else group.pooling)
                first = np.searchsorted(runs.offset, np.flatnonzero(np.isin(runs.shard, holds)), side="right") - 1
                found[first] = True
        return np.flatnonzero(found)

    def _reader(self, group: TensorGroup) -> ShardReader:
        if group.name not in self._readers:
            checksums = self.index.checksums
            self._readers[group.name] = ShardReader(self.index.source, group, exact=True, checksums=checksums)
        return self._readers[group.name]

    def _row_bytes(self, reader: ShardReader, runs: Runs, columns: Sequence[Column]) -> int:
        some = runs.take(np.arange(min(1, len(runs))))
        return sum(width * kind.itemsize for _, width, kind in self._shapes(reader, some, columns))

    def _shapes(
        self, reader: ShardReader, runs: Runs, columns: Sequence[Column]
    ) -> list[tuple[Column, int, np.dtype[Any]]]:
        """Width and dtype of each column: as a dataset of ours names them, else as the headers of the files do."""
        group = reader.group
        said = group.described.get("dtype") if "version" in self.index.ours else None
        shards = np.unique(runs.shard).tolist()
        found = []
        for column in columns:
            if said in FLOATING and group.dim and not column.site.endswith(".indices"):
                found.append((column, group.dim, np.dtype(said)))
                continue
            placed = [reader.placed(shard, column.layer, column.key) for shard in shards]
            found.append((column, placed[0].width, common_dtype(p.dtype for p in placed)))
        return found

    def _indices(self, column: Column, values: Array) -> Array:
        if values.size and (int(values.min()) < 0 or int(values.max()) >= 2**31):
            raise DatasetFormatError(f"{self.index.source.name}: {column.key} holds a number that is no token.")
        return values.astype(np.int32)


def _slices(runs: Runs, row_bytes: int, most: int) -> list[Ints]:
    """Prompts in the order of their files, as many together as fit with what is known of them, at least one."""
    first = runs.offset[:-1]
    order = np.lexsort((runs.start[first], runs.shard[first])) if len(runs) else np.zeros(0, np.int64)
    ends = np.cumsum(np.diff(runs.row_offset)[order] * row_bytes + _PER_PROMPT)
    return [part for part in np.split(order, np.flatnonzero(np.diff((ends - 1) // most)) + 1) if len(part)]


# -- datasets that are open ------------------------------------------------------------------------------

_open: OrderedDict[str, Dataset] = OrderedDict()
_tokens: dict[str, str | bool | None] = {}
_lock = threading.Lock()


def remember(space: str, dataset: Dataset, token: str | bool | None) -> None:
    """Read from `dataset` for `space`, in this process, with the token it was opened with."""
    with _lock:
        _tokens[space] = token
        _open[space] = dataset
        while len(_open) > _OPEN:
            _open.popitem(last=False)


def _forget(space: str, dataset: Dataset) -> None:
    # What went wrong stopped everything that was read of it.
    dataset.index.source.stop.set()
    with _lock:
        if _open.get(space) is dataset:
            del _open[space]


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    # Locks of threads that are not here would never be given back.
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _opened(store: Store, info: SpaceInfo) -> Dataset:
    with _lock:
        known = _open.get(info.space)
    if known is not None and not known.index.source.stop.is_set():
        return known
    pulled = info.identity["pulled"]
    name, commit = str(pulled["dataset"]), str(pulled["commit"])
    folder = local_folder(name)
    try:
        source = open_source(name, token=_tokens.get(info.space), revision=None if folder is not None else commit)
        index = Index(source, Spill(store.index_dir))
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(f"{_what(info)} can no longer be read: {error} {_REMEDY}") from None
    except DatasetAccessError as error:
        raise DatasetAccessError(f"{_what(info)} cannot be read now: {error}") from None
    dataset = Dataset(index)
    remember(info.space, dataset, _tokens.get(info.space))
    return dataset


_REMEDY = (
    "What was read of it before is still here; clear_cache(the id of its space, see `actcache info`) forgets it, "
    "and the model computes what is asked for."
)


def _what(info: SpaceInfo) -> str:
    pulled = info.identity["pulled"]
    return f"{pulled['dataset']} (pulled at {str(pulled['commit'])[:12]})"


# -- fetching --------------------------------------------------------------------------------------------


def fetch(
    store: Store,
    info: SpaceInfo,
    table: PromptTable,
    sites: Sequence[str],
    layout: str,
    *,
    told: Told = int,
    writer: SegmentWriter | None = None,
) -> int:
    """See to it that registered prompts (`table`, as they are registered) have `sites` in `layout` in the store.

    Of what other threads and processes of this host fetch at the same time nothing is fetched twice. `told` how many
    rows of the index are there. `writer`: of who fetches in many steps. Returns how many prompts lacked something.

    Raises:
        DatasetNotFoundError, DatasetAccessError: it is gone, private by now, or cannot be reached.
        DatasetFormatError: it is damaged, or is not what was pulled.
        ValueOverflowError: a value does not fit the dtype of the store.
    """
    missing = _missing(store, info, table, sites, layout)
    lacking = _count(missing)
    told(len(table) - lacking)
    if not missing:
        return 0
    dataset = _opened(store, info)
    try:
        with dataset.lock, exclusive(store.index_dir, f"pull-{info.space}", wait_s=_WAIT_S):
            if dataset.index.source.stop.is_set():
                # It failed for those who had it before.
                dataset = _opened(store, info)
            missing = _missing(store, info, table, sites, layout)
            told(lacking - _count(missing))
            check_unchanged(info, dataset.index.source, dataset.offered)
            with store.writer(info.space, max_bytes=SLICE_BYTES) if writer is None else writer.flushed() as out:
                for members, absent in missing:
                    _fetch(store, info, dataset, table.select(members), absent, layout, told, out)
    except BaseException as error:
        _forget(info.space, dataset)
        if isinstance(error, DamagedFileError) and error.span is None:
            _drop(store, info, dataset.of_file(error.path))
        raise
    return lacking


def _drop(store: Store, info: SpaceInfo, rows: Ints) -> None:
    """Take out what was read of a file that turned out damaged only at its end."""
    table = store.prompts(info, site=PROMPT, layout=PULLED)
    placement = store.locate(info.space, table=table, sites=[PROMPT], layout=PULLED)
    known = np.full(len(table), -1)
    if placement.found.any():
        has = np.flatnonzero(placement.found)
        known[has] = placement.take(index=has)[:, 0, 0]
    mine = table.select(np.isin(known, rows))
    if len(mine):
        store.invalidate(info, mine)


def _missing(
    store: Store, info: SpaceInfo, table: PromptTable, sites: Sequence[str], layout: str
) -> list[tuple[Ints, list[str]]]:
    """Which of the prompts, each different one once, lack which sites."""
    keys = np.hstack([table.token_key, table.text_key])
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    found_each = found_as_given(store, info, table, sites, layout)[first]
    kinds, which = np.unique(found_each, axis=0, return_inverse=True)
    return [
        (first[which.ravel() == number], [site for site, found in zip(sites, kind.tolist(), strict=True) if not found])
        for number, kind in enumerate(kinds)
        if not kind.all()
    ]


def found_as_given(
    store: Store, info: SpaceInfo, table: PromptTable, sites: Sequence[str], layout: str
) -> npt.NDArray[np.bool_]:
    """Which prompts are there at which sites, bool ``[n, sites]``: by their token ids and, where they are texts, by
    these, too. A tokenizer that leaves out case gives several texts the same ids."""
    found = store.locate(info.space, table=table, sites=sites, layout=layout).found_each
    some = np.flatnonzero(found.any(axis=1) & (table.kind != IDS))
    # Prompts of several contexts that were joined do not say which context each text has.
    if not len(some) or not table.text_context:
        return found
    texts = [text or "" for text in table.select(some).texts]
    by_text = store.locate(
        info.space, texts=texts, kinds=table.kind[some], text_context=table.text_context, sites=sites, layout=layout
    )
    found = found.copy()
    found[some] &= by_text.found_each
    return found


def _count(missing: Sequence[tuple[Ints, Sequence[str]]]) -> int:
    return sum(len(members) for members, _ in missing)


def _fetch(
    store: Store,
    info: SpaceInfo,
    dataset: Dataset,
    table: PromptTable,
    sites: Sequence[str],
    layout: str,
    told: Told,
    writer: SegmentWriter,
) -> None:
    placement = store.locate(info.space, table=table, sites=[PROMPT], layout=PULLED)
    if not placement.found.all():
        raise NotCachedError(f"some prompts of {_what(info)} were taken out meanwhile: ask again.")
    rows = placement.take()[:, 0, 0].astype(np.int64)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < dataset.index.num_rows:
        raise DatasetFormatError(f"{_what(info)} has {dataset.index.num_rows:,} prompts by now: it was changed.")
    groups: dict[str | None, list[Column]] = {}
    for site in sites:
        column = dataset.offered.columns.get(site)
        if column is None:
            raise DatasetFormatError(f"{_what(info)} has no {site!r} any more: it was changed.")
        groups.setdefault(column.group.name if column.group is not None else None, []).append(column)
    for name, columns in groups.items():
        if name is None:
            order = np.argsort(rows, kind="stable")
            for records in results_of(dataset.index, rows[order], table.select(order)):
                if set(records.data) & {column.site for column in columns}:
                    check_unchanged(info, dataset.index.source, dataset.offered)
                    writer.put(records)
            continue
        _check_lengths(info, dataset, columns, rows, table, layout)
        for members, data in dataset.read(rows, columns, layout):
            prompts = table.select(members)
            records = Records.tokens(prompts, data) if layout == TOKENS else Records.pooled(prompts, layout, data)
            records = _screened(store, info, records)
            # What was read after somebody had begun to change the files is not what was pulled.
            check_unchanged(info, dataset.index.source, dataset.offered)
            writer.put(records)
            told(len(members))
            if 2 * records.nbytes > SLICE_BYTES:
                # What others have left free would be kept beside what is read next.
                return_free_memory()
    log.info("fetched %d prompts of %s", len(table), info.pulled)


def _screened(store: Store, info: SpaceInfo, records: Records) -> Records:
    """`records` in the dtype of the store; logits stay as they are."""
    if all(map(is_result, records.data)):
        records.screened = True
        return records
    kept, refused = store.screen(records)
    if refused or kept is None:
        raise ValueOverflowError(f"{_what(info)}: {refused[0]}")
    return kept


def _check_lengths(
    info: SpaceInfo, dataset: Dataset, columns: Sequence[Column], rows: Ints, table: PromptTable, layout: str
) -> None:
    if layout != TOKENS:
        return
    lengths = lengths_of(dataset.index, columns[0].group)
    if lengths is None or not np.array_equal(lengths[rows], table.lengths):
        raise DatasetFormatError(f"{_what(info)} has other numbers of tokens by now: it was changed.")
