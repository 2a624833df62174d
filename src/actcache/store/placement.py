"""Where located prompts are, and reading them from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError
from actcache.store import memory
from actcache.store.bringing import receive_together
from actcache.store.by_segment import Ints, by_segment
from actcache.store.checks import BlockChecks
from actcache.store.delivering import Deliveries, deliveries
from actcache.store.dtypes import common_dtype, name_of
from actcache.store.gather import Piece, gather_pieces
from actcache.store.lazy import lazy, once
from actcache.store.mapping import Reader, Segment
from actcache.store.moving import move
from actcache.store.places import Part, Places
from actcache.store.prompts import PromptTable
from actcache.store.receiving import Received
from actcache.store.records import SPARSE, TOKENS

_Received = Mapping[BlockChecks, Received]


class Placement:
    """Prompts found in a store. It keeps its segments mapped, so what was located stays readable.

    `found` bool ``[n]`` (every site), `found_each` bool ``[n, sites]``, `num_tokens` int64 ``[n]`` (-1 where
    not found).
    """

    def __init__(
        self,
        n: int,
        sites: Sequence[str],
        layout: str,
        parts: Sequence[Part],
        segments: Sequence[Segment],
        received: _Received | None = None,
        *,
        found: npt.NDArray[np.bool_] | None = None,
        places: Places | None = None,
    ) -> None:
        """`received`: of some segments all that the prompts have, where it was fetched just now; used once. `found`,
        `places`: where they are known."""
        self.sites = tuple(sites)
        self.layout = layout
        self._parts = list(parts)
        self._segments = list(segments)
        self._places = Places(n, self._parts, self._segments) if places is None else places
        self._received = received or {}
        self._read: dict[tuple[int, int], Reader] = {}
        self._n = n
        self.found: npt.NDArray[np.bool_]
        if found is not None:
            self.found = found
            return
        self.found = np.zeros(n, bool) if sites else np.ones(n, bool)
        for k, part in enumerate(parts):
            self.found = (part.segment >= 0) if not k else self.found & (part.segment >= 0)

    @classmethod
    def of_one(cls, sites: Sequence[str], layout: str, segment: Segment | None, prompt: int) -> Placement:
        """The placement of a single prompt that lies in `segment`, or is absent."""
        slot = _ABSENT if segment is None else _FIRST
        part = Part(tuple(range(len(sites))), slot, np.array([prompt], np.int64))
        return cls(1, sites, layout, [part], [] if segment is None else [segment])

    @lazy
    def all_found(self) -> bool:
        """Whether every prompt was found at every site."""
        return bool(self.found.all())

    @property
    def every(self) -> Ints:
        """The number of each prompt."""
        return self._places.every

    @lazy
    def found_each(self) -> npt.NDArray[np.bool_]:
        found = np.zeros((self._n, len(self.sites)), bool)
        for part in self._parts:
            found[:, list(part.sites)] = (part.segment >= 0)[:, None]
        return found

    @lazy
    def num_tokens(self) -> Ints:
        count = np.full(self._n, -1, np.int64)
        for part in self._parts[:1]:
            for number, members in by_segment(part.segment, np.flatnonzero(self.found)):
                prompts = part.prompt[members]
                offset = self._segments[number].prompts.token_offset
                count[members] = offset[prompts + 1] - offset[prompts]
        return count

    @lazy
    def dtype(self) -> np.dtype[Any]:
        """The dtype of what was found; one that holds them all where segments differ."""
        return common_dtype(segment.column(s)[0] for part, segment in self._places.used for s in self._names(part))

    def __len__(self) -> int:
        return len(self.found)

    def take(
        self,
        out: npt.NDArray[Any] | None = None,
        *,
        index: npt.ArrayLike | None = None,
        at: Ints | None = None,
        meanwhile: Callable[[npt.NDArray[Any]], object] = lambda out: None,
    ) -> npt.NDArray[Any]:
        """The vectors ``[n, sites, D]`` of a pooled layout, of prompts `index` (default all) in that order.

        Written straight into `out` where one is given (any floating dtype, converted on the way), each of them at its
        place `at` in there (default: from the first on). `meanwhile` is given what will be returned, in which the
        numbers may be still to come. NotCachedError when one of the prompts was not found. Where reading fails
        otherwise, what is in `out` may be anything.
        """
        if self.layout in (TOKENS, SPARSE):
            raise ValueError("take() reads pooled layouts; use rows() or take_padded() for every token")
        chosen = self._require(index)
        shape = (len(chosen), len(self.sites), self._dim())
        if out is not None and (out.shape[1:] != shape[1:] or (at is None and len(out) != len(chosen))):
            raise ValueError(f"out has shape {out.shape}, expected {shape}")

        @once
        def prepared() -> tuple[list[Piece], npt.NDArray[Any]]:
            """From where all comes and where it goes: looked for while what lies elsewhere is on its way."""
            target = memory.empty(shape, self.dtype) if out is None else out
            meanwhile(target)
            if index is None and at is None:
                return self._places.pieces, target
            return [
                Piece(segment, part.sites, part.prompt[chosen[members]], members if at is None else at[members])
                for part, segment, members in self._places.by_segment(chosen)
            ], target

        received = self._bring(self._wanted(chosen), lambda: deliveries(self.sites, *prepared()))
        pieces, target = prepared()
        if received:
            found = [(piece, received.get(piece.segment.checks)) for piece in pieces]
            # Some is where it is wanted since it came.
            pieces = [replace(piece, received=here) for piece, here in found if here is None or here.targets is None]
        if pieces:
            gather_pieces(pieces, self.sites, target)
        return target

    def rows(self, i: int) -> list[npt.NDArray[Any]]:
        """The rows of prompt `i`: one array ``[T, D]`` per site, a read-only view of the mapping where it can be."""
        if not self.found[i] or self._places.are_elsewhere:
            return self.all_rows([i])[0]
        found: list[npt.NDArray[Any]] = [np.empty(0)] * len(self.sites)
        for part in self._parts:
            number, prompt = int(part.segment[i]), int(part.prompt[i])
            start, stop = self._segments[number].row_offset[prompt : prompt + 2].tolist()
            for j in part.sites:
                if (number, j) not in self._read:
                    self._read[number, j] = self._segments[number].reader(self.sites[j])
                found[j] = self._read[number, j](start, stop)
        return found

    def all_rows(self, index: npt.ArrayLike | None = None) -> list[list[npt.NDArray[Any]]]:
        """`rows` of the prompts `index` (default all), in that order."""
        chosen = self._require(index)
        received = self._bring(self._wanted(chosen))
        found: list[list[npt.NDArray[Any]]] = [[np.empty(0)] * len(self.sites) for _ in range(len(chosen))]
        for part, segment, members in self._places.by_segment(chosen):
            prompts = part.prompt[chosen[members]]
            starts, stops = segment.row_offset[prompts], segment.row_offset[prompts + 1]
            readers = list(zip(part.sites, self._readers(part, segment, starts, stops, received), strict=True))
            for at, start, stop in zip(members.tolist(), starts.tolist(), stops.tolist(), strict=True):
                for j, read in readers:
                    found[at][j] = read(start, stop)
        return found

    def _readers(
        self, part: Part, segment: Segment, starts: Ints, stops: Ints, received: _Received
    ) -> Sequence[Callable[[int, int], npt.NDArray[Any]]]:
        """`Segment.readers` of what was brought."""
        here = received.get(segment.checks)
        if here is None:
            return segment.readers(self._names(part), starts, stops)
        return [here.rows(segment.parts(site)[0]).between for site in self._names(part)]

    def _wanted(self, chosen: Ints) -> Iterator[tuple[BlockChecks, list[str], Ints, Ints]]:
        """The rows of the prompts `chosen`, where they lie elsewhere; without what no segment has: whoever takes that
        says so."""
        if self._places.are_elsewhere:
            every = self._places.is_every(chosen)
            for part, segment, starts, stops in (
                self._places.elsewhere if every else self._places.ranges_elsewhere(chosen)
            ):
                yield segment.checks, self._names(part), starts, stops

    def _bring(
        self, wanted: Iterable[tuple[BlockChecks, list[str], Ints, Ints]], targets: Callable[[], Deliveries] = dict
    ) -> _Received:
        """Fetch what is not here of the rows `wanted`, where it was located without being checked.

        Of the segments that are given back all that is wanted was received, and may not be in their files yet.
        """
        if not self._places.are_elsewhere:
            return {}
        # Let go of now: by the next time it is in the files.
        received, self._received = self._received, {}
        left = [one for one in wanted if one[0] not in received]
        try:
            return {**received, **receive_together(left, targets)}
        except FileNotFoundError as error:
            raise NotCachedError(f"some of what was found has gone since: look for it again ({error})") from error

    def prompt(self, i: int) -> PromptTable:
        """What is stored for prompt `i`: its ids and text, a table of one."""
        self._require([i])
        part = self._parts[0]
        segment: Segment = self._segments[part.segment[i]]
        return segment.prompts.select(part.prompt[i : i + 1])

    def stored_as(self, i: int) -> list[str]:
        """The dtype in which prompt `i` is stored at each site: "float16", "int8", ..."""
        self._require([i])
        found = [""] * len(self.sites)
        for part in self._parts:
            codes = {site: code for site, code, _ in self._segments[part.segment[i]].info.columns}
            for j in part.sites:
                found[j] = name_of(codes[self.sites[j]])
        return found

    def of_site(self, site: str) -> Placement:
        """The same prompts at one of the sites."""
        return self.of_columns([self.sites.index(site)])

    def of_columns(self, columns: Sequence[int] | npt.NDArray[np.intp]) -> Placement:
        """The same prompts at some of the sites, by their numbers."""
        chosen = [(tuple(k for k, j in enumerate(columns) if j in part.sites), part) for part in self._parts]
        parts = [p if mine == p.sites else Part(mine, p.segment, p.prompt) for mine, p in chosen if mine]
        # Sites that lie together are found together, and there may be many of them.
        found = self.found if len(self._parts) == 1 else None
        return Placement(self._n, [self.sites[j] for j in columns], self.layout, parts, self._segments, found=found)

    def beside(self, site: str, received: _Received | None = None) -> Placement:
        """The same prompts at a site that lies beside the only one of this, in the same segments; `received` as ever.

        What is found out of where they are, by whichever of them, need not be found again.
        """
        other = Placement(
            self._n, [site], self.layout, self._parts, self._segments, received, found=self.found, places=self._places
        )
        other.all_found = self.all_found
        return other

    @property
    def segments(self) -> list[Segment]:
        """The segments in which prompts were found."""
        return self._segments

    def where(self, site: str) -> tuple[npt.NDArray[np.int32], Ints]:
        """For each prompt the segment that holds it at `site` (in `segments`; -1: absent), and which prompt of that
        segment it is. Sites that lie together have the very same arrays."""
        j = self.sites.index(site)
        part = next(part for part in self._parts if j in part.sites)
        return part.segment, part.prompt

    @property
    def held(self) -> list[tuple[Segment, Ints]]:
        """Every segment in which something was found, with the prompts of it that were."""
        return self._places.held

    def fingerprint(self) -> bytes:
        """Digest of where everything is. Segments never change, so that what has the same is the same."""
        digest = hashlib.sha256(repr([self.layout, self.sites, [s.path.name for s in self._segments]]).encode())
        for part in self._parts:
            digest.update(repr(part.sites).encode())
            for where in (part.segment, part.prompt):
                digest.update(np.ascontiguousarray(where).data)
        return digest.digest()

    def take_padded(
        self, out: npt.NDArray[Any] | None = None, *, index: npt.ArrayLike | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """All rows, right-padded with zeros: ``[n, S, sites * D]`` and the mask bool ``[n, S]``; S the longest."""
        chosen = self._require(index)
        received = self._bring(self._wanted(chosen))
        dim, width = self._dim(), len(self.sites)
        counts = self.row_counts()[chosen]
        longest = int(counts.max(initial=0))
        shape = (len(chosen), longest, width * dim)
        if out is None:
            out = memory.empty(shape, self.dtype)
        elif out.shape != shape:
            raise ValueError(f"out has shape {out.shape}, expected {shape}")
        split = out.reshape(len(chosen), longest, width, dim)
        if split.size and not np.shares_memory(split, out):
            raise ValueError("out must be contiguous")
        for part, segment, members in self._places.by_segment(chosen):
            self._fill(split, part, segment, part.prompt[chosen[members]], members, counts, received)
        real = np.arange(longest) < counts[:, None]
        for at, length in enumerate(counts.tolist()):
            split[at, length:] = 0
        return out, real

    def _fill(
        self,
        out: npt.NDArray[Any],
        part: Part,
        segment: Segment,
        prompts: Ints,
        members: Ints,
        counts: Ints,
        received: _Received,
    ) -> None:
        """``out[members[k], :, j] = rows of prompts[k]`` for the sites `j` of `part`, `counts` in number."""
        starts, stops = segment.row_offset[prompts], segment.row_offset[prompts + 1]
        wrong = np.flatnonzero(stops - starts != counts[members])
        if len(wrong):
            k = wrong[0]
            raise ValueError(
                f"prompt {members[k]}: {self.sites[part.sites[0]]!r} has {stops[k] - starts[k]} rows and "
                f"{self.sites[0]!r} has {counts[members[k]]}: ask for them one by one"
            )
        readers = self._readers(part, segment, starts, stops, received)
        for at, start, stop in zip(members.tolist(), starts.tolist(), stops.tolist(), strict=True):
            for j, read in zip(part.sites, readers, strict=True):
                move(out[at, : stop - start, j], read(start, stop))

    def row_counts(self) -> Ints:
        """How many rows each prompt has at the first site, int64 ``[n]``; 0 where it was not found."""
        lengths = np.zeros(len(self), np.int64)
        for part in self._parts:
            if 0 in part.sites:
                for number, members in by_segment(part.segment, np.flatnonzero(self.found)):
                    offset, prompt = self._segments[number].row_offset, part.prompt[members]
                    lengths[members] = offset[prompt + 1] - offset[prompt]
        return lengths

    def prompts(self, index: npt.ArrayLike | None = None) -> PromptTable:
        """What is stored for the prompts `index` (ascending; default all), in their order: ids and texts."""
        chosen = self._require(index)
        if not len(chosen):
            return PromptTable.build([])
        part = self._parts[0]
        order, tables = [], []
        for number, members in by_segment(part.segment, chosen):
            order.append(members)
            tables.append(self._segments[number].prompts.select(part.prompt[members]))
        return PromptTable.concatenate(tables, mixed=True).select(np.argsort(np.concatenate(order), kind="stable"))

    def _require(self, index: npt.ArrayLike | None) -> Ints:
        if index is None:
            chosen = self.every
            if self.all_found:
                return chosen
        else:
            chosen = np.asarray(index)
            if chosen.dtype == bool or not chosen.size or chosen.min() < 0:
                chosen = np.arange(len(self), dtype=np.int64)[chosen]
            chosen = chosen.astype(np.int64, copy=False)
        missing = chosen[~(self.found if index is None else self.found[chosen])]
        if len(missing):
            raise NotCachedError(
                f"{len(missing)} of {len(chosen)} prompts are not in the store (the first is prompt {missing[0]}): "
                "extract them first, or ask only for those marked in `found`"
            )
        return chosen

    @lazy
    def widths(self) -> frozenset[int]:
        """The widths of the sites that were found."""
        every = frozenset(dim for _, segment in self._places.used for dim in segment.widths)
        if len(every) > 1:
            every = frozenset(segment.column(s)[1] for part, segment in self._places.used for s in self._names(part))
        return every

    def _dim(self) -> int:
        dims = self.widths
        if len(dims) > 1:
            raise ValueError(
                f"sites of different widths {sorted(dims)} cannot share one array: ask for them one by one"
            )
        return next(iter(dims), 0)

    def _names(self, part: Part) -> list[str]:
        return [self.sites[j] for j in part.sites]


_ABSENT, _FIRST = np.array([-1], np.int32), np.array([0], np.int32)
