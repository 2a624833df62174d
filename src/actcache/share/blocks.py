"""The digests of blocks of a dataset's files, so that a few rows of a file can be checked without reading all of it.

A dataset of ours has them in one more file, `FILE`, which readers that do not know it pass by: xxh3-64 of each `BLOCK`
bytes of every file that the index lists with its size (the last one of a file may be shorter), files in the order of
their names, as little-endian numbers; behind them the same of its own blocks. Of these last ones the index has the
digest, so that index, digests and rows are a chain: whatever is read of it is checked, and nothing else has to be read.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import DatasetFormatError
from actcache.share.source import NoFileError, Source
from actcache.store.writing import BlockHasher

FILE = "tensors/blocks.xxh3"
BLOCK = 1 << 16
"""Bytes of a block. A request to the Hub costs more than four of them, and their digests are 1/8192 of the files."""
_DIGEST = 8
_FEW = 1 << 18
"""Bytes of digests that are read by one request."""
_KEPT = 64
"""Blocks of digests that are kept in memory: each is of half a gigabyte of files."""
_MOST_TAIL = 16 << 20
_XXH3_128 = re.compile(r"[0-9a-f]{32}")

Digests = npt.NDArray[np.uint64]


class DamagedFileError(DatasetFormatError):
    """A file whose bytes are others than those of which its dataset gives a digest.

    Attributes:
        path: of the file in the dataset.
        span: the bytes from where to where are others; None where it is only known that some are.
    """

    def __init__(self, path: str, message: str, span: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.span = span

    def of(self, rows: str) -> DamagedFileError:
        """The same that also says which rows these bytes are."""
        return DamagedFileError(self.path, f"{self} They are {rows}." if rows else str(self), self.span)


def hasher() -> BlockHasher:
    """Digests blocks of what passes by."""
    return BlockHasher(BLOCK)


def count(nbytes: int) -> int:
    """How many blocks so many bytes are."""
    return -(-nbytes // BLOCK)


def as_bytes(digests: Sequence[int]) -> bytes:
    """Digests as they lie in a file."""
    return np.array(digests, "<u8").tobytes()


def write(path: Path, lists: Iterable[bytes]) -> dict[str, Any]:
    """Write the file of all digests, `lists` being those of each file in the order of their names; what the index says
    of it."""
    own = hasher()
    with path.open("wb") as file:
        for digests in lists:
            own.update(memoryview(digests))
            file.write(digests)
        tail = as_bytes(own.finish())
        file.write(tail)
    return {"block": BLOCK, "digest": xxhash.xxh3_128_hexdigest(tail)}


def size(files: Iterable[int]) -> int:
    """Bytes of the file of all digests, of files of so many bytes."""
    digests = sum(count(nbytes) for nbytes in files) * _DIGEST
    return digests + count(digests) * _DIGEST


class Blocks:
    """The digests that a dataset has, fetched as they are needed; threads may share it.

    Args:
        said: what the index says of them.
        files: path -> bytes of every file, as it says, too.

    Raises `DatasetFormatError` for what cannot be: here, and when digests are fetched.
    """

    def __init__(self, source: Source, said: Any, files: Mapping[str, int]) -> None:
        self._source = source
        block, digest = (said.get("block"), said.get("digest")) if isinstance(said, Mapping) else (None, None)
        if type(block) is not int or block != BLOCK:
            raise DatasetFormatError(
                f"{source.name} says that {FILE} has digests of blocks of {block!r:.40} bytes: expected {BLOCK:,}."
            )
        if not isinstance(digest, str) or not _XXH3_128.fullmatch(digest):
            raise DatasetFormatError(f"{source.name} gives {digest!r:.40} as the digest of {FILE}: expected 32 digits.")
        self._digest = digest
        names = sorted(files)
        counts = [count(files[name]) for name in names]
        self._first = dict(zip(names, accumulate(counts, initial=0), strict=False))
        self._digests = sum(counts)
        self._tail_bytes = count(self._digests * _DIGEST) * _DIGEST
        if self._tail_bytes > _MOST_TAIL:
            raise DatasetFormatError(
                f"{source.name}: its files would have {self._digests:,} blocks, more than are read."
            )
        self._lock = threading.Lock()
        self._begin = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(16)]
        self._pages: OrderedDict[int, Digests] = OrderedDict()
        self._tail: Digests | None = None

    def require(self) -> None:
        """Raise what reading any file of the dataset would, where there are no digests, or others."""
        self._own()

    def of(self, path: str, first: int, many: int) -> list[int]:
        """The digests of some blocks of a file."""
        at = self._first[path] + first
        found: list[int] = []
        per_page = BLOCK // _DIGEST
        while many:
            start = at % per_page
            some: list[int] = self._page(at // per_page)[start : start + many].tolist()
            found += some
            at += len(some)
            many -= len(some)
        return found

    def _page(self, number: int) -> Digests:
        """One block of digests."""
        with self._fetching[number % len(self._fetching)]:
            tail = self._own()
            known = self._known(number)
            if known is None:
                start = number * BLOCK
                known = self._keep(number, self._read(start, min(start + BLOCK, self._digests * _DIGEST)), tail)
            return known

    def _own(self) -> Digests:
        """The digests of the blocks of digests."""
        with self._begin:
            if self._tail is not None:
                return self._tail
            digests = self._digests * _DIGEST
            start = 0 if digests + self._tail_bytes <= _FEW else digests
            data = self._read(start, digests + self._tail_bytes)
            own = data[digests - start :]
            if xxhash.xxh3_128_hexdigest(own) != self._digest:
                raise self._damaged(digests, digests + self._tail_bytes)
            tail = np.frombuffer(own, "<u8")
            for number in range(0 if start else len(tail)):
                self._keep(number, data[number * BLOCK : min((number + 1) * BLOCK, digests)], tail)
            self._tail = tail
            return tail

    def _known(self, number: int) -> Digests | None:
        with self._lock:
            if number in self._pages:
                self._pages.move_to_end(number)
            return self._pages.get(number)

    def _keep(self, number: int, data: memoryview, tail: Digests) -> Digests:
        if xxhash.xxh3_64_intdigest(data) != int(tail[number]):
            raise self._damaged(number * BLOCK, number * BLOCK + len(data))
        page = np.frombuffer(data, "<u8")
        with self._lock:
            self._pages[number] = page
            while len(self._pages) > _KEPT:
                self._pages.popitem(last=False)
        return page

    def _read(self, start: int, stop: int) -> memoryview:
        whole = self._digests * _DIGEST + self._tail_bytes
        try:
            with self._source.open(FILE, start, stop) as stream:
                if stream.size != whole:
                    raise DatasetFormatError(
                        f"{FILE} of {self._source.name} has {stream.size:,} bytes, and for the files of the dataset it "
                        f"would have {whole:,}: it was changed, or is not all there."
                    )
                into = bytearray(stop - start)
                stream.readinto(memoryview(into))
                return memoryview(into)
        except NoFileError:
            raise DatasetFormatError(
                f"{self._source.name} has no {FILE}, by which its other files are checked: it is not all there. "
                "Download that file, too; where the dataset itself lacks it, whoever pushed it can push it again."
            ) from None

    def _damaged(self, start: int, stop: int) -> DamagedFileError:
        return damaged(FILE, self._source.name, (start, stop))


def damaged(path: str, name: str, span: tuple[int, int]) -> DamagedFileError:
    """The error for bytes of a file of the dataset `name` that are not what was written."""
    return DamagedFileError(
        path,
        f"{path} of {name} is damaged: its bytes {span[0]:,} to {span[1]:,} are not those of which the dataset gives "
        "the digest.",
        span,
    )
