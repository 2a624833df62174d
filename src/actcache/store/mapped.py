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

import numpy as np
import numpy.typing as npt

_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """The bytes of an open file, mapped; unmapped when nothing refers to them any more.

    `raw`: read-only memoryview; `array`: the same as a read-only uint8 array.
    """

    def __init__(self, fd: int, size: int) -> None:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._address: int = address
        buffer = (ctypes.c_ubyte * size).from_address(address)
        # Not at exit: threads that still read then would fault.
        weakref.finalize(buffer, _libc.munmap, address, size).atexit = False
        self.raw = memoryview(buffer).cast("B").toreadonly()
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.raw, np.uint8)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of a range; bytes compare many times faster than memoryviews."""
        return self.raw[start:stop].tobytes()

    def populate(self, start: int, stop: int) -> None:
        """Map the pages of a range in one call, reading them ahead: far faster than faulting one by one."""
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        for advice in (mmap.MADV_WILLNEED, _POPULATE_READ):
            # Advice only: an older kernel or a failing disk shows when the bytes are read.
            with contextlib.suppress(OSError):
                _libc.madvise(self._address + start, stop - start, advice)
