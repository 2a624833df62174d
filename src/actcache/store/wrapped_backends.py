"""Backends around another one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from actcache.store.backend import Bytes, CacheBackend, ObjectInfo

log = logging.getLogger("actcache.store")

T = TypeVar("T")


class WrappedBackend(CacheBackend):
    """The same place as `inner`, and nothing else: what subclasses change is theirs."""

    def __init__(self, inner: CacheBackend) -> None:
        self.inner = inner
        self.concurrency = inner.concurrency

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def identity(self) -> str:
        return self.inner.identity

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        return self.inner.read(name, start, stop)

    def put(self, name: str, source: Bytes | Path) -> None:
        self.inner.put(name, source)

    def delete(self, name: str) -> None:
        self.inner.delete(name)


class LoggingBackend(WrappedBackend):
    """Counts what another backend is asked, and says it at debug to the logger ``actcache.store``.

    `counts`: how many calls of each of list, read, put and delete, failed ones among them; `requests`: their sum.
    `bytes_read`, `bytes_put`: of calls that succeeded. `seconds`: spent in all of them, added up over threads.
    """

    def __init__(self, inner: CacheBackend) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        with self._lock:
            self.counts = {"list": 0, "read": 0, "put": 0, "delete": 0}
            self.bytes_read = self.bytes_put = 0
            self.seconds = 0.0

    @property
    def requests(self) -> int:
        """How many requests were made, of all kinds."""
        return sum(self.counts.values())

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        def collect() -> tuple[ObjectInfo, ...]:
            return (*self.inner.list(prefix),)

        found = self._timed("list", prefix, collect, len, "objects")
        return iter(found)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        what = f"{name} from {start} to {'the end' if stop is None else stop}"
        data = self._timed("read", what, lambda: self.inner.read(name, start, stop), _size)
        with self._lock:
            self.bytes_read += _size(data)
        return data

    def put(self, name: str, source: Bytes | Path) -> None:
        size = source.stat().st_size if isinstance(source, Path) else _size(source)
        self._timed("put", name, lambda: self.inner.put(name, source), lambda _: size)
        with self._lock:
            self.bytes_put += size

    def delete(self, name: str) -> None:
        self._timed("delete", name, lambda: self.inner.delete(name))

    def _timed(
        self,
        verb: str,
        what: str,
        call: Callable[[], T],
        amount: Callable[[T], int] | None = None,
        unit: str = "bytes",
    ) -> T:
        began = time.perf_counter()
        outcome = "failed"
        try:
            result = call()
            outcome = f"{amount(result):,} {unit}" if amount else "done"
            return result
        except Exception as error:
            outcome = f"failed: {error}"
            raise
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                self.counts[verb] += 1
                self.seconds += seconds
            log.debug("%s: %s %s: %s in %.4f s", self.url, verb, what, outcome, seconds)


def _size(data: Bytes) -> int:
    return memoryview(data).nbytes
