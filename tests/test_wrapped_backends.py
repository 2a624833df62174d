"""Backends around another one: what they count, say, and make fail."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path

import pytest

import actcache as ac
from actcache.errors import BackendError, OptionError, StoreAccessError
from actcache.testing import Fault, FaultyBackend


def test_requests_and_bytes_are_counted(tmp_path: Path) -> None:
    backend = ac.LoggingBackend(ac.MemoryBackend("place"))
    source = tmp_path / "file"
    source.write_bytes(bytes(50))
    backend.put("v1/a", bytes(100))
    backend.put("v1/b", source)
    backend.read("v1/a", 90, 200)
    backend.read("v1/b")
    list(backend.list("v1/"))
    backend.delete("v1/a")
    with pytest.raises(FileNotFoundError):
        backend.read("v1/a")
    assert backend.counts == {"list": 1, "read": 3, "put": 2, "delete": 1} and backend.requests == 7
    assert (backend.bytes_put, backend.bytes_read) == (150, 60) and backend.seconds > 0
    backend.reset()
    assert (backend.requests, backend.bytes_put, backend.bytes_read, backend.seconds) == (0, 0, 0, 0)


def test_threads_are_counted_together() -> None:
    backend = ac.LoggingBackend(ac.MemoryBackend())
    backend.put("a", bytes(10))
    threads = [threading.Thread(target=lambda: [backend.read("a") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (backend.counts["read"], backend.bytes_read) == (4000, 40_000)


def test_every_operation_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="actcache.store")
    backend = ac.LoggingBackend(ac.MemoryBackend("place"))
    backend.put("v1/a", bytes(1234))
    backend.read("v1/a", 4, 6)
    backend.read("v1/a", 4)
    list(backend.list("v1/"))
    backend.delete("v1/a")
    with pytest.raises(FileNotFoundError):
        backend.read("v1/a")
    said = [re.sub(r" in [\d.]+ s$", "", record.getMessage()) for record in caplog.records]
    assert said == [
        "memory://place: put v1/a: 1,234 bytes", "memory://place: read v1/a from 4 to 6: 2 bytes",
        "memory://place: read v1/a from 4 to the end: 1,230 bytes", "memory://place: list v1/: 1 objects",
        "memory://place: delete v1/a: done",
        "memory://place: read v1/a from 0 to the end: failed: memory://place has no object v1/a",
    ]  # fmt: skip
    assert {(record.name, record.levelname) for record in caplog.records} == {("actcache.store", "DEBUG")}


def test_a_backend_around_another_is_the_same_place() -> None:
    inner = ac.MemoryBackend("place")
    inner.concurrency = 3
    for outer in (ac.LoggingBackend(inner), FaultyBackend(inner)):
        assert (outer.url, outer.identity, outer.concurrency) == (inner.url, inner.identity, 3)


def test_an_error_comes_before_or_after_the_effect() -> None:
    inner = ac.MemoryBackend()
    backend = FaultyBackend(inner, [Fault("error before", "put", times=1), Fault("error after", "delete", times=1)])
    with pytest.raises(BackendError, match="before any effect"):
        backend.put("a", b"0")
    assert not list(inner.list())
    backend.put("a", b"0")
    with pytest.raises(BackendError, match="after the effect"):
        backend.delete("a")
    assert not list(inner.list())
    assert backend.happened == [("error before", "put", "a"), ("error after", "delete", "a")]


def test_an_error_may_be_any() -> None:
    backend = FaultyBackend(ac.MemoryBackend(), [Fault("error before", error=StoreAccessError)])
    with pytest.raises(StoreAccessError):
        backend.read("a")


def test_what_is_read_may_be_wrong() -> None:
    inner = ac.MemoryBackend()
    inner.put("a", b"0123456789")
    backend = FaultyBackend(inner, [Fault("short", times=1), Fault("flipped", times=1), Fault("missing", times=1)])
    assert bytes(backend.read("a")) == b"01234"
    flipped = bytes(backend.read("a"))
    assert len(flipped) == 10 and sum(x != y for x, y in zip(flipped, b"0123456789", strict=True)) == 1
    with pytest.raises(FileNotFoundError):
        backend.read("a")
    assert bytes(backend.read("a")) == b"0123456789"


def test_a_listing_may_be_late() -> None:
    backend = FaultyBackend(ac.MemoryBackend(), [Fault("stale", times=1)])
    backend.put("v1/a", b"0")
    assert not list(backend.list("v1/"))
    assert [o.name for o in backend.list("v1/")] == ["v1/a"]
    backend.put("v1/b", b"0")
    backend.delete("v1/a")
    backend.faults.append(Fault("stale", after=0, times=1, names="v1"))
    assert [o.name for o in backend.list("v1/")] == ["v1/a"]
    assert [o.name for o in backend.list("v1/")] == ["v1/b"]


def test_a_stall_only_takes_time() -> None:
    backend = FaultyBackend(ac.MemoryBackend(), [Fault("stall", "put", seconds=0.2)])
    began = time.monotonic()
    backend.put("a", b"0")
    assert time.monotonic() - began >= 0.2 and bytes(backend.read("a")) == b"0"


def test_faults_choose_names_and_turns() -> None:
    backend = FaultyBackend(ac.MemoryBackend(), [Fault("error before", "put", names=r"\.bin$", after=2, times=2)])
    outcomes = []
    for number in range(8):
        backend.put(f"{number}.txt", b"0")
        try:
            backend.put(f"{number}.bin", b"0")
            outcomes.append("ok")
        except BackendError:
            outcomes.append("failed")
    assert outcomes == ["ok", "ok", "failed", "failed", "ok", "ok", "ok", "ok"]


def test_a_seed_gives_the_same_faults() -> None:
    def run(seed: int) -> list[tuple[str, str, str]]:
        backend = FaultyBackend(ac.MemoryBackend(), [Fault("missing", probability=0.3)], seed=seed)
        backend.put("a", b"0")
        for _ in range(100):
            try:
                backend.read("a")
                backend.happened.append(("fine", "read", "a"))
            except FileNotFoundError:
                pass
        return backend.happened

    assert run(1) == run(1) != run(2)
    assert 10 < sum(kind == "missing" for kind, _, _ in run(1)) < 50


@pytest.mark.parametrize(
    ("kind", "verb", "said"),
    [("error", None, "error before"), ("stal", None, "stall"), ("short", "put", "read only"), ("stale", "read", "list"),
     ("stall", "reed", "'read'")],
)  # fmt: skip
def test_a_fault_that_is_none_is_refused(kind: str, verb: str | None, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Fault(kind, verb)
