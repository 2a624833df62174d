"""Gathering rows, in every shape of request, against the plain double loop."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import NotCachedError
from actcache.store import gather as module
from actcache.store.gather import Piece, gather_pieces


class Held:
    """A segment whose sites are called by their numbers: matrices in one piece of memory, `gap` rows between them."""

    source = None

    def __init__(self, sites: int, rows: int, width: int, dtype: np.dtype, gap: int, *, on_grid: bool = True):
        self.whole = np.arange(sites * (rows + gap) * width, dtype=np.float32).astype(dtype).reshape(-1, width)
        self.step, self.rows, self.on_grid = rows + gap, rows, on_grid
        self.info = SimpleNamespace(rows=rows)

    def matrix(self, site):
        start = int(site) * self.step
        return self.whole[start : start + self.rows]

    def scales(self, site):
        return None

    def grid(self, sites):
        return (self.whole, np.array([int(site) * self.step for site in sites])) if self.on_grid else None


@settings(deadline=None)
@given(st.data())
def test_any_rows_to_any_places(data):
    sites, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    dtype = np.dtype(data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])))
    held = Held(sites, 20, width, dtype, data.draw(st.integers(0, 2)), on_grid=data.draw(st.booleans()))
    columns = data.draw(st.permutations(range(sites)))[: data.draw(st.integers(1, sites))]
    names = [str(j) for j in data.draw(st.permutations(range(sites)))]
    n = data.draw(st.integers(1, 80))
    runs = st.builds(lambda first: [(first + i) % 20 for i in range(n)], st.integers(0, 19))
    rows = np.array(data.draw(st.one_of(runs, st.lists(st.integers(0, 19), min_size=n, max_size=n))), np.int64)
    first = data.draw(st.integers(0, 3))
    at = data.draw(st.one_of(st.just(list(range(first, first + n))), st.permutations(range(n))))
    at = np.array(at, np.int64)
    target = np.dtype(data.draw(st.sampled_from([dtype, np.dtype(np.float32)])))
    out = np.full((n + 4, sites, width), -1, target)
    expected = out.copy()
    for row, place in zip(rows, at, strict=True):
        for column in columns:
            expected[place, column] = held.matrix(names[column])[row].astype(target)
    # Small results, too, take the way of those that are worth a copy of their own.
    straight = bool((np.diff(rows) == 1).all() and (np.diff(at) == 1).all()) and data.draw(st.booleans())
    with mock.patch.object(module, "_LONG_BYTES", data.draw(st.sampled_from([1, 40, module._LONG_BYTES]))):
        gather_pieces([Piece(held, columns, rows, at, straight)], names, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "at",
    [[*range(6), *range(8, 14)], [*range(6, 12), *range(6)], list(range(12))[::-1]],
    ids=["gap", "swapped", "back"],
)
def test_neighbours_of_one_site_that_go_to_other_places(monkeypatch, at):
    """Each run is worth a copy of its own, and ends where the places do."""
    monkeypatch.setattr(module, "_LONG_BYTES", 1)
    held = Held(2, 20, 7, np.dtype(np.float32), 1)
    rows = np.arange(4, 16)
    out = np.full((15, 2, 7), -1, np.float32)
    expected = out.copy()
    expected[at, 1] = held.matrix(1)[rows]
    gather_pieces([Piece(held, [1], rows, np.array(at))], ["0", "1"], out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("touched", [1, 9, module._TOUCHED_ROWS])
def test_long_ones_among_others_go_each_to_its_place(monkeypatch, touched):
    monkeypatch.setattr(module, "_LONG_BYTES", 64)
    monkeypatch.setattr(module, "_TOUCHED_BYTES", 4)
    monkeypatch.setattr(module, "_TOUCHED_ROWS", touched)
    rng = np.random.default_rng(touched)
    held = [Held(3, 40 + k, 7, np.dtype(np.float32), k) for k in range(4)]
    places, owner = np.arange(50), rng.integers(0, 4, 50)
    rows = np.where(owner == 3, 42, rng.integers(0, 40, 50))
    out = np.full((51, 3, 7), -1, np.float32)
    pieces = [Piece(held[k], range(3), rows[owner == k], places[owner == k]) for k in range(4)]
    assert min(len(piece.rows) for piece in pieces) > 1
    gather_pieces(pieces, ["2", "0", "1"], out)
    for place, row, k in zip(places, rows, owner, strict=True):
        np.testing.assert_array_equal(out[place], np.stack([held[k].matrix(j)[row] for j in (2, 0, 1)]))
    assert (out[50] == -1).all()

    # Where one of them is wrong nothing of the others is copied.
    out[:] = -1
    pieces[3] = Piece(held[3], range(3), pieces[3].rows + 1, pieces[3].at)
    with pytest.raises(NotCachedError, match="row 43 of"):
        gather_pieces(pieces, ["2", "0", "1"], out)
    assert (out == -1).all()


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_several_threads_copy_the_same(monkeypatch, threads):
    monkeypatch.setattr(module, "THREAD_BYTES", 64)
    monkeypatch.setattr(module, "allowed_threads", lambda: threads)
    rng = np.random.default_rng(0)
    held = [Held(3, 50, 7, np.dtype(np.float32), 1), Held(3, 20, 7, np.dtype(np.float32), 0)]
    rows, at = [rng.integers(0, 50, 41), rng.integers(0, 20, 13)], rng.permutation(54)
    out = np.empty((54, 3, 7), np.float32)
    parts = [(0, [0, 2], rows[0], at[:41]), (0, [1], rows[0], at[:41]), (1, [0, 1, 2], rows[1], at[41:])]
    gather_pieces([Piece(held[k], *rest) for k, *rest in parts], ["0", "1", "2"], out)
    for k, where in enumerate((at[:41], at[41:])):
        expected = np.stack([held[k].matrix(j)[rows[k]] for j in range(3)], axis=1)
        np.testing.assert_array_equal(out[where], expected)


@pytest.mark.parametrize("first", [-1, 19, 10**12])
def test_neighbours_that_reach_outside_are_an_error(first):
    held = Held(2, 20, 3, np.dtype(np.float32), 0)
    out = np.zeros((2, 2, 3), np.float32)
    with pytest.raises(NotCachedError, match=r"row .* of a segment of 20 rows"):
        gather_pieces([Piece(held, [0], first + np.arange(2), np.arange(2), straight=True)], ["0", "1"], out)
    assert not out.any()


@pytest.mark.parametrize("row", [-1, 20, 10**12])
def test_a_row_outside_is_an_error_and_never_another_row(row):
    held = Held(2, 20, 3, np.dtype(np.float32), 0)
    out = np.zeros((2, 2, 3), np.float32)
    with pytest.raises(NotCachedError, match=f"row {row} of"):
        gather_pieces([Piece(held, range(2), np.array([1, row]), np.arange(2))], ["0", "1"], out)
    assert not out.any()
