"""Verifying a store: what is wrong is named, and repair drops that and nothing else."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

import actcache as ac
from actcache.cli.app import run
from actcache.errors import NewerFormatError
from actcache.store import container
from actcache.store import segment as segments
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from actcache.store.verification import Damage, VerifyReport, in_words
from store_helpers import CONTEXT, SITES, check_pooled, every_token, flip, make_store, make_table, pooled, segment_files


def reopened(tmp_path: Path, index: str = "index") -> Store:
    return Store(tmp_path / "store", index_dir=tmp_path / index)


def segment_path(store: Store, info: segments.SegmentInfo) -> Path:
    return store.root / info.space / f"{info.name}.safetensors"


def test_a_sound_store_is_read_whole(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    wide = {"a": np.ones((30, 4000), np.float32), "b": np.ones((30, 7), np.float16)}
    infos = [
        store.append(space, pooled(range(10))),
        store.append(space, every_token(range(10))),
        store.append(space, Records.pooled(make_table(range(30)), "mean", wide)),
    ]
    store.invalidate(space, make_table([3]))
    (store.root / space / "notes.txt").write_text("mine")
    for repair in (False, True):
        report = store.verify(repair)
        assert report.ok
        assert report.damaged == []
        assert (report.segments, report.tombs, report.repaired) == (3, 3, 0)
        blocks = sum(
            -(-i.rows * dim * (2 if code == "F16" else 4) // BLOCK) for i in infos for _, code, dim in i.columns
        )
        assert report.blocks == blocks == 2 + 2 + 4 + 1
    empty = Store(tmp_path / "nothing", index_dir=tmp_path / "index").verify(True)
    assert empty.ok
    assert empty.segments == 0
    assert not (tmp_path / "nothing").exists()


def test_damaged_rows_are_named_and_dropped(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    data = {site: np.random.default_rng(0).standard_normal((100, 4096)).astype(np.float32) for site in SITES}
    info = store.append(space, Records.pooled(make_table(range(100)), "last_token", data))
    sound = store.append(space, pooled(range(200, 210)))
    path = segment_path(store, info)
    start = segments.open(path).start_of(SITES[1])
    # A row has 16 KiB, so a block has eight of them.
    flip(path, start + 2 * BLOCK + 5)
    flip(path, start + 9 * BLOCK + 5)
    report = store.verify()
    assert not report.ok
    (damage,) = report.damaged
    assert (damage.segment, damage.site, damage.repaired) == (f"v1/{space}/{path.name}", SITES[1], False)
    assert damage.rows == [*range(16, 24), *range(72, 80)]
    assert path.exists()
    repaired = reopened(tmp_path).verify(repair=True)
    assert repaired.ok
    assert repaired.repaired == 1
    assert not path.exists()
    assert segment_path(store, sound).exists()
    assert store.verify().damaged == []
    fresh = reopened(tmp_path, "other")
    kept = np.setdiff1d(np.arange(100), damage.rows)
    for site, left in zip(SITES, (np.arange(100), kept), strict=True):
        found = fresh.contains(space, make_table(range(100)), site, pooling="last_token")
        assert np.flatnonzero(found).tolist() == left.tolist()
        place = fresh.locate(space, table=make_table(left.tolist()), sites=[site], layout="last_token")
        np.testing.assert_array_equal(place.take()[:, 0], data[site][left])
    place = fresh.locate(space, table=make_table(kept.tolist()), sites=SITES, layout="last_token")
    np.testing.assert_array_equal(place.take(), np.stack([data[s][kept] for s in SITES], 1))


def damaged_header(store: Store, path: Path) -> None:
    flip(path, 200)


def damaged_index(store: Store, path: Path) -> None:
    flip(path, segments.open(path)._tensors["text"].start)


def truncated(store: Store, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def wrong_keys(store: Store, path: Path) -> None:
    """A writer's mistake: every digest is right, but a key is not that of its prompt."""
    data = bytearray(path.read_bytes())
    opened = segments.open(path)
    data[opened._tensors["prompt_key"].start] ^= 1
    head = container.header_size(bytes(data[:8]), len(data))
    stop = min(opened.start_of(site) for site in opened.info.sites)
    digest = xxhash.xxh3_64_intdigest(bytes(data[head + 16 : stop]))
    data[head + 8 : head + 16] = digest.to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damaged_header, damaged_index, truncated, wrong_keys])
def test_a_segment_that_cannot_be_trusted_goes(tmp_path: Path, damage: Callable[[Store, Path], None]) -> None:
    store, space = make_store(tmp_path)
    first = store.append(space, pooled(range(10)))
    store.append(space, pooled(range(10, 20)))
    damage(store, segment_path(store, first))
    report = reopened(tmp_path, "other").verify()
    assert [d.segment for d in report.damaged] == [f"v1/{space}/{first.name}.safetensors"]
    assert not report.ok
    again = reopened(tmp_path)
    assert again.verify(repair=True).ok
    assert again.verify().damaged == []
    assert check_pooled(again, space, range(20)).tolist() == [False] * 10 + [True] * 10
    again.append(space, pooled(range(10)))
    assert check_pooled(again, space, range(20)).all()


def test_a_tomb_that_cannot_be_read_takes_its_segment_with_it(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(10)))
    store.append(space, pooled(range(10, 20)))
    store.invalidate(space, make_table([3]))
    (tomb,) = (store.root / space).glob("*.tomb")
    flip(tomb, tomb.stat().st_size - 1)
    fresh = reopened(tmp_path, "other")
    (damage,) = fresh.verify(repair=True).damaged
    assert damage.segment.endswith(tomb.name)
    assert damage.repaired
    assert not tomb.exists()
    assert check_pooled(fresh, space, range(20)).tolist() == [False] * 10 + [True] * 10


def test_what_is_not_ours_or_not_yet_known_is_left_alone(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, pooled(range(5)))
    folder = store.root / space
    foreign, newer = folder / f"{'e' * 32}.safetensors", folder / f"{'f' * 32}.safetensors"
    foreign.write_bytes(b"something else")
    raw = segment_path(store, info).read_bytes()
    newer.write_bytes(raw.replace(b'"version":"1.0"', b'"version":"2.0"'))
    with pytest.raises(NewerFormatError, match=r"'2\.0', this actcache reads 1\.0: install a newer actcache"):
        segments.open(newer)
    other = store.open_space({"weights": "other"}, {"model_name": "other"})
    store.append(other, pooled(range(3)))
    stray = store.root / other / f"{'d' * 32}.safetensors"
    stray.write_bytes(raw)
    for repair in (False, True):
        report = reopened(tmp_path).verify(repair)
        assert report.newer == [f"v1/{space}/{newer.name}"]
        assert {d.segment: d.repaired for d in report.damaged} == {
            f"v1/{space}/{foreign.name}": False,
            f"v1/{other}/{stray.name}": False,
        }
        assert foreign.exists() and newer.exists() and stray.exists()
    assert "delete it yourself" in next(d.reason for d in report.damaged if foreign.name in d.segment)


def test_a_lost_description_is_written_again(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(5)))
    description = store.root / space / "space.json"
    content = description.read_bytes()
    for damage in (b"", content[: len(content) // 2], None):
        if damage is None:
            description.unlink()
        else:
            description.write_bytes(damage or content.replace(b'"identity"', b'"identitx"'))
        stranger = reopened(tmp_path)
        report = stranger.verify()
        assert [d.segment for d in report.damaged] == [f"v1/{space}/space.json"]
        assert not report.ok
        assert check_pooled(stranger, space, range(5)).all()
        assert (stranger if damage is None else store).verify(repair=True).ok
        assert description.read_bytes().startswith(b'{"__metadata__"')
        assert [s.space for s in reopened(tmp_path).spaces()] == [space]
    newer = content.replace(b'"version":"1.0"', b'"version":"2.0"')
    description.write_bytes(newer)
    report = store.verify(repair=True)
    assert report.newer == [f"v1/{space}/space.json"]
    assert description.read_bytes() == newer


@pytest.mark.parametrize("column", ["prompt_key", "text_key", "size", "rows", "text_context", "replaces"])
def test_every_row_of_the_index_is_held_against_its_segment(tmp_path: Path, column: str) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(5)))
    store.append(space, pooled(range(5, 9)))
    store.close()
    wrong = {"size": 5, "rows": 7, "text_context": "x", "replaces": '{"a":["b"]}'}.get(column, bytes(16 * 5))
    with sqlite3.connect(tmp_path / "index" / "index.sqlite") as db:
        assert db.execute(f"UPDATE segment SET {column} = ? WHERE prompts = 5", (wrong,)).rowcount == 1
    db.close()
    store = reopened(tmp_path)
    (damage,) = store.verify().damaged
    assert damage.segment == "index"
    assert store.verify(repair=True).ok
    assert store.verify().damaged == []
    store.close()
    assert check_pooled(reopened(tmp_path), space, range(9)).all()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_file_that_the_disk_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A bad sector is damage, and named; to have run out of file descriptors says nothing of the file."""
    store, space = make_store(tmp_path)
    bad = segment_path(store, store.append(space, pooled(range(5))))
    store.append(space, pooled(range(5, 9)))
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == bad.stat().st_ino:
            raise OSError(number, os.strerror(number))
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    fresh = reopened(tmp_path, "other")
    if number == errno.EMFILE:
        with pytest.raises(OSError, match="Too many open files"):
            fresh.verify()
        return
    (damage,) = fresh.verify().damaged
    assert (damage.segment, damage.reason.startswith("[Errno 5] Input/output error")) == (
        f"v1/{space}/{bad.name}",
        True,
    )
    assert check_pooled(fresh, space, range(9)).tolist() == [False] * 5 + [True] * 4
    assert not fresh.verify(repair=True).ok
    monkeypatch.undo()
    assert check_pooled(reopened(tmp_path, "again"), space, range(9)).all(), "left for a person to look at"


def test_damage_since_it_was_last_looked_at_is_found(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, pooled(range(10)))
    assert check_pooled(store, space, range(10)).all()
    path = segment_path(store, info)
    flip(path, path.stat().st_size - 1)
    report = store.verify(repair=True)
    assert [(d.site, d.rows) for d in report.damaged] == [(SITES[1], list(range(10)))]
    assert not check_pooled(store, space, range(10)).any()
    assert check_pooled(store, space, range(10), SITES[:1]).all()
    assert len(segment_files(store, space)) == 1


def test_validate_looks_at_what_no_checksum_covers(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    uneven = {"a": np.ones((5, 3), np.float32), "b": np.ones((5, 3), np.float32)}
    info = store.append(space, Records.pooled(make_table(range(5)), "mean", uneven))
    path = segment_path(store, info)
    assert segments.validate(path) == []
    flip(path, segments.open(path).start_of("b") - 1)
    (problem,) = segments.validate(path)
    assert "not filled with zeros" in problem


def test_compacting_drops_what_was_invalidated(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for start in range(0, 40, 10):
        store.append(space, pooled(range(start, start + 10)))
    lone = store.append(space, every_token(range(10)))
    store.invalidate(space, make_table([3, 35]))
    assert store.compact() == 4 + 1
    assert len(segment_files(store, space)) == 2
    assert not segment_path(store, lone).exists()
    kept = [i for i in range(40) if i not in (3, 35)]
    fresh = reopened(tmp_path, "other")
    for one in (store, fresh):
        assert check_pooled(one, space, range(40)).nonzero()[0].tolist() == kept
        assert one.contains(space, make_table(range(10)), SITES[0]).tolist() == [i != 3 for i in range(10)]
        assert one.verify().ok
    assert store.compact(space) == 0
    assert store.read(space, [make_table([5]).text_of(0)], SITES[0], pooling="last_token").shape == (1, 8)
    assert CONTEXT in store._index(space).contexts()


def test_the_verb_and_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, space = make_store(tmp_path)
    info = store.append(space, pooled(range(10)))
    where = ["--store", str(store.location)]
    assert run(["verify", *where]) == 0
    assert "everything is intact" in capsys.readouterr().out
    path = segment_path(store, info)
    flip(path, path.stat().st_size - 1)
    assert run(["verify", *where, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["repaired"], found["segments"]) == (False, 0, 1)
    assert found["damaged"][0]["site"] == SITES[1]
    assert (found["lost"], found["lost_prompts"], found["lost_sites"]) == (10, 10, {SITES[1]: 10})
    assert run(["verify", *where]) == 1
    shown = capsys.readouterr().out
    assert f"DAMAGED: v1/{space}/{path.name} {SITES[1]}, 10 rows" in shown
    assert f"lost: 10 activations of 10 prompts ({SITES[1]} of 10); all else is intact." in shown
    assert shown.startswith("1 segment, 2 blocks, 0 tombs read.\n")
    one = VerifyReport(1, 1, 1, [Damage("a", "x.0", [0], "rot")], [], 1, 1, {"x.0": 1})
    assert in_words(one)[:3] == [
        "1 segment, 1 block, 1 tomb read.",
        "DAMAGED: a x.0, 1 row: rot",
        "lost: 1 activation of 1 prompt (x.0 of 1); all else is intact.",
    ]
    assert run(["verify", "--repair", *where]) == 0
    assert "1 of 1 repaired" in capsys.readouterr().out
    ac.set_cache_backend(store.location)
    assert ac.verify_cache().ok
    ac.set_cache_backend(None)
