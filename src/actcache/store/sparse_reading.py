"""Sparse matrices out of a store, as tensors for each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError, OptionError
from actcache.store import tensors
from actcache.store.asking import locate_sites, sparse_sites
from actcache.store.index import SpaceIndex
from actcache.store.keys import Ints
from actcache.store.lookup import locate
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.queries import Query
from actcache.store.records import SPARSE, TOKENS
from actcache.store.reports import stored_prompts
from actcache.store.sparse import SparseSite

if TYPE_CHECKING:
    import torch

_PROMPTS_AT_ONCE = 1024


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
    for start in range(0, len(owner), _PROMPTS_AT_ONCE):
        yield from _some(placements, owner[start : start + _PROMPTS_AT_ONCE], local[start:], site)


def _some(placements: Sequence[Placement], owner: Ints, local: Ints, site: SparseSite) -> list[SparseRows]:
    """The numbers of prompts ``local[i]`` of placement ``owner[i]``."""
    found: dict[int, SparseRows] = {}
    for k in np.unique(owner).tolist():
        members, placement = np.flatnonzero(owner == k), placements[k]
        chosen = local[members]
        tokens = placement.num_tokens[chosen].tolist()
        for i, number, columns in zip(members.tolist(), tokens, placement.all_rows(chosen), strict=True):
            position, index, value = (rows[:, 0] for rows in columns)
            if not len(position) == len(index) == len(value):
                raise NotCachedError(f"the columns of {site.name!r} of a prompt do not belong together: encode again.")
            found[i] = SparseRows(number, position, index, value)
    return [found[i] for i in range(len(owner))]


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
