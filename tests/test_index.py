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

from actcache.store import keys as keys_module
from actcache.store.index import SpaceIndex
from actcache.store.keys import KeyTable
from actcache.store.prompts import PromptTable
from actcache.store.store import Store
from store_helpers import CONTEXT, SITES, check_pooled, make_store, make_table, pooled, segment_files, text, vector

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
    assert [table.find_one(*key, rank) for key in asked] == list(zip(number.tolist(), row.tolist(), strict=True))
    for found, again in zip((number, row), table.find(as_keys(asked * 20), rank), strict=True):
        np.testing.assert_array_equal(again, np.tile(found, 20))


@pytest.mark.parametrize("count", [40, 400, 2000])
def test_keys_that_agree_lie_among_many_that_do_not(count: int) -> None:
    """Copies of a prompt in one segment and in others, and first words that agree by chance, at the very end too."""
    rng = np.random.default_rng(count)
    words = rng.integers(1, 2**63, (4000, 2), np.uint64)
    words[7], words[2500], words[900] = words[3], words[3], words[2000]
    words[3001, 0], words[11, 0] = words[12, 0], words[3002, 0]
    words[50, 0] = words[51, 0] = 2**64 - 1
    table, parts = KeyTable(), np.split(words, [1000, 1100, 3000])
    rank = np.array([2, 0, 3, 1])
    right: dict[tuple[int, int], tuple[int, int]] = {}
    for number in np.argsort(rank).tolist():
        right.update({(high, low): (number, row) for row, (high, low) in enumerate(parts[number].tolist())})
    table.add(0, parts[0].view(np.uint8))
    for number, part in enumerate(parts[1:], 1):
        table.add(number, part.view(np.uint8))
        assert table.find(words[:1].view(np.uint8), rank)[0].tolist() == [0]
    assert len(table._runs) > 1
    special = [3, 7, 2500, 900, 2000, 3001, 12, 11, 3002, 50, 51, 1050]
    asked = words[np.concatenate([special, rng.choice(4000, count)])]
    asked[20:30, 1] += np.uint64(1)
    asked[30:35, 0] = [0, 2**64 - 1, 2**64 - 2, 1, 5]
    expected = [right.get((high, low), (-1, -1)) for high, low in asked.tolist()]
    assert len({number for number, _ in expected}) == 5
    number, row = table.find(asked.view(np.uint8), rank)
    assert list(zip(number.tolist(), row.tolist(), strict=True)) == expected
    assert [table.find_one(high, low, rank) for high, low in asked.tolist()] == expected


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=300),
    st.sampled_from([(0, 2**64 - 1, 5000), (0, 0, 0), (0, 9999, 5000), (2**64 - 9999, 2**64 - 1, 5000)]),
    st.data(),
)
def test_one_key_is_found_wherever_its_digest_lies(
    values: list[int], others: tuple[int, int, int], data: st.DataObject
) -> None:
    """Digests lie evenly, which the search builds on; hostile ones may not."""
    low, high, count = others
    words = np.random.default_rng(len(values)).integers(low, high, count, np.uint64, endpoint=True)
    values = [*values, *words[:10].tolist()]
    words = np.unique(np.concatenate([words, np.array(values, np.uint64)]))
    table = KeyTable()
    table.add(0, np.stack([words, ~words], 1).view(np.uint8))
    rank = np.zeros(1, np.int64)
    for value in [*values[:10], *values[-10:], data.draw(st.integers(0, 2**64 - 1))]:
        at = int(np.searchsorted(words, np.uint64(value)))
        there = at < len(words) and int(words[at]) == value
        assert table.find_one(value, value ^ (2**64 - 1), rank) == ((0, at) if there else (-1, -1))
        assert table.find_one(value, value, rank) == (-1, -1)


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
    original = keys_module.Run.keep
    monkeypatch.setattr(keys_module.Run, "keep", lambda run, mask: filtered.append(run) or original(run, mask))
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


def test_a_segment_that_vanishes_unnoticed_is_looked_up_again(tmp_path: Path) -> None:
    """The folder's time stamp does not tell, as on some network file systems: the open fails, and it looks again."""
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    store.append(space, pooled([1, 2]))
    newest = max(segment_files(store, space), key=lambda p: p.stat().st_mtime_ns)
    newest.unlink()
    index = store._index(space)
    index._open.clear()
    index.listing._seen = time.time_ns() + 10**10, os.stat(index.folder).st_mtime_ns
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


def test_one_prompt_is_found_as_many_are(tmp_path: Path) -> None:
    """Alone and in company: newest copies, tombs, damage, sites in several segments, other kinds, contexts and ids."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(20)))
    newer = pooled(range(5, 10))
    newer.data = {site: rows + 1 for site, rows in newer.data.items()}
    store.append(space, newer)
    store.append(space, pooled(range(10, 15), sites=["resid_post.2"]))
    damaged = store.append(space, pooled(range(30, 34)))
    store.append(space, pooled(range(33, 36), sites=[*SITES, "resid_post.2"]))
    store.invalidate(space, make_table([3, 7]))
    path = store.root / space / f"{damaged.name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    numbers = [*range(-3, 20), *range(28, 40)]
    # Stores of their own, so that nothing is known to be intact or damaged before.
    alone, together = (Store(store.location, index_dir=tmp_path / name) for name in ("alone", "together"))
    for sites in (["resid_post.0"], SITES, ["resid_post.2"], [*SITES, "resid_post.2"], ["nothing"]):
        for check in (False, True):
            for context, kind in ((CONTEXT, 1), (CONTEXT, 2), ("other", 1)):
                options = {
                    "text_context": context,
                    "kinds": kind,
                    "sites": sites,
                    "layout": "last_token",
                    "check": check,
                }
                many = together.locate(space, texts=[text(i) for i in numbers], **options)  # type: ignore[arg-type]
                for k, i in enumerate(numbers):
                    for _ in range(2):
                        one = alone.locate(space, texts=[text(i)], **options)  # type: ignore[arg-type]
                        assert one.found.tolist() == [many.found[k]], (i, sites, check)
                        assert one.found_each.tolist() == many.found_each[k : k + 1].tolist()
                        assert one.num_tokens.tolist() == [many.num_tokens[k]]
                        if many.found[k]:
                            np.testing.assert_array_equal(one.take(), many.take(index=[k]))
            some = [i for i in numbers if i >= 0]
            by_ids = together.locate(space, table=make_table(some), sites=sites, layout="last_token", check=check)
            for k, i in enumerate(some):
                one = alone.locate(space, table=make_table([i]), sites=sites, layout="last_token", check=check)
                assert one.found.tolist() == [by_ids.found[k]]
    assert not alone.locate(space, texts=[text(30)], text_context=CONTEXT, sites=SITES, layout="last_token").found[0]
    changed = make_table([1])
    other = PromptTable(
        changed.token_ids + 1, changed.token_offset, changed.kind, changed.text, changed.text_offset, CONTEXT,
        changed.token_key, changed.text_key,
    )  # fmt: skip
    assert not alone.locate(space, table=other, sites=SITES, layout="last_token").found[0], "a key is not enough"
