"""Files that grew and will grow no more: what they hold becomes segments."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actcache.store.batches import OpenFile
from actcache.store.files import OPEN_NAME, is_ours, log, remove, sync_folder
from actcache.store.growing import GrowingFile
from actcache.store.index import SpaceIndex
from actcache.store.locks import LOCK_WAIT_S, exclusive
from actcache.store.merging import before_writes, drop_duplicates, open_source, replace_segments, writing_since
from actcache.store.records import SegmentInfo
from actcache.store.sources import Part, in_order, overtaken_by_others
from actcache.store.tombs import Keys, is_member


def adopt(index: SpaceIndex, lock_folder: Path) -> int:
    """Make segments of the files whose writers are gone; how many files went. Another process at it: 0, its turn."""
    index.refresh()
    with index.lock:
        if not any(index.opened):
            return 0
    with exclusive(lock_folder, index.folder.name) as mine:
        return adopt_now(index) if mine else 0


def adopt_now(index: SpaceIndex) -> int:
    """`adopt`, for whoever has the space to itself."""
    index.refresh(force=True)
    with index.lock:
        paths = [file.path for file in index.opened]
    adopted = 0
    for path in paths:
        with claimed(path) as mine:
            adopted += mine and _settled(index, path)
    return adopted


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the file that grows at `path` has no writer any more; it gets none while the block runs."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its writer may have finished it in the meantime, or another process done what is to be done.
            mine = os.path.samestat(os.fstat(fd), os.stat(path))
        except OSError:
            mine = False
        yield mine
    finally:
        os.close(fd)


def finish(index: SpaceIndex, file: GrowingFile, lock_folder: Path) -> None:
    """Make a segment of what this process has written to `file`, and close it: where it is if that is mostly filled."""
    try:
        filled = file.is_well_filled if index.copy is None else file.is_almost_full
        if file.batches and filled and _may_be_sealed(index, file):
            _seal(index, file)
        else:
            with exclusive(lock_folder, index.folder.name, wait_s=LOCK_WAIT_S) as mine:
                if mine:
                    _settled(index, file.path, file)
    finally:
        file.close()


def _may_be_sealed(index: SpaceIndex, file: GrowingFile) -> bool:
    batches = file.batches
    # What is in the file this process has written itself and need not read; nobody else looks at the index meanwhile.
    with index.lock, index.opened.leaving(file.path):
        # First: what is finished from here on is among the copies that are looked for below.
        since, _ = writing_since(index)
        numbers = {info.name: number for number, info in index.segments()}
        parts = [Part(numbers.get(b.name, -1), b, np.ones(b.prompts, bool)) for b in batches]
        # All of it will count as being as new as its last batch, and a tomb of one batch for all of it.
        said = [(batch, keys) for batch in batches for keys in index.tombs_of(batch).values()]
        newest = max(batch.created_ns for batch in batches)
        return not (
            any(keys is None or _is_stored_again(keys, batch, batches) for batch, keys in said)
            or newest >= since
            or overtaken_by_others(index, parts)
        )


def _is_stored_again(gone: Keys, batch: SegmentInfo, batches: Sequence[SegmentInfo]) -> bool:
    """Whether other batches have a prompt that a tomb of `batch` names: they may have got it behind the tomb."""
    return any(is_member(other.prompt_key, gone).any() for other in batches if other is not batch)


def _seal(index: SpaceIndex, file: GrowingFile) -> None:
    with contextlib.suppress(FileNotFoundError):
        # Tombs of the batches go on counting through `replaces`, since nothing is dropped.
        info = file.seal({batch.name: () for batch in file.batches})
        if index.copy is not None:
            index.copy.spool.vouched.add(index.path(info.name))
        with index.lock:
            index.reads.inherit(info, np.concatenate([index.reads.times(batch) for batch in file.batches]))
        index.add(info)
        index.refresh(force=True)
        log.info("%d batches became %s, with %d prompts", len(file.batches), index.path(info.name), info.prompts)


def _batches(index: SpaceIndex, path: Path) -> list[int]:
    """The numbers of the batches of a file, oldest first."""
    index.refresh(force=True)
    with index.lock:
        numbers = {info.name: number for number, info in index.segments()}
        return [numbers[batch.info.name] for file in index.opened if file.path == path for batch in file.batches]


def _settled(index: SpaceIndex, path: Path, file: GrowingFile | None = None) -> bool:
    """Write what the file at `path` holds as segments, and remove it. Whoever calls has its lock.

    `file`: the same, where this process has written it, and need not measure it again.

    False when it was left, since what of it is live is unknown.
    """
    sources = [open_source(index, number) for number in _batches(index, path)]
    known = [source for source in sources if source is not None]
    intact = [source for source in known if not source.remnants]
    if len(known) < len(sources) or not is_ours(path, OPEN_NAME):
        return False
    settled = before_writes(index)
    together = in_order(index, [source for source in intact if source.info.name in settled])
    apart = {source.number for source in known} - {source.number for source in together}
    if together:
        drop_duplicates(together)
        names = [source.info.name for source in together]
        whole = file is not None and names == [batch.name for batch in file.batches]
        replace_segments(index, together, file.measured if file is not None and whole else dict)
    for source in known:
        if source.number in apart:
            replace_segments(index, [source])
    # Where locks are not seen by every host, its writer may be at work after all.
    if _count(path) == len(sources):
        remove(path)
        with contextlib.suppress(OSError):
            sync_folder(path.parent)
    index.refresh(force=True)
    return True


def _count(path: Path) -> int:
    with contextlib.suppress(OSError):
        file = OpenFile(path)
        return len(file.poll())
    return 0
