"""What is written behind the answers that were given from it: bytes received from elsewhere, on their way to a disk.

Nothing hangs on them: where the process is killed first, or the disk is full, they are read once more.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from actcache.store.files import log
from actcache.store.locks import is_ending

MOST = 128 << 20
"""Bytes that may wait: what comes beyond them is written before it is used."""

# For as long an answer is left alone with the processors.
_LINGER_S = 0.01
# So long the thread that writes stays awake for what it expects, and so often it looks whether that has come. A process
# that ends waits for it.
_AWAKE_S, _LOOK_S = 0.25, 0.01


class _Writing:
    """One thread that writes, and how much waits for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[Path, int] = {}
        self.nbytes = 0
        self.jobs: deque[tuple[float, Job]] = deque()
        """What is to be written, and when at the earliest."""
        self.until = 0.0
        """Till when the thread stays awake while it has nothing to write, as of `time.monotonic`."""
        self.awaited = threading.Event()
        """Set when somebody has waited for it to be written."""
        self.pool: ThreadPoolExecutor | None = None
        self.works = False
        """Whether the thread is awake, and looks for jobs before it sleeps."""


_state = _Writing()


def has_room(size: int) -> bool:
    """Whether so many bytes more may wait."""
    return _state.nbytes + size <= MOST and not is_ending()


@dataclass(frozen=True)
class Job:
    """What writes `size` bytes to the file at `path`."""

    path: Path
    size: int
    write: Callable[[], object]


def expect() -> None:
    """Have the thread awake when something is handed over soon: to wake it takes longer than to hand it over."""
    state = _state
    with state.changed:
        state.until = time.monotonic() + _AWAKE_S
        _wake(state)


def write(jobs: Sequence[Job]) -> None:
    """Do `jobs` soon, one after the other. What they raise is logged."""
    state, begin = _state, time.monotonic() + _LINGER_S
    with state.changed:
        for job in jobs:
            state.waiting[job.path] = state.waiting.get(job.path, 0) + 1
            state.nbytes += job.size
            state.jobs.append((begin, job))
        awake = _wake(state)
    if not awake:
        # As at the end of a process.
        state.until = 0.0
        _work(state)


def settle(path: Path | None = None) -> None:
    """Return when nothing waits to be written to the file at `path`; None: to any."""
    state = _state
    # Looked at without the lock first: mostly there is nothing, and what matters was put there by the same thread.
    if state.waiting and (path is None or path in state.waiting):
        state.awaited.set()
        with state.changed:
            state.changed.wait_for(lambda: not state.waiting if path is None else path not in state.waiting)


def _wake(state: _Writing) -> bool:
    """See to it that the thread is awake; False where none can be started any more. With the lock."""
    if not state.works:
        if state.pool is None:
            state.pool = ThreadPoolExecutor(1, thread_name_prefix="actcache-behind")
        try:
            state.pool.submit(_work, state)
            state.works = True
        except RuntimeError:
            return False
    return True


def _work(state: _Writing) -> None:
    """Write until nothing is left; first wait for what is expected."""
    failed: BaseException | None = None
    while True:
        with state.changed:
            if not state.jobs and time.monotonic() >= state.until:
                state.works = False
                break
            begin, job = state.jobs.popleft() if state.jobs else (0.0, None)
        if job is None:
            state.awaited.wait(_LOOK_S)
            continue
        state.until = 0.0
        # Whatever one ends with, the others are waited for.
        try:
            state.awaited.wait(max(0.0, begin - time.monotonic()))
        except BaseException as error:
            failed = error
        try:
            _write(state, job)
        except BaseException as error:
            failed = error
        # What is written is let go of before the next one is.
        del job
    if failed is not None:
        raise failed


def _write(state: _Writing, job: Job) -> None:
    try:
        job.write()
    except Exception as error:
        log.warning("what was read is not kept in %s, and is read again: %s", job.path, error)
    finally:
        with state.changed:
            state.nbytes -= job.size
            state.waiting[job.path] -= 1
            if not state.waiting[job.path]:
                del state.waiting[job.path]
            if not state.waiting:
                state.awaited.clear()
            state.changed.notify_all()


def _after_fork() -> None:
    # What waits is the parent's, and so is the thread.
    global _state
    _state = _Writing()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
