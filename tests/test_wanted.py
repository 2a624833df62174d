"""Blocks of an object: how they are cut into reads, and what lies where in what has come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actcache.store.records import BLOCK
from actcache.store.wanted import Blocks, Right, Wanted

FETCHER: Any = SimpleNamespace(path=None)


def neighbours(count: int, last: int, first: int = 7, *, even: bool) -> Wanted:
    """`count` blocks one behind the other, of which the last one has `last` bytes."""
    starts = 512 + np.arange(first, first + count, dtype=np.int64) * BLOCK
    stops = starts + BLOCK
    stops[-1] = starts[-1] + last
    numbers = np.arange(first, first + count)
    before = np.zeros(first, np.int64)
    blocks = Blocks(
        *(np.concatenate([before, some]) for some in (starts, stops)), np.arange(first + count, dtype=np.uint64)
    )
    return Wanted(FETCHER, blocks, slice(first, first + count) if even else numbers, lambda *_: None)


@given(st.integers(1, 200), st.integers(1, BLOCK), st.integers(1, 40 * BLOCK))
def test_blocks_known_to_be_neighbours_are_cut_as_others_are(count: int, last: int, most: int) -> None:
    known, found = (neighbours(count, last, even=even) for even in (True, False))
    assert known.nbytes == found.nbytes == (count - 1) * BLOCK + last
    cut, other = list(known.runs(most)), list(found.runs(most))
    assert [run.numbers.tolist() for run in cut] == [run.numbers.tolist() for run in other]
    for name in ("starts", "stops", "checksums"):
        assert [getattr(run, name).tolist() for run in cut] == [getattr(run, name).tolist() for run in other]
    assert [run.nbytes for run in cut] == [int(run.stops[-1] - run.starts[0]) for run in cut]
    assert all(run.nbytes <= max(most, BLOCK) for run in cut)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30, unique=True), st.integers(1, 10 * BLOCK))
def test_every_block_is_in_one_read_and_where_it_lies_is_told(numbers: list[int], most: int) -> None:
    """Whatever is missing between them, in whatever order."""
    whole = neighbours(61, 99, first=0, even=True)
    wanted = whole.select(np.array(numbers))
    assert wanted.nbytes == int((wanted.stops - wanted.starts).sum())
    data = np.random.default_rng(0).bytes(int(whole.stops[-1]))
    runs = list(wanted.runs(most))
    assert sorted(n for run in runs for n in run.numbers.tolist()) == sorted(numbers)
    for run in runs:
        begin, end = int(run.starts[0]), int(run.stops[-1])
        pieces = dict(Right(run, memoryview(data)[begin:end], begin).parts())
        covered = [(start, start + len(part)) for start, part in pieces.items()]
        assert all(part == data[start : start + len(part)] for start, part in pieces.items())
        assert sum(b - a for a, b in covered) == run.nbytes
        for a, b in zip(run.starts.tolist(), run.stops.tolist(), strict=True):
            assert any(low <= a and b <= high for low, high in covered)
