"""Damaged files and full disks, seen through a store: a right answer, a miss, or a clear error."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from actcache.store.files import SIGNATURE
from actcache.store.records import Records
from actcache.store.store import Store
from segment_helpers import HOSTILE, hostile
from store_helpers import check_pooled, make_store, make_table, pooled, segment_files

GB = 2**30


def uneven() -> Records:
    """Full sequences at sites of different widths, so that there is padding between the matrices."""
    table = make_table([1, 2, 9])
    rng = np.random.default_rng(0)
    rows = len(table.token_ids)
    return Records.tokens(
        table, {site: rng.standard_normal((rows, dim)).astype(np.float32) for site, dim in {"a": 3, "b": 5}.items()}
    )


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(None, 17), ("int8", 17), *(pytest.param(d, 1, marks=pytest.mark.slow) for d in (None, "int8"))],
)
def test_no_flipped_byte_gives_a_wrong_number(tmp_path: Path, dtype: str | None, step: int) -> None:
    store = Store(tmp_path / "store", dtype=dtype, index_dir=tmp_path / "index")
    space = store.open_space({"weights": "abc"}, {"model_name": "org/model"})
    store.append(space, uneven())
    table = make_table([1, 2, 9])
    sites = ["a", "b"]

    def read(index: str) -> tuple[Store, list[list[bytes] | None]]:
        fresh = Store(tmp_path / "store", index_dir=tmp_path / index)
        found: list[list[bytes] | None] = []
        for site in sites:
            place = fresh.locate(space, table=table, sites=[site], layout="tokens")
            found += [[place.rows(k)[0].tobytes()] if place.found[k] else None for k in range(3)]
        return fresh, found

    _, expected = read("index")
    assert None not in expected
    (path,) = segment_files(store, space)
    original = path.read_bytes()
    misses = harmless = 0
    for at in range(0, len(original), step):
        broken = bytearray(original)
        broken[at] ^= 0x41
        path.write_bytes(broken)
        # With what this host knows of the file, and without.
        fresh, found = read("index" if at % 2 else f"index {at}")
        assert all(f is None or f == e for f, e in zip(found, expected, strict=True)), at
        report = fresh.verify()
        missed = None in found
        misses += missed
        harmless += not missed
        assert report.ok is not missed, at
        fresh.close()
        shutil.rmtree(tmp_path / f"index {at}", ignore_errors=True)
    # Only the padding between matrices may change unnoticed.
    assert misses > 50 // step
    assert harmless * step < 400


def test_no_flipped_byte_of_a_tomb_brings_a_prompt_back(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(6)))
    store.invalidate(space, make_table([2, 4]))
    (tomb,) = (store.root / space).glob("*.tomb")
    original = tomb.read_bytes()
    for at in range(len(original)):
        broken = bytearray(original)
        broken[at] ^= 0x10
        tomb.write_bytes(broken)
        fresh = Store(store.location, index_dir=tmp_path / "fresh")
        assert not check_pooled(fresh, space, range(6))[[2, 4]].any(), at
        fresh.close()
    for keep in (0, 8, len(original) // 2, len(original) - 1):
        tomb.write_bytes(original[:keep])
        fresh = Store(store.location, index_dir=tmp_path / "fresh")
        assert not check_pooled(fresh, space, range(6))[[2, 4]].any(), keep
        fresh.close()


def test_a_folder_full_of_hostile_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is refused by name, none is opened as what it claims to be, and everything else goes on."""
    store, space = make_store(tmp_path)
    for i in range(6):
        store.append(space, pooled([i]))
    store.invalidate(space, make_table([2]))
    sound = segment_files(store, space)
    folder = store.root / space
    ours: set[str] = set()
    foreign: set[str] = set()

    def put(content: bytes) -> None:
        path = folder / f"{len(ours | foreign):032x}.safetensors"
        path.write_bytes(content)
        (ours if content[8:].startswith(SIGNATURE) else foreign).add(path.name)

    for edit in HOSTILE.values():
        put(hostile(lambda entries, edit=edit: entries["__metadata__"].update(space=space) or edit(entries)))
    before = set(ours)
    put(hostile(lambda entries: entries["__metadata__"].update(space="../../" + space)))
    stray = ours - before
    whole = sound[0].read_bytes()
    for content in (b"", b"\0", b"\xff" * 400, (1 << 62).to_bytes(8, "little") + SIGNATURE, whole[:-1], whole[:300]):
        put(content)
    for k, make in enumerate((lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to(sound[1]))):
        path = folder / f"{'f' * 31}{k}.safetensors"
        make(path)
        foreign.add(path.name)
    other = store.root / ("e" * 32)
    other.mkdir()
    (other / "space.json").write_text('{"__metadata__":{"format":"actcache-space","version":"1.0"},"space":"../.."}')

    fresh = Store(store.location, index_dir=tmp_path / "fresh")
    with caplog.at_level("WARNING", "actcache.store"):
        assert check_pooled(fresh, space, range(6)).tolist() == [True, True, False, True, True, True]
        assert [s.space for s in fresh.spaces()] == [space]
    assert {name for name in ours | foreign if any(name in message for message in caplog.messages)} == ours | foreign
    assert "e" * 32 in caplog.text
    report = fresh.verify()
    newer = {Path(name).name for name in report.newer}
    assert len(newer) == 1
    assert {Path(damage.segment).name for damage in report.damaged} | newer == ours | foreign | {"space.json"}
    fresh.append(space, pooled(range(10, 30), dim=128))
    assert fresh.merge(space) == 6
    assert fresh.info().models[0].num_prompts == 25
    size = fresh.evict(1).bytes_kept
    assert fresh.evict(0.9 * size / GB).segments > 0
    assert check_pooled(fresh, space, range(6)).sum() == 5, "what nobody can read goes first"
    fresh.verify(repair=True)
    left = {file.name for file in folder.iterdir()}
    assert left & (foreign | ours) == foreign | newer | stray
    assert check_pooled(Store(store.location, index_dir=tmp_path / "again"), space, range(6)).sum() == 5
    fresh.clear()
    assert {file.name for file in folder.iterdir()} == foreign
    assert sound[1].name not in {file.name for file in folder.iterdir()}
