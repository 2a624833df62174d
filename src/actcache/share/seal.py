"""The digests of an index in itself, so that a damaged row number is no other row.

They lie where readers of Parquet do not look, between the last page and the footer: xxh3-64 of each `BLOCK` bytes in
front of them (the last block may be shorter), a mark, and what finds and checks these. Every place that a footer names
is in front of them, so that it is as it was. Whoever writes an index anew leaves them out; it is read unchecked then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.share import blocks
from actcache.share.blocks import BLOCK

_MARK = b"ACIDX001"
_PIECE = 1 << 20
_TAIL = struct.Struct("<8sQ16s16s")
TAIL = _TAIL.size
"""Bytes in front of a footer that tell whether there is a seal."""
_DIGEST = 16
_END = 8
"""Bytes behind a footer: its length, and the format's mark."""


class BrokenSealError(ValueError):
    """An index is not what its seal says; the message says what is wrong with it."""


@dataclass(frozen=True)
class Seal:
    """What an index says of its own bytes: the `body` first ones have `digests`, block by block."""

    body: int
    digests: npt.NDArray[np.uint64]

    def check(self, data: memoryview, start: int) -> None:
        """Compare bytes from `start` on, where a block begins; `BrokenSealError` for others. What of them is only a
        part of a block, or behind the body, is not looked at."""
        stop = min(start + len(data), self.body)
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, self.body)
            if end > stop:
                break
            if xxhash.xxh3_64_intdigest(data[at - start : end - start]) != int(self.digests[at // BLOCK]):
                raise BrokenSealError(f"its bytes {at:,} to {end:,} are not those that were written")

    def around(self, start: int, stop: int) -> tuple[int, int]:
        """The bytes to read for those from `start` to `stop`, so that all of them are checked."""
        first = min(start, self.body) // BLOCK * BLOCK if start < self.body else start
        return first, min(-(-stop // BLOCK) * BLOCK, self.body) if stop <= self.body else stop


def put(path: Path) -> None:
    """Seal a Parquet file that is whole."""
    hasher = blocks.hasher()
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - _END)
        body = size - _END - int.from_bytes(file.read(4), "little")
        file.seek(0)
        for at in range(0, body, _PIECE):
            hasher.update(memoryview(file.read(min(_PIECE, body - at))))
        footer = file.read()
        seal = (
            blocks.as_bytes(hasher.finish()) + _TAIL.pack(_MARK, body, xxhash.xxh3_128_digest(footer), b"")[:-_DIGEST]
        )
        file.seek(body)
        file.write(seal + xxhash.xxh3_128_digest(seal) + footer)


def find(at: Callable[[int, int], memoryview], footer: int, size: int) -> Seal | None:
    """The seal of a file of `size` bytes whose footer begins at byte `footer`, where it has one; ``at(start, count)``
    reads. Raises `BrokenSealError` where it, or the footer, is not what was written."""
    if footer < TAIL:
        return None
    mark, body, of_footer, _ = _TAIL.unpack(at(footer - TAIL, TAIL))
    digests = blocks.count(body) * 8
    fits = body + digests + TAIL == footer
    if mark != _MARK and not fits:
        return None
    seal = at(body, digests + TAIL) if fits else memoryview(b"")
    if not fits or xxhash.xxh3_128_digest(seal[:-_DIGEST]) != bytes(seal[-_DIGEST:]):
        # Also where only the mark is another: pages of a file without a seal do not end in the right numbers.
        raise BrokenSealError("its own checksums are damaged")
    if mark != _MARK:
        # As it was written, by whoever writes another kind.
        return None
    if xxhash.xxh3_128_digest(at(footer, size - footer)) != of_footer:
        raise BrokenSealError("its footer is not the one that was written")
    return Seal(body, np.frombuffer(seal[:digests], "<u8"))
