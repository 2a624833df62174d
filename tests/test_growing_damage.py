"""Growing files that are torn, damaged or hostile: what is wrong is noticed, and the rest is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actcache.errors import FormatError
from actcache.store import batches, segment
from actcache.store.batches import OpenFile
from actcache.store.growing import GrowingFile
from actcache.store.store import Store
from store_helpers import (
    SITES,
    check_pooled,
    flip,
    fresh,
    growing_writer,
    make_store,
    make_table,
    open_files,
    pooled,
    segment_files,
    text,
    vector,
)


def grown_file(folder: Path, count: int = 3) -> tuple[Store, str, Path]:
    """A file that grew by `count` batches of two prompts, whose writer is gone."""
    store, space = make_store(folder)
    writer = growing_writer(store, space)
    for i in range(count):
        writer.append([pooled([2 * i, 2 * i + 1])])
    for file in writer._files.values():
        file.close()
    return store, space, open_files(store, space)[0]


def tear_last(path: Path, *, synced: bool) -> None:
    """Take the rows of one site out of the last batch; unless it was `synced`, the mark that follows the sync, too."""
    last = OpenFile(path)
    last.poll()
    at = last._at
    with path.open("r+b") as file:
        file.seek(last.batches[-1].start_of(SITES[1]))
        file.write(bytes(64))
        if not synced:
            file.seek(at)
            assert any(file.read(16))
            file.seek(at)
            file.write(bytes(16))


def test_a_torn_last_batch_never_was(tmp_path: Path) -> None:
    """One sync makes rows and record durable, in no order: the record can be there without the rows."""
    store, space, path = grown_file(tmp_path)
    tear_last(path, synced=False)
    again = fresh(store, tmp_path)
    assert check_pooled(again, space, range(6)).tolist() == [True] * 4 + [False] * 2
    report = again.verify()
    assert report.ok
    assert report.damaged == []
    again.merge(space)
    assert not open_files(store, space)
    assert check_pooled(again, space, range(6)).tolist() == [True] * 4 + [False] * 2


def test_damage_of_a_last_batch_that_was_synced_costs_what_is_damaged(tmp_path: Path) -> None:
    """The mark that is written behind a sync tells such damage from a batch that was never committed."""
    store, space, path = grown_file(tmp_path)
    tear_last(path, synced=True)
    again = fresh(store, tmp_path)
    assert check_pooled(again, space, range(6)).tolist() == [True] * 4 + [False] * 2
    assert check_pooled(again, space, range(6), SITES[:1]).all()
    (damage,) = again.verify().damaged
    assert (damage.site, damage.rows) == (SITES[1], [4, 5])
    # Whoever writes next makes a segment of it.
    again.merge(space)
    assert not open_files(store, space)
    for host in (again, fresh(store, tmp_path, "another")):
        assert check_pooled(host, space, range(6)).tolist() == [True] * 4 + [False] * 2
        assert check_pooled(host, space, range(6), SITES[:1]).all()
        assert host.verify().ok


def test_a_mark_never_takes_the_place_of_what_stands_at_the_end(tmp_path: Path) -> None:
    """A journal that is full to the last byte leaves no room for it."""
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    writer.append([pooled([0])])
    (file,) = writer._files.values()
    before = file._at
    writer.append([pooled([0])])
    length = file._at - before
    assert any(file.path.read_bytes()[file._at :][:16])
    # As if the file ended behind the next record.
    whole, file._size = file._size, file._at + length + 16
    file.add([pooled([0])])
    assert file._at + 16 == file._size
    assert not any(file.path.read_bytes()[file._at :][:16])
    file._size = whole
    writer.finish(True)
    assert check_pooled(store, space, [0]).all()


@pytest.mark.parametrize("what", ["rows", "record"])
def test_damage_before_the_last_batch_is_found_and_repaired(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, space, path = grown_file(tmp_path)
    held = OpenFile(path)
    held.poll()
    flip(path, held.batches[1].start_of(SITES[0]) + 5 if what == "rows" else held.batches[1].start + 900)
    again = fresh(store, tmp_path)
    assert check_pooled(again, space, range(6)).tolist() == [True, True, False, False, True, True] or what == "rows"
    assert not check_pooled(again, space, [2]).any()
    assert check_pooled(again, space, [0, 1, 4, 5]).all()
    assert "damaged" in caplog.text
    report = again.verify()
    assert [d.segment for d in report.damaged] == [str(path.relative_to(store.location))]
    assert not report.ok
    assert report.damaged[0].rows == ([2, 3] if what == "rows" else [])
    assert again.verify(repair=True).ok
    assert again.verify().damaged == []
    assert check_pooled(again, space, [0, 1, 4, 5]).all()
    assert not check_pooled(again, space, [2]).any()


@pytest.mark.parametrize("known", [0, 2])
def test_a_writer_need_not_read_what_it_seals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """Damage of a record costs nothing then, whether its process has read some batches or none."""
    monkeypatch.setattr(GrowingFile, "is_well_filled", True)
    store, space = make_store(tmp_path)
    writer = growing_writer(store, space)
    for k in range(4):
        writer.append([pooled([2 * k, 2 * k + 1])])
        if k < known:
            assert check_pooled(store, space, range(2 * k + 2)).all()
    (path,) = open_files(store, space)
    held = OpenFile(path)
    held.poll()
    flip(path, held.batches[2].start + 900)
    assert not check_pooled(fresh(store, tmp_path), space, [4, 5]).any()
    writer.finish(True)
    (made,) = segment_files(store, space)
    assert made.stem == path.stem and segment.validate(made) == []
    assert len(segment.open(made).info.replaces) == 4
    for looking in (store, fresh(store, tmp_path, "third")):
        assert check_pooled(looking, space, range(8)).all()


def test_every_byte_flipped_is_detected_or_harmless(tmp_path: Path) -> None:
    """Of everything that is not a hole."""
    store, _, path = grown_file(tmp_path, 2)
    store.close()
    data = path.read_bytes()
    table = make_table(range(4))
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    for at in used[:: max(1, len(used) // 400)].tolist():
        flip(path, at)
        try:
            file = OpenFile(path)
        except FormatError:
            pass
        else:
            for batch in [b for b in (file.poll() or ()) if b.is_whole()]:
                for i, key in enumerate(batch.prompts.token_key):
                    number = int(np.flatnonzero((table.token_key == key).all(axis=1))[0])
                    assert batch.prompts.text_of(i) == text(number)
                    for site in SITES:
                        np.testing.assert_array_equal(batch.matrix(site)[i], vector(number, site))
        flip(path, at)
    assert path.read_bytes() == data


def test_hostile_descriptions_are_refused(tmp_path: Path) -> None:
    """Places outside the file, or over one another, must not be read."""
    store, space, path = grown_file(tmp_path)
    good = OpenFile(path)
    with path.open("rb") as file:
        data = bytearray(file.read())
    journal = good._journal()
    length = batches.FRAME.unpack_from(data, journal)[0]
    blob = bytes(data[journal + 16 : journal + 16 + length])

    def with_description(**changes: str) -> None:
        metadata = {**good.metadata, **changes}
        made = batches.framed(batches.blob_of(metadata, {}))
        path.write_bytes(data[:journal] + made + bytes(len(data) - journal - len(made) - 16) + data[-16:])

    assert blob
    with_description()
    assert OpenFile(path).poll() == []
    site, code, dim, at = good.strips[0]
    wrong = {
        "outside": [(site, code, dim, len(data))],
        "negative": [(site, code, dim, -64)],
        "wide": [(site, code, 1 << 40, at)],
        "over one another": [(site, code, dim, at), ("other", code, dim, at)],
        "scaled": [(site, "I8+S", dim, at)],
        "slash": [("a/b", code, dim, at)],
        "twice": [(site, code, dim, at), (site, code, dim, good.strips[1][3])],
        "none": [],
    }
    for columns in wrong.values():
        with_description(columns=json.dumps(columns))
        with pytest.raises(FormatError):
            OpenFile(path)
    for changes in ({"rows": "-1"}, {"rows": str(1 << 50)}, {"layout": "a b"}, {"version": "x"}, {"format": "other"}):
        with_description(**changes)
        with pytest.raises(FormatError):
            OpenFile(path)
    path.write_bytes(data[:-100])
    with pytest.raises(FormatError):
        OpenFile(path)
    again = fresh(store, tmp_path)
    assert not check_pooled(again, space, range(6)).any()
    assert not again.verify().ok
    assert again.verify(repair=True).ok
    assert not path.exists()


def test_rows_beyond_what_was_mapped_are_never_read(tmp_path: Path) -> None:
    """A reader that mapped a growing file too short once handed out another prompt's rows: here it has its full size
    from the beginning, and a record that points elsewhere is refused."""
    store, _, path = grown_file(tmp_path, 1)
    file = OpenFile(path)
    (batch,) = file.poll()
    record = file._record(batch.start - batches.FRAME.size)
    assert record is not None
    assert len(file.mapped.raw) == path.stat().st_size
    size = int.from_bytes(record[:8], "little")
    for first in (file.rows - 1, file.rows, file.rows + 5):
        header = record[8 : 8 + size].rstrip().replace(b'"row":"0"', b'"row":"%d"' % first).ljust(size)
        assert len(header) == size
        with pytest.raises(FormatError, match="room for"):
            batches.Batch(file, record[:8] + header + record[8 + size :], batch.start, 0)
    assert store.verify().ok
