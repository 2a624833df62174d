"""A backend that goes wrong where it is told to."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import BackendError, OptionError, require_choice
from actcache.store.backend import Bytes, CacheBackend, ObjectInfo
from actcache.store.wrapped_backends import WrappedBackend

VERBS = ("list", "read", "put", "delete")
KINDS = ("error before", "error after", "short", "flipped", "stall", "stale", "missing")
_OF_READS = ("short", "flipped", "missing")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when.

    `kind`: ``"error before"`` raises `error` instead of the call, ``"error after"`` when its effect is there;
    ``"short"`` gives half of the bytes asked for, ``"flipped"`` all of them with one changed, ``"missing"`` says that
    there is no such object; ``"stall"`` waits `seconds` first; ``"stale"`` lists what an earlier list has given,
    nothing at first. `verb`: of list, read, put and delete (None: any that it can happen to). `names`: a regular
    expression that the name, or the prefix, has to match in part. `probability`: of each such call. `times`: how often
    at most. `after`: how many such calls go well before.
    """

    kind: str
    verb: str | None = None
    names: str = ""
    probability: float = 1.0
    times: int | None = None
    after: int = 0
    seconds: float = 0.0
    error: Callable[[str], Exception] = BackendError

    def __post_init__(self) -> None:
        require_choice(self.kind, KINDS, "kind of fault")
        possible = self.verbs
        if self.verb is not None and require_choice(self.verb, VERBS, "verb") not in possible:
            raise OptionError(f"{self.kind!r} happens to {' and '.join(possible)} only, not to {self.verb}.")

    @property
    def verbs(self) -> Sequence[str]:
        """The calls that this can happen to, whatever `verb` chooses of them."""
        return ("read",) if self.kind in _OF_READS else ("list",) if self.kind == "stale" else VERBS


class FaultyBackend(WrappedBackend):
    """Another backend with faults; the first of `faults` that fits a call happens to it.

    With one thread the same `seed` gives the same faults. `happened`: kind, verb and name of each, in order. `faults`
    may be changed at any time.
    """

    def __init__(self, inner: CacheBackend, faults: Sequence[Fault] = (), *, seed: int = 0) -> None:
        super().__init__(inner)
        self.faults = list(faults)
        self.happened: list[tuple[str, str, str]] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._fitted: dict[Fault, int] = {}
        self._done: dict[Fault, int] = {}
        self._listed: dict[str, list[ObjectInfo]] = {}

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        fault = self._begin("list", prefix)
        if fault is not None and fault.kind == "stale":
            return iter(self._listed.get(prefix, ()))
        found = [*self.inner.list(prefix)]
        self._listed[prefix] = found
        self._end(fault, "list", prefix)
        return iter(found)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        fault = self._begin("read", name)
        kind = fault.kind if fault is not None else ""
        if kind == "missing":
            raise FileNotFoundError(f"{self.url} has no object {name} (a fault)")
        data = self.inner.read(name, start, stop)
        self._end(fault, "read", name)
        if kind == "short":
            return memoryview(data)[: len(data) // 2]
        if kind == "flipped" and len(data):
            changed = bytearray(data)
            changed[self._random.randrange(len(changed))] ^= 0xFF
            return changed
        return data

    def put(self, name: str, source: Bytes | Path) -> None:
        fault = self._begin("put", name)
        self.inner.put(name, source)
        self._end(fault, "put", name)

    def delete(self, name: str) -> None:
        fault = self._begin("delete", name)
        self.inner.delete(name)
        self._end(fault, "delete", name)

    def _begin(self, verb: str, name: str) -> Fault | None:
        with self._lock:
            fault = next((f for f in self.faults if self._happens(f, verb, name)), None)
            if fault is None:
                return None
            self.happened.append((fault.kind, verb, name))
        if fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault.kind == "error before":
            raise fault.error(f"{verb} {name}: a fault, before any effect")
        return fault

    def _happens(self, fault: Fault, verb: str, name: str) -> bool:
        if verb not in fault.verbs or fault.verb not in (None, verb) or not re.search(fault.names, name):
            return False
        if fault.times is not None and self._done.get(fault, 0) >= fault.times:
            return False
        self._fitted[fault] = self._fitted.get(fault, 0) + 1
        if self._fitted[fault] <= fault.after or self._random.random() >= fault.probability:
            return False
        self._done[fault] = self._done.get(fault, 0) + 1
        return True

    @staticmethod
    def _end(fault: Fault | None, verb: str, name: str) -> None:
        if fault is not None and fault.kind == "error after":
            raise fault.error(f"{verb} {name}: a fault, after the effect")
