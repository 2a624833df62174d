"""Small disks and read-only ones, as the kernel makes them: in a child that has mounts of its own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from store_helpers import in_child, wait_for

_NOT_ALLOWED = 77
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _PRIVATE = 0x1, 0x20, 0x1000, 0x44000


def on_a_small_disk(folder: Path, size: int, work: Callable[[], None]) -> None:
    """Run `work` in a child for which `folder` is an empty file system of `size` bytes."""
    _in_child_with([(b"tmpfs", folder, b"tmpfs", 0, f"size={size}".encode())], work)


def on_a_read_only_disk(folder: Path, work: Callable[[], None]) -> None:
    """Run `work` in a child in which nobody, root included, may write anything into `folder`."""
    bind = (os.fsencode(folder), folder, None, _BIND, None)
    _in_child_with([bind, (None, folder, None, _BIND | _REMOUNT | _READ_ONLY, None)], work)


def _in_child_with(
    mounts: list[tuple[bytes | None, Path, bytes | None, int, bytes | None]], work: Callable[[], None]
) -> None:
    """Skips where nothing may be mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def child() -> None:
        if libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)):
            os._exit(_NOT_ALLOWED)
        if user:
            for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path(f"/proc/self/{name}").write_text(content)
        if libc.mount(None, b"/", None, _PRIVATE, None):
            os._exit(_NOT_ALLOWED)
        for source, target, kind, flags, options in mounts:
            if libc.mount(source, os.fsencode(target), kind, flags, options):
                os._exit(_NOT_ALLOWED)
        work()

    status = wait_for(in_child(child))
    if status == _NOT_ALLOWED:
        pytest.skip("no file system may be mounted here")
    assert status == 0
