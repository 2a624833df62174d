"""The sizes and SHA-256 that a dataset of ours gives of its files, held against what is read of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from actcache.errors import DatasetFormatError
from actcache.share.source import Stream

_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedFileError(DatasetFormatError):
    """A file whose bytes are others than those of which its dataset gives the SHA-256. `path`: in the dataset."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


class Checksums:
    """What is known of the files of a dataset.

    The size of every file that is opened is compared. The digest of one is compared once it was read from its beginning
    to its end, by one stream or by several that follow one another; of single ranges nothing can be said.
    """

    def __init__(self, name: str, files: Any) -> None:
        """`name` of the dataset; `files`: path -> ``[bytes, SHA-256]``, as somebody wrote it."""
        self._name = name
        self._files: dict[str, tuple[int, str]] = {}
        self._read: dict[str, _Read] = {}
        for path, known in files.items() if isinstance(files, Mapping) else ():
            if isinstance(known, list) and len(known) == 2 and type(known[0]) is int and isinstance(known[1], str):
                self._files[path] = known[0], known[1]

    def knows(self, path: str) -> bool:
        """Whether the digest of a file is known."""
        return path in self._files and _SHA256.fullmatch(self._files[path][1]) is not None

    def around(self, path: str, stream: Stream, start: int = 0) -> Stream:
        """`stream` of a file from byte `start` on, added up where its digest is known.

        Raises `DatasetFormatError` for a file of another size.
        """
        known = self._files.get(path)
        if known is None:
            return stream
        if stream.size != known[0]:
            stream.close()
            raise DatasetFormatError(
                f"{path} of {self._name} has {stream.size:,} bytes, and the dataset says {known[0]:,}: it was changed, "
                "or is not all there."
            )
        if start == 0:
            self._read[path] = _Read()
        return _Followed(path, stream, start, self._read.get(path) or _Read())

    def finish(self, stream: Stream) -> None:
        """Compare the digest of a file that was read to its end by now; `DatasetFormatError` where it is another."""
        if not isinstance(stream, _Followed) or stream.read_so_far.end != stream.size or not self.knows(stream.path):
            return
        if stream.read_so_far.digest.hexdigest() != self._files[stream.path][1]:
            self._read.pop(stream.path, None)
            raise DamagedFileError(
                stream.path,
                f"{stream.path} of {self._name} is damaged: its bytes are not those of which the dataset gives the "
                "SHA-256.",
            )


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
