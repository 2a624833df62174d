"""Perplexity and logits in the store: which prompts have them, and putting those of a batch there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actcache.derive.results import LOGITS, PERPLEXITY, TOKEN_NLL, Asked, LogitsAsked, result_records
from actcache.extract.answer import Lookup, Question
from actcache.extract.lookup import look_up
from actcache.extract.prompts import PromptList
from actcache.store.files import log
from actcache.store.records import DERIVED, TOKENS

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from actcache.model.source import ModelSource
    from actcache.store.prompts import PromptTable
    from actcache.store.records import Records
    from actcache.store.store import Store
    from actcache.store.writer import SegmentWriter, Ticket

# They are small, and a file of their own for each batch would cost more than it holds.
_LINGER_SECONDS = 1.0
_QUEUE_BYTES = 32 << 20


@dataclass
class ResultsFound:
    """Which prompts have the results that were asked for.

    Attributes:
        asked: what is looked for; without perplexity where the model has none.
        perplexity, logits: bool ``[n]``; True where they are not needed.
    """

    asked: Asked
    perplexity: npt.NDArray[np.bool_]
    logits: npt.NDArray[np.bool_]

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        return self.perplexity & self.logits

    def missing(self, i: int) -> Asked:
        """What is to be computed for prompt `i`."""
        perplexity = self.asked.perplexity and not self.perplexity[i]
        return Asked(perplexity, None if self.logits[i] else self.asked.logits)


def find_results(
    question: Question,
    asked: Asked,
    prompts: PromptList,
    of: npt.NDArray[np.intp],
    source: ModelSource,
    context: str,
    *,
    add_special_tokens: bool,
) -> ResultsFound:
    """Which of the prompts `of` have what is `asked`; the others need nothing. `question` says where to look.

    Prompts that lack some of it are tokenised.
    """
    found = ResultsFound(asked, np.ones(len(prompts), bool), np.ones(len(prompts), bool))
    if not asked or not len(of):
        return found
    whole = len(of) == len(prompts)
    some = prompts if whole else prompts.select(of.tolist())

    def stored(names: tuple[str, ...], layout: str) -> Lookup:
        # What is imported has no results that these would be.
        asked_of = replace(question, names=names, layout=layout, trusted=())
        return look_up(asked_of, some, source, context, add_special_tokens=add_special_tokens)

    if asked.logits is not None:
        has = np.zeros(len(of), bool)
        for names in answering(asked.logits):
            # What is not found is looked for by its ids, for which the tokenizer is loaded.
            if not has.all():
                has |= stored(names, asked.logits.layout).found
        found.logits[of] = has
    if asked.perplexity:
        has = stored((PERPLEXITY,), DERIVED).found & stored((TOKEN_NLL,), TOKENS).found
        if not has.all() and not source.predicts_next():
            log.info("%s does not predict next tokens, its prompts have no perplexity", source.name)
            found.asked = replace(asked, perplexity=False)
        else:
            found.perplexity[of] = has
    return found


def answering(logits: LogitsAsked) -> list[tuple[str, ...]]:
    """The columns that answer a question for logits: those that hold just that, and all logits."""
    return [logits.names] if logits.top_k is None else [logits.names, (LOGITS,)]


class ResultWriter:
    """Takes the results of batches and makes them durable in the background; a context manager.

    Each layout has a writer of its own: what is put between others could not go into one file.
    """

    def __init__(self, store: Store, space: str) -> None:
        self._store = store
        self._space = space
        self._stack = ExitStack()
        self._writers: dict[str, SegmentWriter] = {}

    def __enter__(self) -> ResultWriter:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def put(
        self, prompts: PromptTable, asked: Asked, rows: Mapping[str, torch.Tensor], *, after: Ticket | None = None
    ) -> int:
        """Queue what is `asked` of `prompts`; its bytes. `rows`: CPU tensors, by the names of their columns.

        `after`: the ticket of the vectors that come of the same pass. A kill must not leave results without them.
        """
        nbytes = 0
        columns = {name: tensor.numpy() for name, tensor in rows.items()}
        for records in result_records(prompts, asked, columns):
            self.put_records(records, after=after)
            nbytes += records.stored_bytes
        return nbytes

    def put_records(self, records: Records, *, after: Ticket | None = None) -> None:
        """Queue `records` of any layout that has results."""
        if records.layout not in self._writers:
            writer = self._store.writer(self._space, max_bytes=_QUEUE_BYTES, linger=_LINGER_SECONDS)
            self._writers[records.layout] = self._stack.enter_context(writer)
        self._writers[records.layout].put(records, after=after)
