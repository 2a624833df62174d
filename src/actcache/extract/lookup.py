"""Which prompts of a request are stored, found by text first and by token ids second, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.capture.positions import pool_numpy
from actcache.errors import NotCachedError
from actcache.extract.prompts import PromptList, prompt_table, tokenize
from actcache.store.dtypes import common_dtype
from actcache.store.prompts import CHAT, IDS
from actcache.store.pulled import fetched, registered
from actcache.store.records import DERIVED, TOKENS

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.model.source import ModelSource
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
        trusts: whether what is known by name only may be among `trusted`.
    """

    store: Store
    space: str
    names: Sequence[str]
    layout: str
    check: bool = True
    trusted: Sequence[tuple[str, Sequence[str]]] = ()
    pulled: Callable[[], Sequence[Pulled]] = tuple
    added: Callable[[], object] = int
    trusts: bool = False


@dataclass(frozen=True)
class _Piece:
    """Some prompts of a request and where they are stored."""

    placement: Placement
    local: npt.NDArray[np.intp]
    at: npt.NDArray[np.intp]
    full_rows: bool


@dataclass(frozen=True)
class _Waiting:
    """Some prompts of a request whose rows are to be fetched from a dataset."""

    info: SpaceInfo
    table: PromptTable
    layout: str
    at: npt.NDArray[np.intp]
    full_rows: bool


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
    _waiting: list[_Waiting] = field(default_factory=list)

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
        if len(local):
            self._pieces.append(_Piece(placement, local, at[local], full_rows))
            self.found[at[local]] = True

    def add_waiting(
        self, info: SpaceInfo, table: PromptTable, at: npt.NDArray[np.intp], layout: str, *, full_rows: bool
    ) -> None:
        """Note prompts (`table` in the dataset `info`, `at` here) whose rows are fetched when they are read."""
        if len(at):
            self._waiting.append(_Waiting(info, table, layout, at, full_rows))
            self.found[at] = True

    def _bring(self) -> None:
        """Fetch what is in datasets and not here yet."""
        while self._waiting:
            one = self._waiting[0]
            placement = fetched(self.question.store, one.info, one.table, self.question.names, one.layout)
            self.question.added()
            self._pieces.append(_Piece(placement, np.arange(len(one.table)), one.at, one.full_rows))
            del self._waiting[0]

    def note_missing(self, placement: Placement, at: npt.NDArray[np.intp]) -> None:
        """For prompts of `placement` still not found: the names that are not there."""
        left = np.flatnonzero(~self.found[at])
        absent, which = np.unique(~placement.found_each[left], axis=0, return_inverse=True)
        names = np.asarray(self.question.names, object)
        kinds = [tuple(names[row]) for row in absent]
        self.missing.update(zip(at[left].tolist(), (kinds[k] for k in which.ravel()), strict=True))

    @property
    def one_width(self) -> bool:
        """Whether all that was found has one width."""
        self._bring()
        return len({width for piece in self._pieces for width in piece.placement.widths}) <= 1

    def name_at(self, width: int, index: Sequence[int]) -> str:
        """What to call the value at `index` of the answer, in which all sites side by side have `width` columns."""
        names = self.question.names
        site = f", {names[index[-1] * len(names) // width]}" if self.one_width else ""
        return f"prompt {index[0]}{site}"

    def pooled(self) -> npt.NDArray[Any]:
        """One row per prompt and site, `[n, sites, D]`, in a new array. All sites must have the same width."""
        self.require_all()
        n = len(self.found)
        first = self._pieces[0]
        if len(self._pieces) == 1 and len(first.local) == n and not first.full_rows:
            return first.placement.take()
        parts = [
            self._pooled_rows(piece) if piece.full_rows else piece.placement.take(index=piece.local)
            for piece in self._pieces
        ]
        result: npt.NDArray[Any] = np.empty((n, *parts[0].shape[1:]), common_dtype(part.dtype for part in parts))
        for piece, values in zip(self._pieces, parts, strict=True):
            result[piece.at] = values
        return result

    def _pooled_rows(self, piece: _Piece) -> npt.NDArray[Any]:
        pooling = self.question.layout
        each = piece.placement.all_rows(piece.local)
        return np.stack([[pool_numpy(rows, pooling) for rows in found] for found in each])

    def rows(self) -> list[list[npt.NDArray[Any]]]:
        """For each prompt one read-only array `[T, D]` per site."""
        self.require_all()
        result: list[list[npt.NDArray[Any]]] = [[] for _ in range(len(self.found))]
        for piece in self._pieces:
            for i, rows in zip(piece.at.tolist(), piece.placement.all_rows(piece.local), strict=True):
                result[i] = rows
        return result

    def with_prompts(self, members: Sequence[int]) -> tuple[list[list[npt.NDArray[Any]]], list[npt.NDArray[np.int32]]]:
        """For each of `members`, which were found, one array per site, and the token ids that it is stored with."""
        self._bring()
        where = {
            int(i): (piece.placement, int(k))
            for piece in self._pieces
            for k, i in zip(piece.local, piece.at, strict=True)
        }
        placed = [where[i] for i in members]
        return [placement.rows(k) for placement, k in placed], [p.prompt(k).tokens(0) for p, k in placed]

    def token_ids(self, known: Sequence[npt.NDArray[np.int32] | None]) -> list[npt.NDArray[np.int32] | None]:
        """The token ids that are `known`, and of the others, where they were found, those they are stored with."""
        ids = list(known)
        for piece in self._pieces:
            unknown = np.array([ids[i] is None for i in piece.at], bool)
            table = piece.placement.prompts(piece.local[unknown])
            for k, i in enumerate(piece.at[unknown].tolist()):
                ids[i] = table.tokens(k)
        return ids

    def padded(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """`([n, S, sites * D], mask [n, S])`, right-padded with zeros."""
        self.require_all()
        n = len(self.found)
        if len(self._pieces) == 1 and len(self._pieces[0].local) == n and self.one_width:
            return self._pieces[0].placement.take_padded()
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


def look_up(
    question: Question, prompts: PromptList, source: ModelSource, context: str, *, add_special_tokens: bool
) -> Lookup:
    """Find `prompts`. A prompt known by its text is not tokenised; the others are, and are found by their ids.

    A chat is not known by its text where the template reads the clock. A pooled question is also answered by stored
    full sequences.
    """
    n = len(prompts)
    answer = Lookup(question, np.zeros(n, bool))
    everything = np.arange(n)
    alone = question.layout in (TOKENS, DERIVED) or ":" in question.layout
    layouts = [question.layout] if alone else [question.layout, TOKENS]
    store, names = question.store, list(question.names)
    known_by_text = prompts.kinds != IDS
    if (prompts.kinds == CHAT).any() and source.tokenizer_source().reads_the_clock():
        known_by_text &= prompts.kinds != CHAT
    by_text = np.flatnonzero(known_by_text)
    if len(by_text):
        texts = [prompts.texts[i] or "" for i in by_text] if len(by_text) < n else [t or "" for t in prompts.texts]
        kinds = prompts.kinds[by_text]
        for layout in layouts:
            placement = store.locate(
                question.space,
                texts=texts,
                kinds=kinds,
                text_context=context,
                sites=names,
                layout=layout,
                check=question.check,
            )
            answer.add(placement, by_text, full_rows=layout == TOKENS and question.layout != TOKENS)
            if answer.found.all():
                return answer
    left = everything[~answer.found]
    tokenize(prompts, left.tolist(), source, add_special_tokens=add_special_tokens)
    table = prompt_table(prompts, left.tolist(), context)
    for layout in layouts:
        placement = store.locate(question.space, table=table, sites=names, layout=layout, check=question.check)
        answer.add(placement, left, full_rows=layout == TOKENS and question.layout != TOKENS)
        if layout == question.layout:
            asked = placement
    for space, contexts in question.trusted:
        for layout in layouts:
            _look_among_imports(answer, prompts, left, space, contexts, layout)
    if not answer.found[left].all():
        for pulled in question.pulled():
            _look_among_pulled(answer, prompts, left, pulled, layouts)
    answer.note_missing(asked, left)
    return answer


def _look_among_imports(
    answer: Lookup, prompts: PromptList, left: npt.NDArray[np.intp], space: str, contexts: Sequence[str], layout: str
) -> None:
    """Take what was imported under the model's name for prompts that are still missing.

    An import may know the text of a prompt and not its token ids: then the text must do, and the number of rows.
    """
    question = answer.question
    store, names, full_rows = question.store, question.names, layout == TOKENS and question.layout != TOKENS
    at = left[~answer.found[left]]
    if not len(at):
        return
    table = prompt_table(prompts, at.tolist(), "")
    placement = store.locate(space, table=table, sites=names, layout=layout, check=question.check)
    answer.add(placement, at, full_rows=full_rows)
    for context in contexts:
        at = left[~answer.found[left] & (prompts.kinds[left] != IDS)]
        if not len(at):
            return
        placement = store.locate(
            space,
            texts=[prompts.texts[i] or "" for i in at],
            kinds=prompts.kinds[at],
            text_context=context,
            sites=names,
            layout=layout,
            check=question.check,
        )

        def fits(k: int, placement: Placement = placement, at: npt.NDArray[np.intp] = at) -> bool:
            ids, stored = prompts.ids[at[k]], placement.prompt(k).tokens(0)
            # Other ids than ours are of another tokenizer; negative ones stand for ids that nobody knew.
            return ids is not None and bool((stored < 0).all()) and (layout != TOKENS or len(stored) == len(ids))

        answer.add(placement, at, full_rows=full_rows, accept=fits)


def _look_among_pulled(
    answer: Lookup, prompts: PromptList, left: npt.NDArray[np.intp], pulled: Pulled, layouts: Sequence[str]
) -> None:
    """Take what was pulled for prompts that are still missing: what is here of it, and what can be fetched."""
    question = answer.question
    names = question.names
    offered = [layout for layout in layouts if pulled.offers(names, layout)]
    at = left[~answer.found[left]]
    if not len(at) or not offered:
        return
    table = prompt_table(prompts, at.tolist(), "")
    for known, theirs in registered(question.store, pulled, names, table, at):
        for layout in layouts:
            placement = question.store.locate(
                pulled.info.space, table=known, sites=names, layout=layout, check=question.check
            )
            answer.add(placement, theirs, full_rows=layout == TOKENS and question.layout != TOKENS)
        rest = ~answer.found[theirs]
        full_rows = offered[0] == TOKENS and question.layout != TOKENS
        answer.add_waiting(pulled.info, known.select(rest), theirs[rest], offered[0], full_rows=full_rows)
