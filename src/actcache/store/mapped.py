"""Read-only memory maps that hold no file descriptor.

Python's `mmap` keeps a duplicate of the descriptor for the life of a map (before 3.13), which would limit a
store to about a thousand segments; hence the C library's own call.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_POPULATE_READ = 22
# Behind the index tensors a segment may have holes, which would only fill memory.
_MOST_AHEAD = 4 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_start_writing = getattr(_libc, "sync_file_range", None)
if _start_writing is not None:
    _start_writing.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_RANGE_WRITE = 2
_FAILED = ctypes.c_void_p(-1).value


def start_writing(fd: int, start: int, size: int) -> None:
    """Send a range of a file to the disk without waiting: a later sync finds most of its work done."""
    if _start_writing is not None:
        # Advice only: an error shows when the file is synced.
        _start_writing(fd, start, size, _RANGE_WRITE)


def ask_for(path: Path, size: int) -> None:
    """Ask the disk for the first `size` bytes of a file, a few MB at most, without waiting for them."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                # What grew has room behind its index, with which this says nothing of the rows that follow.
                stop = min(size, _MOST_AHEAD, os.lseek(fd, 0, os.SEEK_HOLE)) if hasattr(os, "SEEK_HOLE") else size
                os.posix_fadvise(fd, 0, min(stop, _MOST_AHEAD), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)


class MappedFile:
    """The bytes of an open file, mapped; unmapped when nothing refers to them any more.

    `raw`: read-only memoryview; `array`: the same as an uint8 array, read-only unless `writable`.
    """

    def __init__(self, fd: int, size: int, *, writable: bool = False) -> None:
        allowed = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, size, allowed, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._address: int = address
        buffer = (ctypes.c_char * size).from_address(address)
        # Not at exit: threads that still read then would fault.
        weakref.finalize(buffer, _libc.munmap, address, size).atexit = False
        self._chars = buffer
        whole = memoryview(buffer).cast("B")
        self.raw = whole.toreadonly()
        self.array: npt.NDArray[np.uint8] = np.frombuffer(whole if writable else self.raw, np.uint8)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of a range; bytes compare many times faster than memoryviews."""
        return self.raw[start:stop].tobytes()

    def touched(self, starts: Ints, stops: Ints) -> Any:
        """Something of which slices are copies of the bytes, where many short ranges are copied next."""
        # Looked at all at once, since each copy would wait for its own.
        self.array.take(starts, mode="clip")
        self.array.take(stops, mode="clip")
        return self._chars

    def will_need(self, start: int, stop: int) -> None:
        """Ask the disk for a range, without waiting for it."""
        self._advise(mmap.MADV_WILLNEED, start, stop)

    def populate(self, start: int, stop: int) -> None:
        """Map the pages of a range in one call, reading them where needed: far faster than faulting one by one."""
        self._advise(_POPULATE_READ, start, stop)

    def _advise(self, advice: int, start: int, stop: int) -> None:
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice only: an older kernel or a failing disk shows when the bytes are read.
        with contextlib.suppress(OSError):
            _libc.madvise(self._address + start, stop - start, advice)
