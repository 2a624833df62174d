"""For which thread a pass runs: what one puts on modules is met by its own passes only.

The one exception works for that thread: where `backward()` runs blocks again (gradient checkpointing), autograd does so
on a CUDA device in a thread of its own, to which it brings torch's thread-local objects of the thread that called
`backward()`; our key is among them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_KEY = "actcache.thread"
_is_key_in_tls: Callable[[str], bool] = torch._C._is_key_in_tls
_get_obj_in_tls: Callable[[str], object] = torch._C._get_obj_in_tls


class _Here(threading.local):
    # A thread's number is given out again after its end; an object is not.
    key: object | None = None
    unseen = False


here = _Here()


def thread_key() -> object:
    """What stands for this thread: what is put on modules under it is met by the passes of this thread only."""
    key = here.key
    if key is None:
        key = here.key = object()
        torch._C._stash_obj_in_tls(_KEY, key)
    return key


@contextmanager
def unseen() -> Iterator[None]:
    """Passes of this thread meet nothing that any block put on modules; those of other threads meet what they did."""
    key, before, at_work = here.key, here.unseen, key_at_work()
    here.key, here.unseen = object(), True
    torch._C._stash_obj_in_tls(_KEY, here.key)
    try:
        yield
    finally:
        here.key, here.unseen = key, before
        # In a thread that works for another one this is not its own.
        torch._C._stash_obj_in_tls(_KEY, at_work)


@contextmanager
def working_for(key: object) -> Iterator[None]:
    """Passes of this thread are those of the thread that `key` stands for, and meet what that one put on modules."""
    before, at_work = here.key, key_at_work()
    here.key = key
    torch._C._stash_obj_in_tls(_KEY, key)
    try:
        yield
    finally:
        here.key = before
        torch._C._stash_obj_in_tls(_KEY, at_work)


def key_at_work() -> object | None:
    """The key of the thread for which this one works; its own, or none, where it works for itself."""
    return _get_obj_in_tls(_KEY) if _is_key_in_tls(_KEY) else None


def works_for(key: object | None) -> bool:
    """Whether the passes of this thread are those of the thread that `key` stands for."""
    return key is not None and (key is here.key or key is key_at_work())
