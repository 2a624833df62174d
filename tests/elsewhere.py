"""Stores whose objects lie elsewhere: backends to look into, to break, and to share between processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import BackendError
from actcache.store.backend import CacheBackend, LocalBackend, ObjectInfo
from actcache.store.records import Records
from actcache.store.store import Store
from store_helpers import check_pooled, make_table

IDENTITY = {"weights": "abc"}, {"model_name": "org/model", "revision": "r1", "dtype": "float32"}


class Wrapped(CacheBackend):
    """Passes everything on."""

    def __init__(self, inner: CacheBackend) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        return f"wrapped:{self.inner.url}"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self.inner.read(name, start, stop)

    def put(self, name: str, source: Any) -> None:
        self.inner.put(name, source)

    def delete(self, name: str) -> None:
        self.inner.delete(name)


class Folder(Wrapped):
    """Objects in a folder, for several processes; a `Store` does not know that they are files of its own machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalBackend(folder))


class Watched(Wrapped):
    """Notes every call as (method, name), and asks `before` and `after` about it, which may raise."""

    def __init__(self, inner: CacheBackend) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], object] = lambda method, name: None
        self.after: Callable[[str, str], object] = lambda method, name: None
        self._lock = threading.Lock()

    def _called(self, method: str, name: str, work: Callable[[], Any]) -> Any:
        with self._lock:
            self.calls.append((method, name))
        self.before(method, name)
        found = work()
        self.after(method, name)
        return found

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(self._called("list", prefix, lambda: list(self.inner.list(prefix))))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self._called("read", name, lambda: self.inner.read(name, start, stop))

    def put(self, name: str, source: Any) -> None:
        self._called("put", name, lambda: self.inner.put(name, source))

    def delete(self, name: str) -> None:
        self._called("delete", name, lambda: self.inner.delete(name))

    def count(self, method: str, suffix: str = "") -> int:
        """How many calls of that method there were for names that end so."""
        return sum(m == method and n.endswith(suffix) for m, n in self.calls)


def failing(method: str, suffix: str = "") -> Callable[[str, str], None]:
    """For `Watched`: calls of that method, for names that end so, fail."""

    def fail(called: str, name: str) -> None:
        if called == method and name.endswith(suffix):
            raise BackendError(f"{method} of {name} was cut off")

    return fail


def killing(at: int) -> Callable[[str, str], None]:
    """For `Watched`: the process is killed at its call number `at` that changes anything."""
    left = [at]

    def kill(called: str, name: str) -> None:
        if called in ("put", "delete"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return kill


def machine(backend: CacheBackend, folder: Path, **options: Any) -> tuple[Store, str]:
    """A store over `backend` as a machine of its own sees it, which keeps what it must in `folder`; and its space."""
    store = Store(backend, index_dir=folder, **options)
    return store, store.open_space(*IDENTITY)


def objects(backend: CacheBackend, suffix: str = ".safetensors") -> list[str]:
    """The names of the objects that end so."""
    return sorted(info.name for info in backend.list() if info.name.endswith(suffix))


def two(backend: CacheBackend, folder: Path) -> tuple[Store, Store, str]:
    """Two machines that share a store, which keep what is theirs in folders of `folder`; and its space."""
    (one, space), (other, _) = machine(backend, folder / "a"), machine(backend, folder / "b")
    return one, other, space


def found(store: Store, space: str, numbers: Any) -> list[bool]:
    """Which prompts a machine finds when it has looked; their values are compared."""
    store.refresh()
    answer: list[bool] = check_pooled(store, space, numbers).tolist()
    return answer


def names(backend: Wrapped) -> set[str]:
    """Of all objects."""
    return {info.name for info in backend.inner.list()}


def soon(true: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether it becomes so before that time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.01)
    return False


def seen(backend: Any, folder: Path, numbers: Any) -> list[bool]:
    """Which prompts a machine finds that has never been there before."""
    store, space = machine(backend, folder)
    found: list[bool] = check_pooled(store, space, numbers).tolist()
    return found


def large(numbers: range, sites: int = 4, dim: int = 256) -> Records:
    """Pooled rows that say of which prompt and site they are."""
    data = {f"resid_post.{k}": np.stack([np.full(dim, 100 * i + k, np.float32) for i in numbers]) for k in range(sites)}
    return Records.pooled(make_table(numbers), "last_token", data)
