"""Finding prompts: sorted keys, the index on disk, and keeping in step with the folder."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.store import container
from actcache.store import keys as keys_module
from actcache.store.index import SpaceIndex
from actcache.store.keys import KeyTable
from actcache.store.store import Store
from store_helpers import SITES, check_pooled, make_store, pooled, segment_files, text, vector

# -- sorted keys ---------------------------------------------------------------------------------------

small_keys = st.integers(0, 5)
segments_of_keys = st.lists(st.lists(st.tuples(small_keys, small_keys), min_size=1, max_size=6), max_size=8)


def as_keys(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.uint64).reshape(-1, 2).view(np.uint8)


@settings(max_examples=150, deadline=None)
@given(segments_of_keys, st.data())
def test_key_table_agrees_with_a_dictionary(segments: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    """Few distinct words, so that duplicates and equal first words are common; segments are dropped in between."""
    rank = np.array(data.draw(st.permutations(range(len(segments)))), np.int64)
    table = KeyTable()
    live: dict[int, list[tuple[int, int]]] = {}
    for number, keys in enumerate(segments):
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))), bool)
        table.add(number, as_keys(keys), mask)
        live[number] = [k for k, m in zip(keys, mask, strict=True) if m]
        if data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(live)))
            table.drop(gone)
            live[gone] = []
    asked = [(a, b) for a in range(7) for b in range(7)]
    number, row = table.find(as_keys(asked), rank)
    for i, key in enumerate(asked):
        holders = [n for n, keys in live.items() if key in keys]
        if not holders:
            assert number[i] == -1
            continue
        assert number[i] == max(holders, key=lambda n: rank[n])
        assert segments[number[i]][row[i]] == key


def test_many_small_segments_make_few_runs() -> None:
    table = KeyTable()
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 255, (500, 16), np.uint8)
    for i in range(500):
        table.add(i, keys[i : i + 1])
        if i % 3 == 0:
            table.find(keys[:1], np.arange(500))
    number, _ = table.find(keys, np.arange(500))
    assert number.tolist() == list(range(500))
    assert len(table._runs) <= 10


def test_many_drops_are_filtered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge drops a thousand segments at once; going through all keys for each would take minutes."""
    table, keys = KeyTable(), np.random.default_rng(0).integers(0, 255, (500, 16), np.uint8)
    for i in range(500):
        table.add(i, keys[i : i + 1])
    table.find(keys[:1], np.arange(500))
    filtered: list[object] = []
    original = keys_module._Run.keep
    monkeypatch.setattr(keys_module._Run, "keep", lambda run, mask: filtered.append(run) or original(run, mask))
    for i in range(0, 400, 2):
        table.drop(i)
        if i % 8 == 0:
            table.add(i, keys[i : i + 1])
    number, _ = table.find(keys, np.arange(500))
    assert number.tolist() == [i if i % 2 or i >= 400 or i % 8 == 0 else -1 for i in range(500)]
    assert len(filtered) < 100
    assert len(table) == 500 - 150


def test_of_two_rows_of_a_segment_the_later_is_read(tmp_path: Path) -> None:
    """What waits for the writer goes into one segment, also when a prompt is written twice."""
    store, space = make_store(tmp_path)
    old, new = (pooled([i, 3, 4]) for i in (1, 2))
    old.data = {site: rows - 1 for site, rows in old.data.items()}
    info = store.append(space, [old, new])
    assert info.prompts == 6
    assert check_pooled(store, space, [2, 3, 4]).all()
    expected = np.mean([vector(2, SITES[0]), vector(3, SITES[0]), vector(4, SITES[0]), vector(1, SITES[0]) - 1], axis=0)
    np.testing.assert_allclose(store.statistics(space, SITES[0], pooling="last_token").mean, expected, atol=1e-6)
    store.append(space, pooled([9]))
    store.merge(space)
    assert check_pooled(store, space, [2, 3, 4, 9]).all()
    assert store.statistics(space, SITES[0], pooling="last_token").count == 5


# -- the index on disk ---------------------------------------------------------------------------------


def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    original = SpaceIndex._read

    def counting(self: SpaceIndex, name: str) -> object:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(SpaceIndex, "_read", counting)
    return read


def test_a_second_process_reads_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(5)))
    store.append(space, pooled(range(5, 9)))
    store.close()
    read = headers_read(monkeypatch)
    again, _ = make_store(tmp_path)
    assert check_pooled(again, space, range(10)).tolist() == [True] * 9 + [False]
    assert read == []


@pytest.mark.parametrize("damage", ["deleted", "garbage", "truncated", "flipped", "older", "folder is a file"])
def test_the_index_is_rebuilt(tmp_path: Path, damage: str) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(5)))
    store.close()
    file = tmp_path / "index" / "index.sqlite"
    for leftover in file.parent.glob("index.sqlite-*"):
        leftover.unlink()
    raw = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(os.urandom(5000))
    elif damage == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        file.write_bytes(raw[:100] + bytes(b ^ 0x55 for b in raw[100:]))
    elif damage == "older":
        import sqlite3

        with sqlite3.connect(file) as db:
            db.execute("PRAGMA user_version=77")
        db.close()
    else:
        shutil.rmtree(file.parent)
        file.parent.write_text("in the way")
    for _ in range(2):
        again, _ = make_store(tmp_path)
        assert check_pooled(again, space, range(6)).tolist() == [True] * 5 + [False]
        again.append(space, pooled([77]))
        assert check_pooled(again, space, [77]).all()
        again.close()


def test_keys_changed_in_the_index_never_give_wrong_rows(tmp_path: Path) -> None:
    import sqlite3

    store, space = make_store(tmp_path)
    store.append(space, pooled([1, 2]))
    store.close()
    db = sqlite3.connect(tmp_path / "index" / "index.sqlite")
    key = db.execute("SELECT text_key FROM segment").fetchone()[0]
    db.execute("UPDATE segment SET text_key = ?", (key[16:] + key[:16],))
    db.commit()
    db.close()
    again, _ = make_store(tmp_path)
    # check_pooled compares what is found with what each prompt must have.
    assert not check_pooled(again, space, [1, 2]).any()


def test_what_the_index_cannot_hold_is_read_from_the_segments(tmp_path: Path) -> None:
    """A lone surrogate is legal in a str and has no UTF-8."""
    store, space = make_store(tmp_path)
    records = pooled([1, 2])
    records.prompts = replace(records.prompts, text_context="\ud800")
    store.append(space, records)
    store.append(space, pooled([3]))
    store.close()
    again, _ = make_store(tmp_path)
    assert again.contains(space, [text(1), text(2), text(3)]).all()


def test_a_store_works_without_any_index_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "store", index_dir=tmp_path / "file" / "index")
    space = store.open_space({}, {"model_name": "m"})
    with store.writer(space) as writer:
        for i in range(12):
            writer.put(pooled([i]))
            writer.flush()
    assert check_pooled(store, space, range(12)).all()


# -- keeping in step -----------------------------------------------------------------------------------


def test_segments_of_others_appear_and_vanish(tmp_path: Path) -> None:
    here, space = make_store(tmp_path)
    there = Store(here.location, index_dir=tmp_path / "another host")
    there.open_space({"weights": "abc"}, {"model_name": "org/model"})
    assert not check_pooled(here, space, [1]).any()
    there.append(space, pooled([1]))
    assert check_pooled(here, space, [1]).all()
    there.append(space, pooled([2]))
    assert check_pooled(here, space, [1, 2]).all()
    for file in segment_files(here, space):
        file.unlink()
    assert not check_pooled(here, space, [1, 2]).any()
    assert not check_pooled(there, space, [1, 2]).any()


def test_a_change_within_one_clock_tick_is_seen(tmp_path: Path) -> None:
    here, space = make_store(tmp_path)
    there = Store(here.location, index_dir=tmp_path / "i2")
    there.open_space({"weights": "abc"}, {"model_name": "org/model"})
    here.append(space, pooled([0]))
    folder = here.root / space
    check_pooled(here, space, [0])
    stamp = os.stat(folder).st_mtime_ns
    there.append(space, pooled([1]))
    os.utime(folder, ns=(stamp, stamp))
    assert check_pooled(here, space, [0, 1]).all()


def test_a_file_system_of_whole_seconds_is_listed_for_longer(tmp_path: Path) -> None:
    here, space = make_store(tmp_path)
    here.append(space, pooled([0]))
    folder = here.root / space
    stamp = (time.time_ns() // 1_000_000_000 - 1) * 1_000_000_000
    os.utime(folder, ns=(stamp, stamp))
    assert check_pooled(here, space, [0]).all()
    there = Store(here.location, index_dir=tmp_path / "i2")
    there.invalidate(space, [text(0)])
    os.utime(folder, ns=(stamp, stamp))
    assert not check_pooled(here, space, [0]).any()


def test_a_listing_that_misses_both_sides_of_a_merge_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is not read in one instant: neither the old segments nor the new one need be in it."""
    here, space = make_store(tmp_path)
    there = Store(here.location, index_dir=tmp_path / "i2")
    for i in range(4):
        here.append(space, pooled([i]))
    original, torn = SpaceIndex._list, []

    def listing(self: SpaceIndex) -> set[str]:
        if self is not here._index(space) or torn:
            return original(self)
        torn.append(True)
        before = original(self)
        assert there.merge(space) == 4
        return before & original(self)

    monkeypatch.setattr(SpaceIndex, "_list", listing)
    assert check_pooled(here, space, range(4)).all()
    assert torn


def test_an_unchanged_folder_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    time.sleep(0.3)
    check_pooled(store, space, [1])
    monkeypatch.setattr(SpaceIndex, "_list", lambda self: pytest.fail("listed"))
    assert check_pooled(store, space, [1, 2]).tolist() == [True, False]


def test_a_segment_that_vanishes_unnoticed_is_looked_up_again(tmp_path: Path) -> None:
    """The folder's time stamp does not tell, as on some network file systems: the open fails, and it looks again."""
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    store.append(space, pooled([1, 2]))
    newest = max(segment_files(store, space), key=lambda p: p.stat().st_mtime_ns)
    newest.unlink()
    index = store._index(space)
    index._open.clear()
    index._listed = (time.time_ns(), os.stat(index.folder).st_mtime_ns)
    index._listed = (index._listed[0] + 10**10, index._listed[1])
    assert check_pooled(store, space, [1, 2]).tolist() == [True, False]


def test_damaged_and_foreign_files_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    folder = store.root / space
    (folder / ("d" * 32 + ".safetensors")).write_bytes(b"\xff" * 500)
    (folder / ("e" * 32 + ".safetensors")).write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    (folder / "other.safetensors").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "actcache.store"):
        assert check_pooled(store, space, [1, 2]).tolist() == [True, False]
    assert {m.split(".safetensors")[0][-3:] for m in caplog.messages} == {"ddd", "eee"}
    caplog.clear()
    (folder / "more").write_text("")
    check_pooled(store, space, [1])
    assert not caplog.messages


def test_a_segment_copied_from_another_space_is_refused(tmp_path: Path) -> None:
    """Its numbers belong to another model."""
    store, space = make_store(tmp_path)
    other = store.open_space({"weights": "other"}, {"model_name": "other"})
    store.append(other, pooled([1]))
    store.append(space, pooled([2]))
    source = segment_files(store, other)[0]
    shutil.copy(source, store.root / space / source.name)
    assert check_pooled(store, space, [1, 2]).tolist() == [False, True]


def test_a_file_too_short_for_its_index_is_a_miss_not_anothers_rows(tmp_path: Path) -> None:
    """A reader that mapped a growing file too short once got clamped rows; here it is refused."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(50)))
    file = segment_files(store, space)[0]
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[: len(raw) - 8 * 4])
    store._index(space)._open.clear()
    assert not check_pooled(store, space, range(50)).any()


def test_gather_never_clips() -> None:
    from actcache.errors import NotCachedError
    from actcache.store.gather import gather

    matrix = np.arange(12, dtype=np.float32).reshape(6, 2)
    for rows in ([0, 6], [-1, 2]):
        with pytest.raises(NotCachedError):
            gather([matrix], np.array(rows), np.empty((2, 1, 2), np.float32), np.arange(2), [0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gather_agrees_with_plain_indexing(data: st.DataObject) -> None:
    dtype = container.DTYPES[data.draw(st.sampled_from(["F32", "F16", "BF16"]))]
    target = np.dtype(np.float32) if data.draw(st.booleans()) else dtype
    from actcache.store.gather import gather

    rows = np.array(data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=300)), np.int64)
    if data.draw(st.booleans()):
        rows = np.arange(len(rows)) % 200
    matrices = [(np.arange(600).reshape(200, 3) % 97 + j).astype(dtype) for j in range(2)]
    at = (
        np.array(data.draw(st.permutations(range(len(rows)))), np.int64)
        if data.draw(st.booleans())
        else np.arange(len(rows))
    )
    out = np.zeros((len(rows), 3, 3), target)
    gather(matrices, rows, out, at, [2, 0])
    for j, column in enumerate([2, 0]):
        np.testing.assert_array_equal(out[at, column].astype(np.float32), matrices[j][rows].astype(np.float32))
    assert not out[:, 1].any()
