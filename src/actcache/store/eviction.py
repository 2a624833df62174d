"""Keeping a store below a size: the coldest segments go, after what was read lately has been copied out of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actcache.errors import DiskFullError, NewerFormatError
from actcache.store.adoption import adopt_now
from actcache.store.files import (
    OPEN_NAME,
    SEGMENT_NAME,
    SPACE_NAME,
    TOMB_NAME,
    is_ours,
    log,
    sync_folder,
    translated,
)
from actcache.store.index import SpaceIndex
from actcache.store.keys import Mask
from actcache.store.locks import LOCK_WAIT_S, exclusive
from actcache.store.merging import Overtaken, open_source, replace_segments
from actcache.store.records import LABEL, METADATA, PULLED, is_result
from actcache.store.replacing import bury, discard
from actcache.store.spaces import FILE, drop_if_empty
from actcache.store.tidying import tidy
from actcache.store.tombs import Keys, count_distinct, is_member
from actcache.store.victims import Newer, Victim

_PASSES, _ROUNDS = 4, 64
_SAID = (LABEL, METADATA)
# Segments of which at least this part was invalidated are written anew before anything that is live goes.
_GARBAGE = 0.25
# No eviction goes below this part of the limit for want of copying: of a store with few segments each is much.
_FILLED = 0.9


@dataclass(frozen=True)
class EvictionReport:
    """What an eviction did.

    Attributes:
        prompts: different prompts of which something is gone.
        bytes_freed, bytes_kept: on disk; what was copied to be kept does not count as freed.
        segments: files that are gone.
        segments_rewritten: those of them out of which prompts were copied that are kept.
        limit_bytes: what was to be reached; None where there was no limit and nothing was done.
        models: prompts gone, by the id of their space.
    """

    prompts: int
    bytes_freed: int
    bytes_kept: int
    segments: int
    segments_rewritten: int
    limit_bytes: int | None
    models: dict[str, int]


class _Eviction:
    """One run over the spaces of a store."""

    def __init__(self, indexes: Sequence[SpaceIndex], limit: int) -> None:
        self.indexes = indexes
        self.limit = limit
        self.gone: dict[SpaceIndex, list[Keys]] = {}
        self.segments = self.rewritten = 0

    def run(self) -> EvictionReport:
        before = self._on_disk()
        after = before
        if before > self.limit:
            for index in self.indexes:
                with contextlib.suppress(DiskFullError):
                    adopt_now(index)
            for work in (self._clear_out_damaged, self._clear_out_garbage):
                after = self._on_disk()
                work(after - self.limit)
            for _ in range(_PASSES):
                for _ in range(_ROUNDS):
                    after = self._on_disk()
                    if after <= self.limit or not self._round(after):
                        break
                self._clear_out_open(self._on_disk() - self.limit)
                self._drop_what_is_left()
                if (after := self._on_disk()) <= self.limit:
                    break
                # What was derived, or said, of prompts that went may weigh more, with its tombs, than before.
                self._clear_out_garbage(after - self.limit, least=0)
            after = self._finish()
        models = {index.folder.name: count_distinct(keys) for index, keys in self.gone.items()}
        report = EvictionReport(
            sum(models.values()), before - after, after, self.segments, self.rewritten, self.limit,
            {space: n for space, n in models.items() if n},
        )  # fmt: skip
        if self.segments:
            log.info("evicted: %s", report)
        return report

    def _on_disk(self) -> int:
        for index in self.indexes:
            index.refresh(force=True)
        return sum(bytes_on_disk(index) for index in self.indexes)

    # -- what nobody can read ----------------------------------------------------------------------------

    def _clear_out_damaged(self, need: int) -> None:
        for index in self.indexes:
            for name, error in index.refused.items():
                if need > 0 and not isinstance(error, NewerFormatError) and is_ours(index.path(name), SEGMENT_NAME):
                    need -= discard(index.copy, index.path(name))
                    self.segments += 1

    def _clear_out_garbage(self, need: int, least: float = _GARBAGE) -> None:
        shares = []
        for index in self.indexes:
            with index.lock:
                for number, info in index.sealed():
                    live = index.live(number)
                    dead = 0.0 if live is None else 1 - float(live.mean())
                    if dead > 0 and dead >= least and all(keys is not None for keys in index.tombs_of(info).values()):
                        shares.append((dead, Victim(index, number, info, 0)))
        for _, victim in sorted(shares, key=lambda s: -s[0]):
            if need > 0:
                with contextlib.suppress(DiskFullError):
                    need -= self._take(victim, victim.live)

    # -- what was read longest ago -----------------------------------------------------------------------

    def _round(self, total: int) -> bool:
        """Take out what should be enough; whether anything went."""
        victims, threshold = self._choose(total - self.limit)
        if threshold == -np.inf:
            kept = self._that_fit(victims, total, self.limit)
        else:
            some = self._that_fit(victims, total, int(self.limit * _FILLED))
            kept = [victim.hot(threshold) | more for victim, more in zip(victims, some, strict=True)]
        need = total - self.limit
        freed = 0
        postponed = []
        for victim, mask in zip(victims, kept, strict=True):
            # All of them: what is kept of one was weighed against what goes of the others.
            if victim.stays_whole(mask):
                continue
            try:
                freed += self._take(victim, mask)
            except DiskFullError:
                # What goes whole makes the room that copying needs.
                postponed.append((victim, mask))
        for victim, mask in postponed:
            if freed >= need:
                break
            try:
                freed += self._take(victim, mask)
            except DiskFullError:
                log.warning("no room to copy what was read lately out of %s: all of it goes", victim.info.name)
                freed += self._take(victim, np.zeros(victim.info.prompts, bool))
        return freed > 0

    def _choose(self, need: int) -> tuple[list[Victim], float]:
        """The coldest segments, as many as it takes, and the time after which what was read in them is kept.

        Minus infinity where all of them must go.
        """
        candidates = sorted(self._candidates(), key=lambda c: (c.heat, c.info.created_ns, c.info.name))
        size = 0
        for k, candidate in enumerate(candidates[:-1]):
            size += candidate.info.size
            if size >= need:
                threshold = candidates[k + 1].heat
                chosen = candidates[: k + 1]
                if size - sum(victim.copied(threshold) for victim in chosen) >= need:
                    return chosen, threshold
        return candidates, -np.inf

    def _candidates(self) -> Iterator[Victim]:
        for index in self.indexes:
            with index.lock:
                medians = index.reads.medians()
                held = list(index.sealed())
            for number, info in held:
                if info.layout in _SAID or (info.layout == PULLED and self.limit):
                    # Nobody can compute them again: they go when all else of their prompts has gone. And where prompts
                    # are in a dataset takes next to nothing, without which nothing could be fetched again.
                    continue
                yield Victim(index, number, info, medians.get(info.name, info.created_ns))
            for name, error in index.refused.items():
                if isinstance(error, NewerFormatError):
                    yield Newer(index, name)

    def _that_fit(self, victims: Sequence[Victim], total: int, limit: int) -> list[Mask]:
        """What was read last of `victims`, as much as fits below `limit` beside all else."""
        room = limit - (total - sum(v.info.size for v in victims))
        kept = [np.zeros(v.info.prompts, bool) for v in victims]
        if room <= 0 or not victims:
            return kept
        owner = np.repeat(np.arange(len(victims)), [v.info.prompts for v in victims])
        row = np.concatenate([np.arange(v.info.prompts) for v in victims])
        times = np.concatenate([np.where(v.live, v.times, -1) for v in victims])
        nbytes = np.concatenate([v.nbytes for v in victims])
        order = np.lexsort((-row, -times))
        some, first = np.unique(owner[order], return_index=True)
        nbytes[order[first]] += [victims[k].fixed for k in some.tolist()]
        order = order[(np.cumsum(nbytes[order]) <= room) & (times[order] >= 0)]
        for k, mask in enumerate(kept):
            mask[row[order[owner[order] == k]]] = True
        return kept

    def _take(self, victim: Victim, keep: Mask) -> int:
        """Remove a segment, `keep` of it copied to a new one before; the bytes that makes free."""
        index, info = victim.index, victim.info
        lost = victim.live & ~keep
        written = 0
        if keep.any():
            source = open_source(index, victim.number, keep)
            if source is not None:
                lost = victim.live & ~source.kept
                with contextlib.suppress(Overtaken):
                    made = replace_segments(index, [source])
                    written = sum(info.size for info in made)
                    self.rewritten += bool(made)
        index.forget(info.name)
        discard(index.copy, index.path(info.name))
        self.segments += 1
        if lost.any():
            self.gone.setdefault(index, []).append(info.prompt_key[lost])
        return info.size - written

    def _clear_out_open(self, need: int) -> None:
        """Where all else does not do, also what is being written; its writer notices and goes on in another file."""
        files = [(index, file) for index in self.indexes for file in index.opened]
        # What people said goes only with the vectors of its prompts: here where all of them go, else in `_finish`.
        said = {file: file.metadata.get("layout") in _SAID for _, file in files}
        ages = {file: max((b.info.created_ns for b in file.batches), default=0) for _, file in files}
        for index, file in sorted(files, key=lambda f: (said[f[1]], ages[f[1]])):
            if need > 0 and is_ours(file.path, OPEN_NAME) and not (said[file] and self.limit):
                with index.lock:
                    keys = [b.info.prompt_key for b in file.batches]
                with contextlib.suppress(FileNotFoundError):
                    need -= _allocated(file.path.stat())
                discard(index.copy, file.path)
                self.segments += 1
                if keys:
                    self.gone.setdefault(index, []).append(np.concatenate(keys))

    # -- afterwards --------------------------------------------------------------------------------------

    def _drop_what_is_left(self) -> None:
        for index in self.gone:
            with contextlib.suppress(DiskFullError):
                self._drop_derived(index, np.concatenate(self.gone[index]))
        if self._on_disk() > self.limit:
            # What was said of prompts whose vectors went in another way: by damage, or an eviction killed just here.
            for index in self.indexes:
                said = [info.prompt_key for _, info in index.segments() if info.layout in _SAID]
                if said:
                    with contextlib.suppress(DiskFullError):
                        self._drop_derived(index, np.concatenate(said))

    def _finish(self) -> int:
        for index in self.indexes:
            index.refresh(force=True)
            tidy(index)
            with contextlib.suppress(OSError):
                drop_if_empty(index.folder, index.copy)
                sync_folder(index.folder)
        return self._on_disk()

    def _drop_derived(self, index: SpaceIndex, keys: Keys) -> None:
        """What was computed from prompts goes with the last copy of what it was computed from."""
        index.refresh(force=True)
        with index.lock:
            groups = index.all_groups()
            # What of a segment is left of damaged prompts goes, or stays, with it.
            derived = [number for number, info in index.segments() if _is_derived(info.layout, info.sites)]
            if not derived:
                return
            for group in groups:
                if not _is_derived(group.layout, group.sites):
                    keys = keys[index.find(group, "token", keys)[0] < 0]
            hits = []
            for number in derived:
                info, live = index.info(number), index.live(number)
                if info is not None:
                    hit = is_member(info.prompt_key, keys)
                    hits.append((number, info, hit if live is None else hit & live))
        for number, info, hit in hits:
            victim = Victim(index, number, info, 0)
            if hit.any() and hit[victim.live].all() and info.name not in index.opened:
                # Earlier evictions may have taken the others.
                self._take(victim, np.zeros(info.prompts, bool))
            elif hit.any():
                with translated(index.folder):
                    bury(index.copy, index.folder, [(info.name, info.prompt_key[hit])])


def _is_derived(layout: str, sites: Iterable[str]) -> bool:
    # What was said of a prompt stays while its vectors can be fetched again.
    return layout != PULLED and all(map(is_result, sites))


def evict(indexes: Sequence[SpaceIndex], lock_folder: Path, limit: int) -> EvictionReport:
    """Bring the bytes on disk below `limit`: what was read longest ago goes first.

    What other processes have mapped stays readable for them. Needs room for a copy of the part of one segment that was
    read lately; where a full disk has none, that part goes, too.
    """
    ordered = sorted(indexes, key=lambda index: index.folder.name)
    with contextlib.ExitStack() as stack:
        for index in ordered:
            stack.enter_context(exclusive(lock_folder, index.folder.name, wait_s=LOCK_WAIT_S))
        return _Eviction(ordered, limit).run()


def space_folders(root: Path) -> list[str]:
    """The names of all spaces, described or not."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        return sorted(e.name for e in entries if SPACE_NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    return []


def bytes_on_disk(index: SpaceIndex) -> int:
    """Bytes of the files of ours in a space's folder; of those that grow what is in them, of unfinished ones none."""
    known = {info.name for _, info in index.segments()}
    total = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(index.folder) as entries:
        for entry in entries:
            segment = SEGMENT_NAME.fullmatch(entry.name)
            if OPEN_NAME.fullmatch(entry.name) and is_ours(index.folder / entry.name, OPEN_NAME):
                with contextlib.suppress(FileNotFoundError):
                    total += _allocated(entry.stat(follow_symlinks=False))
                continue
            mine = (
                entry.name[:32] in known or is_ours(index.folder / entry.name, SEGMENT_NAME)
                if segment
                else (TOMB_NAME.fullmatch(entry.name) or entry.name == FILE)
            )
            if mine:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _allocated(status: os.stat_result) -> int:
    """What a file takes on disk that may have holes."""
    return min(status.st_size, 512 * status.st_blocks)
