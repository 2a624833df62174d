"""A segment that grows: batches are written where the finished file will have them, each durable with one sync.

docs/format.md is normative; `actcache.store.batches` reads what is here. The matrices of all sites have their room from
the beginning, holes until rows come, so that when the file is full only header and index are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.store import container
from actcache.store.batches import BATCH, FRAME, OPEN, blob_of, framed, mark_behind
from actcache.store.beside import Background
from actcache.store.casting import CastError, cast, is_cast
from actcache.store.dtypes import matrix_dtype
from actcache.store.files import open_locked, sync_data, sync_folder, translated, write_all
from actcache.store.mapped import start_writing
from actcache.store.measuring import Measured
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, INDEX_TENSORS, JOURNAL, TOKENS, VERSION, Records, SegmentInfo, flat_bytes
from actcache.store.writing import (
    BlockHasher,
    Measurements,
    index_region,
    index_tensors,
    joined_moments,
    segment_metadata,
)

_PAGE = 4096
DISK = "actcache-disk"
"""What threads that wait for the disk are called."""
_SENT_BYTES = 1 << 20
_STUB = b'{"__metadata__":{"format":"actcache-open"}}'
# Prompts to come may have more text and come in smaller batches: holes cost nothing.
_SPARE = 2
# What headers take at most: that of a record, and that of the segment for each tensor and the name of each batch.
_PER_BATCH, _PER_TENSOR, _PER_NAME = 3072, 256, 64


class _Column:
    """One site: its place in the file, and what is known of its rows so far."""

    def __init__(self, site: str, code: str, dim: int, start: int) -> None:
        self.site, self.code, self.dim, self.start = site, code, dim, start
        self.width = dim * matrix_dtype(code).itemsize
        self.checksums = BlockHasher()

    def hash_given(self, matrices: Sequence[npt.NDArray[Any]]) -> list[int]:
        """The checksums of rows that are written as they are."""
        hasher = BlockHasher()
        for matrix in matrices:
            hasher.update_both(self.checksums, flat_bytes(matrix))
        return hasher.finish()

    def write(
        self, fd: int, at: int, matrices: Sequence[npt.NDArray[Any]], hasher: BlockHasher, measured: Measured
    ) -> tuple[int, CastError | None]:
        """Write rows at `at` of the file: where they end, and what casting changed; None where nothing is cast.

        What was cast is given to `measured`, the rest is not.
        """
        if not any(is_cast(matrix, self.code) for matrix in matrices):
            for matrix in matrices:
                at = self._written(fd, at, np.ascontiguousarray(matrix), hasher)
            return at, None
        error = CastError()
        for piece in (piece for matrix in matrices for piece in cast(matrix, self.code)):
            at = self._written(fd, at, piece.rows, hasher)
            error.add(piece.error)
            measured.add_cast(self.site, piece)
        return at, error

    def _written(self, fd: int, at: int, rows: npt.NDArray[Any], hasher: BlockHasher) -> int:
        data = flat_bytes(rows)
        hasher.update_both(self.checksums, data)
        return write_all(fd, [data], at)


class GrowingFile:
    """A file to which this process appends batches of one signature. Not thread-safe.

    After an error of `add` or `seal` nothing more can be done with it but `close`: what was committed stays readable,
    and whoever merges next makes a segment of it.
    """

    def __init__(
        self, folder: Path, space: str, group: Sequence[Records], size: int, disk: Background | None = None
    ) -> None:
        """A file of about `size` bytes for batches like `group`, which must fit; nothing is in it yet.

        `disk`: the thread that waits for the disk, where its owner has one for several files.

        Raises DiskFullError or StoreAccessError, naming the folder; OSError where files cannot be locked.
        """
        first = group[0]
        self._layout, self._context = first.layout, first.prompts.text_context
        self._signature = first.signature
        self.space = space
        index = _index_bytes(group)
        record = index + _check_bytes(group) + _PER_BATCH
        batches = max(1, size // (_stored(group) + record))
        rows = self._rows_left = batches * _rows(group)
        self._index_used = _fixed(first, rows)
        self._index_room = self._index_used + _SPARE * batches * (index + _PER_NAME)
        at = _up(self._index_room)
        self._columns: list[_Column] = []
        for site, matrix in first.data.items():
            column = _Column(site, first.code(site), matrix.shape[1], at)
            self._columns.append(column)
            at = _up(at + rows * column.width)
        self._journal = self._at = at
        self._size = _up(at + _SPARE * batches * record + _PER_BATCH + _PER_TENSOR * len(first.data))
        self._first_row = 0
        self._tables: list[PromptTable] = []
        self.batches: list[SegmentInfo] = []
        """What was committed, as readers know it, in order."""
        self.created_ns = 0
        self._used = 0
        self._measured = Measured([(c.site, c.code, c.dim) for c in self._columns])
        self._disk = disk or Background(DISK)
        self._own_disk = disk is None
        with translated(folder):
            temporary, self._fd = open_locked(folder, ".tmp", locks_needed=True)
            _owned.add(self)
            self.path = temporary.with_suffix(".open")
            try:
                os.ftruncate(self._fd, self._size)
                self._describe(rows)
                os.fsync(self._fd)
                os.rename(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                self.close()
                raise
            sync_folder(folder)

    def _describe(self, rows: int) -> None:
        metadata = {
            "format": OPEN, "version": VERSION, "space": self.space, "layout": self._layout,
            "text_context": self._context, "rows": str(rows),
            "columns": json.dumps([(c.site, c.code, c.dim, c.start) for c in self._columns]),
        }  # fmt: skip
        # Like every file of ours it begins with the format; that is overwritten when it is sealed.
        write_all(self._fd, [len(_STUB).to_bytes(8, "little") + _STUB], 0)
        where = self._journal.to_bytes(8, "little")
        write_all(self._fd, [where + _digest(where)], self._size - FRAME.size)
        self._at = write_all(self._fd, [framed(blob_of(metadata, {}))], self._journal)

    def fits(self, group: Sequence[Records]) -> bool:
        """Whether there is room for `group`, of the same signature, as one batch."""
        if group[0].signature != self._signature or _rows(group) > self._rows_left:
            return False
        index = _index_bytes(group)
        return (
            self._index_used + index + _PER_NAME <= self._index_room
            and self._at + index + _check_bytes(group) + _PER_BATCH <= self._size - FRAME.size
        )

    def add(self, group: Sequence[Records]) -> None:
        """Commit `group` as one batch: durable, and visible to everyone, when this returns.

        FileNotFoundError when the file was removed meanwhile, by whoever evicted or cleared it: the batch is gone, too.
        """
        rows, prompts = _rows(group), PromptTable.concatenate([part.prompts for part in group])
        given = [c.site for c in self._columns if not any(is_cast(part.data[c.site], c.code) for part in group)]
        size = _stored(group)
        with translated(self.path.parent, size), self._disk.waited_for():
            # The disk has a thread of its own, which hands over rows, then their record, and waits; all is looked at in
            # this one meanwhile. What is written goes in few calls: two threads that take the interpreter from one
            # another for each small piece come to a standstill.
            if len(given) == len(self._columns):
                every = [[np.ascontiguousarray(part.data[site]) for part in group] for site in given]
                self._disk.do(partial(self._write_given, every, rows))
                errors = [CastError()] * len(every)
                looked = [column.hash_given(matrices) for column, matrices in zip(self._columns, every, strict=True)]
                checksums = [digest for digests in looked for digest in digests]
            else:
                errors, checksums = self._write_rows(group, rows)
            tensors = self._record(prompts, checksums, errors)
            name, frames = uuid.uuid4().hex, list[bytes]()
            self._disk.do(partial(self._commit, name, tensors, max(part.not_before for part in group), frames))
            self._measured.add_given(group, given)
        with translated(self.path.parent):
            os.stat(self.path)
            (frame,) = frames
            mark = mark_behind(frame)
            if self._at + len(mark) <= self._size - FRAME.size:
                # Nothing hangs on it, so that it costs no sync: it gets to the disk with what comes next, or by itself.
                with contextlib.suppress(OSError):
                    write_all(self._fd, [mark], self._at)
        columns = tuple((c.site, c.code, c.dim) for c in self._columns)
        self.batches.append(
            SegmentInfo(
                name, self.space, self._layout, columns, len(prompts), rows, size + len(frame), self.created_ns,
                prompts.text_context, {}, prompts.token_key, prompts.text_key,
            )
        )  # fmt: skip
        self._tables.append(prompts)
        self._first_row += rows
        self._rows_left -= rows
        self._index_used += _index_bytes(group) + _PER_NAME
        self._used += size + 2 * len(frame)

    def _write_given(self, every: Sequence[Sequence[npt.NDArray[Any]]], rows: int) -> None:
        """Write the matrices of each column as they are, and send them on to the disk."""
        unsent = 0
        for column, matrices in zip(self._columns, every, strict=True):
            start = column.start + self._first_row * column.width
            unsent += self._written(column, start, write_all(self._fd, [flat_bytes(m) for m in matrices], start), rows)
            if unsent >= _SENT_BYTES:
                start_writing(self._fd, 0, 0)
                unsent = 0

    def _write_rows(self, group: Sequence[Records], rows: int) -> tuple[list[CastError], list[int]]:
        """Write the `rows` of `group`: what casting changed at each site, and the checksums of all blocks."""
        errors, checksums, unsent = [], list[int](), 0
        for column in self._columns:
            start = column.start + self._first_row * column.width
            hasher, matrices = BlockHasher(), [part.data[column.site] for part in group]
            at, error = column.write(self._fd, start, matrices, hasher, self._measured)
            checksums += hasher.finish()
            errors.append(error or CastError())
            unsent += self._written(column, start, at, rows)
            if unsent >= _SENT_BYTES:
                self._disk.do(partial(start_writing, self._fd, 0, 0))
                unsent = 0
        return errors, checksums

    @staticmethod
    def _written(column: _Column, start: int, at: int, rows: int) -> int:
        if at != start + rows * column.width:
            raise ValueError(f"{column.site}: {at - start} bytes of data for {rows} rows")
        return at - start

    def _commit(self, name: str, tensors: Mapping[str, npt.NDArray[Any]], not_before: int, frames: list[bytes]) -> None:
        """Write the record of the batch `name`, whose rows are written, to the journal and to `frames`; sync all."""
        self.created_ns = max(time.time_ns(), not_before)
        metadata = {
            "format": BATCH, "batch": name, "created_ns": str(self.created_ns), "row": str(self._first_row),
        }  # fmt: skip
        frames.append(framed(blob_of(metadata, tensors)))
        self._at = write_all(self._fd, frames, self._at)
        sync_data(self._fd)

    def _record(
        self, prompts: PromptTable, checksums: Sequence[int], errors: Sequence[CastError]
    ) -> dict[str, npt.NDArray[Any]]:
        tensors = index_tensors(prompts, self._row_offset(prompts), np.zeros(1, np.int64))
        del tensors["digest"]
        tensors["checksum"] = np.array(checksums, np.uint64)
        tensors["errors"] = np.array([error.numbers for error in errors], np.float64)
        return tensors

    def _row_offset(self, prompts: PromptTable) -> npt.NDArray[np.int64]:
        return prompts.token_offset if self._layout == TOKENS else np.arange(len(prompts) + 1, dtype=np.int64)

    @property
    def is_well_filled(self) -> bool:
        """Whether holes, which take no room on the disk but in copies of the file, are at most two thirds of it."""
        return 3 * self._used >= self._size

    @property
    def is_almost_full(self) -> bool:
        """Whether holes, which weigh as much as rows where the file is uploaded, are little of it."""
        return 8 * self._used >= 7 * self._size

    def measured(self) -> Measurements:
        """What is known of all rows of each site; to be asked once, when no more come."""
        return self._measured.all()

    def seal(self, replaces: Mapping[str, Sequence[str]]) -> SegmentInfo:
        """Make a segment of it where it is: durable under its final name when this returns. The file is closed."""
        prompts = PromptTable.concatenate(self._tables)
        rows = self._first_row
        prefix = "" if self._layout == TOKENS else f"{self._layout}/"
        index = index_tensors(prompts, self._row_offset(prompts), np.zeros(1, np.int64))
        index["checksum"] = np.array([d for c in self._columns for d in c.checksums.finish()], np.uint64)
        measured = self.measured()
        index["moments"] = joined_moments([measured[c.site][0] for c in self._columns])
        index["errors"] = np.array([measured[c.site][1].numbers for c in self._columns])
        metadata = segment_metadata(
            self.path.parent, self._layout, self.created_ns, self._context, replaces, space=self.space
        )
        shapes = [(prefix + c.site, matrix_dtype(c.code), (rows, c.dim)) for c in self._columns]
        starts = {prefix + c.site: c.start for c in self._columns} | {JOURNAL: self._journal}
        tensors = [(name, a.dtype, a.shape) for name, a in index.items()] + shapes
        tensors.append((JOURNAL, np.dtype("u1"), (self._size - self._journal,)))
        head, placed = container.encode_around(metadata, tensors, starts)
        region = index_region(head, index, placed, self._columns[0].start)
        path = self.path.with_suffix(".safetensors")
        try:
            with translated(self.path.parent, len(head) + len(region)):
                # The rest of the room is a hole of zeros already.
                write_all(self._fd, [head, region.data], 0)
                os.fsync(self._fd)
                os.rename(self.path, path)
        finally:
            self.close()
        with translated(path.parent):
            sync_folder(path.parent)
        return SegmentInfo(
            path.name[:32], self.space, self._layout, tuple((c.site, c.code, c.dim) for c in self._columns),
            len(prompts), rows, self._size, self.created_ns, prompts.text_context,
            {name: tuple(tombs) for name, tombs in replaces.items()}, prompts.token_key, prompts.text_key,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the file and its lock; it stays as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._own_disk:
                self._disk.stop()


def _rows(group: Sequence[Records]) -> int:
    return sum(int(part.row_offset[-1]) for part in group)


def _stored(group: Sequence[Records]) -> int:
    return sum(part.stored_bytes for part in group)


def _up(size: int) -> int:
    return size + -size % _PAGE


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")


def _index_bytes(group: Sequence[Records]) -> int:
    """What the index of a segment takes for the prompts of `group`, at most."""
    size = container.ALIGN * len(INDEX_TENSORS)
    for prompts in (part.prompts for part in group):
        size += 57 * len(prompts) + 24 + prompts.token_ids.nbytes + prompts.text.nbytes
    return size


def _check_bytes(group: Sequence[Records]) -> int:
    """What checksums and errors of a batch take, at most."""
    return 8 * (_stored(group) // BLOCK + len(group[0].data)) + 48 * len(group[0].data)


def _fixed(first: Records, rows: int) -> int:
    """What header and index of a segment take, at most, beside what they say of its prompts."""
    size = _PER_TENSOR * (2 * len(first.data) + 2 * len(INDEX_TENSORS))
    for site, matrix in first.data.items():
        dim = matrix.shape[1]
        blocks = rows * dim * matrix_dtype(first.code(site)).itemsize // BLOCK + 1
        size += 8 * blocks + 8 * (2 * dim + 1) + 48 + 2 * len(site.encode())
    return size


_owned: weakref.WeakSet[GrowingFile] = weakref.WeakSet()


def _after_fork() -> None:
    # The lock belongs to parent and child together: the child must not hold it when the parent dies.
    for file in list(_owned):
        if file._fd >= 0:
            os.close(file._fd)
            file._fd = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
