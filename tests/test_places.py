"""Where prompts lie: what is worked out of it once agrees with looking at each prompt."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store import places
from actcache.store.placement import Placement
from actcache.store.places import Part, Places

PROMPTS = 12


def segment(number: int, rows: int, source: bool) -> Any:
    """What `Places` looks at: a segment of which each prompt has `rows` rows."""
    return SimpleNamespace(
        number=number,
        source=object() if source else None,
        info=SimpleNamespace(prompts=PROMPTS),
        row_offset=np.arange(PROMPTS + 1) * rows,
    )


where = st.lists(st.tuples(st.integers(0, 2), st.integers(0, PROMPTS - 1)), max_size=40)
# Neighbours are the usual case.
runs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, PROMPTS - 1), st.integers(1, 8)), max_size=8).map(
    lambda runs: [(s, p) for s, first, count in runs for p in range(first, min(PROMPTS, first + count))]
)


@settings(deadline=None)
@given(st.one_of(where, runs), st.integers(1, 3), st.sampled_from([1, 2, 64]), st.data())
def test_what_is_looked_up_together(
    where: list[tuple[int, int]], rows: int, long_run: int, data: st.DataObject
) -> None:
    n = len(where)
    segments = [segment(i, rows, source=i != 1) for i in range(3)]
    part = Part((0,), np.array([s for s, _ in where], np.int32), np.array([p for _, p in where], np.int64))
    found = Places(n, [part], segments)
    assert {s.number for _, s in found.used} == {s for s, _ in where}
    for _, held, members in found.members:
        assert members.tolist() == [i for i, (s, _) in enumerate(where) if s == held.number]
    for held, prompts in found.held:
        assert prompts.tolist() == [p for s, p in where if s == held.number]
    assert found.are_elsewhere

    with mock.patch.object(places, "_LONG_RUN", long_run):
        pieces = found.pieces
    taken = {}
    for piece in pieces:
        assert not piece.straight or ((np.diff(piece.rows) == 1).all() and (np.diff(piece.at) == 1).all())
        taken.update({int(at): (piece.segment.number, int(row)) for row, at in zip(piece.rows, piece.at, strict=True)})
    assert taken == dict(enumerate(where)) and sum(len(piece.at) for piece in pieces) == n

    chosen = np.array(data.draw(st.lists(st.integers(0, n - 1)) if n else st.just([])), np.int64)
    for some, ranges in ((np.arange(n), found.elsewhere), (chosen, list(found.ranges_elsewhere(chosen)))):
        assert {s.number for _, s, _, _ in ranges} == {where[i][0] for i in some} - {1}, "what is here is not fetched"
        for _, held, starts, stops in ranges:
            asked = [row for start, stop in zip(starts, stops, strict=True) for row in range(start, stop)]
            prompts = [where[i][1] for i in some if where[i][0] == held.number]
            assert asked == [row for p in prompts for row in range(p * rows, (p + 1) * rows)]


def test_what_no_segment_has_is_not_asked_for() -> None:
    part = Part((0,), np.zeros(2, np.int32), np.array([0, PROMPTS], np.int64))
    assert Places(2, [part], [segment(0, 1, source=True)]).elsewhere == []


def test_what_is_absent_lies_nowhere() -> None:
    part = Part((0,), np.array([-1, 0, -1], np.int32), np.array([5, 3, 0], np.int64))
    found = Places(3, [part], [segment(0, 1, source=False)])
    ((_, _, members),) = found.members
    assert members.tolist() == [1] and found.held[0][1].tolist() == [3]
    assert not found.are_elsewhere


def test_a_few_of_very_many_take_no_memory_for_all() -> None:
    """As many as there may be lie in files, of which a part is looked at a time."""
    n = 2_000_000
    part = Part((0,), np.zeros(n, np.int32), np.zeros(n, np.int64))
    placement = Placement(n, ["a"], "mean", [part], [segment(0, 1, source=False)], found=np.broadcast_to(True, n))
    tracemalloc.start()
    try:
        for chosen in (np.arange(5), np.array([n - 1])):
            assert placement._require(chosen).tolist() == chosen.tolist()
            ((_, _, members),) = placement._places.by_segment(chosen)
            assert members.tolist() == list(range(len(chosen)))
        assert tracemalloc.get_traced_memory()[1] < n
    finally:
        tracemalloc.stop()
