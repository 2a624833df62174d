"""Where located prompts are, and reading them from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store.gather import gather
from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.prompts import PromptTable
from actcache.store.records import TOKENS


@dataclass(frozen=True)
class Part:
    """Sites that lie together: for each prompt the segment (-1: absent) and its number in it."""

    sites: tuple[int, ...]
    segment: npt.NDArray[np.int32]
    prompt: Ints


class Placement:
    """Prompts found in a store. It keeps its segments mapped, so what was located stays readable.

    `found` bool ``[n]`` (every site), `found_each` bool ``[n, sites]``, `num_tokens` int64 ``[n]`` (-1 where
    not found).
    """

    def __init__(
        self, n: int, sites: Sequence[str], layout: str, parts: Sequence[Part], segments: Sequence[Segment]
    ) -> None:
        self.sites = tuple(sites)
        self.layout = layout
        self._parts = list(parts)
        self._segments = list(segments)
        self.found_each = np.zeros((n, len(sites)), bool)
        self.num_tokens: Ints = np.full(n, -1, np.int64)
        for part in parts:
            self.found_each[:, list(part.sites)] = (part.segment >= 0)[:, None]
        self.found: npt.NDArray[np.bool_] = np.asarray(self.found_each.all(axis=1))
        for part in parts[:1]:
            for number, members in self._by_segment(part.segment, np.flatnonzero(self.found)):
                prompts = part.prompt[members]
                offset = self._segments[number].prompts.token_offset
                self.num_tokens[members] = offset[prompts + 1] - offset[prompts]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of what was found; float32 where segments differ."""
        dtypes = {segment.column(s)[0] for part, segment in self._used() for s in self._names(part)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.found)

    def take(self, out: npt.NDArray[Any] | None = None, *, index: npt.ArrayLike | None = None) -> npt.NDArray[Any]:
        """The vectors ``[n, sites, D]`` of a pooled layout, of prompts `index` (default all) in that order.

        Written straight into `out` where one is given (any floating dtype, converted on the way).
        NotCachedError when one of the prompts was not found.
        """
        if self.layout == TOKENS:
            raise ValueError("take() reads pooled layouts; use rows() or take_padded() for every token")
        chosen = self._require(index)
        dim = self._dim()
        shape = (len(chosen), len(self.sites), dim)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape:
            raise ValueError(f"out has shape {out.shape}, expected {shape}")
        for part in self._parts:
            segment, prompt = part.segment[chosen], part.prompt[chosen]
            for number, members in self._by_segment(segment, np.arange(len(chosen))):
                matrices = [self._segments[number].matrix(self.sites[j]) for j in part.sites]
                gather(matrices, prompt[members], out, members, part.sites)
        return out

    def rows(self, i: int) -> list[npt.NDArray[Any]]:
        """The rows of prompt `i`: one read-only view ``[T, D]`` of the mapping per site."""
        self._require([i])
        found: list[npt.NDArray[Any]] = [np.empty(0)] * len(self.sites)
        for part in self._parts:
            segment, prompt = self._segments[part.segment[i]], int(part.prompt[i])
            start, stop = int(segment.row_offset[prompt]), int(segment.row_offset[prompt + 1])
            for j in part.sites:
                matrix = segment.matrix(self.sites[j])
                if not 0 <= start <= stop <= len(matrix):
                    raise NotCachedError(f"{segment.path} is shorter than its index says")
                found[j] = matrix[start:stop]
        return found

    def take_padded(
        self, out: npt.NDArray[Any] | None = None, *, index: npt.ArrayLike | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """All rows, right-padded with zeros: ``[n, S, sites * D]`` and the mask bool ``[n, S]``; S the longest."""
        chosen = self._require(index)
        dim, width = self._dim(), len(self.sites)
        counts = np.array([len(self.rows(int(i))[0]) for i in chosen], np.int64)
        longest = int(counts.max(initial=0))
        shape = (len(chosen), longest, width * dim)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape:
            raise ValueError(f"out has shape {out.shape}, expected {shape}")
        split = out.reshape(len(chosen), longest, width, dim)
        if split.size and not np.shares_memory(split, out):
            raise ValueError("out must be contiguous")
        for at, i in enumerate(chosen.tolist()):
            length = int(counts[at])
            for j, rows in enumerate(self.rows(i)):
                if len(rows) != length:
                    raise ValueError(
                        f"prompt {i}: {self.sites[j]!r} has {len(rows)} rows and {self.sites[0]!r} has {length}: "
                        "ask for them one by one"
                    )
                split[at, :length, j] = rows
            split[at, length:] = 0
        return out, np.arange(longest) < counts[:, None]

    def prompts(self) -> PromptTable:
        """What is stored for these prompts, in their order: ids and texts. All must be found."""
        self._require(None)
        if not len(self):
            return PromptTable.build([])
        part = self._parts[0]
        order, tables = [], []
        for number, members in self._by_segment(part.segment, np.arange(len(self))):
            order.append(members)
            tables.append(self._segments[number].prompts.select(part.prompt[members]))
        return PromptTable.concatenate(tables).select(np.argsort(np.concatenate(order), kind="stable"))

    def _require(self, index: npt.ArrayLike | None) -> Ints:
        chosen = np.arange(len(self), dtype=np.int64)
        if index is not None:
            chosen = chosen[np.asarray(index)]
        missing = chosen[~self.found[chosen]]
        if len(missing):
            raise NotCachedError(
                f"{len(missing)} of {len(chosen)} prompts are not in the store (the first is prompt {missing[0]}): "
                "extract them first, or ask only for those marked in `found`"
            )
        return chosen

    def _dim(self) -> int:
        dims = {segment.column(s)[1] for part, segment in self._used() for s in self._names(part)}
        if len(dims) > 1:
            raise ValueError(
                f"sites of different widths {sorted(dims)} cannot share one array: ask for them one by one"
            )
        return dims.pop() if dims else 0

    def _used(self) -> list[tuple[Part, Segment]]:
        return [(p, self._segments[s]) for p in self._parts for s in np.unique(p.segment).tolist() if s >= 0]

    def _names(self, part: Part) -> list[str]:
        return [self.sites[j] for j in part.sites]

    @staticmethod
    def _by_segment(segment: npt.NDArray[np.int32], members: Ints) -> list[tuple[int, Ints]]:
        """`members` split by the segment each is in."""
        mine = segment[members]
        if not len(mine):
            return []
        if (mine == mine[0]).all():
            return [(int(mine[0]), members)]
        order = np.argsort(mine, kind="stable")
        cuts = np.flatnonzero(np.diff(mine[order])) + 1
        return [(int(mine[part[0]]), members[part]) for part in np.split(order, cuts)]
