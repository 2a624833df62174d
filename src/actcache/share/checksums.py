"""The digests that a dataset of ours gives of its files, held against what is read of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from actcache.errors import DatasetFormatError
from actcache.share import blocks
from actcache.share.blocks import BLOCK, Blocks, DamagedFileError
from actcache.share.source import Source, Stream

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 62
"""Bytes of a file."""
_MOST_NAMED = 1 << 20


class Checksums:
    """What is known of the files of a dataset.

    The size of every file that is opened is compared. Where the digests of blocks are known, everything that is read is
    compared with them, block by block, and whole blocks are read for that. Else the SHA-256 of a file is compared once
    it was read from its beginning to its end, by one stream or by several that follow one another; of single ranges
    nothing can be said then.
    """

    def __init__(self, source: Source, files: Any = None, of_blocks: Any = None) -> None:
        """`files`: path -> ``[bytes, SHA-256]``, as somebody wrote it; `of_blocks`: what was written of the digests of
        blocks, None where there are none. Raises `DatasetFormatError` for what cannot be."""
        self._source = source
        self._files: dict[str, tuple[int, str]] = {}
        self._read: dict[str, _Read] = {}
        listed = files if isinstance(files, Mapping) else {}
        for path, known in listed.items():
            if isinstance(known, list) and len(known) == 2 and type(known[0]) is int and isinstance(known[1], str):
                self._files[path] = known[0], known[1]
        self._blocks: Blocks | None = None
        if of_blocks is not None:
            sizes = {path: known[0] for path, known in self._files.items()}
            if len(sizes) != len(listed) or not sizes or not all(0 < size <= _MOST for size in sizes.values()):
                raise DatasetFormatError(
                    f"{source.name} does not say how large the files are that {blocks.FILE} is of."
                )
            self._blocks = Blocks(source, of_blocks, sizes)

    @property
    def kind(self) -> str | None:
        """What is compared: "blocks" or "files"; None where nothing is known."""
        return "blocks" if self._blocks is not None else "files" if self._files else None

    def kind_of(self, paths: Iterable[str]) -> str | None:
        """As `kind`, of these files: "some" where something is compared, and nothing is known of one of them."""
        # What is said of a dataset may name a few files more often than anybody has files.
        known = all(path in self._files for path in islice(paths, _MOST_NAMED))
        return self.kind if known else self.kind and "some"

    def require(self) -> None:
        """Raise `DatasetFormatError` where the digests that the dataset speaks of are not there, or are damaged."""
        if self._blocks is not None:
            self._blocks.require()

    def needs_all(self, path: str) -> bool:
        """Whether a file can be checked, and only as a whole."""
        return path in self._files and self._blocks is None and _SHA256.fullmatch(self._files[path][1]) is not None

    def digests(self, path: str) -> bytes | None:
        """The digests of all blocks of a file, as they lie in the dataset; None where they are not known."""
        if self._blocks is None or path not in self._files:
            return None
        return blocks.as_bytes(self._blocks.of(path, 0, blocks.count(self._files[path][0])))

    def open(self, path: str, start: int = 0, stop: int | None = None) -> Stream:
        """Bytes `start` to `stop` of a file (None: to its end), checked while they are read.

        Raises `DatasetFormatError` for a file of another size, and what opening it raises.
        """
        known = self._files.get(path)
        if known is None:
            return self._source.open(path, start, stop)
        size = known[0]
        if self._blocks is None:
            stream = self._sized(path, self._source.open(path, start, stop), size)
            if start == 0:
                self._read[path] = _Read()
            return _Followed(path, stream, start, self._read.get(path) or _Read())
        end = size if stop is None else min(stop, size)
        first, last = start - start % BLOCK, min(size, -(-end // BLOCK) * BLOCK)
        stream = self._sized(path, self._source.open(path, first, last), size)
        return _Checked(path, stream, start, self._blocks, self._source.name)

    def _sized(self, path: str, stream: Stream, size: int) -> Stream:
        if stream.size != size:
            stream.close()
            raise DatasetFormatError(
                f"{path} of {self._source.name} has {stream.size:,} bytes, and the dataset says {size:,}: it was "
                "changed, or is not all there."
            )
        return stream

    def finish(self, stream: Stream) -> None:
        """Compare what was read of a stream and is not compared yet: reads on to the end of a block. Where a file is
        known as a whole, and was read to its end by now, compare that. `DamagedFileError` where it is another."""
        if isinstance(stream, _Checked):
            stream.finish()
            return
        if (
            not isinstance(stream, _Followed)
            or stream.read_so_far.end != stream.size
            or not self.needs_all(stream.path)
        ):
            return
        if stream.read_so_far.digest.hexdigest() != self._files[stream.path][1]:
            self._read.pop(stream.path, None)
            raise DamagedFileError(
                stream.path,
                f"{stream.path} of {self._source.name} is damaged: its bytes are not those of which the dataset gives "
                "the SHA-256.",
            )


class _Checked(Stream):
    """A stream from the beginning of a block on, all of which is compared, that stands at byte `start`."""

    def __init__(self, path: str, stream: Stream, start: int, digests: Blocks, name: str) -> None:
        self.size = stream.size
        self._path, self._stream, self._digests, self._name = path, stream, digests, name
        self._next = start // BLOCK
        self._at = self._next * BLOCK
        self._hasher = blocks.hasher()
        try:
            self.read(start - self._at)
        except BaseException:
            stream.close()
            raise

    def readinto(self, view: memoryview) -> None:
        self._stream.readinto(view)
        self._hasher.update(view)
        self._at += len(view)
        found = self._hasher.finish() if self._at == self.size else self._hasher.digests
        if not found:
            return
        known = self._digests.of(self._path, self._next, len(found))
        if found != known:
            bad = self._next + next(i for i, pair in enumerate(zip(found, known, strict=True)) if pair[0] != pair[1])
            span = bad * BLOCK, min((bad + 1) * BLOCK, self.size)
            raise blocks.damaged(self._path, self._name, span)
        self._next += len(found)
        found.clear()

    def finish(self) -> None:
        """Read on to where everything that was read is compared."""
        self.read(min(-self._at % BLOCK, self.size - self._at))

    def close(self) -> None:
        self._stream.close()


class _Read:
    """What was read of a file from its beginning on, without a gap."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.end = 0


class _Followed(Stream):
    """A stream that adds up what it reads, where that goes on where others ended."""

    def __init__(self, path: str, stream: Stream, start: int, read: _Read) -> None:
        self.path = path
        self.size = stream.size
        self.read_so_far = read
        self._at = start
        self._stream = stream

    def readinto(self, view: memoryview) -> None:
        self._stream.readinto(view)
        if self.read_so_far.end == self._at:
            self.read_so_far.digest.update(view)
            self.read_so_far.end += len(view)
        self._at += len(view)

    def close(self) -> None:
        self._stream.close()
