"""Tokens out of a store: which there are at the moment a stream is made, and reading them in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import NotCachedError, OptionError
from actcache.store.prompts import offsets
from actcache.store.records import TOKENS
from actcache.store.statistics import Moments
from actcache.stream.permutation import Ints, Permutation
from actcache.stream.states import MOST_PIECES, arranged, pieces
from actcache.stream.tokens import Exclusion

if TYPE_CHECKING:
    from actcache.store.backend import CacheBackend
    from actcache.store.prompts import PromptTable
    from actcache.store.store import Store


_MOST_STORES = 8


@dataclass(frozen=True)
class Address:
    """Where the tokens of a source are: in which space of a store, at which sites, in which layout."""

    space: str
    sites: tuple[str, ...]
    layout: str

    @property
    def pooling(self) -> str | None:
        return None if self.layout == TOKENS else self.layout


class Order(Protocol):
    """All tokens of a source in one order, by their place in it."""

    def take(self, start: int, stop: int, sites: Sequence[str]) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
        """The numbers of the tokens at the places from `start` to `stop`, and their vectors at each site: new arrays
        ``[stop - start, D]``."""


class Tokens(ABC):
    """The tokens (or pooled vectors) of `prompts`, all of which are stored, in their order; those of `leave_out` are
    not. They have numbers from 0 on."""

    begins: Ints
    """The prompts that do not lie behind the one before, in the same segment."""

    def __init__(self, store: Store, address: Address, prompts: PromptTable, leave_out: Exclusion) -> None:
        self.address, self.prompts, self.leave_out = address, prompts, leave_out
        self._store = store
        lengths = prompts.lengths if address.layout == TOKENS else np.ones(len(prompts), np.int64)
        self._starts = offsets(lengths)
        self._kept: Ints | None = None
        if leave_out:
            kept = leave_out.kept(prompts)
            # Four bytes for each token where that is enough.
            self._kept = kept.astype(np.uint32) if self._starts[-1] < 1 << 32 else kept
        if not len(self):
            raise OptionError(f"nothing is left of {self._starts[-1]} tokens when those of exclude= are left out.")

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    @abstractmethod
    def column(self, site: str) -> tuple[np.dtype[Any], int]:
        """The dtype of the values of `site`, and its width."""

    @abstractmethod
    def order(self, key: Sequence[int] | None) -> Order:
        """All tokens in the order that `key` decides; None: as they are stored."""

    @abstractmethod
    def moments(self, site: str) -> Moments:
        """The moments of all these tokens."""

    def row_of(self, numbers: Ints) -> Ints:
        """Where these tokens are among those of all prompts, the ones that are left out included."""
        return numbers if self._kept is None else self._kept[numbers].astype(np.int64)

    def tokens(self, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """Prompt, position and id of each of these tokens."""
        rows = self.row_of(numbers)
        prompt = np.searchsorted(self._starts, rows, "right") - 1
        if self.address.layout != TOKENS:
            return prompt, np.full(len(rows), -1), np.full(len(rows), -1)
        ids = self.prompts.token_ids[rows].astype(np.int64)
        return prompt, rows - self._starts[prompt], np.maximum(ids, -1)

    def first(self, number: int) -> Self:
        """The same of the first `number` prompts."""
        if number == len(self.prompts):
            return self
        return type(self)(self._store, self.address, self.prompts.select(np.arange(number)), self.leave_out)

    def said(self) -> dict[str, Any]:
        """What `before` knows these tokens by in another process, or another time: plain numbers and strings."""
        said = {"prompts": len(self.prompts), "digest": self.fingerprint(len(self.prompts))}
        if len(self.begins) <= MOST_PIECES:
            said["pieces"] = pieces(self.prompts.token_key, self.begins)
        return said

    def before(self, said: Mapping[str, Any]) -> Self | None:
        """The tokens that once `said` this of themselves, in the order that they had; None where some are gone.

        Segments are merged, and then come in another order. Prompts that lay together still do.
        """
        number, digest = said["prompts"], said["digest"]
        if number <= len(self.prompts) and self.fingerprint(number) == digest:
            return self.first(number)
        order = arranged(self.prompts.token_key, said.get("pieces", ()))
        if order is None or len(order) != number:
            return None
        found = type(self)(self._store, self.address, self.prompts.select(order), self.leave_out)
        return found if found.fingerprint(number) == digest else None

    def fingerprint(self, number: int) -> str:
        """What the first `number` prompts are, and which of their tokens are left out."""
        digest = xxhash.xxh3_128(self.prompts.token_key[:number].tobytes())
        digest.update(repr((self.address.sites, self.address.layout, self.leave_out)).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "place": self._store.place,
            "address": self.address,
            "keys": self.prompts.token_key.tobytes(),
            "leave_out": self.leave_out,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        store, address = _opened(*state["place"]), state["address"]
        table = store.common_prompts(address.space, address.sites[:1], pooling=address.pooling)
        keys = np.frombuffer(state["keys"], np.uint8).reshape(-1, 16)
        self.__init__(store, address, picked(table, keys), state["leave_out"])  # type: ignore[misc]


class StoredTokens(Tokens):
    """Tokens in files of this host, in any order.

    What was mapped for them stays readable, whatever is stored or removed meanwhile.
    """

    def __init__(self, store: Store, address: Address, prompts: PromptTable, leave_out: Exclusion) -> None:
        super().__init__(store, address, prompts, leave_out)
        self._rows = store.numbered(address.space, prompts, address.sites, pooling=address.pooling)
        self.begins = self._rows.begins

    def column(self, site: str) -> tuple[np.dtype[Any], int]:
        return self._rows.column(site)

    def order(self, key: Sequence[int] | None) -> TokenOrder:
        return TokenOrder(self, None if key is None else Permutation(len(self), key))

    def moments(self, site: str) -> Moments:
        return self._rows.moments(site, None if self._kept is None else self._kept.astype(np.int64))

    def take(
        self, start: int, stop: int, permutation: Permutation | None, sites: Sequence[str]
    ) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
        """`Order.take` in the order of a permutation (None: their own)."""
        numbers = np.arange(start, stop)
        if permutation is None and self._kept is None:
            return numbers, {site: self._rows.copy(start, stop, site) for site in sites}
        if permutation is not None:
            numbers = permutation(numbers)
        rows = self.row_of(numbers)
        return numbers, {site: self._rows.take(rows, site) for site in sites}


class TokenOrder:
    """The `Order` of a permutation of all tokens."""

    def __init__(self, tokens: StoredTokens, permutation: Permutation | None) -> None:
        self._tokens, self._permutation = tokens, permutation

    def take(self, start: int, stop: int, sites: Sequence[str]) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
        return self._tokens.take(start, stop, self._permutation, sites)


_stores: dict[tuple[str, str], Store] = {}


def _opened(location: Path | CacheBackend, index_dir: Path, local_gb: float | None) -> Store:
    """The store of a stream that has come from another process: one for all streams, which learn of it together."""
    from actcache.store.store import Store

    name = str(location) if isinstance(location, Path) else location.identity, str(index_dir)
    if name not in _stores:
        while len(_stores) >= _MOST_STORES:
            del _stores[next(iter(_stores))]
        _stores[name] = Store(location, index_dir=index_dir, local_gb=local_gb)
    return _stores[name]


def picked(table: PromptTable, keys: npt.NDArray[np.uint8]) -> PromptTable:
    """The prompts of `table` that have these `keys`, in their order; NotCachedError where one has gone."""
    if np.array_equal(table.token_key[: len(keys)], keys):
        return table if len(table) == len(keys) else table.select(np.arange(len(keys)))
    have, want = (np.ascontiguousarray(k).view("V16").reshape(-1) for k in (table.token_key, keys))
    place = {key: i for i, key in enumerate(have.tolist())}
    found = [place.get(key, -1) for key in want.tolist()]
    if -1 in found:
        raise NotCachedError(
            f"{found.count(-1)} of {len(keys)} prompts of this stream are not in the store any more: make a new stream"
        )
    return table.select(found)
