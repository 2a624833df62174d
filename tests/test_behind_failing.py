"""What has just come when something fails: damage, full disks, mirrors that go, processes that end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actcache.errors import NotCachedError
from actcache.store import behind, wanted
from actcache.store.backend import Bytes, LocalBackend
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from behind_helpers import ROWS, TABLE, VALUES, WIDTH, Counting, equal, held_back, place, waits, written
from bucket_helpers import opened


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with held_back(monkeypatch):
        yield


@pytest.fixture
def backend(tmp_path: Path) -> Counting:
    return written(tmp_path / "writer")


@pytest.fixture
def reader(backend: Counting, tmp_path: Path) -> tuple[Store, str]:
    return opened(backend, tmp_path / "reader")


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("lasts", [False, True])
def test_damage_is_found_before_an_answer(
    reader: tuple[Store, str], backend: Counting, check: bool, lasts: bool
) -> None:
    """What passes is read once more; of what lies in a block that is wrong in the object nothing is given."""
    wrong: list[int] = []

    def change(data: bytearray, start: int) -> None:
        if lasts or not wrong:
            wrong[:] = wrong or [start + BLOCK + 17]
            if 0 <= wrong[0] - start < len(data) - 1:
                data[1 + wrong[0] - start] ^= 1

    backend.on_read = change
    found = place(reader, check=check)
    lost = range(BLOCK // (WIDTH * 4), 2 * BLOCK // (WIDTH * 4) + 1) if lasts else range(0)
    if lasts and not check:
        with pytest.raises(NotCachedError, match="damaged"):
            found.take()
        found = place(reader, check=True)
    assert set(np.flatnonzero(~found.found)) == (set(lost) if check or lasts else set())
    good = np.flatnonzero(found.found)
    np.testing.assert_array_equal(found.take(index=good)[:, 0], VALUES["b"][good])


def test_a_full_disk_keeps_nobody_from_reading(
    reader: tuple[Store, str], backend: Counting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = wanted.write_all

    def write_all(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wanted, "write_all", write_all)
    for _ in range(2):
        assert equal(place(reader).take())
        behind.settle()
    assert backend.reads == 2 and reader[0].spaces()
    assert sum("no room" in record.message for record in caplog.records) == 2
    assert all(record.levelno <= logging.WARNING for record in caplog.records)
    monkeypatch.setattr(wanted, "write_all", real)
    for _ in range(2):
        assert equal(place(reader).take())
    assert backend.reads == 3


def test_a_full_disk_makes_room_for_what_comes_next(reader: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal(place(reader, ["a"]).take(), "a")
    behind.settle()
    (path,) = reader[0].root.glob("*/*.safetensors")
    real = wanted.write_all
    before = path.stat().st_blocks
    monkeypatch.setattr(wanted, "write_all", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert equal(place(reader).take())
    behind.settle()
    monkeypatch.setattr(wanted, "write_all", real)
    assert equal(place(reader, check=True).take())
    behind.settle()
    assert path.stat().st_blocks < 1.5 * before, "what was read first has gone"


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_write_that_fails_is_told_and_nothing_else(
    reader: tuple[Store, str], backend: Counting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    part: float,
) -> None:  # fmt: skip
    real = wanted.write_all

    def write_all(fd: int, buffers: list[memoryview], offset: int) -> int:
        real(fd, [b[: int(part * len(b))] for b in buffers], offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(wanted, "write_all", write_all)
    assert equal(place(reader).take())
    behind.settle()
    assert any("read again" in record.message for record in caplog.records)
    monkeypatch.setattr(wanted, "write_all", real)
    assert equal(place(reader).take()) and backend.reads == 2


@pytest.mark.parametrize("how", ["dropped", "renewed"])
def test_a_mirror_that_goes_before_it_is_written(reader: tuple[Store, str], backend: Counting, how: str) -> None:
    store, _ = reader
    assert equal(place(reader).take())
    (path,) = store.root.glob("*/*.safetensors")
    copy = store._copy
    assert copy is not None
    (copy.drop if how == "dropped" else copy.renew)(path)
    behind.settle()
    assert equal(place(reader, check=True).take())
    behind.settle()
    asked = backend.reads
    assert equal(place(reader).take()) and backend.reads == asked


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_reads_what_is_on_its_way_in_its_parent(reader: tuple[Store, str]) -> None:
    assert equal(place(reader).take())
    child = os.fork()
    if not child:
        try:
            os._exit(0 if equal(place(reader).take()) and not _of_parent() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert waits()


def _of_parent() -> bool:
    """Whether what the child waits for is more than its own."""
    behind.settle()
    return waits()


_READER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from actcache.store import behind, bringing
from actcache.store.backend import LocalBackend
from bucket_helpers import opened
from store_helpers import make_table

class Elsewhere(LocalBackend):
    pass

bringing._LEAST_BEHIND, behind._LINGER_S = 0, float(sys.argv[3])
store, space = opened(Elsewhere(sys.argv[1]), Path(sys.argv[2]))
place = store.locate(space, table=make_table(range(int(sys.argv[4]))), sites=["b"], layout="mean", check=False)
print(float(place.take().sum(dtype=np.float64)), len(behind._state.waiting), flush=True)
if sys.argv[5] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "ends"])
def test_a_process_that_goes_before_it_has_written(tmp_path: Path, end: str) -> None:
    """Killed, it has kept nothing, and spoilt nothing; where it ends by itself, all of it."""

    class Elsewhere(LocalBackend):
        reads = 0

        def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
            self.reads += bool(start) and name.endswith(".safetensors")
            return super().read(name, start, stop)

    bucket = Elsewhere(tmp_path / "bucket")
    store, space = opened(bucket, tmp_path / "writer")
    with store:
        store.append(space, Records.pooled(TABLE, "mean", VALUES))
    command = [sys.executable, "-c", _READER, str(tmp_path / "bucket"), str(tmp_path / "reader")]
    linger = "600" if end == "killed" else "0.2"
    done = subprocess.run(
        [*command, linger, str(ROWS), end], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    total, waiting = done.stdout.split()
    assert float(total) == float(VALUES["b"].sum(dtype=np.float64)) and waiting == "1"
    reader = opened(bucket, tmp_path / "reader")
    bucket.reads = 0
    assert equal(place(reader).take())
    assert bucket.reads == (1 if end == "killed" else 0)
    behind.settle()
    assert equal(place(opened(bucket, tmp_path / "reader")).take())
    assert bucket.reads == (1 if end == "killed" else 0)


_STUCK = """
import sys, threading, time
from pathlib import Path
from actcache.store import bringing
from actcache.store.backend import LocalBackend
from bucket_helpers import opened
from store_helpers import make_table

class Stuck(LocalBackend):
    concurrency = 1

    def read(self, name, start=0, stop=None):
        if start and name.endswith(".safetensors"):
            print("reads", flush=True)
            reads.set()
            time.sleep(600)
        return super().read(name, start, stop)

reads = threading.Event()
bringing._LEAST_BEHIND = 0
store, space = opened(Stuck(sys.argv[1]), Path(sys.argv[2]))
place = store.locate(space, table=make_table(range(int(sys.argv[3]))), sites=["b"], layout="mean", check=False)
threading.Thread(target=place.take, daemon=True).start()
assert reads.wait(60)
"""


def test_a_process_ends_while_a_daemon_of_it_waits_for_a_server(tmp_path: Path) -> None:
    store, space = opened(LocalBackend(tmp_path / "bucket"), tmp_path / "writer")
    with store:
        store.append(space, Records.pooled(TABLE, "mean", VALUES))
    done = subprocess.run(
        [sys.executable, "-c", _STUCK, str(tmp_path / "bucket"), str(tmp_path / "reader"), str(ROWS)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "reads\n", done.stderr
