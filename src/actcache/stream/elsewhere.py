"""Tokens of a store that lies elsewhere: fetched block by block, in an order that never needs more than two buffers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.store.numbered import NumberedRows
from actcache.store.prompts import offsets
from actcache.store.sparse_numbered import SparseNumbered
from actcache.store.statistics import Moments, as_float
from actcache.stream.permutation import Ints, Permutation
from actcache.stream.stored import Address, Tokens
from actcache.stream.tokens import Exclusion

if TYPE_CHECKING:
    from actcache.store.prompts import PromptTable
    from actcache.store.store import Store

BUFFER_TOKENS = 65536
"""Among how many tokens a stream from elsewhere is shuffled."""
_BLOCKS = 64
_WITHIN = 1


class TokensElsewhere(Tokens):
    """Tokens of objects that are fetched as they are needed.

    A block is a run of prompts with about a 64th of `buffer` tokens. An epoch is a permutation of the blocks; of so
    many of them as have `buffer` tokens together all tokens are shuffled, then those of the next ones. While one buffer
    is streamed the next one is fetched.
    """

    buffer = BUFFER_TOKENS

    def __init__(self, store: Store, address: Address, prompts: PromptTable, leave_out: Exclusion) -> None:
        super().__init__(store, address, prompts, leave_out)
        # Heads alone are fetched for this.
        rows = store.numbered(address.space, prompts, address.sites, pooling=address.pooling)
        self._columns = {site: rows.column(site) for site in address.sites}
        self._is_sparse = isinstance(rows, SparseNumbered)
        self.begins = rows.begins
        # How many tokens of those that count come before each prompt.
        before = self._starts if self._kept is None else np.searchsorted(self._kept, self._starts)
        block = before[:-1] // max(1, self.buffer // _BLOCKS)
        self._first_prompt = np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(prompts))
        self._first_token = before[self._first_prompt]

    def column(self, site: str) -> tuple[np.dtype[Any], int]:
        return self._columns[site]

    def order(self, key: Sequence[int] | None) -> BlockOrder:
        return BlockOrder(self, np.diff(self._first_token), key)

    def moments(self, site: str) -> Moments:
        """Without reading them where they are all that the store has at the site."""
        address = self.address
        if not self._is_sparse:
            known = self._store.statistics(address.space, site, pooling=address.pooling)
            if known.count == len(self) and self._are_all(site):
                return known.moments()
        total = Moments.empty(self.column(site)[1])
        order, step = self.order(None), max(1, self.buffer // _BLOCKS)
        for start in range(0, len(self), step):
            rows = order.take(start, min(start + step, len(self)), [site])[1][site]
            total.update(as_float(rows))
        return total

    def _are_all(self, site: str) -> bool:
        """Whether these are all prompts that the store has at `site`: so many tokens may be those of others by now."""
        now = self._store.common_prompts(self.address.space, [site], pooling=self.address.pooling)
        both = (np.ascontiguousarray(table.token_key).view("V16") for table in (now, self.prompts))
        have, mine = (np.sort(keys, axis=None) for keys in both)
        return bool(np.array_equal(have, mine))

    def loaded(self, blocks: Ints) -> Loaded:
        """What these blocks hold, fetched and checked."""
        prompts = np.concatenate([np.arange(*self._first_prompt[b : b + 2]) for b in blocks.tolist()])
        numbers = np.concatenate([np.arange(*self._first_token[b : b + 2]) for b in blocks.tolist()])
        address = self.address
        table = self.prompts.select(prompts)
        rows = self._store.numbered(address.space, table, address.sites, pooling=address.pooling, check=True)
        # Where the rows of a prompt begin among those that were loaded, against where they do among all.
        shift = np.zeros(len(self.prompts), np.int64)
        shift[prompts] = rows.starts[:-1] - self._starts[prompts]
        everywhere = self.row_of(numbers)
        return Loaded(numbers, everywhere + shift[np.searchsorted(self._starts, everywhere, "right") - 1], rows)


@dataclass(frozen=True)
class Loaded:
    """Tokens by their `numbers`, and which of the `rows` that were loaded are theirs."""

    numbers: Ints
    places: Ints
    rows: NumberedRows | SparseNumbered


class BlockOrder:
    """The `Order` of a permutation of blocks of `sizes` tokens, and of the tokens of each buffer of them."""

    def __init__(self, tokens: TokensElsewhere, sizes: Ints, key: Sequence[int] | None) -> None:
        self._tokens, self._key = tokens, key
        blocks = np.arange(len(sizes))
        self._blocks = blocks if key is None else Permutation(len(sizes), key)(blocks)
        ends = offsets(sizes[self._blocks])
        group = ends[:-1] // tokens.buffer
        self._first_block = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(blocks))
        self._begin = ends[self._first_block]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="actcache-blocks")
        self._held: dict[int, Future[Loaded]] = {}

    def take(self, start: int, stop: int, sites: Sequence[str]) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
        numbers, vectors = [], []
        while start < stop:
            group = int(np.searchsorted(self._begin, start, "right")) - 1
            begin, end = int(self._begin[group]), int(self._begin[group + 1])
            places = np.arange(start, min(stop, end)) - begin
            if self._key is not None:
                places = Permutation(end - begin, [*self._key, _WITHIN, group])(places)
            loaded = self._group(group)
            numbers.append(loaded.numbers[places])
            vectors.append({site: loaded.rows.take(loaded.places[places], site) for site in sites})
            start += len(places)
        if len(numbers) == 1:
            return numbers[0], vectors[0]
        return np.concatenate(numbers), {site: _joined([part[site] for part in vectors]) for site in sites}

    def _group(self, group: int) -> Loaded:
        """A buffer; the next one is being fetched from now on, and what came before is let go."""
        wanted = [number for number in (group, group + 1) if number < len(self._begin) - 1]
        self._held = {number: self._held.get(number) or self._submit(number) for number in wanted}
        return self._held[group].result()

    def _submit(self, group: int) -> Future[Loaded]:
        blocks = self._blocks[self._first_block[group] : self._first_block[group + 1]]
        return self._pool.submit(self._tokens.loaded, blocks)


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if len({part.dtype for part in parts}) > 1:
        parts = [as_float(part) for part in parts]
    return np.concatenate(parts)
