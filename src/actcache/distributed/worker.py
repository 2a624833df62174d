"""What runs a unit: in this process, in a process of this machine, or in an actor of Ray."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from actcache.distributed.job import Job
from actcache.distributed.rows import Row
from actcache.distributed.units import Reader, Unit
from actcache.errors import ModelChangedError, OptionError, PartialWarmupError, PromptError, PromptTypeError
from actcache.extract.declared import check_edited
from actcache.extract.given import Said, checked
from actcache.extract.prompts import check_tokens, ids_of, read_prompts, tokenize
from actcache.extract.stats import WarmupStats
from actcache.store.spaces import space_id

if TYPE_CHECKING:
    from actcache.unified import UnifiedCache

# No power of two: what is in the way may come at every eighth prompt.
_PARTS = 7


@dataclass(frozen=True)
class Task:
    """Some prompts of a unit: `first` and every `step`-th after it.

    `tries`: how many workers have died of it.
    """

    unit: Unit
    first: int = 0
    step: int = 1
    tries: int = 0

    def parts(self, rows: int) -> list[Task]:
        """Some tasks of the same prompts, of a unit with so many `rows`; none where there is one prompt only."""
        # Halves would cost more workers before one of them finishes something, where a unit has several such prompts.
        count = min(_PARTS, len(range(self.first, rows, self.step)))
        if count < 2:
            return []
        return [replace(self, first=self.first + k * self.step, step=count * self.step, tries=1) for k in range(count)]


@dataclass(frozen=True)
class Lost:
    """A prompt that could not be done: its place in its unit, where that is, and why."""

    index: int
    at: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What became of a task: of how many prompts, what was found and done of them, and which could not be done.

    `rows`: how many prompts the whole unit has.
    """

    prompts: int
    rows: int
    stats: WarmupStats
    lost: tuple[Lost, ...] = ()


def joined(one: WarmupStats, other: WarmupStats) -> WarmupStats:
    """Both together; their times are added, too."""
    values = {f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(WarmupStats)}
    return WarmupStats(**values)


class Worker:
    """A model with a cache of its own. Nothing is loaded before a unit lacks something.

    Raises what `UnifiedCache` raises, and `ModelChangedError` where the model is not the one that the driver found.
    """

    def __init__(self, job: Job) -> None:
        if job.threads is not None:
            import torch

            torch.set_num_threads(job.threads)
        self._job = job
        self._reader = Reader()
        self._has_labels = False
        self._cache: UnifiedCache = job.open()
        source = self._cache.extractor.source
        if space_id(source.identity().values) != job.space:
            raise ModelChangedError(
                f"the model {source.name!r} is not the same on {socket.gethostname()} as where this run began: its "
                "files differ, or what it runs with. Nothing of it was stored."
            )
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, task: Task) -> Answer:
        """Compute what is missing of the prompts of `task`, and store it; it is durable, and uploaded, when this
        returns.

        Raises what concerns more than single prompts: the store, the model, the input.
        """
        if task.tries:
            # Whoever was at it before may have stored some of it.
            self._cache.store.refresh()
        everything = self._reader.rows(task.unit)
        indices = range(task.first, len(everything), task.step)
        lost = [Lost(i, everything[i].at, everything[i].reason) for i in indices if everything[i].reason]
        whole = [i for i in indices if not everything[i].reason]
        self._has_labels = task.unit.input.label is not None
        stats, failed = self._warm([everything[i] for i in whole])
        lost += [Lost(whole[i], everything[whole[i]].at, reason) for i, reason in failed]
        self._cache.store.flush()
        stats = replace(stats, total_prompts=len(indices))
        return Answer(len(indices), len(everything), stats, tuple(sorted(lost, key=lambda one: one.index)))

    def close(self) -> None:
        self._reader.close()
        self._cache.store.close()

    def _store(self, rows: list[Row]) -> WarmupStats:
        return self._cache.warmup(
            [row.prompt for row in rows],
            verify_cache=self._job.verify_cache,
            max_retries=self._job.max_retries,
            labels=[row.label for row in rows] if self._has_labels else None,
            metadata=None if rows[0].metadata is None else [row.metadata for row in rows],
        )

    def _warm(self, rows: list[Row]) -> tuple[WarmupStats, list[tuple[int, str]]]:
        """What was done, and which of `rows` could not be, each on its own."""
        refused = {i: reason for i, row in enumerate(rows) if (reason := _unsayable(row))}
        while len(refused) < len(rows):
            kept = [i for i in range(len(rows)) if i not in refused]
            try:
                return self._store([rows[i] for i in kept]), sorted(refused.items())
            except PartialWarmupError as error:
                first = cast(WarmupStats, error.stats)
                stats, failed = self._singly(rows, [(kept[i], reason) for i, reason in error.failed])
                return joined(first, stats), sorted([*refused.items(), *failed])
            except (PromptError, PromptTypeError) as error:
                # Of all that are given at once the first is named; here each is to be.
                found = {i: reason for i in kept if (reason := self._refusal(rows[i].prompt))}
                if not found:
                    # None by itself: what they are to one another.
                    stats, failed = self._singly(rows, [(i, _told(error)) for i in kept])
                    return stats, sorted([*refused.items(), *failed])
                refused |= found
            except OptionError:
                contrary = self._contrary([rows[i] for i in kept])
                if not contrary:
                    raise
                refused |= {kept[k]: reason for k, reason in contrary.items()}
        return WarmupStats(len(rows)), sorted(refused.items())

    def _refusal(self, prompt: Any) -> str:
        """Why the model cannot take `prompt`; empty where it can."""
        extractor = self._cache.extractor
        try:
            read = read_prompts([prompt])
            tokenize(read, [0], extractor.source, add_special_tokens=extractor.add_special_tokens)
            check_tokens(read, [0], extractor.source)
            check_edited(read, [0], extractor.edits)
        except (PromptError, PromptTypeError) as error:
            return _told(error)
        return ""

    def _contrary(self, rows: list[Row]) -> dict[int, str]:
        """Which of `rows` say something else of a prompt than one before them, and why they are not done."""
        extractor, found = self._cache.extractor, {}
        read = read_prompts([row.prompt for row in rows])
        tokenize(read, range(len(rows)), extractor.source, add_special_tokens=extractor.add_special_tokens)
        first: dict[bytes, int] = {}
        for i, row in enumerate(rows):
            j = first.setdefault(ids_of(read, i).tobytes(), i)
            if _said(row) != _said(rows[j]):
                found[i] = f"PromptError: the prompt is that of {rows[j].at}, and its label or metadata is not."
        return found

    def _singly(self, rows: list[Row], failed: list[tuple[int, str]]) -> tuple[WarmupStats, list[tuple[int, str]]]:
        """Those of `rows` that failed with others of their batch, each by itself."""
        stats, left = WarmupStats(0), []
        for i, _ in failed:
            try:
                done = self._store([rows[i]])
                stats = joined(stats, replace(done, activations_cached=0))
            except PartialWarmupError as error:
                left.append((i, error.failed[0][1]))
            except (PromptError, PromptTypeError) as error:
                left.append((i, _told(error)))
        return stats, left


def _said(row: Row) -> Said:
    return checked([row.label], None if row.metadata is None else [row.metadata], 1)


def _unsayable(row: Row) -> str:
    """Why label or metadata of `row` cannot be kept; empty where they can."""
    if row.label is None and row.metadata is None:
        return ""
    try:
        _said(row)
    except OptionError as error:
        told = re.sub(r"^(label|metadata)s?\[0\]", r"the \1", str(error))
        return f"PromptError: {told}"
    return ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {re.sub(r'^prompt 0 ', 'the prompt ', str(error))}"
