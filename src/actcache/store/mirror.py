"""Mirrors: files of a working copy that stand for objects, with as much of them as was read.

A mirror is a sparse file of its object's size and name. Beside it lies a sidecar, which says which blocks of its data
are there; its header and index tensors always are. Both are this host's own and disposable: what a sidecar says is
believed only where the checksum of the block agrees.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actcache.store.files import atomic_file, open_plain, write_all
from actcache.store.keys import Ints

FORMAT = "actcache-have"
_HEAD = 256
_MOST_BLOCKS = 1 << 30

THERE = 1
"""How a sidecar marks a block that is there."""

Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sidecar:
    """What a sidecar says of its object: its `size` in bytes, how many `blocks` with checksums it has (0: not known
    yet), and when this host has put it, in nanoseconds (0: it did not)."""

    size: int
    blocks: int = 0
    put_ns: int = 0


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of the mirror at `path` is."""
    return path.with_suffix(".have")


def is_mirror(path: Path) -> bool:
    """Whether the file at `path` stands for an object; False for what is whole and lies here alone."""
    return sidecar_of(path).exists()


def note_put(path: Path) -> None:
    """Say, where that is possible, that there was an object of the small file at `path`: others may remove it."""
    with contextlib.suppress(OSError):
        sidecar_of(path).touch()


def write_sidecar(path: Path, said: Sidecar, *, whole: bool = False) -> None:
    """Durably make the file at `path` a mirror, of which nothing is there but its head; with `whole` everything is."""
    text = json.dumps(
        {"__metadata__": {"format": FORMAT, "size": said.size, "blocks": said.blocks, "put_ns": said.put_ns}},
        separators=(",", ":"),
    )
    # Bytes, not holes: marking a block later must not need room on the disk.
    data = text.encode().ljust(_HEAD) + bytes([THERE if whole else 0]) * said.blocks
    target = sidecar_of(path)
    with atomic_file(target.parent, target.name, needed=len(data)) as fd:
        write_all(fd, [data], 0)


def read_sidecar(path: Path) -> Sidecar | None:
    """What the sidecar of the mirror at `path` says; None where there is none, or it says nothing sensible."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        fd = open_plain(sidecar_of(path))
        try:
            found = json.loads(os.pread(fd, _HEAD, 0))["__metadata__"]
        finally:
            os.close(fd)
        size, blocks, put_ns = int(found["size"]), int(found["blocks"]), int(found["put_ns"])
        if found["format"] == FORMAT and size >= 0 and 0 <= blocks <= _MOST_BLOCKS:
            return Sidecar(size, blocks, put_ns)
    return None


def put_lately(path: Path, seconds: float) -> bool:
    """Whether this host has put the object of the mirror at `path` not longer ago than that."""
    said = read_sidecar(path)
    return said is not None and abs(time.time_ns() - said.put_ns) < seconds * 1e9


def read_marks(path: Path, blocks: int) -> Marks:
    """Which of its `blocks` the sidecar of the mirror at `path` says to be there."""
    marks: Marks = np.frombuffer(marks_in(sidecar_of(path), 0, blocks), np.uint8) == THERE
    return marks


def marks_in(sidecar: Path, start: int, stop: int) -> bytes:
    """What a `sidecar` says of blocks `start` to `stop`: a byte for each, `THERE` where the mirror has it."""
    try:
        fd = open_plain(sidecar)
        try:
            said = os.pread(fd, stop - start, _HEAD + start)
        finally:
            os.close(fd)
    except (OSError, ValueError):
        said = b""
    return said.ljust(stop - start, b"\0")


def mark(path: Path, blocks: Ints, *, there: bool) -> None:
    """Say in the sidecar of the mirror at `path` that these blocks are there, whose bytes were written, or are not."""
    # Only advice: a block that is there without a mark is read once more.
    with contextlib.suppress(OSError):
        fd = os.open(sidecar_of(path), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            runs = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1)
            for run in runs if len(blocks) else ():
                os.pwrite(fd, bytes([THERE if there else 0]) * len(run), _HEAD + int(run[0]))
        finally:
            os.close(fd)


def has_hole(path: Path, starts: Ints, stops: Ints) -> bool:
    """Whether something in one of these ranges of bytes was never written, as in a mirror.

    False where the file system cannot say.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return any(os.lseek(fd, a, os.SEEK_HOLE) < b for a, b in zip(starts.tolist(), stops.tolist(), strict=True))
    except OSError:
        return False
    finally:
        os.close(fd)
