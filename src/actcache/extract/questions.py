"""Whose activations may answer for a model: its own, and of what others have computed what is trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from actcache.extract.answer import Question

if TYPE_CHECKING:
    from actcache.extract.extractor import ActivationExtractor
    from actcache.store.store import Store


def question_of(
    extractor: ActivationExtractor,
    store: Store,
    space: str,
    names: Sequence[str],
    layout: str,
    *,
    check: bool,
    trust_names: bool,
    own: bool,
    added: Callable[[], object],
) -> Question:
    """What is asked of `store` for the model of `extractor`, whose space is `space`.

    `own`: nothing that others have computed counts. Datasets that claim the name alone are of a model as it is, neither
    edited nor continuing its prompts.
    """
    source = extractor.source
    as_it_is = not (extractor.edits or source.generate)
    by_name = "none" if not as_it_is else "all" if trust_names else "trusted"
    pulled = partial(store.pulled_for, space, source.name, names=by_name)
    trust = trust_names and not own and not extractor.edits
    return Question(store, space, names, layout, check, (), tuple if own else pulled, added, trust)


def with_imports(question: Question, extractor: ActivationExtractor) -> Question:
    """`question`, which imports answer, too, where their names are trusted; they are of a model without edits."""
    return replace(question, trusted=question.store.imports_of(extractor.source.name)) if question.trusts else question
