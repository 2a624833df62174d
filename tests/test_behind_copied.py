"""Rows go where they are wanted as they come, out of pieces that are cut anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actcache.errors import BackendError, NotCachedError
from actcache.store import behind, fetching, gather, placement, receiving
from actcache.store.container import Tensor
from actcache.store.prompts import PromptTable
from actcache.store.receiving import Received, Rows
from actcache.store.records import Records
from behind_helpers import ROWS, TABLE, VALUES, WIDTH, Counting, held_back, waits, written
from bucket_helpers import opened
from store_helpers import make_table


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with held_back(monkeypatch):
        yield


@pytest.fixture
def backend(tmp_path: Path) -> Counting:
    return written(tmp_path / "writer")


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


def test_a_long_array_keeps_no_others_and_is_kept_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "_TOGETHER", 40)
    matrix = np.arange(100, dtype=np.float32)[:, None]
    starts, stops = np.array([0, 2, 5, 60, 62, 75]), np.array([2, 5, 60, 62, 75, 77])
    into: list[npt.NDArray[Any]] = [np.empty((0, 1), np.float32)] * len(starts)
    rows = Rows(Tensor("a", np.dtype(np.float32), matrix.shape, 0, matrix.nbytes), starts, stops, np.arange(6), into)
    rows.take(0, memoryview(matrix.tobytes()))
    for array, a, b in zip(into, starts.tolist(), stops.tolist(), strict=True):
        np.testing.assert_array_equal(array, matrix[a:b])
    kept = [(array if array.base is None else array.base).nbytes for array in into]
    assert kept == [20, 20, 220, 8, 52, 8]


@pytest.mark.parametrize("together", [1, 50, 1 << 20])
@pytest.mark.parametrize("seed", range(10))
def test_rows_are_copied_whatever_the_pieces_that_come(
    seed: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of any length, none among them, some twice and some not, out of pieces that are cut anywhere."""
    monkeypatch.setattr(receiving, "_TOGETHER", together)
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
    for place, array in enumerate(into):
        # Not more than one prompt and a row beyond half as much again as is meant to lie together is kept with any.
        assert (array if array.base is None else array.base).nbytes < 3 * together // 2 + 7 * 12
        array[:] = place
    for place, array in enumerate(into):
        assert (array == place).all(), "none shares its numbers with another"
