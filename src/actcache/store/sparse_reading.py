"""Sparse matrices out of a store: as tensors for each prompt, and by the column in which something is not zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import LayerRangeError, NotCachedError, OptionError
from actcache.store import tensors
from actcache.store.asking import locate_sites, sparse_sites
from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints
from actcache.store.lookup import Query, locate
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.records import SPARSE, TOKENS
from actcache.store.reports import stored_prompts
from actcache.store.sparse import SparseSite

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The numbers of one prompt that are not zero, ordered by position and index: ``[nnz]`` each.

    `position`, `index` int32; `tokens`: how many the prompt has.
    """

    tokens: int
    position: npt.NDArray[np.int32]
    index: npt.NDArray[np.int32]
    value: npt.NDArray[Any]


def find_site(index: SpaceIndex, name: str, pooling: str | None) -> SparseSite | None:
    """The sparse matrix that a space has under `name`; None where it has none, or has something else there.

    Raises:
        OptionError: several of different widths.
    """
    with index.lock:
        if any(name in group.sites for group in index.groups(pooling or TOKENS)):
            return None
    index.refresh()
    found = sparse_sites(index, name, pooling)
    if len(found) > 1:
        names = ", ".join(f"{site.name}.of{site.size}" for site in found)
        raise OptionError(f"{name!r} is stored in several widths in space {index.folder.name}: name one of {names}.")
    return found[0] if found else None


def each_prompt(index: SpaceIndex, site: SparseSite, prompts: Any) -> Iterator[SparseRows]:
    """The numbers of `prompts` (texts, token ids, chats, a table), in their order; every block is checked.

    Raises:
        NotCachedError: a prompt is not stored, or turns out damaged.
    """
    if isinstance(prompts, PromptTable):
        placement = locate(index, Query.by_tokens(prompts), list(site.columns), SPARSE, True)
        placements = [placement]
        owner, local = np.where(placement.found, 0, -1), np.arange(len(prompts))
    else:
        located = locate_sites(index, tensors.as_list(prompts), site.columns, SPARSE, check=True)
        placements, local = located.placements, located.local
        owner = np.where(located.found.all(axis=1), located.owner, -1)
    if (owner < 0).any():
        raise NotCachedError(
            f"{int((owner < 0).sum())} of {len(owner)} prompts have no {site.name!r} in the store (the first is prompt "
            f"{int(np.flatnonzero(owner < 0)[0])}): see Store.contains()."
        )
    for k, i in zip(owner.tolist(), local.tolist(), strict=True):
        yield _rows_of(placements[k], i, site)


def _rows_of(placement: Placement, i: int, site: SparseSite) -> SparseRows:
    position, index, value = (rows[:, 0] for rows in placement.rows(i))
    if not len(position) == len(index) == len(value):
        raise NotCachedError(f"the columns of {site.name!r} of prompt {i} do not belong together: encode it again.")
    return SparseRows(int(placement.num_tokens[i]), position, index, value)


def read(index: SpaceIndex, site: SparseSite, prompts: Any, *, pooled: bool, positions: Any) -> Any:
    """Sparse tensors (COO, coalesced): ``[T, n]`` for each prompt, one ``[B, n]`` of pooled vectors.

    `prompts`: as of `Store.read`; `positions` cuts rows as there.
    """
    if prompts is None:
        prompts = stored_prompts(index, site.columns[2], SPARSE)
    rows = list(each_prompt(index, site, prompts))
    if pooled:
        position = np.repeat(np.arange(len(rows)), [len(r.value) for r in rows])
        return _tensor(position, _joined(rows, "index"), _joined(rows, "value"), (len(rows), site.size))
    if positions is None or positions == "all":
        return [_tensor(r.position, r.index, r.value, (r.tokens, site.size)) for r in rows]
    return [_cut(r, site.size, tensors.cut(np.arange(r.tokens), positions)) for r in rows]


def _joined(rows: list[SparseRows], part: str) -> npt.NDArray[Any]:
    return np.concatenate([getattr(r, part) for r in rows])


def _cut(rows: SparseRows, size: int, chosen: Ints) -> torch.Tensor:
    """The rows `chosen` of a prompt, in that order."""
    first, last = (np.searchsorted(rows.position, chosen, side) for side in ("left", "right"))
    lengths = last - first
    ends = np.cumsum(lengths)
    take = np.arange(int(lengths.sum())) + np.repeat(first - (ends - lengths), lengths)
    return _tensor(np.repeat(np.arange(len(chosen)), lengths), rows.index[take], rows.value[take], (len(chosen), size))


def _tensor(position: Any, index: Any, value: npt.NDArray[Any], size: tuple[int, int]) -> torch.Tensor:
    import torch

    at = torch.from_numpy(np.stack([position, index]).astype(np.int64))
    return torch.sparse_coo_tensor(at, tensors.to_tensor(value), size, is_coalesced=True, check_invariants=True)


def occurrences(
    index: SpaceIndex, site: SparseSite, prompts: PromptTable, column: int
) -> tuple[Ints, Ints, npt.NDArray[Any]]:
    """Where `column` is not zero: the number in `prompts`, the position, the value, ``[k]`` each, in that order."""
    if not 0 <= column < site.size:
        raise LayerRangeError(f"there is no feature {column}: expected 0 to {site.size - 1}")
    found: list[tuple[Ints, Ints, npt.NDArray[Any]]] = []

    def look(i: int, rows: SparseRows) -> None:
        hits = np.flatnonzero(rows.index == column)
        if len(hits):
            found.append((np.full(len(hits), i), rows.position[hits].astype(np.int64), rows.value[hits]))

    _each(index, site, prompts, look)
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    prompt, position, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return prompt, position, value


def counts(index: SpaceIndex, site: SparseSite, prompts: PromptTable) -> Ints:
    """In how many rows each column is not zero, int64 ``[n]``."""
    total = np.zeros(site.size, np.int64)
    _each(index, site, prompts, lambda _, rows: np.add.at(total, rows.index, 1))
    return total


def _each(index: SpaceIndex, site: SparseSite, prompts: PromptTable, work: Callable[[int, SparseRows], object]) -> None:
    for i, rows in enumerate(each_prompt(index, site, prompts)):
        work(i, rows)
