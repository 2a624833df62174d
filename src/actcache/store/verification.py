"""Is everything that is stored intact? And putting right what is not."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from actcache.errors import FormatError, NewerFormatError
from actcache.store.adoption import adopt_now
from actcache.store.batches import OpenFile
from actcache.store.catalog import Catalog
from actcache.store.damage import intact_of, losses
from actcache.store.eviction import space_folders
from actcache.store.files import (
    ELSEWHERE,
    OPEN_NAME,
    SEGMENT_NAME,
    SPACE_FILE,
    TOMB_NAME,
    TRANSIENT,
    is_ours,
    log,
    sweep,
    translated,
)
from actcache.store.index import SpaceIndex
from actcache.store.keys import Mask
from actcache.store.locks import LOCK_WAIT_S, exclusive
from actcache.store.mapping import Segment
from actcache.store.merging import Overtaken, open_source, replace_segments
from actcache.store.records import SegmentInfo
from actcache.store.replacing import bury, discard
from actcache.store.segment import blocks_of, problems_of_keys, rows_of_blocks
from actcache.store.spaces import FILE, SpaceInfo, holds_segments, read_space, recovered_space, write_space
from actcache.store.tombs import read_tomb
from actcache.store.working_copy import WorkingCopy
from actcache.wording import count

T = TypeVar("T")


@dataclass(frozen=True)
class Damage:
    """Something wrong.

    Attributes:
        segment: the file, from the store's folder; "index" for this host's index.
        site: whose vectors are damaged; None when it is not about vectors.
        rows: the rows of that site which lie in damaged blocks.
        reason: in words.
        repaired: whether it has been put right: what is damaged is gone, and will be computed again when asked for.
    """

    segment: str
    site: str | None
    rows: list[int]
    reason: str
    repaired: bool = False


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        segments, blocks, tombs: how many were read and checked.
        damaged: what is wrong with them; empty when all is well.
        newer: files that only a later actcache can read; nothing is said of them, and nothing is done to them.
        lost: activations that are damaged and have no other copy, here neither, one for each prompt and site: they
            read as not stored, with `repair` as without. Of a file that does not tell what it held, and is not known
            to this host, they are not counted.
        lost_prompts: the different prompts, in all spaces, that lost one or more of them.
        lost_sites: how many were lost at each site.
    """

    segments: int = 0
    blocks: int = 0
    tombs: int = 0
    damaged: list[Damage] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    lost: int = 0
    lost_prompts: int = 0
    lost_sites: dict[str, int] = field(default_factory=dict)

    @property
    def repaired(self) -> int:
        """How much of what was wrong has been put right."""
        return sum(damage.repaired for damage in self.damaged)

    @property
    def ok(self) -> bool:
        """Whether all is well now."""
        return self.repaired == len(self.damaged)


class _Space:
    """One space under verification."""

    def __init__(self, location: Path, index: SpaceIndex, report: VerifyReport) -> None:
        self.location, self.index, self.report = location, index, report
        self.folder = index.folder
        self.unreadable: dict[Path, str] = {}
        """Files to remove: segments, then tombs."""
        self.rotten: set[str] = set()
        """Segments of which some rows are damaged."""
        self.left: dict[Path, str] = {}
        """Files that we may not touch."""
        self.blocks: list[tuple[str, str, list[int]]] = []
        self.batches: list[tuple[Path, str | None, list[int], str]] = []
        """What is wrong in files that grow."""
        self.held: list[tuple[SegmentInfo, dict[str, Mask]]] = []
        """Every segment and batch, and of its damaged sites which prompts are intact."""

    def check(self) -> None:
        sweep(self.folder)
        names = self._names()
        for name in sorted(names):
            path = self.folder / name
            with contextlib.suppress(FileNotFoundError):
                if SEGMENT_NAME.fullmatch(name):
                    self._segment(path)
                elif OPEN_NAME.fullmatch(name):
                    self._open(path)
                elif TOMB_NAME.fullmatch(name):
                    self._tomb(path)
        self._count_losses()

    def _count_losses(self) -> None:
        self.index.refresh(force=True)
        numbers = {info.name: number for number, info in self.index.segments()}
        read = {info.name for info, _ in self.held}
        for path in self.unreadable:
            if SEGMENT_NAME.fullmatch(path.name) and path.name[:32] not in read:
                info = self.index.info(numbers[path.name[:32]]) if path.name[:32] in numbers else None
                if info is None:
                    self.unreadable[path] += "; what it held is not known"
                else:
                    # This host knew it when it could be read.
                    self.held.append((info, dict.fromkeys(info.sites, np.zeros(info.prompts, bool))))
        found = losses(
            [
                (info, self.index.untombed(numbers[info.name]), damaged)
                for info, damaged in self.held
                if info.name in numbers
            ]
        )
        self.report.lost += found.activations
        self.report.lost_prompts += found.prompts
        for site, number in found.sites.items():
            self.report.lost_sites[site] = self.report.lost_sites.get(site, 0) + number

    def _names(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {path.name for path in self.folder.iterdir()}
        return set()

    def _read(self, path: Path, opened: Callable[[], T], named: re.Pattern[str]) -> T | None:
        """What `opened` makes of `path`, counted; None where it cannot be read, which is noted."""
        try:
            file = opened()
        except NewerFormatError:
            self.report.newer.append(self._named(path))
            return None
        except (FormatError, OSError) as error:
            self._refused(path, error, is_ours(path, named))
            return None
        self.report.segments += 1
        return file

    def _belongs_here(self, path: Path, space: str | None) -> bool:
        """Whether a file of `space` is in its folder; noted where it is not."""
        if space == self.folder.name:
            return True
        self.left[path] = f"it belongs to space {space}: move it there, or delete it"
        return False

    def _segment(self, path: Path) -> None:
        def opened() -> Segment:
            if self.index.copy is not None:
                self.index.copy.check_head(path)
            return Segment(path, self.index.copy)

        segment = self._read(path, opened, SEGMENT_NAME)
        if segment is None or not self._belongs_here(path, segment.info.space):
            return
        self.report.blocks += blocks_of(segment)
        wrong = list(problems_of_keys(segment))
        if wrong:
            self.unreadable[path] = "; ".join(wrong)
            self._hold(segment, lost=True)
            return
        segment.checks.check_source()
        for site in segment.info.sites:
            damaged = segment.checks.damaged(site)
            if len(damaged):
                self.rotten.add(segment.info.name)
                self.blocks.append((segment.info.name, site, rows_of_blocks(segment, site, damaged).tolist()))
        self._hold(segment)

    def _hold(self, segment: Segment, *, lost: bool = False) -> None:
        """Note what of a segment whose blocks have been read is intact; nothing, where it is `lost`."""
        intact = intact_of(segment, np.full(segment.info.prompts, not lost))
        broken: Mask = np.logical_not(intact.all(axis=0))
        if self.index.copy is not None and broken.any() and not lost and segment.info.name in self.rotten:
            # Of what is wrong in the object this host may have read the right bytes before: repair takes these.
            intact |= intact_of(Segment(segment.path, self.index.copy), broken)
        sites = zip(segment.info.sites, intact, strict=True)
        self.held.append((segment.info, {site: good for site, good in sites if not good.all()}))

    def _open(self, path: Path) -> None:
        file = self._read(path, lambda: OpenFile(path), OPEN_NAME)
        if file is None or not self._belongs_here(path, file.metadata.get("space")):
            return
        file.poll()
        self.batches += [(path, None, [], reason) for reason in file.damage.values()]
        for batch in file.batches:
            self.report.blocks += blocks_of(batch)
            self.batches += [(path, None, [], reason) for reason in problems_of_keys(batch)]
            self._hold(batch)
            for site in batch.info.sites:
                damaged = batch.checks.damaged(site)
                if len(damaged):
                    rows = batch.stop - batch.info.rows + rows_of_blocks(batch, site, damaged)
                    self.batches.append((path, site, rows.tolist(), "checksums do not match"))

    def _tomb(self, path: Path) -> None:
        if self.index.copy is not None:
            self.index.copy.renew_small(path)
        try:
            read_tomb(path)
            self.report.tombs += 1
        except NewerFormatError:
            self.report.newer.append(self._named(path))
        except (FormatError, OSError) as error:
            self._refused(path, error, is_ours(path, TOMB_NAME))

    def _refused(self, path: Path, error: Exception, ours: bool) -> None:
        if isinstance(error, (*ELSEWHERE, FileNotFoundError)) or getattr(error, "errno", None) in TRANSIENT:
            raise error
        reason = str(error).removeprefix(f"{path}: ")
        if ours:
            self.unreadable[path] = reason
        else:
            self.left[path] = f"{reason}; it does not begin as a file of ours does: delete it yourself if you know it"

    def repair(self, wanted: bool, lock_folder: Path) -> None:
        """Note what is wrong; where `wanted`, put it right first."""
        done = False
        if wanted and (self.unreadable or self.rotten or self.batches):
            with exclusive(lock_folder, self.folder.name, wait_s=LOCK_WAIT_S), translated(self.folder):
                self._drop_buried()
                for path in self.unreadable:
                    discard(self.index.copy, path)
                self._rewrite()
                if self.batches:
                    adopt_now(self.index)
            done = True
        damaged = [Damage(self._named(path), None, [], reason, done) for path, reason in self.unreadable.items()]
        damaged += [Damage(self._named(path), None, [], reason) for path, reason in self.left.items()]
        damaged += [
            Damage(self._named(self.index.path(name)), site, rows, "checksums do not match", done)
            for name, site, rows in self.blocks
        ]
        for path, site, rows, reason in self.batches:
            gone = done and not path.exists()
            if wanted and not gone:
                reason += "; it is being written: repair it when its writer has finished"
            damaged.append(Damage(self._named(path), site, rows, reason, gone))
        self.report.damaged += damaged

    def _drop_buried(self) -> None:
        """Segments of which an unreadable tomb names nobody knows what: all of them counts as gone already."""
        self.index.refresh(force=True)
        for _, info in list(self.index.segments()):
            if any(keys is None for keys in self.index.tombs_of(info).values()):
                log.info("repair: removing %s, a tomb of which cannot be read", info.name)
                if info.name in self.index.opened:
                    bury(self.index.copy, self.folder, [(info.name, info.prompt_key)])
                else:
                    discard(self.index.copy, self.index.path(info.name))
                self.rotten.discard(info.name)

    def _rewrite(self) -> None:
        self.index.refresh(force=True)
        for number, info in list(self.index.segments()):
            if info.name in self.rotten:
                source = open_source(self.index, number)
                if source is not None:
                    with contextlib.suppress(Overtaken):
                        replace_segments(self.index, [source])

    def description(self, known: SpaceInfo | None, repair: bool) -> None:
        """Check space.json, and write it again where its content is `known`, or told by a segment."""
        path = self.folder / FILE
        if self.index.copy is not None:
            self.index.copy.renew_small(path)
        try:
            read_space(self.folder)
            return
        except FileNotFoundError:
            if not holds_segments(self.folder):
                return
            reason = "there is no description of the space"
        except NewerFormatError:
            self.report.newer.append(self._named(path))
            return
        except (FormatError, OSError) as error:
            reason = str(error).removeprefix(str(path)).strip()
        repaired = False
        if repair:
            with translated(self.location):
                if is_ours(path, SPACE_FILE):
                    discard(self.index.copy, path)
                known = known or recovered_space(self.folder)
                if known is not None and not path.exists():
                    write_space(self.folder.parent, known)
                    if self.index.copy is not None:
                        self.index.copy.spool.describe(self.folder)
                    repaired = True
        if not repaired:
            listed = "" if recovered_space(self.folder) else ", but not listed"
            reason += f" (its prompts are found{listed}): what is stored next for its model describes it again"
        self.report.damaged.append(Damage(self._named(path), None, [], reason, repaired))

    def _named(self, path: Path) -> str:
        return str(path.relative_to(self.location))


def verify(
    location: Path,
    root: Path,
    catalog: Catalog,
    known: Mapping[str, SpaceInfo],
    *,
    repair: bool,
    copy: WorkingCopy | None = None,
) -> VerifyReport:
    """Read and check every block, key, tomb, description and row of the index of the store at `location`."""
    report = VerifyReport()
    for name in space_folders(root):
        # An index of its own: what this process has verified before may have been damaged since.
        space = _Space(location, SpaceIndex(root / name, catalog, copy), report)
        space.check()
        report.damaged += _index(root / name, catalog, repair)
        space.repair(repair, catalog.path.parent)
        space.description(known.get(name), repair)
    return report


def _index(folder: Path, catalog: Catalog, repair: bool) -> Iterator[Damage]:
    """Rows of the index that say something else than the segments do."""
    wrong = []
    for row in catalog.load(folder.name):
        with contextlib.suppress(FormatError, OSError):
            info = Segment(folder / f"{row.name}.safetensors").info
            if not _same(row, info):
                wrong.append(row.name)
    if repair and wrong:
        catalog.record(folder.name, [], wrong)
    for name in wrong:
        yield Damage("index", None, [], f"the row of segment {name} does not fit the segment", repair)


def _same(row: SegmentInfo, info: SegmentInfo) -> bool:
    plain = all(
        getattr(row, name) == getattr(info, name)
        for name in ("space", "layout", "columns", "prompts", "rows", "size", "created_ns", "text_context")
    )
    keys = all(np.array_equal(getattr(row, name), getattr(info, name)) for name in ("prompt_key", "text_key"))
    return plain and keys and json.dumps(dict(row.replaces)) == json.dumps(dict(info.replaces))


def in_words(report: VerifyReport) -> list[str]:
    """The lines that a person reads."""
    read = (count(report.segments, "segment"), count(report.blocks, "block"), count(report.tombs, "tomb"))
    lines = [f"{', '.join(read)} read."]
    for damage in report.damaged:
        about = f" {damage.site}, {count(len(damage.rows), 'row')}" if damage.site else ""
        lines.append(f"{'repaired' if damage.repaired else 'DAMAGED'}: {damage.segment}{about}: {damage.reason}")
    if report.lost:
        each = ", ".join(f"{site} of {number:,}" for site, number in sorted(report.lost_sites.items()))
        lost = f"{count(report.lost, 'activation')} of {count(report.lost_prompts, 'prompt')}"
        lines.append(f"lost: {lost} ({each}); all else is intact.")
    lines += [f"newer: {name}: install a newer actcache to read it" for name in report.newer]
    lines.append(
        "everything is intact." if not report.damaged else f"{report.repaired} of {len(report.damaged)} repaired."
    )
    return lines
