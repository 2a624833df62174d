"""Memory for answers, in huge pages where the system has them; and memory that is given back.

To touch 64 MB for the first time takes 38 ms in pages of 4 KB and 9 in such of 2 MB (measured: 33 arrays of 2 MB each;
5 of it are the copy), and on machines that hand free memory back to their host several times that. numpy asks for huge
pages itself, for arrays of 4 MB and more; answers are mostly made of smaller ones, lest a part that somebody keeps keep
all of it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

HUGE = 2 << 20
"""The size of a huge page."""

# Less than that would leave much of a huge page unused.
_LEAST = HUGE * 3 // 4
# So much of what is let go of is kept: whoever reads one layer after the other touches nothing anew.
_KEPT = 128 << 20
# Each may be a mapping of its own, of which a process has 65,530 where nobody has said otherwise.
_MOST_MAPPED = 8192
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_map, _unmap, _advise = _libc.mmap, _libc.munmap, _libc.madvise
_map.restype = ctypes.c_void_p
_map.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Mapped:
    """Mappings of this process, by their address, and those that nobody uses at the moment, by their length."""

    def __init__(self) -> None:
        self.length: dict[int, int] = {}
        # Threads and finalizers put and take one item at a time, for which they need no lock.
        self.free: dict[int, deque[int]] = {}

    def kept(self) -> int:
        """How many bytes nobody uses."""
        # Nothing is made here that might start a collection, whose finalizers would put something else meanwhile.
        return sum(length * len(self.free[length]) for length in list(self.free))


_mapped = _Mapped()


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A new array that may be written to, with anything in it, as of `np.empty`."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    buffer = _huge(size) if size >= _LEAST else None
    if buffer is None:
        return np.empty(shape, kind)
    # Nothing but arrays refers to the buffer: of objects in a cycle finalizers come before their own `__del__`.
    data: npt.NDArray[Any] = np.frombuffer(memoryview(buffer).cast("B"), np.uint8, size)
    return data.view(kind).reshape(shape)


def return_free_memory() -> None:
    """Give back what is kept for answers to come, and let the C library give back what large arrays have left free.

    It keeps up to 32 MB of each otherwise; likewise pyarrow, where that is in use, as much as an index has ever needed.
    """
    for free in list(_mapped.free.values()):
        while (address := _taken(free)) is not None:
            _forget(address)
    # Another thread may be about to import it.
    pool = getattr(sys.modules.get("pyarrow"), "default_memory_pool", None)
    if pool is not None:
        pool().release_unused()
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _huge(size: int) -> ctypes.Array[ctypes.c_char] | None:
    """At least `size` bytes that begin with a huge page; None where the system has none, or no room."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    # Few lengths, so that what is kept fits what is asked for; what nobody touches takes no memory.
    length = -(-size // HUGE) * HUGE
    try:
        address: int | None = _mapped.free[length].pop()
    except LookupError:
        address = _new(length)
    if address is None:
        return None
    # A last part that would leave most of a huge page unused has small ones.
    _advise(address, (size + HUGE // 2) // HUGE * HUGE, advice)
    buffer = (ctypes.c_char * length).from_address(address)
    # Not at exit: threads that still read then would fault.
    weakref.finalize(buffer, _let_go, address).atexit = False
    return buffer


def _new(length: int) -> int | None:
    """The address of a new mapping; None where there is no room."""
    if len(_mapped.length) >= _MOST_MAPPED:
        return None
    # Huge pages lie at multiples of their size: what is too much on either side goes back at once.
    allowed = mmap.PROT_READ | mmap.PROT_WRITE
    start = _map(None, length + HUGE, allowed, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start is None or start == _FAILED:
        return None
    address: int = -(-start // HUGE) * HUGE
    for begin, end in ((start, address), (address + length, start + length + HUGE)):
        if end > begin:
            _unmap(begin, end - begin)
    _mapped.length[address] = length
    return address


def _let_go(address: int) -> None:
    """Nobody uses it any more."""
    length = _mapped.length[address]
    # What is asked for now is asked for again sooner than what was asked for once.
    for other in list(_mapped.free):
        while other != length and _mapped.kept() + length > _KEPT and (old := _taken(_mapped.free[other])) is not None:
            _forget(old)
    if _mapped.kept() + length <= _KEPT:
        _mapped.free.setdefault(length, deque()).append(address)
    else:
        _forget(address)


def _taken(free: deque[int]) -> int | None:
    """One of `free`, which is nobody else's from now on."""
    try:
        return free.popleft()
    except IndexError:
        return None


def _forget(address: int) -> None:
    # First: the same address may be given again as soon as it is free.
    length = _mapped.length.pop(address)
    _unmap(address, length)
