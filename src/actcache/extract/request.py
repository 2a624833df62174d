"""Prompts as they were found in a store, and what running the model for the others added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actcache.derive.results import Asked
from actcache.errors import PartialWarmupError
from actcache.extract.answer import Lookup
from actcache.extract.prompts import PromptList
from actcache.store.prompts import PromptTable

if TYPE_CHECKING:
    from actcache.extract.results import ResultsFound


@dataclass
class Request:
    """Prompts looked up in a store, and what is still to be computed for them.

    Attributes:
        lookup: what was found.
        missing: by the names and the results still missing, the prompts (positions in the request), each different
            prompt once.
        results: what of the results asked for was found.
    """

    prompts: PromptList
    lookup: Lookup
    space: str
    text_context: str
    missing: dict[tuple[tuple[str, ...], Asked], list[int]]
    results: ResultsFound

    @property
    def cached(self) -> int:
        return int(self.lookup.found.sum())

    def tokens(self) -> PromptTable:
        """The token ids of all prompts: those found by their text have the ones they are stored with."""
        known = [ids for ids in self.lookup.token_ids(self.prompts.ids) if ids is not None]
        assert len(known) == len(self.prompts), "what was not found was tokenised"
        return PromptTable.build(known)

    @property
    def to_compute(self) -> int:
        return sum(len(members) for members in self.missing.values())


@dataclass
class Filled:
    """What a run of the model added to the store: of how many prompts, and of how many of these what."""

    ran: int = 0
    extracted: int = 0
    perplexity: int = 0
    logits: int = 0
    tokens: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    failed: list[tuple[int, str]] = field(default_factory=list)


def partial_failure(filled: Filled, prompts: PromptList, *, stats: object) -> PartialWarmupError:
    """The error that names which of `prompts` a run could not store, those that are there twice twice."""
    places: dict[bytes, list[int]] = {}
    for i, ids in enumerate(prompts.ids):
        if ids is not None:
            places.setdefault(ids.tobytes(), []).append(i)
    failed = []
    for first, reason in filled.failed:
        tokens = prompts.ids[first]
        failed += [(i, reason) for i in ([first] if tokens is None else places[tokens.tobytes()])]
    failed.sort()
    shown = "; ".join(f"prompt {i}: {reason}" for i, reason in failed[:3])
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    which = "1 prompt was" if len(failed) == 1 else f"{len(failed)} prompts were"
    return PartialWarmupError(
        f"{which} not stored ({shown}{more}). The others are stored; run again to try these again.",
        stats=stats,
        failed=failed,
    )
