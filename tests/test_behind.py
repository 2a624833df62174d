"""Answers from what has just come: right before it is in any file, and whatever becomes of its way there."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actcache.errors import BackendError
from actcache.store import behind, gather, mirror
from actcache.store.placement import Placement
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from behind_helpers import ROWS, SITES, TABLE, VALUES, WIDTH, Counting, equal, held_back, place, waits, written
from bucket_helpers import opened
from store_helpers import make_table


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


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_whatever_one_ends_with_the_others_are_written_and_nobody_waits(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the error cannot even be told, as with a filter that fails."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(behind.log, "warning", fails)
    written: list[str] = []
    jobs = [
        behind.Job(tmp_path / "a", 5, fails),
        behind.Job(tmp_path / "b", 7, lambda: written.append("b")),
        behind.Job(tmp_path / "a", 9, lambda: written.append("a")),
    ]
    before = behind._state.nbytes
    behind.write(jobs)
    waiting = threading.Thread(target=behind.settle, daemon=True)
    waiting.start()
    waiting.join(30)
    assert not waiting.is_alive()
    assert written == ["b", "a"] and behind._state.nbytes == before


def test_the_thread_stays_awake_for_what_is_expected_and_not_for_ever(tmp_path: Path) -> None:
    """Who is expected keeps nobody waiting, and may never come."""
    state, written = behind._state, []
    behind.settle()

    def write(name: str) -> None:
        behind.write([behind.Job(tmp_path / name, 5, lambda: written.append(name))])

    def asleep() -> bool:
        until = time.monotonic() + 30
        while state.works and time.monotonic() < until:
            time.sleep(0.01)
        return not state.works and not state.jobs

    behind.expect()
    assert state.works
    write("a")
    behind.settle(tmp_path / "a")
    assert written == ["a"] and asleep()
    behind.expect()
    behind.expect()
    assert asleep()
    write("b")
    behind.settle()
    assert written == ["a", "b"] and asleep()


def test_where_no_thread_can_be_started_nobody_waits_for_what_is_expected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Ended:
        def submit(self, *_: object) -> None:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    written: list[str] = []
    state = behind._Writing()
    state.pool = Ended()  # type: ignore[assignment]
    monkeypatch.setattr(behind, "_state", state)
    monkeypatch.setattr(behind, "_LINGER_S", 0.0)
    monkeypatch.setattr(behind, "_AWAKE_S", 1e6)
    behind.expect()
    behind.write([behind.Job(tmp_path / name, 5, lambda name=name: written.append(name)) for name in "ab"])  # type: ignore[misc]
    assert written == ["a", "b"] and not state.waiting and not state.nbytes


def test_whoever_reads_wakes_the_thread_before_it_has_something_to_write(
    reader: tuple[Store, str], backend: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    expect, write = behind.expect, behind.write
    monkeypatch.setattr(behind, "expect", lambda: (order.append("expect"), expect()))
    monkeypatch.setattr(behind, "write", lambda jobs: (order.append("write"), write(jobs)))
    assert equal(place(reader).take())
    assert order == ["expect", "write"]


def test_blocks_that_were_looked_at_are_not_asked_for_though_their_marks_are_lost(
    reader: tuple[Store, str], backend: Counting
) -> None:
    """Beside others that are not here: the last read wants some of both."""
    place(reader).take(index=[0])
    behind.settle()
    (path,) = reader[0].root.glob("*/*.safetensors")
    said = mirror.read_sidecar(path)
    assert said is not None
    mirror.mark(path, np.arange(said.blocks), there=False)
    lengths: list[int] = []
    backend.on_read = lambda data, start: lengths.append(len(data) - 1)
    assert equal(place(reader).take())
    assert sum(lengths) == ROWS * WIDTH * 4 - BLOCK


@pytest.mark.parametrize("listed", [False, True])
def test_a_table_of_which_others_have_put_some_since_is_read_whole(
    reader: tuple[Store, str], backend: Counting, tmp_path: Path, listed: bool
) -> None:
    table = make_table(range(ROWS + 9))
    assert equal(reader[0].read(reader[1], TABLE, "b", pooling="mean").numpy()[:, None])
    writer, space = opened(backend, tmp_path / "writer")
    with writer:
        more = Records.pooled(table.select(np.arange(ROWS, ROWS + 9)), "mean", {"b": VALUES["a"][:9]})
        writer.append(space, more)
    prompts = table if listed else table.select(np.arange(ROWS - 1, ROWS + 9))
    got = reader[0].read(reader[1], prompts, "b", pooling="mean").numpy()
    expected = np.concatenate([VALUES["b"], VALUES["a"][:9]])
    np.testing.assert_array_equal(got, expected[-len(got) :])
