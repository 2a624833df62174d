"""Whose activations may answer for a model: its own, and of what others have computed what is trusted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from actcache.errors import OptionError, did_you_mean
from actcache.extract.answer import Question
from actcache.store.spaces import SpaceInfo, list_spaces
from actcache.wording import count

if TYPE_CHECKING:
    from actcache.extract.extractor import ActivationExtractor
    from actcache.store.store import Store

log = logging.getLogger("actcache.extract")
_MOST_NAMES = 10
# What was said is not said with every request.
_said: set[tuple[str, str, tuple[str, ...]]] = set()


def check_trust(trust_names: Any) -> bool | str:
    """What `trust_names` may be: `OptionError` for anything but a truth value or a name."""
    if isinstance(trust_names, bool) or (isinstance(trust_names, str) and trust_names):
        return trust_names
    raise OptionError(
        f"trust_names is {trust_names!r:.80}: expected True, False, or the name under which the model was imported or "
        "pulled."
    )


def question_of(
    extractor: ActivationExtractor,
    store: Store,
    space: str,
    names: Sequence[str],
    layout: str,
    *,
    check: bool,
    trust_names: bool | str,
    own: bool,
    added: Callable[[], object],
) -> Question:
    """What is asked of `store` for the model of `extractor`, whose space is `space`.

    `own`: nothing that others have computed counts. Datasets that claim the name alone are of a model as it is, neither
    edited nor continuing its prompts.
    """
    source = extractor.source
    as_it_is = not (extractor.edits or source.generate)
    trusted = _names(extractor, trust_names)
    pulled = partial(store.pulled_for, space, source.name, names=trusted if as_it_is else None)
    trusts = () if own or extractor.edits else trusted
    return Question(store, space, names, layout, check, (), tuple if own else pulled, added, trusts)


def _names(extractor: ActivationExtractor, trust_names: bool | str) -> tuple[str, ...]:
    """The names that are trusted to be the model's: what was said to be one, or its own.

    What a folder's configuration says of where it came from is not among them: a model that was trained further says
    so of the model it was before.
    """
    if isinstance(trust_names, str):
        return (trust_names,)
    source = extractor.source
    return tuple(dict.fromkeys(filter(None, (source.name, source.given)))) if trust_names else ()


def with_imports(question: Question, extractor: ActivationExtractor) -> Question:
    """`question`, which imports answer, too, where their names are trusted; they are of a model without edits."""
    if not question.trusts:
        return question
    found = [one for name in question.trusts for one in question.store.imports_of(name)]
    # By now what is stored elsewhere is known here.
    _say_other_names(question, extractor)
    return replace(question, trusted=found)


def _say_other_names(question: Question, extractor: ActivationExtractor) -> None:
    """Warn, once, where nothing is stored under any of the names that are trusted: of the model's own only where there
    is something under others, of one that was given in any case."""
    told = str(question.store.location), extractor.source.name, tuple(question.trusts)
    if told in _said:
        return
    known = [space for space in list_spaces(question.store.root) if space.imported or space.pulled]
    if any(_counts(space, question) for space in known):
        return
    source, names = extractor.source, sorted({space.model_name for space in known})
    if not names and set(question.trusts) <= {source.name, source.given}:
        return
    _said.add(told)
    if not names:
        log.warning(
            "nothing was imported or pulled under the name %s, which is trusted, nor under any other, in %s.",
            " or ".join(map(repr, question.trusts)),
            question.store.location,
        )
        return
    more = f" and {count(len(names) - _MOST_NAMES, 'other')}" if len(names) > _MOST_NAMES else ""
    log.warning(
        "nothing was imported or pulled under the name %s, which is trusted; there is %s%s.%s If one of them is the "
        "model %r, name it: trust_names=%r (--known-as NAME).",
        " or ".join(map(repr, question.trusts)),
        ", ".join(map(repr, names[:_MOST_NAMES])),
        more,
        did_you_mean(question.trusts[0], names),
        source.name,
        names[0] if len(names) == 1 else "name",
    )


def _counts(space: SpaceInfo, question: Question) -> bool:
    """Whether what was imported or pulled into `space` may answer, whatever it holds."""
    said = space.label.get("pulled")
    claims = said.get("claims") if isinstance(said, dict) else None
    return space.model_name in question.trusts or claims == question.space
