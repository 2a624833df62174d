"""Answers from what has just come: right before it is in any file, and whatever becomes of its way there."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actcache.errors import BackendError, NotCachedError
from actcache.store import behind, checks, fetching, gather, mirror, placement
from actcache.store.backend import Bytes, LocalBackend, MemoryBackend
from actcache.store.container import Tensor
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.receiving import Received, Rows
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from bucket_helpers import opened
from store_helpers import make_table

# Rows that do not divide blocks, and several blocks of them.
WIDTH, ROWS = 500, 400
SITES = ["a", "b"]
RNG = np.random.default_rng(0)
VALUES = {site: RNG.standard_normal((ROWS, WIDTH), np.float32) for site in SITES}
NUMBERS = range(ROWS)
TABLE = make_table(NUMBERS)


class Counting(MemoryBackend):
    """Counts reads of rows, gives bytes that begin at odd addresses, and does what a test tells it to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.on_read: Callable[[bytearray, int], object] = lambda data, start: None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = bytearray(b"x") + super().read(name, start, stop)
        if start and name.endswith(".safetensors"):
            self.reads += 1
            self.on_read(data, start)
        return memoryview(data)[1:]


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the size, and not before a test waits for it."""
    monkeypatch.setattr(checks, "_LEAST_BEHIND", 0)
    monkeypatch.setattr(behind, "_LINGER_S", 30.0)
    yield
    behind.settle()


@pytest.fixture
def backend(tmp_path: Path) -> Counting:
    backend = Counting()
    store, space = opened(backend, tmp_path / "writer")
    with store:
        store.append(space, Records.pooled(TABLE, "mean", VALUES))
    return backend


@pytest.fixture
def reader(backend: Counting, tmp_path: Path) -> tuple[Store, str]:
    return opened(backend, tmp_path / "reader")


def place(reader: tuple[Store, str], sites: list[str] = SITES[1:], check: bool = False) -> Placement:
    store, space = reader
    return store.locate(space, table=TABLE, sites=sites, layout="mean", check=check)


def equal(got: npt.NDArray[Any], site: str = "b") -> bool:
    return np.array_equal(got[:, 0], VALUES[site])


def waits() -> bool:
    return bool(behind._state.waiting)


@pytest.mark.parametrize("check", [False, True])
def test_an_answer_is_given_before_anything_is_written(reader: tuple[Store, str], check: bool) -> None:
    # The first one looks at what all mirrors take, for which it waits.
    place(reader, ["a"], check=True).take()
    behind.settle()
    assert equal(place(reader, check=check).take())
    (path,) = reader[0].root.glob("*/*.safetensors")
    said = mirror.read_sidecar(path)
    each = -(-ROWS * WIDTH * 4 // BLOCK)
    assert waits() and said is not None and mirror.read_marks(path, said.blocks).sum() == each
    behind.settle()
    assert mirror.read_marks(path, said.blocks).sum() == 2 * each


@pytest.mark.parametrize("check", [False, True])
def test_what_is_on_its_way_is_not_asked_for_again(
    reader: tuple[Store, str], backend: Counting, tmp_path: Path, check: bool
) -> None:
    first = place(reader, check=check)
    assert equal(first.take())
    asked = backend.reads
    assert equal(first.take()) and not waits(), "the second answer is out of the file"
    place(reader, SITES[:1], check=check).take()
    more = backend.reads
    again = opened(backend, tmp_path / "reader")
    assert equal(place(again).take()) and equal(place(again, SITES[:1]).take(), "a")
    assert (asked, more, backend.reads) == (1, 2, 2)


def test_closing_waits_for_what_was_read(reader: tuple[Store, str]) -> None:
    place(reader).take()
    assert waits()
    reader[0].close()
    assert not waits()


def test_every_way_to_read_gives_the_same(backend: Counting, tmp_path: Path) -> None:
    """Tokens and pooled, one site and several, all and some, in any order, into arrays of other dtypes."""
    table = make_table(range(100))
    offset = table.token_offset
    writer, space = opened(backend, tmp_path / "writer")
    with writer:
        writer.append(space, Records.tokens(table, {site: values[: offset[-1]] for site, values in VALUES.items()}))
    some = [7, 7, 3, 99, 0, *range(8, 99)]
    shuffled = np.random.default_rng(1).permutation(ROWS)

    def fresh(layout: str, sites: list[str]) -> Placement:
        behind.settle()
        count[0] += 1
        store, its = opened(backend, tmp_path / f"reader {count[0]}")
        chosen = table if layout == "tokens" else TABLE
        return store.locate(its, table=chosen, sites=sites, layout=layout, check=False)

    count = [0]
    for sites in (["b"], SITES):
        for index in (None, some):
            prompts = range(100) if index is None else index
            found = fresh("tokens", sites).all_rows(index)
            assert waits()
            padded, mask = fresh("tokens", sites).take_padded(index=index)
            assert waits()
            for k, prompt in enumerate(prompts):
                for j, site in enumerate(sites):
                    expected = VALUES[site][offset[prompt] : offset[prompt + 1]]
                    np.testing.assert_array_equal(found[k][j], expected)
                    assert not found[k][j].flags.writeable and found[k][j].flags.aligned
                    cut = padded[k, :, j * WIDTH : (j + 1) * WIDTH]
                    np.testing.assert_array_equal(cut[: len(expected)], expected)
                    assert not cut[len(expected) :].any() and mask[k].sum() == len(expected)
        expected = np.stack([VALUES[site] for site in sites], 1)
        for order in (None, shuffled, shuffled[:350], np.arange(ROWS)[::-1]):
            np.testing.assert_array_equal(
                fresh("mean", sites).take(index=order), expected if order is None else expected[order]
            )
            assert waits()
        out = np.full((ROWS + 5, len(sites), WIDTH), -1, np.float64)
        fresh("mean", sites).take(out, index=np.arange(ROWS), at=shuffled)
        assert waits()
        np.testing.assert_array_equal(out[shuffled], expected)
        assert (out[ROWS:] == -1).all()


@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_rows_in_their_order_go_where_they_are_wanted_as_they_come(
    backend: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: int, given: bool
) -> None:
    """Of several objects, unless some of one is `spoilt` on its way more than once, which is an error."""
    writer, space = opened(backend, tmp_path / "writer")
    table = make_table(range(3 * ROWS))
    values = np.concatenate([VALUES["b"], VALUES["a"], VALUES["b"][::-1]])
    with writer:
        for k in (1, 2):
            part = slice(k * ROWS, (k + 1) * ROWS)
            writer.append(space, Records.pooled(table.select(np.arange(3 * ROWS)[part]), "mean", {"b": values[part]}))
    store, its = opened(backend, tmp_path / "reader")
    found = store.locate(its, table=table, sites=["b"], layout="mean", check=False)
    reads = [0]

    def spoil(data: bytearray, start: int) -> None:
        reads[0] += 1
        if reads[0] <= spoilt:
            data[-1] ^= 1

    gathered: list[Any] = []
    monkeypatch.setattr(
        placement, "gather_pieces", lambda pieces, *rest: (gathered.extend(pieces), gather_all(pieces, *rest))
    )
    gather_all = gather.gather_pieces
    # One read at a time, so that the same one is spoilt again.
    monkeypatch.setattr(backend, "concurrency", 1)
    backend.on_read = spoil
    out = np.full((3 * ROWS, 1, WIDTH), np.nan, np.float32) if given else None
    if spoilt == 2:
        monkeypatch.setattr(fetching, "_READ", 1 << 30)
        found = store.locate(its, table=table.select(np.arange(ROWS)), sites=["b"], layout="mean", check=False)
        with pytest.raises(NotCachedError, match="damaged"):
            found.take(None if out is None else out[:ROWS])
        return
    taken = found.take(out)
    np.testing.assert_array_equal(taken[:, 0], values)
    assert (out is None or taken is out) and not gathered and waits()
    # And some of it is here by now, some is not.
    behind.settle()
    again = store.locate(its, table=table, sites=["b"], layout="mean", check=False).take()
    np.testing.assert_array_equal(again[:, 0], values)


class Three:
    """Three objects of the vectors of 3 x `ROWS` prompts, the tokens' rows of them too, and a reader that has none."""

    def __init__(self, backend: Counting, folder: Path) -> None:
        self.backend, self.folder = backend, folder
        writer, space = opened(backend, folder / "writer")
        self.table = make_table(range(3 * ROWS))
        self.mean = np.concatenate([VALUES["b"], VALUES["a"], VALUES["b"][::-1]])
        rows = self.table.token_offset
        self.every = np.arange(int(rows[-1]) * 40, dtype=np.float32).reshape(-1, 40)
        with writer:
            for k in range(3):
                part = self.table.select(np.arange(k * ROWS, (k + 1) * ROWS))
                if k:
                    mean = {"b": self.mean[k * ROWS : (k + 1) * ROWS]}
                    writer.append(space, Records.pooled(part, "mean", mean))
                writer.append(space, Records.tokens(part, {"b": self.every[rows[k * ROWS] : rows[(k + 1) * ROWS]]}))
                # What is sent later is merged before.
                writer.flush()
        self.store, self.space = opened(backend, folder / "three")
        # The first read looks at what all mirrors take, for which it waits.
        self.store.read(self.space, TABLE.select(np.arange(1)), "a", pooling="mean")
        behind.settle()

    def read(self, pooling: str | None, prompts: PromptTable | None) -> Any:
        return self.store.read(self.space, prompts, "b", pooling=pooling)

    def right(self, got: Any, pooling: str | None, numbers: Sequence[int] = range(3 * ROWS)) -> bool:
        offset = self.table.token_offset
        expected = [self.mean[i] if pooling else self.every[offset[i] : offset[i + 1]] for i in numbers]
        return all(np.array_equal(a.numpy(), b) for a, b in zip(got, expected, strict=True))

    def times(self, layout: str) -> npt.NDArray[np.int64]:
        """When each prompt was read last."""
        index = self.store._index(self.space)
        return np.concatenate([index.reads.times(i) for _, i in index.segments() if i.layout == layout])


@pytest.fixture
def three(backend: Counting, tmp_path: Path) -> Three:
    return Three(backend, tmp_path)


@pytest.mark.parametrize("pooling", ["mean", None])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_read_copies_what_it_gives_as_it_comes(
    three: Three, monkeypatch: pytest.MonkeyPatch, pooling: str | None, named: bool, spoilt: int
) -> None:
    """Nothing is put together behind the last byte; a block that is `spoilt` more than once is an error."""
    reads = [0]

    def spoil(data: bytearray, start: int) -> None:
        reads[0] += 1
        if reads[0] <= spoilt or spoilt == 2:
            data[-1] ^= 1

    behind_it: list[Tensor] = []
    rows = Received.rows
    monkeypatch.setattr(Received, "rows", lambda self, tensor: behind_it.append(tensor) or rows(self, tensor))
    monkeypatch.setattr(three.backend, "concurrency", 1)
    three.backend.on_read = spoil
    prompts = three.table if named else None
    began = time.time_ns()
    if spoilt == 2:
        with pytest.raises(NotCachedError, match=r"damaged|have no 'b'"):
            three.read(pooling, prompts)
        assert (three.times(pooling or "tokens") < began).any()
        return
    got = three.read(pooling, prompts)
    assert waits() and not behind_it and three.right(got, pooling)
    assert (three.times(pooling or "tokens") >= began).all()
    assert (three.times("tokens" if pooling else "mean") < began).all()
    # It is the caller's, and nobody else's.
    for tensor in [got] if pooling else got:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
        tensor.fill_(7)
    behind.settle()
    assert three.right(three.read(pooling, prompts), pooling) and three.store.verify().ok


@pytest.mark.parametrize("pooling", ["mean", None])
def test_some_of_what_is_read_is_here_and_some_wanted_twice(three: Three, pooling: str | None) -> None:
    numbers = [5, 5, 4, *range(3 * ROWS - 1, ROWS, -1), 5]
    three.read(pooling, three.table.select(np.arange(ROWS, ROWS + 9)))
    behind.settle()
    for _ in range(2):
        assert three.right(three.read(pooling, three.table.select(np.array(numbers))), pooling, numbers)
        behind.settle()


@pytest.mark.parametrize("pooling", ["mean", None])
@pytest.mark.parametrize("named", [False, True])
def test_objects_that_another_machine_merges_in_the_middle_of_a_read(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str | None, named: bool
) -> None:
    monkeypatch.setattr(three.backend, "concurrency", 1)
    before = {info.name for info in three.backend.list()}

    def merge(data: bytearray, start: int) -> None:
        three.backend.on_read = lambda data, start: None
        other, space = opened(three.backend, tmp_path / "other")
        with other:
            other.compact(space)

    three.backend.on_read = merge
    assert three.right(three.read(pooling, three.table if named else None), pooling)
    assert len(before - {info.name for info in three.backend.list()}) == 5


@pytest.mark.parametrize("pooling", ["mean", None])
def test_a_read_that_fails_in_the_middle_gives_nothing(three: Three, pooling: str | None) -> None:
    failing = [3]

    def fail(data: bytearray, start: int) -> None:
        failing[0] -= 1
        if not failing[0]:
            raise BackendError("the network is gone")

    three.backend.on_read = fail
    with pytest.raises(BackendError, match="the network is gone"):
        three.read(pooling, None)
    assert three.right(three.read(pooling, None), pooling)


def test_few_rows_of_many_bytes_do_not_keep_these_in_memory(reader: tuple[Store, str]) -> None:
    assert np.array_equal(place(reader).take(index=[3])[0, 0], VALUES["b"][3])
    assert not waits()


def test_what_would_be_too_much_is_written_first(reader: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "MOST", ROWS * WIDTH * 4 - 1)
    assert equal(place(reader).take())
    assert not waits()


@pytest.mark.parametrize("check", [False, True])
def test_what_is_partly_here_is_read_in_part(reader: tuple[Store, str], backend: Counting, check: bool) -> None:
    place(reader).take(index=[0])
    behind.settle()
    assert equal(place(reader, check=check).take())


@pytest.mark.parametrize("check", [False, True])
def test_one_site_of_a_segment_that_is_here_and_one_that_is_not(
    reader: tuple[Store, str], backend: Counting, tmp_path: Path, check: bool
) -> None:
    """Where they are looked for apart, since one of them has other segments, too."""
    writer, space = opened(backend, tmp_path / "writer")
    with writer:
        writer.append(space, Records.pooled(make_table(range(ROWS, ROWS + 9)), "mean", {"a": VALUES["a"][:9]}))
    assert equal(place(reader, ["a"]).take(), "a")
    behind.settle()
    both = place(reader, ["a", "b"], check=check).take()
    np.testing.assert_array_equal(both, np.stack([VALUES["a"], VALUES["b"]], 1))


def test_two_readers_of_the_same_rows(reader: tuple[Store, str], backend: Counting) -> None:
    """At the same time, as one reads while the other one's bytes are on their way, and at any time between."""
    barrier = threading.Barrier(4)

    def read(_: int) -> bool:
        barrier.wait()
        found = place(reader)
        return all(equal(found.take()) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    behind.settle()
    asked = backend.reads
    assert equal(place(reader).take()) and backend.reads == asked


@pytest.mark.parametrize("listed", [False, True])
def test_readers_of_one_space_read_at_the_same_time(reader: tuple[Store, str], backend: Counting, listed: bool) -> None:
    """Each request is answered when that of the other reader is there, too."""
    both = threading.Barrier(2)
    place(reader, ["a"])
    backend.on_read = lambda data, start: both.wait(20)

    def read(site: str) -> npt.NDArray[Any]:
        if listed:
            return reader[0].read(reader[1], None, site, pooling="mean").numpy()  # type: ignore[no-any-return]
        return place(reader, [site], check=True).take()[:, 0]

    with ThreadPoolExecutor(2) as pool:
        for site, rows in zip(SITES, pool.map(read, SITES), strict=True):
            assert np.array_equal(rows, VALUES[site])
    assert backend.reads == 2


def test_torch_may_be_half_imported_by_another_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert gather.allowed_threads() >= 1


@pytest.mark.parametrize("fails", [False, True])
def test_readers_of_the_same_rows_ask_for_them_once(
    reader: tuple[Store, str], backend: Counting, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The second one waits for the first; where that one fails it asks itself."""
    place(reader)
    waiting = threading.Event()
    waits_for = threading.Condition.wait_for

    def wait_for(condition: threading.Condition, *args: Any, **options: Any) -> bool:
        waiting.set()
        return waits_for(condition, *args, **options)

    def answer(data: bytearray, start: int) -> None:
        if backend.reads == 1:
            assert waiting.wait(20)
            if fails:
                raise BackendError("told to fail")

    backend.on_read = answer
    flights = reader[0]._copy._threads.flights  # type: ignore[union-attr]
    monkeypatch.setattr(flights._changed, "wait_for", lambda *args: wait_for(flights._changed, *args), raising=False)
    # Bytes that another one received are waited for till they are in the file.
    monkeypatch.setattr(behind, "_LINGER_S", 0.0)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(lambda: equal(place(reader, check=True).take())) for _ in range(2)]
        failed = [job.exception(60) for job in jobs]
    assert sum(isinstance(error, BackendError) for error in failed) == fails
    assert all(job.result() for job, error in zip(jobs, failed, strict=True) if error is None)
    assert backend.reads == 1 + fails
    assert not flights._coming


def test_a_reader_waits_for_what_another_one_has_received(reader: tuple[Store, str], backend: Counting) -> None:
    found = place(reader)
    assert equal(found.take())
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(lambda: place(reader, check=True).take(index=[5, 6])).result(10)
    assert np.array_equal(rows[:, 0], VALUES["b"][5:7]) and backend.reads == 1


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
    real = fetching.write_all

    def write_all(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetching, "write_all", write_all)
    for _ in range(2):
        assert equal(place(reader).take())
        behind.settle()
    assert backend.reads == 2 and reader[0].spaces()
    assert sum("no room" in record.message for record in caplog.records) == 2
    assert all(record.levelno <= logging.WARNING for record in caplog.records)
    monkeypatch.setattr(fetching, "write_all", real)
    for _ in range(2):
        assert equal(place(reader).take())
    assert backend.reads == 3


def test_a_full_disk_makes_room_for_what_comes_next(reader: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal(place(reader, ["a"]).take(), "a")
    behind.settle()
    (path,) = reader[0].root.glob("*/*.safetensors")
    real = fetching.write_all
    before = path.stat().st_blocks
    monkeypatch.setattr(fetching, "write_all", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert equal(place(reader).take())
    behind.settle()
    monkeypatch.setattr(fetching, "write_all", real)
    assert equal(place(reader, check=True).take())
    behind.settle()
    assert path.stat().st_blocks < 1.5 * before, "what was read first has gone"


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_write_that_fails_is_told_and_nothing_else(
    reader: tuple[Store, str], backend: Counting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    part: float,
) -> None:  # fmt: skip
    real = fetching.write_all

    def write_all(fd: int, buffers: list[memoryview], offset: int) -> int:
        real(fd, [b[: int(part * len(b))] for b in buffers], offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fetching, "write_all", write_all)
    assert equal(place(reader).take())
    behind.settle()
    assert any("read again" in record.message for record in caplog.records)
    monkeypatch.setattr(fetching, "write_all", real)
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
from actcache.store import behind, checks
from actcache.store.backend import LocalBackend
from bucket_helpers import opened
from store_helpers import make_table

class Elsewhere(LocalBackend):
    pass

checks._LEAST_BEHIND, behind._LINGER_S = 0, float(sys.argv[3])
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


@pytest.mark.parametrize("seed", range(20))
def test_rows_out_of_runs_of_any_length(seed: int) -> None:
    """Against the matrix itself: runs that end within rows, that are shorter than rows, and some that are missing."""
    rng = np.random.default_rng(seed)
    rows, dim = int(rng.integers(1, 40)), int(rng.integers(1, 30))
    dtype = np.dtype(rng.choice(["<f4", "<f2", "u1"]))
    matrix = rng.integers(0, 255, (rows, dim)).astype(dtype)
    before, behind_it = int(rng.integers(0, 50)), int(rng.integers(0, 50))
    whole = bytes(before) + matrix.tobytes() + bytes(behind_it)
    tensor = Tensor("x", dtype, (rows, dim), before, before + matrix.nbytes)
    cuts = np.unique(rng.integers(0, len(whole) + 1, int(rng.integers(0, 30))))
    here = np.zeros(len(whole), bool)
    received = Received()
    ends = [0, *cuts.tolist(), len(whole)]
    for k in rng.permutation(len(ends) - 1).tolist():
        start, stop = ends[k], ends[k + 1]
        if stop > start and rng.random() < 0.85:
            received.add(start, memoryview(whole)[start:stop])
            here[start:stop] = True
    known = here[before : before + matrix.nbytes].reshape(rows, -1).all(axis=1)
    found = received.rows(tensor)
    for start in range(rows):
        for stop in range(start, rows + 1):
            if known[start:stop].all():
                np.testing.assert_array_equal(found.between(start, stop), matrix[start:stop])
            else:
                with pytest.raises(NotCachedError):
                    found.between(start, stop)
    asked = rng.integers(0, rows, 50)
    at = rng.permutation(60)[:50]
    for wanted, places in ((asked, at), (np.arange(rows), np.arange(rows))):
        out = np.zeros((60, dim), np.float64 if dtype.kind == "f" else dtype)
        if known[wanted].all():
            found.gather(wanted, out, places)
            np.testing.assert_array_equal(out[places], matrix[wanted])
        else:
            with pytest.raises(NotCachedError):
                found.gather(wanted, out, places)
            wanted, places = wanted[known[wanted]], places[known[wanted]]
            found.gather(wanted, out, places)
            np.testing.assert_array_equal(out[places], matrix[wanted])


@pytest.mark.parametrize("seed", range(10))
def test_rows_are_copied_whatever_the_pieces_that_come(seed: int) -> None:
    """Prompts of any length, none among them, some twice and some not, out of pieces that are cut anywhere."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, 40)
    ends = np.cumsum(counts)
    matrix = rng.standard_normal((int(ends[-1]), 3)).astype(np.float32)
    begin = int(rng.integers(0, 9))
    blob = bytes(begin) + matrix.tobytes() + bytes(5)
    tensor = Tensor("a", np.dtype(np.float32), matrix.shape, begin, begin + matrix.nbytes)
    chosen = rng.integers(0, 40, 30)
    into: list[npt.NDArray[Any]] = [np.full((1, 3), np.nan, np.float32)] * 30
    places = rng.permutation(30)
    rows = Rows(tensor, ends[chosen] - counts[chosen], ends[chosen], places, into)
    cuts = [0, *sorted(rng.integers(0, len(blob), 12).tolist()), len(blob)]
    pieces = [(a, memoryview(blob)[a:b]) for a, b in pairwise(cuts) if b > begin and a < tensor.stop and a < b]
    for k in rng.permutation(len(pieces)).tolist():
        rows.take(*pieces[k])
    for place, i in zip(places.tolist(), chosen.tolist(), strict=True):
        np.testing.assert_array_equal(into[place], matrix[ends[i] - counts[i] : ends[i]])
        assert into[place].flags.writeable and into[place].flags.aligned
