"""The extension module of obstore, usable in children of a fork too.

It runs its requests in threads of its own, which a forked child does not inherit: there every call would wait for
ever. A child therefore loads the extension once more from a copy, which has threads and connections of its own, and
never lets go of what it inherited: that might wait for a lock that one of the lost threads had.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from typing import Any

from actcache.errors import MissingExtraError

_NAME = "obstore._obstore"

_lock = threading.Lock()
_module: Any = None
_inherited = False


def library() -> Any:
    """obstore's extension module, for this process.

    Raises MissingExtraError: obstore is not installed.
    """
    global _module
    with _lock:
        if _module is None:
            try:
                original: Any = importlib.import_module(_NAME)
                # Of the same extra; without it there are no credentials.
                importlib.import_module("botocore")
            except ImportError as error:
                raise MissingExtraError(
                    f"object stores (s3://, gs://, az://) need {error.name or 'obstore'}: pip install 'actcache[s3]'"
                ) from error
            _module = _copy(original.__file__) if _inherited else original
        return _module


def never_free(item: Any) -> None:
    """Let `item` live to the end of the process, and through it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def _copy(path: str) -> Any:
    # Two libraries of one file, or of one path, would be one. The path has this process in it, as its child forks too.
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("obstore", os.MFD_CLOEXEC)
        name = f"/proc/{os.getpid()}/fd/{fd}"
    else:
        fd, name = tempfile.mkstemp(prefix=f"obstore-{os.getpid()}-", suffix=".so")
    with open(path, "rb") as file, open(fd, "wb", closefd=False) as copy:
        shutil.copyfileobj(file, copy)
    loader = importlib.machinery.ExtensionFileLoader(_NAME, name)
    spec = importlib.util.spec_from_file_location(_NAME, loader.path, loader=loader)
    assert spec is not None
    # It puts its submodules where those of the original are.
    before = {name: module for name, module in sys.modules.items() if name.startswith("obstore")}
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        sys.modules.update(before)
        os.close(fd)
        if not name.startswith("/proc/"):
            os.unlink(name)
    return module


def _in_child() -> None:
    global _lock, _module, _inherited
    _lock = threading.Lock()
    _inherited = _inherited or _NAME in sys.modules
    with contextlib.suppress(Exception):
        never_free(_module)
    _module = None


os.register_at_fork(after_in_child=_in_child)
