"""Locks between the processes of a host: of a space, and of single files. And whether this one is ending."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_WAIT_S = 60.0
"""How long whoever must have a space to itself waits for a merge to end."""

_LOOK_S = 0.02
_held: set[int] = set()


def is_ending() -> bool:
    """Whether the interpreter is ending, and starts no threads any more."""
    return not threading.main_thread().is_alive()


@contextlib.contextmanager
def exclusive(folder: Path, space: str, *, wait_s: float = 0.0) -> Iterator[bool]:
    """Whether no other process of this host merges `space`, or evicts from it, after waiting for up to `wait_s`.

    Doing so at the same time is only a waste.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"merge-{space}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield True
        return
    try:
        until = time.monotonic() + wait_s
        while not (mine := _locked(fd)) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        yield mine
    finally:
        os.close(fd)


@contextlib.contextmanager
def claim(path: Path, wait_s: float = 0.0) -> Iterator[bool]:
    """Whether the file at `path` is there and nobody else of this host has claimed it while the block runs.

    After waiting for up to `wait_s`. Where the file system has no locks everybody has.
    """
    fd = _claimed(path, time.monotonic() + wait_s)
    try:
        yield fd >= 0
    finally:
        if fd in _held:
            _held.discard(fd)
            # Not by closing alone: a process that was forked meanwhile has the same lock.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _claimed(path: Path, until: float) -> int:
    """A descriptor that holds the lock of the file at `path`; -1 where it cannot be had, or there is no file."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return -1
        mine = False
        try:
            mine = _locked(fd) and os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            return -1
        finally:
            if mine:
                _held.add(fd)
            else:
                os.close(fd)
        if mine:
            return fd
        if time.monotonic() >= until:
            return -1
        time.sleep(_LOOK_S)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    return True


def _after_fork() -> None:
    # The lock belongs to parent and child together: the child must not hold it when the parent dies.
    for fd in list(_held):
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
