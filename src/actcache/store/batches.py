"""Files that grow: the batches of a segment that is still being written, as readers see them.

docs/format.md is normative; `actcache.store.growing` writes them.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import FormatError
from actcache.store import container
from actcache.store.casting import CastError, nothing_lost
from actcache.store.dtypes import is_scaled, matrix_dtype
from actcache.store.files import open_plain
from actcache.store.mapped import MappedFile
from actcache.store.mapping import Segment
from actcache.store.records import INDEX_TENSORS, SegmentInfo, check_index_tensors, check_version, is_layout
from actcache.store.statistics import Moments, as_float, is_float

OPEN, BATCH = "actcache-open", "actcache-batch"
FRAME = struct.Struct("<QQ")
"""Before each record: its length and its xxh3-64. At the end of the file: where the journal begins, and its digest."""
BATCH_TENSORS = tuple(name for name in INDEX_TENSORS if name not in ("digest", "moments"))
_ROWS_AT_ONCE = 4096
_MAX_ROWS, _MAX_RECORD = 1 << 48, 1 << 30


class Batch(Segment):
    """One batch of a file that grows: to whoever reads it a segment of its own, `info.name` being the batch's id.

    Its rows are a run in the matrix of each site; its moments are computed when they are asked for.
    """

    def __init__(self, file: OpenFile, blob: bytes, start: int, first: int) -> None:
        """The record `blob` that lies at `start` of the file; its rows must not begin before `first`."""
        head = blob[: container.header_size(blob[:8], len(blob))]
        self.path = file.path
        self.metadata, self._tensors = container.parse(head, len(blob), start)
        meta = self.metadata
        created, row = (re.fullmatch(r"[0-9]{1,19}", meta.get(key, "")) for key in ("created_ns", "row"))
        if meta.get("format") != BATCH or created is None or int(created[0]) >= 1 << 63:
            raise FormatError("not the record of a batch")
        if not re.fullmatch(r"[0-9a-f]{32}", meta.get("batch", "")) or row is None or int(row[0]) < first:
            raise FormatError("the record of a batch without a name, or with rows of another one")
        first = int(row[0])
        check_index_tensors(self._tensors, BATCH_TENSORS)
        self.metadata = {**file.metadata, **meta}
        self._file, self._raw, self._bytes = file.mapped, file.mapped.raw, file.mapped.array
        rows = int(self._array("row_offset")[-1]) if self._tensors["row_offset"].shape[0] else -1
        self.start, self.stop = start, first + rows
        """Where its record lies in the file, and the row behind its last one."""
        if rows < 0 or self.stop > file.rows:
            raise FormatError(f"a batch of rows {first} to {self.stop}, where there is room for {file.rows}")
        self._data, self._scales = {}, {}
        for (site, _, dim, at), (dtype, width) in zip(file.strips, file.dtypes, strict=True):
            begin = at + first * width
            self._data[site] = container.Tensor(site, dtype, (rows, dim), begin, begin + rows * width)
        self._check_index()
        self.info = SegmentInfo(
            meta["batch"], self.metadata["space"], self.layout, file.columns, len(self.prompts), rows,
            len(blob) + sum(t.nbytes for t in self._data.values()), int(created[0]), self.prompts.text_context, {},
            self.prompts.token_key, self.prompts.text_key,
        )  # fmt: skip
        self._computed: dict[str, Moments] = {}

    def _read_moments(self, numbers: int) -> None:
        pass

    def moments(self, site: str) -> Moments | None:
        """The moments of all rows of `site`; None for integers."""
        if not is_float(self.column(site)[0]):
            return None
        if site not in self._computed:
            found = Moments.empty(self.column(site)[1])
            for start in range(0, self.info.rows, _ROWS_AT_ONCE):
                found.update(as_float(self.values(site, start, min(start + _ROWS_AT_ONCE, self.info.rows))))
            self._computed[site] = found
        kept = self._computed[site]
        return Moments(kept.count, kept.mean.copy(), kept.m2.copy(), kept.norms)

    def error(self, site: str) -> CastError:
        """What storing `site` changed; nothing, where its record says nothing of it."""
        error = super().error(site)
        return error if error.rows else nothing_lost(self.info.rows, self.moments(site))

    def is_whole(self) -> bool:
        """Whether every block of every site is as it was written."""
        return not any(len(self.checks.damaged(site)) for site in self.info.sites)


class OpenFile:
    """A file that grows, opened for reading. FormatError when it is none, or its description is damaged.

    It has its full size from the beginning, so that what was mapped of it need never be mapped again.
    `strips`: (site, code, D, where its matrix begins) for each site, `dtypes`: its dtype, and the bytes of a row of it;
    `columns`: as those of a segment; `rows`: how many rows there is room for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name[:32]
        self._fd = open_plain(path)
        try:
            self._size = os.fstat(self._fd).st_size
            self._at = self._journal()
            self._describe()
            self.mapped = MappedFile(self._fd, self._size)
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None
        self.batches: list[Batch] = []
        self._first = 0
        self._unsure: bytes | None = None
        self.damage: dict[int, str] = {}
        """Records that cannot be read, by where they are, and why: their batches count as absent."""

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def _journal(self) -> int:
        end = self._size - FRAME.size
        found = os.pread(self._fd, FRAME.size, end) if end > 0 else b""
        if len(found) != FRAME.size:
            raise FormatError(f"a file of {self._size} bytes is too short to be one that grows")
        start, digest = FRAME.unpack(found)
        if digest != _digest(found[:8]) or not 0 < start <= end - FRAME.size or start % container.ALIGN:
            raise FormatError("it does not say where its journal begins")
        return int(start)

    def _describe(self) -> None:
        start, blob = self._at, self._record(self._at)
        if blob is None:
            raise FormatError("its description is damaged")
        self.metadata, tensors = container.parse(blob[: container.header_size(blob[:8], len(blob))], len(blob))
        meta = self.metadata
        if meta.get("format") != OPEN:
            raise FormatError("not a segment that grows (no format in its metadata)")
        check_version(meta.get("version", ""))
        if tensors or not is_layout(meta.get("layout", "")):
            raise FormatError("its description holds tensors, or no layout")
        try:
            columns, rows = json.loads(meta["columns"]), int(meta["rows"])
            self.strips = [(str(site), str(code), int(dim), int(at)) for site, code, dim, at in columns]
            self.dtypes = [(matrix_dtype(code), dim * matrix_dtype(code).itemsize) for _, code, dim, _ in self.strips]
            known = all(not is_scaled(code) and site and "/" not in site for site, code, _, _ in self.strips)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(f"its description is not one: {error}") from None
        if not 0 < rows < _MAX_ROWS or not known or len({s[0] for s in self.strips}) != len(self.strips) or not columns:
            raise FormatError("its sites or their number of rows are impossible")
        end = 0
        for (site, _, dim, at), (_, width) in sorted(zip(self.strips, self.dtypes, strict=True), key=lambda s: s[0][3]):
            if dim < 0 or at < end or at % container.ALIGN or at + rows * width > start:
                raise FormatError(f"{site}: its rows do not fit, or overlap others")
            end = at + rows * width
        self.rows = rows
        self.columns = tuple((site, code, dim) for site, code, dim, _ in self.strips)
        self._at = start + _framed(len(blob))

    def _record(self, at: int) -> bytes | None:
        """The record at `at` of the file; None where none is, or not all of it."""
        length = self._length(at)
        if length is None:
            return None
        frame = os.pread(self._fd, FRAME.size + length, at)
        whole = len(frame) == FRAME.size + length
        return frame[FRAME.size :] if whole and FRAME.unpack_from(frame)[1] == _digest(frame[FRAME.size :]) else None

    def _length(self, at: int) -> int | None:
        """The length of the record at `at` of the file, as it says itself; None where none is, or it is impossible."""
        end = self._size - FRAME.size
        if at + FRAME.size > end:
            return None
        length = int(FRAME.unpack(os.pread(self._fd, FRAME.size, at))[0])
        return length if 0 < length <= min(_MAX_RECORD, end - FRAME.size - at) else None

    def poll(self) -> list[Batch]:
        """The batches that were committed since the last call, in order.

        One sync makes a batch and its record durable, in no order: where power was lost the last record may be there
        without its rows. So the last one counts only if its rows are what they were, or the mark behind it says that it
        was synced; one before another was.
        """
        fresh: list[Batch] = []
        at, first = self._at, self._first
        ends = []
        while (size := self._length(at)) is not None:
            blob = self._record(at)
            if blob is None and self._record(at + _framed(size)) is None:
                # It is being written now, or never was written whole.
                break
            try:
                if blob is None:
                    raise FormatError("its digest does not match")
                fresh.append(Batch(self, blob, at + FRAME.size, first))
                first = fresh[-1].stop
            except (FormatError, IndexError) as error:
                self.damage[at] = f"the record of a batch at byte {at} is damaged: {error}"
            at += _framed(size)
            ends.append((at, first))
        if fresh and not self._is_committed(fresh[-1]):
            last = fresh.pop()
            ends = [end for end in ends if end[0] <= last.start]
        if ends:
            self._at, self._first = ends[-1]
        self.batches += fresh
        return fresh

    def _is_committed(self, last: Batch) -> bool:
        at = last.start - FRAME.size
        length, digest = FRAME.unpack(os.pread(self._fd, FRAME.size, at))
        if os.pread(self._fd, FRAME.size, at + _framed(length)) == FRAME.pack(0, digest):
            # What of it is not as it was has been damaged since, and the rest of it need not be lost.
            return True
        name = last.info.name.encode()
        if name == self._unsure:
            return False
        whole = last.is_whole()
        self._unsure = None if whole else name
        return whole


def _digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _framed(length: int) -> int:
    """What a record takes in the journal."""
    size = FRAME.size + length
    return size + -size % container.ALIGN


def framed(blob: bytes) -> bytes:
    """A record as it is written: its length, its digest, itself, and zeros up to the next one."""
    frame = FRAME.pack(len(blob), _digest(blob)) + blob
    return frame + bytes(-len(frame) % container.ALIGN)


def mark_behind(frame: bytes) -> bytes:
    """What says, in the place of the next record, that this one was synced."""
    return FRAME.pack(0, FRAME.unpack_from(frame)[1])


def blob_of(metadata: dict[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A record: a header with `metadata`, and small tensors, as a safetensors file of its own would be."""
    head, placed = container.encode(metadata, [(name, a.dtype, a.shape) for name, a in tensors.items()])
    blob = bytearray(max((t.stop for t in placed.values()), default=len(head)))
    blob[: len(head)] = head
    for name, array in tensors.items():
        blob[placed[name].start : placed[name].stop] = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return bytes(blob)
