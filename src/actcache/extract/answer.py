"""What is asked of a store, and what was found: where each prompt's sites are, and reading them from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.capture.positions import pool_numpy
from actcache.errors import NotCachedError
from actcache.store.dtypes import common_dtype
from actcache.store.pulled import fetched

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.store.prompts import PromptTable
    from actcache.store.pulled import Pulled
    from actcache.store.store import Placement, SpaceInfo, Store


@dataclass(frozen=True)
class Question:
    """What is asked of a store.

    Attributes:
        names: complete site names; one result column each, in this order.
        layout: `TOKENS` for every token, else the pooling's name.
        check: verify the checksums of all that would be read (damage then counts as missing).
        trusted: spaces known by name only whose values are taken where the model's own are missing, each with its
            text contexts.
        pulled: gives the datasets that may answer where both have nothing.
        added: is told when something was fetched of these, and stored.
        trusts: the names under which what is known by name only may be among `trusted`.
    """

    store: Store
    space: str
    names: Sequence[str]
    layout: str
    check: bool = True
    trusted: Sequence[tuple[str, Sequence[str]]] = ()
    pulled: Callable[[], Sequence[Pulled]] = tuple
    added: Callable[[], object] = int
    trusts: Sequence[str] = ()


@dataclass(frozen=True)
class Strip:
    """What some prompts have at some of the sites asked for, all in one place of the store.

    Attributes:
        placement: of these sites alone; its prompts `local` are those of the piece.
        columns: which of the sites asked for they are.
        full_rows: whether every token is there, where one row is asked for.
    """

    placement: Placement
    local: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]
    full_rows: bool = False


@dataclass(frozen=True)
class Waiting:
    """The same of rows that are to be fetched from a dataset, where the prompts are registered as `table`."""

    info: SpaceInfo
    table: PromptTable
    layout: str
    columns: npt.NDArray[np.intp]
    full_rows: bool = False


@dataclass
class _Piece:
    """Some prompts of a request, and the strips that together have all sites of theirs."""

    at: npt.NDArray[np.intp]
    strips: list[Strip | Waiting]

    @property
    def here(self) -> list[Strip]:
        return [strip for strip in self.strips if isinstance(strip, Strip)]


@dataclass
class Lookup:
    """The answer: what is there, and how to read it.

    Attributes:
        found: bool `[n]`, whether every asked site of a prompt is stored.
        missing: for each prompt that is not, the names still to be computed.
    """

    question: Question
    found: npt.NDArray[np.bool_]
    missing: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _pieces: list[_Piece] = field(default_factory=list)

    def add(
        self,
        placement: Placement,
        at: npt.NDArray[np.intp],
        *,
        full_rows: bool,
        accept: Callable[[int], bool] | None = None,
    ) -> None:
        """Note the prompts of `placement` (its prompt `k` is prompt `at[k]` here) that are stored whole, of these only
        those that `accept` takes."""
        local = np.flatnonzero(placement.found & ~self.found[at])
        if accept is not None:
            local = local[[accept(k) for k in local.tolist()]] if len(local) else local
        self.add_piece(at[local], [Strip(placement, local, np.arange(len(self.question.names)), full_rows)])

    def add_piece(self, at: npt.NDArray[np.intp], strips: Sequence[Strip | Waiting]) -> None:
        """Note that the prompts `at` have all sites, in `strips`; where they differ, the first is the best known."""
        if len(at):
            self._pieces.append(_Piece(at, list(strips)))
            self.found[at] = True

    def of_site(self, name: str) -> Lookup:
        """The same answer, for one of the sites: out of the same places."""
        self._bring()
        column = list(self.question.names).index(name)
        answer = Lookup(replace(self.question, names=[name]), self.found)
        for piece in self._pieces:
            (strip,) = (strip for strip in piece.here if column in strip.columns)
            placement = strip.placement.of_columns(np.flatnonzero(strip.columns == column))
            answer._pieces.append(_Piece(piece.at, [replace(strip, placement=placement, columns=np.arange(1))]))
        return answer

    def _bring(self) -> None:
        """Fetch what is in datasets and not here yet."""
        for piece in self._pieces:
            for k, one in enumerate(piece.strips):
                if isinstance(one, Waiting):
                    names = [self.question.names[j] for j in one.columns]
                    placement = fetched(self.question.store, one.info, one.table, names, one.layout)
                    self.question.added()
                    piece.strips[k] = Strip(placement, np.arange(len(one.table)), one.columns, one.full_rows)

    def note_missing(self, placement: Placement, at: npt.NDArray[np.intp]) -> None:
        """For prompts of `placement` still not found: the names that are not there."""
        left = np.flatnonzero(~self.found[at])
        absent, which = np.unique(~placement.found_each[left], axis=0, return_inverse=True)
        names = np.asarray(self.question.names, object)
        kinds = [tuple(names[row]) for row in absent]
        self.missing.update(zip(at[left].tolist(), (kinds[k] for k in which.ravel()), strict=True))

    @property
    def pooled_here(self) -> npt.NDArray[np.intp]:
        """The prompts some of whose pooled vectors are not stored, and follow from their full sequences, which are."""
        pieces = [piece.at for piece in self._pieces if any(one.full_rows for one in piece.strips)]
        return np.concatenate([np.empty(0, np.intp), *pieces])

    @property
    def one_width(self) -> bool:
        """Whether all that was found has one width."""
        self._bring()
        return len({width for piece in self._pieces for one in piece.here for width in one.placement.widths}) <= 1

    def name_at(self, width: int, index: Sequence[int]) -> str:
        """What to call the value at `index` of the answer, in which all sites side by side have `width` columns."""
        names = self.question.names
        site = f", {names[index[-1] * len(names) // width]}" if self.one_width else ""
        return f"prompt {index[0]}{site}"

    def pooled(self) -> npt.NDArray[Any]:
        """One row per prompt and site, `[n, sites, D]`, in a new array. All sites must have the same width."""
        self.require_all()
        n = len(self.found)
        whole = self._alone()
        if whole is not None and not whole.full_rows:
            return whole.placement.take()
        parts = [
            (piece.at, one.columns, self._pooled_rows(one) if one.full_rows else one.placement.take(index=one.local))
            for piece in self._pieces
            for one in piece.here
        ]
        shape = n, len(self.question.names), parts[0][2].shape[-1]
        result: npt.NDArray[Any] = np.empty(shape, common_dtype(values.dtype for _, _, values in parts))
        for at, columns, values in parts:
            if len(columns) == shape[1]:
                result[at] = values
            else:
                result[np.ix_(at, columns)] = values
        return result

    def _alone(self) -> Strip | None:
        """The one place that holds all prompts whole, in their order; None where there are several."""
        one = self._pieces[0].here[0] if self._pieces else None
        return (
            one if one is not None and len(self._pieces[0].strips) == 1 and len(one.local) == len(self.found) else None
        )

    def _pooled_rows(self, strip: Strip) -> npt.NDArray[Any]:
        pooling = self.question.layout
        each = strip.placement.all_rows(strip.local)
        return np.stack([[pool_numpy(rows, pooling) for rows in found] for found in each])

    def rows(self) -> list[list[npt.NDArray[Any]]]:
        """For each prompt one read-only array `[T, D]` per site."""
        self.require_all()
        result: list[list[npt.NDArray[Any]]] = [[] for _ in range(len(self.found))]
        for piece in self._pieces:
            for one in piece.here:
                for i, rows in zip(piece.at.tolist(), one.placement.all_rows(one.local), strict=True):
                    self._put(result, i, one, rows)
        return result

    def _put(self, result: list[list[Any]], i: int, strip: Strip, rows: list[npt.NDArray[Any]]) -> None:
        count = len(self.question.names)
        if len(strip.columns) == count:
            result[i] = rows
            return
        result[i] = result[i] or [None] * count
        for j, values in zip(strip.columns.tolist(), rows, strict=True):
            result[i][j] = values

    def with_prompts(self, members: Sequence[int]) -> tuple[list[list[npt.NDArray[Any]]], list[npt.NDArray[np.int32]]]:
        """For each of `members`, which were found, one array per site, and the token ids that it is stored with."""
        self._bring()
        where = {int(i): (piece, k) for piece in self._pieces for k, i in enumerate(piece.at)}
        rows: list[list[npt.NDArray[Any]]] = [[] for _ in members]
        ids = []
        for number, i in enumerate(members):
            piece, k = where[i]
            for one in piece.here:
                self._put(rows, number, one, one.placement.rows(int(one.local[k])))
            best = piece.here[0]
            ids.append(best.placement.prompt(int(best.local[k])).tokens(0))
        return rows, ids

    def token_ids(self, known: Sequence[npt.NDArray[np.int32] | None]) -> list[npt.NDArray[np.int32] | None]:
        """The token ids that are `known`, and of the others, where they were found, those they are stored with."""
        ids = list(known)
        for piece in self._pieces:
            unknown = np.array([ids[i] is None for i in piece.at], bool)
            if unknown.any():
                # Only what was found by its text, whole and here, was not tokenised.
                best = piece.here[0]
                table = best.placement.prompts(best.local[unknown])
                for k, i in enumerate(piece.at[unknown].tolist()):
                    ids[i] = table.tokens(k)
        return ids

    def padded(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """`([n, S, sites * D], mask [n, S])`, right-padded with zeros."""
        self.require_all()
        n = len(self.found)
        whole = self._alone()
        if whole is not None and self.one_width:
            return whole.placement.take_padded()
        rows = self.rows()
        longest = max(len(r[0]) for r in rows)
        width = sum(r.shape[1] for r in rows[0])
        values = np.zeros((n, longest, width), common_dtype(r.dtype for parts in rows for r in parts))
        mask = np.zeros((n, longest), bool)
        for i, parts in enumerate(rows):
            mask[i, : len(parts[0])] = True
            start = 0
            for part in parts:
                values[i, : len(part), start : start + part.shape[1]] = part
                start += part.shape[1]
        return values, mask

    def require_all(self) -> None:
        """Raise `NotCachedError` unless every prompt was found; what was in datasets is here afterwards."""
        self._bring()
        if not self.found.all():
            absent = np.flatnonzero(~self.found)
            raise NotCachedError(
                f"{len(absent)} of {len(self.found)} prompts are not stored, the first is prompt {absent[0]}."
            )
