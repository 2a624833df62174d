"""How what is read from elsewhere is cut into requests."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import BackendError
from actcache.store import copied, fetching, placement
from actcache.store.backend import Bytes, MemoryBackend
from actcache.store.records import Records
from bucket_helpers import opened
from store_helpers import make_table

MB = 1 << 20
WIDTH = 1024


class Counting(MemoryBackend):
    """Notes how long the ranges of rows are that are read."""

    concurrency = 4

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = super().read(name, start, stop)
        if start and name.endswith(".safetensors"):
            self.lengths.append(len(data))
        return data


@pytest.mark.parametrize(
    ("size", "requests", "longest"),
    [(MB // 2, 1, MB // 2), (3 * MB, 2, 3 * MB // 2), (16 * MB, 4, 4 * MB), (48 * MB, 6, 8 * MB)],
)
def test_little_is_read_by_few_and_much_by_all_connections(
    tmp_path: Path, size: int, requests: int, longest: int
) -> None:
    backend = Counting()
    rows = size // (4 * WIDTH)
    values = np.random.default_rng(0).standard_normal((rows, WIDTH), np.float32)
    store, space = opened(backend, tmp_path / "writer")
    with store:
        store.append(space, Records.pooled(make_table(range(rows)), "mean", {"a": -values, "b": values}))
    other, _ = opened(backend, tmp_path / "reader")
    with other:
        place = other.locate(space, table=make_table(range(rows)), sites=["b"], layout="mean", check=False)
        assert not backend.lengths, "where something is takes no rows to tell"
        np.testing.assert_array_equal(place.take()[:, 0], values)
    assert sum(backend.lengths) == size
    assert len(backend.lengths) == requests
    assert max(backend.lengths) == longest


class Refusing(Counting):
    """Notes the ranges of rows that it is asked for, and then fails."""

    concurrency = 2
    refuses = False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = super().read(name, start, stop)
        if self.refuses and start and name.endswith(".safetensors"):
            raise BackendError(f"{name} cannot be read")
        return data


def test_a_connection_that_has_failed_begins_no_other_range(tmp_path: Path) -> None:
    """Each may take as long as the deadline allows until it fails."""
    backend = Refusing()
    rows = 48 * MB // (4 * WIDTH)
    store, space = opened(backend, tmp_path / "writer")
    with store:
        values = np.zeros((rows, WIDTH), np.float32)
        store.append(space, Records.pooled(make_table(range(rows)), "mean", {"a": values}))
    other, _ = opened(backend, tmp_path / "reader")
    with other:
        place = other.locate(space, table=make_table(range(rows)), sites=["a"], layout="mean", check=False)
        backend.refuses = True
        backend.lengths.clear()
        with pytest.raises(BackendError, match="cannot be read"):
            place.take()
    assert 1 <= len(backend.lengths) <= Refusing.concurrency


class Telling(Counting):
    """Tells when rows have come."""

    def __init__(self) -> None:
        super().__init__()
        self.come = threading.Event()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = super().read(name, start, stop)
        if self.lengths:
            self.come.set()
        return data


def test_where_no_room_can_be_made_for_an_answer_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is made room for while its bytes come, which then have nowhere to go."""
    backend = Telling()
    table = make_table(range(700))
    values = np.random.default_rng(0).standard_normal((int(table.token_offset[-1]), WIDTH), np.float32)
    store, space = opened(backend, tmp_path / "writer")
    with store:
        store.append(space, Records.tokens(table, {"a": values}))
    other, _ = opened(backend, tmp_path / "reader")

    def no_room(*_: object) -> None:
        assert backend.come.wait(60), "bytes come meanwhile"
        raise MemoryError("no room")

    with other, ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(copied, "Rows", no_room)
            with pytest.raises(MemoryError, match="no room"):
                pool.submit(other.read, space, None, "a").result(timeout=60)
        found = pool.submit(other.read, space, None, "a").result(timeout=60)
        np.testing.assert_array_equal(np.concatenate(found), values)


class Noting(Counting):
    """Notes how many reads of rows have begun; each takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        if start and name.endswith(".safetensors"):
            self.begun += 1
            time.sleep(0.02)
        return super().read(name, start, stop)


def test_what_is_prepared_meanwhile_waits_until_all_connections_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an answer goes is worked out in Python, beside which no other thread could begin."""
    backend = Noting()
    rows = 16 * MB // (4 * WIDTH)
    values = np.random.default_rng(0).standard_normal((rows, WIDTH), np.float32)
    store, space = opened(backend, tmp_path / "writer")
    with store:
        store.append(space, Records.pooled(make_table(range(rows)), "mean", {"a": -values, "b": values}))
    seen = []
    original = placement.deliveries

    def noting(*arguments: Any) -> Any:
        seen.append(backend.begun)
        return original(*arguments)

    monkeypatch.setattr(placement, "deliveries", noting)
    monkeypatch.setattr(fetching, "_BEGIN_S", 10)
    other, _ = opened(backend, tmp_path / "reader")
    interval = sys.getswitchinterval()
    with other:
        # Threads that are there already wait for the interpreter, which nobody takes from whoever has it.
        other.read(space, None, "a", pooling="mean")
        backend.begun = 0
        sys.setswitchinterval(10)
        try:
            answer = other.read(space, None, "b", pooling="mean")
        finally:
            sys.setswitchinterval(interval)
    assert seen[1:] == [backend.concurrency]
    assert sorted(answer[:, 0].tolist()) == sorted(values[:, 0].tolist())
