"""Which prompts of a request are stored, found by text first and by token ids second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.extract.answer import Lookup, Question, Strip, Waiting
from actcache.extract.prompts import PromptList, prompt_table, tokenize
from actcache.store.prompts import CHAT, IDS
from actcache.store.pulled import registered
from actcache.store.records import DERIVED, TOKENS, is_result

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.model.source import ModelSource
    from actcache.store.pulled import Pulled
    from actcache.store.store import Placement


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
    own = []
    for layout in layouts:
        placement = store.locate(question.space, table=table, sites=names, layout=layout, check=question.check)
        full_rows = layout == TOKENS and question.layout != TOKENS
        answer.add(placement, left, full_rows=full_rows)
        own.append((placement, full_rows))
    if not answer.found[left].all():
        for part in _parts(answer, left, own):
            _look_elsewhere(answer, prompts, part, layouts)
    answer.note_missing(own[0][0], left)
    return answer


@dataclass(frozen=True)
class _Part:
    """Prompts of a request that have the same sites here, and lack the same ones.

    `local`: which of the prompts that were looked for by their ids they are; `at`: which of the request. `own`: the
    sites that are here. `absent`: those that are not.
    """

    local: npt.NDArray[np.intp]
    at: npt.NDArray[np.intp]
    own: Sequence[tuple[Placement, npt.NDArray[np.intp], bool]]
    absent: npt.NDArray[np.intp]

    def select(self, members: npt.NDArray[Any]) -> _Part:
        return replace(self, local=self.local[members], at=self.at[members])

    def strips(self) -> list[Strip]:
        return [Strip(placement, self.local, columns, full) for placement, columns, full in self.own]


def _parts(answer: Lookup, left: npt.NDArray[np.intp], own: Sequence[tuple[Placement, bool]]) -> Iterator[_Part]:
    """The prompts that are not here whole, by what of them is: that is read here, whoever else has it, too."""
    names = answer.question.names
    local = np.flatnonzero(~answer.found[left])
    holder = np.full((len(local), len(names)), -1)
    # Results that belong together, such as logits and their tokens, are of one run.
    if not any(map(is_result, names)):
        for number, (placement, _) in reversed(list(enumerate(own))):
            holder[placement.found_each[local]] = number
    kinds, which = np.unique(holder, axis=0, return_inverse=True)
    for number, kind in enumerate(kinds):
        mine = []
        for place, (placement, full_rows) in enumerate(own):
            columns = np.flatnonzero(kind == place)
            if len(columns):
                mine.append((placement.of_columns(columns), columns, full_rows))
        members = local[which.ravel() == number]
        yield _Part(members, left[members], mine, np.flatnonzero(kind < 0))


def _look_elsewhere(answer: Lookup, prompts: PromptList, part: _Part, layouts: Sequence[str]) -> None:
    """Take what is absent of the prompts of `part` from what others have computed, where one of them has all of it."""
    question = answer.question
    if not len(part.absent):
        answer.add_piece(part.at, part.strips())
        return
    for space, contexts in question.trusted:
        for layout in layouts:
            _look_among_imports(answer, prompts, part, space, contexts, layout)
    if not answer.found[part.at].all():
        for pulled in question.pulled():
            _look_among_pulled(answer, prompts, part, pulled, layouts)


def _left(answer: Lookup, part: _Part) -> _Part:
    return part.select(~answer.found[part.at])


def _add(
    answer: Lookup, part: _Part, placement: Placement, *, full_rows: bool, accept: Callable[[int], bool] | None = None
) -> None:
    """Note the prompts of `part` of which `placement`, whose prompts they are, has all that is absent."""
    local = np.flatnonzero(placement.found & ~answer.found[part.at])
    if accept is not None:
        local = local[[accept(k) for k in local.tolist()]] if len(local) else local
    some = part.select(local)
    answer.add_piece(some.at, [*some.strips(), Strip(placement, local, part.absent, full_rows)])


def _look_among_imports(
    answer: Lookup, prompts: PromptList, part: _Part, space: str, contexts: Sequence[str], layout: str
) -> None:
    """Take what was imported under the model's name for prompts that are still missing.

    An import may know the text of a prompt and not its token ids: then the text must do, and the number of rows.
    """
    question = answer.question
    store, names = question.store, [question.names[j] for j in part.absent]
    full_rows = layout == TOKENS and question.layout != TOKENS
    some = _left(answer, part)
    if not len(some.at):
        return
    table = prompt_table(prompts, some.at.tolist(), "")
    placement = store.locate(space, table=table, sites=names, layout=layout, check=question.check)
    _add(answer, some, placement, full_rows=full_rows)
    for context in contexts:
        some = _left(answer, part)
        some = some.select(prompts.kinds[some.at] != IDS)
        if not len(some.at):
            return
        placement = store.locate(
            space,
            texts=[prompts.texts[i] or "" for i in some.at],
            kinds=prompts.kinds[some.at],
            text_context=context,
            sites=names,
            layout=layout,
            check=question.check,
        )

        def fits(k: int, placement: Placement = placement, at: npt.NDArray[np.intp] = some.at) -> bool:
            ids, stored = prompts.ids[at[k]], placement.prompt(k).tokens(0)
            # Other ids than ours are of another tokenizer; negative ones stand for ids that nobody knew.
            return ids is not None and bool((stored < 0).all()) and (layout != TOKENS or len(stored) == len(ids))

        _add(answer, some, placement, full_rows=full_rows, accept=fits)


def _look_among_pulled(
    answer: Lookup, prompts: PromptList, part: _Part, pulled: Pulled, layouts: Sequence[str]
) -> None:
    """Take what was pulled for prompts that are still missing: what is here of it, and what can be fetched."""
    question = answer.question
    names = [question.names[j] for j in part.absent]
    offered = [layout for layout in layouts if pulled.offers(names, layout)]
    some = _left(answer, part)
    if not len(some.at) or not offered:
        return
    table = prompt_table(prompts, some.at.tolist(), "")
    for known, theirs in registered(question.store, pulled, names, table, np.arange(len(some.at))):
        these = some.select(theirs)
        for layout in layouts:
            placement = question.store.locate(
                pulled.info.space, table=known, sites=names, layout=layout, check=question.check
            )
            _add(answer, these, placement, full_rows=layout == TOKENS and question.layout != TOKENS)
        rest = ~answer.found[these.at]
        full_rows = offered[0] == TOKENS and question.layout != TOKENS
        late = these.select(rest)
        waiting = Waiting(pulled.info, known.select(rest), offered[0], part.absent, full_rows)
        answer.add_piece(late.at, [*late.strips(), waiting])
