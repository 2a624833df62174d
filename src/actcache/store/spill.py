"""Arrays that lie in files without a name, so that they take no anonymous memory: the system may write their pages
there and drop them. Nothing is left of them when nobody refers to them any more, or when the process ends."""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.files import log
from actcache.store.mapped import MappedFile

_SMALL = 64 << 10
"""Bytes up to which an array is not worth a file."""
_FEW_BYTES = 512 << 10
"""Bytes of small arrays that are kept in memory, before files are made for them."""
_LEAST_ROOM, _MOST_ROOM = 1 << 20, 64 << 20
_ALIGN = 16
_AT_ONCE = 1 << 16


class Spill:
    """Makes such arrays in `folder`, ordinary ones where it cannot (None: always). Not thread-safe."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._taken = 0
        self._room = np.empty(0, np.uint8)
        self._pid = 0

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array to be written to."""
        made = self._in_file(shape, np.dtype(dtype))
        return np.empty(shape, dtype) if made is None else made

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of zeros."""
        made = self._in_file(shape, np.dtype(dtype))
        return np.zeros(shape, dtype) if made is None else made

    def full(self, shape: int | tuple[int, ...], value: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array with one value everywhere."""
        made = self.empty(shape, dtype)
        made[...] = value
        return made

    def flatnonzero(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Where `mask` bool ``[n]`` is True, int64."""
        pieces = [(start, mask[start : start + _AT_ONCE]) for start in range(0, len(mask), _AT_ONCE)]
        found = self.empty(sum(int(np.count_nonzero(piece)) for _, piece in pieces), np.int64)
        at = 0
        for start, piece in pieces:
            some = np.flatnonzero(piece)
            found[at : at + len(some)] = start + some
            at += len(some)
        return found

    def beside(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """`count` zeros, beside what else was asked for in this way; in memory while there is little of it."""
        kind = np.dtype(dtype)
        raw = self._part(count * kind.itemsize)
        return np.zeros(count, kind) if raw is None else raw.view(kind)

    def keep(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A read-only copy of an array, beside others that are kept; in memory while there is little of them."""
        raw = self._part(array.nbytes)
        if raw is None:
            return array.copy()
        raw[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        raw.flags.writeable = False
        return raw.view(array.dtype).reshape(array.shape)

    def _part(self, size: int) -> npt.NDArray[np.uint8] | None:
        """So many zeros in a file, with others in it; None where they are to be in memory."""
        self._taken += size
        if self._taken <= _FEW_BYTES:
            return None
        if self._pid != os.getpid():
            # What is left of the last file is the parent's after a fork.
            self._room, self._pid = np.empty(0, np.uint8), os.getpid()
        if len(self._room) < size:
            made = self._mapped(max(size, min(max(self._taken, _LEAST_ROOM), _MOST_ROOM)))
            if made is None:
                return None
            self._room = made
        raw, self._room = self._room[:size], self._room[size + -size % _ALIGN :]
        return raw

    def _in_file(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        size = prod(shape if isinstance(shape, tuple) else (shape,)) * dtype.itemsize
        raw = self._mapped(size) if size > _SMALL else None
        return None if raw is None else raw.view(dtype).reshape(shape)

    def _mapped(self, size: int) -> npt.NDArray[np.uint8] | None:
        if self._folder is None:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                # Now: where a full disk shows only when a page is written, it ends the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    for start in range(0, size, _LEAST_ROOM):
                        file.write(bytes(min(_LEAST_ROOM, size - start)))
                return MappedFile(file.fileno(), size, writable=True).array
        except OSError as error:
            log.debug("no room for %d bytes in %s, they stay in memory: %s", size, self._folder, error)
            self._folder = None
            return None
