"""Processes that tests start end with their test, or with the process that runs it, whatever happens to either.

One that went on would keep the machine busy under the tests that follow, and whoever reads what pytest prints waiting
for the end of it. This is a plugin of pytest, which `conftest` registers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_DEATH_SIGNAL, _SUBREAPER = 1, 36
_ROUNDS = 100
_TASKS = Path("/proc/self/task")
_LISTS = _TASKS / str(threading.main_thread().native_id) / "children"

_owner = _forking = os.getpid()
_main = threading.main_thread().ident
_kept: set[int] = set()
"""Of fixtures that outlive a test."""
_outputs: dict[int, tuple[int, int]] = {}
"""Descriptors by which this process tells others of its tests, and what they are of."""


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _in_forked_child() -> None:
    # The kernel means the thread that has forked; and whoever wants a child to outlive a child may have that.
    if threading.get_ident() == _main and _forking == _owner:
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        # By then it may have ended already.
        if os.getppid() != _owner:
            os._exit(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd, of in _outputs.items():
        with contextlib.suppress(OSError):
            if _identity(fd) == of:
                os.dup2(nowhere, fd)
    os.close(nowhere)


os.register_at_fork(before=_before_fork, after_in_child=_in_forked_child)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def children() -> set[int]:
    """The children of this process: also those that the end of a child has left behind."""
    return {pid for pid in (_listed() if _LISTS.exists() else _searched()) if not _is_of_the_interpreter(pid)}


def _listed() -> set[int]:
    found: set[int] = set()
    for task in os.listdir(_TASKS):
        with contextlib.suppress(OSError):
            found |= set(map(int, (_TASKS / task / "children").read_text().split()))
    return found


def _searched() -> set[int]:
    """`_listed`, for kernels without such lists: much slower."""
    mine, found = str(os.getpid()), set()
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError):
            # The parent is the second thing behind the name, which may hold anything.
            if Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1] == mine:
                found.add(int(name))
    return found


def _is_of_the_interpreter(pid: int) -> bool:
    """Whether it is what multiprocessing starts once for all, and ends with this process."""
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def end_all_but(kept: set[int]) -> None:
    """Kill the other children of this process, and what they leave behind."""
    for _ in range(_ROUNDS):
        left = children() - kept
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            # The other error is how torch tells that a worker of a loader, which a test has left alive, was killed.
            with contextlib.suppress(ChildProcessError, RuntimeError):
                os.waitpid(pid, 0)


def pytest_sessionstart() -> None:
    _prctl(_SUBREAPER, 1)
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd):
                _outputs[fd] = _identity(fd)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    if fixturedef.scope == "function":
        return (yield)
    before = children()
    try:
        return (yield)
    finally:
        _kept.update(children() - before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        _kept.intersection_update(children())
        end_all_but(_kept)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    # With several processes also what the end of one of them has left behind.
    end_all_but(set())
