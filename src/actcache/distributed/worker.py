"""What runs a unit: in this process, in a process of this machine, or in an actor of Ray."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from actcache.distributed.job import Job
from actcache.distributed.units import Reader, Unit
from actcache.errors import ModelChangedError, PartialWarmupError, PromptError, PromptTypeError
from actcache.extract.declared import check_edited
from actcache.extract.prompts import check_tokens, read_prompts, tokenize
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
        prompts: list[Any] = [everything[i].prompt for i in whole]
        stats, failed = self._warm(prompts)
        lost += [Lost(whole[i], everything[whole[i]].at, reason) for i, reason in failed]
        self._cache.store.flush()
        stats = replace(stats, total_prompts=len(indices))
        return Answer(len(indices), len(everything), stats, tuple(sorted(lost, key=lambda one: one.index)))

    def close(self) -> None:
        self._reader.close()
        self._cache.store.close()

    def _warm(self, prompts: list[Any]) -> tuple[WarmupStats, list[tuple[int, str]]]:
        """What was done, and which of `prompts` could not be, each on its own."""
        refused: dict[int, str] = {}
        while len(refused) < len(prompts):
            kept = [i for i in range(len(prompts)) if i not in refused]
            try:
                stats = self._cache.warmup([prompts[i] for i in kept], verify_cache=self._job.verify_cache)
                return stats, sorted(refused.items())
            except PartialWarmupError as error:
                first = cast(WarmupStats, error.stats)
                stats, failed = self._singly(prompts, [(kept[i], reason) for i, reason in error.failed])
                return joined(first, stats), sorted([*refused.items(), *failed])
            except (PromptError, PromptTypeError) as error:
                # Of all that are given at once the first is named; here each is to be.
                found = {i: reason for i in kept if (reason := self._refusal(prompts[i]))}
                if not found:
                    # None by itself: what they are to one another.
                    stats, failed = self._singly(prompts, [(i, _told(error)) for i in kept])
                    return stats, sorted([*refused.items(), *failed])
                refused |= found
        return WarmupStats(len(prompts)), sorted(refused.items())

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

    def _singly(self, prompts: list[Any], failed: list[tuple[int, str]]) -> tuple[WarmupStats, list[tuple[int, str]]]:
        """Prompts that failed with others of their batch, each by itself."""
        stats, left = WarmupStats(0), []
        for i, _ in failed:
            try:
                done = self._cache.warmup([prompts[i]], verify_cache=self._job.verify_cache)
                stats = joined(stats, replace(done, activations_cached=0))
            except PartialWarmupError as error:
                left.append((i, error.failed[0][1]))
            except (PromptError, PromptTypeError) as error:
                left.append((i, _told(error)))
        return stats, left


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {re.sub(r'^prompt 0 ', 'the prompt ', str(error))}"
