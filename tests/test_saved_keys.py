"""Sorted keys that a host keeps in files: shared, replaced, damaged, out of date; and arrays that lie in files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store import keys, saved_keys, spill
from actcache.store.distinct import Distinct, count_keys
from actcache.store.keys import KeyTable
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.spill import Spill
from actcache.store.store import Store
from store_helpers import SITES, check_pooled, make_store, pooled, text


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in files only where there is much of it does so at once."""
    monkeypatch.setattr(keys, "AT_ONCE", 4)
    monkeypatch.setattr(saved_keys, "AT_ONCE", 4)
    monkeypatch.setattr(spill, "_SMALL", 0)
    monkeypatch.setattr(spill, "_FEW_BYTES", 0)


def saved(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "index" / "keys").glob("*/*.keys"))


def filled(tmp_path: Path) -> str:
    """A store with the prompts 0 to 29 in three segments, and a file of sorted keys of it."""
    store, space = make_store(tmp_path)
    for start in range(0, 30, 10):
        store.append(space, pooled(range(start, start + 10)))
    store.close()
    found(tmp_path, space)
    assert len(saved(tmp_path)) == 1
    return space


def found(tmp_path: Path, space: str, n: int = 40) -> list[int]:
    """Which of the prompts are found, one and many at a time, in a store opened anew; each has its own rows."""
    store, _ = make_store(tmp_path)
    hits = np.flatnonzero(check_pooled(store, space, range(n))).tolist()
    assert hits == [i for i in range(n) if store.contains(space, [text(i)])[0]]
    store.close()
    return hits


def sorted_keys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    original = keys._sorted

    def counting(high: np.ndarray, *rest: np.ndarray) -> keys.Run:
        counts.append(len(high))
        return original(high, *rest)

    monkeypatch.setattr(keys, "_sorted", counting)
    return counts


@pytest.mark.usefixtures("few")
def test_another_process_sorts_no_key_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = filled(tmp_path)
    counts = sorted_keys(monkeypatch)
    assert found(tmp_path, space) == list(range(30))
    assert sum(counts) == 0
    store, _ = make_store(tmp_path)
    store.append(space, pooled([30]))
    assert check_pooled(store, space, range(31)).all()
    assert sum(counts) == 1, "what has come since is all that is sorted"


@pytest.mark.usefixtures("few")
def test_segments_without_such_keys_are_not_looked_for_again(tmp_path: Path) -> None:
    """Prompts given as ids have no text; what still grows is no segment."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(10)))
    bare = PromptTable.build([[i, 7] for i in range(50, 90)])
    store.append(space, Records.pooled(bare, "last_token", {s: np.zeros((40, 8), np.float32) for s in SITES}))
    store.close()
    assert found(tmp_path, space) == list(range(10))
    before = [(path, path.stat().st_ino) for path in saved(tmp_path)]
    assert len(before) == 1
    store, _ = make_store(tmp_path)
    with store.writer(space, linger=0) as writer:
        for i in range(10, 30):
            writer.put(pooled([i]))
            writer.flush()
        for _ in range(2):
            assert found(tmp_path, space) == list(range(30))
            assert [(path, path.stat().st_ino) for path in saved(tmp_path)] == before
    store.close()


@pytest.mark.usefixtures("few")
def test_what_has_changed_since_counts(tmp_path: Path) -> None:
    space = filled(tmp_path)
    before = saved(tmp_path)[0].read_bytes()
    store, _ = make_store(tmp_path)
    store.invalidate(space, [text(i) for i in (3, 14, 15)])
    store.append(space, pooled([31]))
    gone = {3, 14, 15}
    assert np.flatnonzero(check_pooled(store, space, range(40))).tolist() == [*sorted({*range(30)} - gone), 31]
    store.close()
    assert found(tmp_path, space) == [*sorted({*range(30)} - gone), 31]
    saved(tmp_path)[0].write_bytes(before)
    assert found(tmp_path, space) == [*sorted({*range(30)} - gone), 31]
    store, _ = make_store(tmp_path)
    store.merge(space)
    store.append(space, pooled([14]))
    store.close()
    assert found(tmp_path, space) == [*sorted({*range(30)} - {3, 15}), 31]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "link", "folder", "other keys"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space = filled(tmp_path)
    (path,) = saved(tmp_path)
    raw = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"x" * len(raw))
    elif damage == "cut":
        path.write_bytes(raw[:-8])
    elif damage == "flipped":
        path.write_bytes(raw[:-30] + bytes([raw[-30] ^ 1]) + raw[-29:])
    elif damage == "link":
        (tmp_path / "else").write_bytes(raw)
        path.symlink_to(tmp_path / "else")
    elif damage == "folder":
        path.mkdir()
    else:
        other, there = make_store(tmp_path / "b")
        other.append(there, pooled(range(50, 80)))
        other.close()
        found(tmp_path / "b", there)
        path.write_bytes(saved(tmp_path / "b")[0].read_bytes())
    counts = sorted_keys(monkeypatch)
    assert found(tmp_path, space) == list(range(30))
    assert sum(counts) >= 30
    if damage != "folder":
        counts.clear()
        assert found(tmp_path, space) == list(range(30)) and sum(counts) == 0


@pytest.mark.usefixtures("few")
def test_a_file_in_use_may_be_replaced_and_removed(tmp_path: Path) -> None:
    space = filled(tmp_path)
    store, _ = make_store(tmp_path)
    assert store.contains(space, [text(0)]).all()
    other, _ = make_store(tmp_path)
    other.append(space, pooled(range(30, 60)))
    assert check_pooled(other, space, range(60)).all()
    (path,) = saved(tmp_path)
    os.replace(path, tmp_path / "old")
    path.write_bytes(b"another")
    path.unlink()
    (tmp_path / "old").unlink()
    assert check_pooled(store, space, range(60)).all()


@pytest.mark.usefixtures("few")
def test_without_a_place_for_files_all_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "keys").write_text("in the way")
    store, space = make_store(tmp_path)
    for start in range(0, 30, 10):
        store.append(space, pooled(range(start, start + 10)))
    store.close()
    assert found(tmp_path, space) == list(range(30))


@pytest.mark.usefixtures("few")
def test_files_of_what_has_gone_go(tmp_path: Path) -> None:
    space = filled(tmp_path)
    half = saved(tmp_path)[0].with_suffix(".0123456789abcdef.tmp")
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    stale = half.with_name("0" * 32 + ".keys")
    stale.write_bytes(b"of a group that is no more")
    store, _ = make_store(tmp_path)
    store.append(space, pooled(range(30, 60)))
    store.close()
    found(tmp_path, space)
    assert not half.exists() and not stale.exists() and len(saved(tmp_path)) == 1
    store, _ = make_store(tmp_path)
    assert store.contains(space, [text(1)]).all()
    store.clear(space)
    assert not store.contains(space, [text(1)]).any()
    assert saved(tmp_path) == []


# -- many keys, few at a time ----------------------------------------------------------------------------

pairs = st.tuples(st.integers(0, 4), st.integers(0, 4))


def as_keys(some: list[tuple[int, int]]) -> np.ndarray:
    # High words all over the range, as those of digests are.
    words = np.array(some, np.uint64).reshape(-1, 2)
    return np.stack([words[:, 0] << np.uint64(61), words[:, 1]], 1).copy().view(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "AT_ONCE", 3)
        patch.setattr(spill, "_SMALL", 0)
        yield tmp_path_factory.mktemp("spill")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(pairs, min_size=1, max_size=9), max_size=7), st.data())
def test_tables_in_files_agree_with_a_dictionary(
    folder: Path, segments: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    rank = np.array(data.draw(st.permutations(range(len(segments)))), np.int64)
    table = KeyTable(Spill(folder))
    live: dict[int, list[tuple[int, int]]] = {}
    for number, some in enumerate(segments):
        table.add(number, as_keys(some))
        live[number] = some
        if data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(live)))
            table.drop(gone)
            live[gone] = []
        if data.draw(st.booleans()):
            assert len(table) == sum(map(len, live.values()))
    asked = [(a, b) for a in range(6) for b in range(6)]
    where, row = table.find(as_keys(asked), rank)
    for i, key in enumerate(asked):
        holders = [n for n, held in live.items() if key in held]
        assert where[i] == max(holders, key=lambda n: rank[n], default=-1)
        if holders:
            # Of several in one segment the later.
            assert row[i] == max(j for j, other in enumerate(segments[where[i]]) if other == key)
        high, low = as_keys([key]).view(np.uint64)[0].tolist()
        assert table.find_one(high, low, rank) == (where[i], row[i])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(pairs, st.booleans(), st.booleans()), max_size=9), max_size=6))
def test_the_first_of_each_key(folder: Path, parts: list[list[tuple[tuple[int, int], bool, bool]]]) -> None:
    rows = [row for part in parts for row in part]
    distinct = Distinct(len(rows), Spill(folder))
    for part in parts:
        distinct.add(
            as_keys([key for key, _, _ in part]),
            np.array([live for _, live, _ in part], bool),
            np.array([later for _, _, later in part], bool),
        )
    wanted = {}
    for later in (False, True):
        for i, (key, live, after) in enumerate(rows):
            if live and after == later:
                wanted.setdefault(key, i)
    assert np.flatnonzero(distinct.first()).tolist() == sorted(wanted.values())
    some = [(as_keys([k for k, _, _ in part]), np.array([live for _, live, _ in part], bool)) for part in parts]
    assert count_keys(some, Spill(folder)) == len(wanted)


def test_arrays_in_files_are_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_FEW_BYTES", 100)
    there, rng = Spill(tmp_path), np.random.default_rng(0)
    kept = [rng.integers(0, 99, n, np.uint8).reshape(-1, 1) for n in (1, 7, 90, 4000, 3 << 20, 0, 16, 5)]
    copies = [there.keep(one) for one in kept]
    beside = [there.beside(n, np.int64) for n in (3, 100_000)]
    assert all((one == 0).all() for one in beside)
    for one in beside:
        one[:] = -1
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, copies, strict=True))
    with pytest.raises(ValueError, match="read-only"):
        copies[4][0] = 1
    mask = rng.random(300_000) < 0.1
    assert np.array_equal(there.flatnonzero(mask), np.flatnonzero(mask))
    monkeypatch.delattr(os, "posix_fallocate")
    assert (there.zeros(3 << 20, np.uint8) == 0).all(), "as on systems without it"
    assert list(tmp_path.iterdir()) == [], "nothing to clean up, whatever ends the process"
    made = there.full((1000, 100), 7, np.int32)
    assert made.shape == (1000, 100) and (made == 7).all() and there.zeros(10, bool).sum() == 0


def test_a_forked_child_leaves_its_parents_arrays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_FEW_BYTES", 0)
    there = Spill(tmp_path)
    there.keep(np.zeros(10, np.uint8))
    child = os.fork()
    if not child:
        there.keep(np.full(1000, 1, np.uint8))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    mine = there.beside(1000, np.uint8)
    assert (mine == 0).all(), "the child has taken the same room"


@pytest.mark.usefixtures("few")
def test_two_stores_of_one_folder_agree(tmp_path: Path) -> None:
    """Each host has files of its own; what one has changed the other finds."""
    here, space = make_store(tmp_path)
    there = Store(tmp_path / "store", index_dir=tmp_path / "elsewhere")
    for start in range(0, 60, 10):
        (here, there)[start // 10 % 2].append(space, pooled(range(start, start + 10)))
        for store in (here, there):
            assert np.flatnonzero(check_pooled(store, space, range(70))).tolist() == list(range(start + 10))
    here.invalidate(space, [text(5)])
    there.merge(space)
    for store in (here, there):
        assert np.flatnonzero(check_pooled(store, space, range(60))).tolist() == [i for i in range(60) if i != 5]
