"""Tokens of a model while it runs: extracted in one thread, taken in another, with little between them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError, OptionError, did_you_mean
from actcache.extract.cached import CachedExtractor
from actcache.extract.prompts import prompt_table, tokenize
from actcache.extract.request import Request, partial_failure
from actcache.store.dtypes import SCALED_DTYPES, code_for, matrix_dtype
from actcache.store.prompts import PromptTable
from actcache.store.records import TOKENS, Records
from actcache.store.spaces import space_id
from actcache.store.statistics import as_float, is_float
from actcache.stream.elsewhere import TokensElsewhere
from actcache.stream.permutation import Ints
from actcache.stream.stored import Address, StoredTokens, Tokens
from actcache.stream.tokens import Exclusion, asks_for_bos, exclusion

LIVE_BATCHES = 8
"""How many batches of tokens of a running model are drawn from at most."""
_EASE = 8
"""And at most so small a part of what has come, and of what is to come. A buffer that has to be full would let the
consumer wait at the beginning, and the model be long done when it has taken the rest."""
_QUEUED = 4
_CHUNK_ROWS = 4096
_PROMPTS_AT_ONCE = 1024

Chunk = tuple[Ints, dict[str, npt.NDArray[Any]]]
"""Numbers of tokens, and their vectors by site."""


class _Stopped(Exception):
    """Nobody takes the tokens any more."""


class Extraction:
    """What the prompts of `request` (each different one once) are to give at `sites`, of which some are not stored."""

    def __init__(self, cached: CachedExtractor, sites: Sequence[str], request: Request, exclude: Any) -> None:
        self._cached, self._sites = cached, tuple(sites)
        for site in sites:
            if site not in cached.extractor.sites:
                hint = did_you_mean(site, cached.extractor.sites)
                raise OptionError(f"{site!r} is no site of this cache.{hint} It has: {cached.extractor.sites}.")
        if not cached.keeps:
            raise OptionError("the limit of the store is 0: what is streamed while the model runs is also stored.")
        source = cached.extractor.source
        bos = getattr(source.tokenizer(), "bos_token_id", None) if asks_for_bos(exclude) else None
        self.leave_out: Exclusion = exclusion(exclude, bos, known=True)
        if self.leave_out and cached.layout != TOKENS:
            raise OptionError(f"exclude= leaves out tokens: vectors pooled by {cached.layout!r} belong to no one.")
        read = request.prompts
        tokenize(read, range(len(read)), source, add_special_tokens=cached.extractor.add_special_tokens)
        context = cached.text_context(read)
        table = PromptTable.build([ids for ids in read.ids if ids is not None], read.texts, read.kinds, context)
        keys = np.ascontiguousarray(table.token_key).view("V16").reshape(-1)
        first = np.sort(np.unique(keys, return_index=True)[1]).tolist()
        self.table = table if len(first) == len(table) else table.select(first)
        self._prompts = read.select(first)
        self._number = {key.tobytes(): i for i, key in enumerate(self.table.token_key)}
        rows = self.table.lengths if cached.layout == TOKENS else np.ones(len(self.table), np.int64)
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._keep = np.ones(int(self._starts[-1]), bool)
        if self.leave_out:
            self._keep[:] = False
            self._keep[self.leave_out.kept(self.table)] = True
        self.missing = request.to_compute

    @classmethod
    def of(cls, source: Any, sites: Sequence[str], prompts: Any, exclude: Any) -> Extraction | None:
        """None where `source` runs no model, or all is stored."""
        cached = source if isinstance(source, CachedExtractor) else getattr(source, "cached", None)
        if not isinstance(cached, CachedExtractor):
            return None
        if getattr(source, "_completions", None) is not None:
            raise OptionError("of a cache with generate= what is stored can be streamed: leave prompts= out.")
        request = cached.request(prompts, list(sites), check=False, own=True)
        store_pooled(cached, sites, request)
        return cls(cached, sites, request, exclude) if request.missing else None

    @property
    def tokens(self) -> int:
        """How many tokens there are to come."""
        return int(self._keep.sum())

    def of_tokens(self, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """Prompt, position and id of tokens by their rows."""
        prompt = np.searchsorted(self._starts, numbers, "right") - 1
        if self._cached.layout != TOKENS:
            return prompt, np.full(len(numbers), -1), np.full(len(numbers), -1)
        return prompt, numbers - self._starts[prompt], self.table.token_ids[numbers].astype(np.int64)

    def _request(self) -> Request:
        return self._cached.request(self._prompts, list(self._sites), check=False, own=True)

    def stored(self) -> Tokens | None:
        """The tokens out of the store; None while some are missing there."""
        request = self._request()
        self.missing = request.to_compute
        if self.missing:
            return None
        address = Address(request.space, self._sites, self._cached.layout)
        kind = TokensElsewhere if self._cached.store.is_elsewhere else StoredTokens
        return kind(self._cached.store, address, self.table, self.leave_out)

    def chunks(self) -> Iterator[Chunk]:
        """All tokens, those that are stored when nothing else is there; raises what the extraction raised.

        The model runs from the first call on, until the iterator is closed.
        """
        with self._cached.session():
            request = self._request()
            found = np.flatnonzero(request.lookup.found)
            # What comes of them are not all sites.
            late = [i for (names, _), of in request.missing.items() if set(names) != set(self._sites) for i in of]
        lines: queue.Queue[Chunk | BaseException | None] = queue.Queue(_QUEUED)
        stop = threading.Event()

        def put(item: Chunk | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return lines.put(item, timeout=0.1)
                except queue.Full:
                    continue
            raise _Stopped

        def taken(records: Records) -> None:
            if records.data.keys() == set(self._sites):
                put(self._chunk(records))

        def work() -> None:
            try:
                with self._cached.session():
                    filled = self._cached.fill(request, taken=taken)
                put(partial_failure(filled, self._prompts, stats=filled) if filled.failed else None)
            except _Stopped:
                pass
            except BaseException as error:
                with contextlib.suppress(_Stopped):
                    put(error)

        thread = threading.Thread(target=work, name="actcache-extraction", daemon=True)
        thread.start()
        try:
            waiting = self._found(found)
            while True:
                try:
                    item = lines.get(block=False)
                except queue.Empty:
                    ready = next(waiting, None)
                    if ready is not None:
                        yield ready
                        continue
                    item = lines.get()
                if item is None or isinstance(item, BaseException):
                    yield from waiting
                    if item is not None:
                        raise item
                    yield from self._found(np.array(late, np.int64))
                    return
                yield item
        finally:
            stop.set()
            thread.join()

    def _found(self, prompts: Ints) -> Iterator[Chunk]:
        """The tokens of prompts that are stored."""
        if not len(prompts):
            return
        space = space_id(self._cached.extractor.source.identity().values)
        layout = self._cached.layout
        table = self.table.select(prompts)
        pooling = None if layout == TOKENS else layout
        rows = self._cached.store.numbered(space, table, self._sites, pooling=pooling, check=True)
        shift = self._starts[prompts] - rows.starts[:-1]
        for start in range(0, len(rows), _CHUNK_ROWS):
            mine = np.arange(start, min(start + _CHUNK_ROWS, len(rows)))
            numbers = mine + shift[rows.prompt_of(mine)]
            keep = self._keep[numbers]
            yield numbers[keep], {site: rows.take(mine[keep], site) for site in self._sites}

    def _chunk(self, records: Records) -> Chunk:
        """The tokens of records that are being stored, as they will be read."""
        mine = [self._number[key.tobytes()] for key in records.prompts.token_key]
        numbers = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in mine])
        keep = self._keep[numbers]
        vectors = {site: as_stored(records.data[site][keep], records.storage) for site in self._sites}
        return numbers[keep], vectors


def store_pooled(cached: CachedExtractor, sites: Sequence[str], request: Request) -> None:
    """Store the pooled vectors that follow from stored full sequences: what is streamed is read again and again."""
    at = request.lookup.pooled_here
    if not len(at):
        return
    identity, read = cached.identity(), request.prompts
    with cached.session(), cached.store.writer(cached.store.open_space(identity.values, identity.label)) as writer:
        for start in range(0, len(at), _PROMPTS_AT_ONCE):
            some = read.select(at[start : start + _PROMPTS_AT_ONCE].tolist())
            answer = cached.look_up(some, sites, cached.layout, own=True)
            special = cached.extractor.add_special_tokens
            tokenize(some, range(len(some)), cached.extractor.source, add_special_tokens=special)
            table = prompt_table(some, range(len(some)), request.text_context)
            vectors = {site: answer.of_site(site).pooled()[:, 0] for site in sites}
            writer.put(Records(table, cached.layout, np.arange(len(some) + 1), vectors))
        cached.note_added()


def as_stored(rows: npt.NDArray[Any], storage: str | None) -> npt.NDArray[Any]:
    """`rows` rounded as they are in the store; of int8 and float8_e4m3, of which scales are not known yet, as given."""
    if not is_float(rows.dtype):
        return rows
    if storage in SCALED_DTYPES:
        return as_float(rows)
    with np.errstate(over="ignore"):
        return rows.astype(matrix_dtype(code_for(rows.dtype, storage)), copy=False)


class Buffer:
    """Chunks of any size in, batches out: drawn from up to `batches` batches of tokens, or without `draw` in order.

    `total`: how many tokens are to come.
    """

    def __init__(self, batch_size: int, batches: int, draw: np.random.Generator | None, total: int) -> None:
        self._size, self._room, self._draw = batch_size, batch_size * batches, draw
        self._came, self._total = 0, total
        self._numbers = np.empty(0, np.int64)
        self._vectors: dict[str, npt.NDArray[Any]] = {}
        self._count = 0

    def batches(self, chunks: Iterator[Chunk], *, drop_last: bool) -> Iterator[Chunk]:
        """Every token once, with the last batch what is left."""
        try:
            for chunk in chunks:
                self._add(chunk)
                while self._count >= self._wanted():
                    yield self._batch(self._size)
            while self._count >= (self._size if drop_last else 1):
                yield self._batch(min(self._size, self._count))
        finally:
            chunks.close()  # type: ignore[attr-defined]

    def _wanted(self) -> int:
        """Of how many tokens there have to be for a batch to be drawn."""
        if self._draw is None:
            return self._size
        return max(self._size, min(self._room, min(self._came, self._total - self._came) // _EASE))

    def _add(self, chunk: Chunk) -> None:
        numbers, vectors = chunk
        self._came += len(numbers)
        end = self._count + len(numbers)
        for site, rows in vectors.items():
            kept = self._vectors.get(site)
            if kept is None or len(kept) < end:
                grown = np.empty((max(end, self._room + self._size), rows.shape[1]), rows.dtype)
                if kept is not None:
                    grown[: self._count] = kept[: self._count]
                self._vectors[site] = kept = grown
            if kept.dtype != rows.dtype:
                raise NotCachedError(f"{site!r} is stored as {kept.dtype} and as {rows.dtype}: give dtype=")
            kept[self._count : end] = rows
        if len(self._numbers) < end:
            self._numbers = np.concatenate([self._numbers[: self._count], np.empty(end + self._room, np.int64)])
        self._numbers[self._count : end] = numbers
        self._count = end

    def _batch(self, size: int) -> Chunk:
        left = self._count - size
        if self._draw is None:
            chosen = np.arange(size)
            rest, holes = np.arange(size, self._count), np.arange(left)
        else:
            chosen = self._draw.permutation(self._count)[:size]
            gone = np.zeros(self._count, bool)
            gone[chosen] = True
            # What lies behind the new end moves into the gaps before it.
            rest, holes = left + np.flatnonzero(~gone[left:]), np.flatnonzero(gone[:left])
        batch = self._numbers[chosen], {site: rows[chosen] for site, rows in self._vectors.items()}
        self._numbers[holes] = self._numbers[rest]
        for rows in self._vectors.values():
            rows[holes] = rows[rest]
        self._count = left
        return batch
