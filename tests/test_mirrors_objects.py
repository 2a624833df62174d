"""What a backend gives and lists is never believed over checksums, and what it fails at is told."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.errors import BackendError, NotCachedError
from actcache.store import mirror
from actcache.store import segment as segments
from actcache.store.backend import Bytes, MemoryBackend, ObjectInfo
from actcache.store.store import Store
from mirrors_helpers import (
    EVERYTHING,
    ROWS,
    SITES,
    SPACE,
    VALUES,
    WIDTH,
    Strange,
    check,
    mirrors,
    other_host,
    prompts,
    rows_at,
    segment_names,
    write,
)


@pytest.fixture
def backend() -> Strange:
    return Strange()


@pytest.fixture
def reader(backend: Strange, tmp_path: Path) -> Store:
    return other_host(backend, tmp_path)


# -- what comes is wrong -----------------------------------------------------------------------------------


def test_an_object_with_other_bytes_is_a_miss_and_never_garbage(
    reader: Store, backend: Strange, caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = segment_names(backend)
    at = rows_at(bytes(MemoryBackend.read(backend, name)), SITES[1])
    backend.change(name, at + 4 * WIDTH * 100, b"\7" * 40)
    with pytest.raises(NotCachedError, match=r"have no 'resid_post\.1'"):
        check(reader)
    assert "resid_post.1 of" in caplog.text and "is damaged" in caplog.text
    first_intact = -(-segments.BLOCK // (4 * WIDTH))
    check(reader, range(first_intact, ROWS))
    check(reader, site=SITES[0])
    damaged = [read for read in backend.reads if read[1] == at]
    assert len(damaged) == 2, "it was read once more before it was called damaged"


def test_what_was_right_stays_right_when_the_object_is_replaced(reader: Store, backend: Strange) -> None:
    check(reader)
    placement = reader.locate(
        SPACE.space, texts=prompts(EVERYTHING), text_context="external", sites=[SITES[0]], layout="last_token"
    )
    (name,) = segment_names(backend)
    backend._objects[name] = bytes(len(MemoryBackend.read(backend, name)))
    check(reader)
    assert placement.found.all()
    assert np.array_equal(placement.take()[:, 0], VALUES[SITES[0]].numpy())
    reader.close()
    check(reader)
    with pytest.raises(NotCachedError):
        check(reader, site=SITES[2])


def test_wrong_bytes_that_come_once_cost_one_more_read(reader: Store, backend: Strange) -> None:
    spoiled: set[tuple[str, int]] = set()

    def spoil(name: str, start: int, size: int, data: Bytes) -> Bytes:
        if start and (name, start) not in spoiled:
            spoiled.add((name, start))
            return bytes(size)
        return data

    backend.on_read = spoil
    for site in SITES:
        check(reader, site=site)
    assert spoiled


@pytest.mark.parametrize("most", [1, 777, 100_000])
def test_reads_that_give_less_than_was_asked_are_gone_on_with(backend: Strange, tmp_path: Path, most: int) -> None:
    few = range(30)
    write(Store(backend, index_dir=tmp_path / "writer"), few)
    backend.on_read = lambda name, start, size, data: data[:most]
    check(Store(backend, index_dir=tmp_path / "reader"), few)


def test_reads_that_give_more_than_was_asked_are_cut(reader: Store, backend: Strange) -> None:
    backend.on_read = lambda name, start, size, data: bytes(data) + b"more" * 1000
    for site in SITES:
        check(reader, site=site)


@pytest.mark.parametrize("missing", [1, 1000, 400_000, 2_000_000])
def test_an_object_that_is_shorter_than_it_was_is_a_miss(reader: Store, backend: Strange, missing: int) -> None:
    reader.info()
    (name,) = segment_names(backend)
    backend._objects[name] = backend._objects[name][:-missing]
    with pytest.raises(NotCachedError):
        check(reader, site=SITES[2])


@pytest.mark.parametrize("listed", [0, 1, 5000, 1 << 33, 1 << 45, (1 << 63) - 1, 1 << 80])
def test_an_object_of_another_size_than_listed_is_refused_by_name(
    reader: Store, backend: Strange, listed: int, caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = segment_names(backend)
    write(Store(backend, index_dir=reader.index_dir.parent / "writer"), range(5))
    backend.on_list = lambda found: [ObjectInfo(i.name, listed if i.name == name else i.size) for i in found]
    check(reader, range(5))
    with pytest.raises(NotCachedError):
        check(reader, range(10))
    assert Path(name).stem in caplog.text
    on_disk = sum(512 * path.stat().st_blocks for path in mirrors(reader))
    assert on_disk < 20 << 20
    backend.on_list = None


@pytest.mark.parametrize("kind", ["noise", "empty", "long header", "other space", "deep"])
def test_a_hostile_object_is_refused_by_name_and_the_rest_is_read(
    reader: Store, backend: Strange, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = segment_names(backend)
    good = bytes(MemoryBackend.read(backend, name))
    bad = {
        "noise": random.Random(1).randbytes(300_000),
        "empty": b"",
        "long header": (63 << 20).to_bytes(8, "little") + b" " * (64 << 20),
        "other space": good.replace(SPACE.space.encode(), b"0" * 32),
        "deep": len(b"[" * 90_000).to_bytes(8, "little") + b"[" * 90_000,
    }[kind]
    other = f"{name.rpartition('/')[0]}/{'ab' * 16}.safetensors"
    backend.put(other, bad)
    check(reader)
    assert reader.info().models[0].num_prompts == ROWS
    assert "ab" * 16 in caplog.text
    report = reader.verify()
    assert ["ab" * 16 in damage.segment for damage in report.damaged] == [True]


def test_names_that_are_none_of_ours_are_left_alone(reader: Store, backend: Strange, tmp_path: Path) -> None:
    strange = [
        f"v1/{SPACE.space}/../../../evil.safetensors", f"v1/{SPACE.space}/{'a' * 32}.safetensors/x", "v1/..", "v1//x",
        f"v1/{'g' * 32}/{'a' * 32}.safetensors", "/etc/passwd", f"v1/{SPACE.space}/{'a' * 32}.have", "", "v2/x",
        f"v1/{SPACE.space}/{'a' * 32}.open", f"v1/{SPACE.space}/\0",
    ]  # fmt: skip
    backend.on_list = lambda found: found + [ObjectInfo(name, 10) for name in strange]
    before = set(tmp_path.rglob("*"))
    check(reader)
    assert {p.name for p in set(tmp_path.rglob("*")) - before if p.is_file()} <= {
        "space.json", "space.have", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm",
        f"mirrors-{SPACE.space}.lock",
        *(path.name for path in mirrors(reader)), *(mirror.sidecar_of(path).name for path in mirrors(reader)),
    }  # fmt: skip


# -- what fails --------------------------------------------------------------------------------------------


def test_an_error_at_any_read_is_told_and_nothing_partial_is_given(backend: Strange, tmp_path: Path) -> None:
    for part in range(4):
        write(Store(backend, index_dir=tmp_path / "writer"), range(300 * part, 300 * part + 300))
    for failing in range(14):
        reader = Store(backend, index_dir=tmp_path / f"reader{failing}")
        left = [failing]

        def fail(name: str, start: int, size: int, data: Bytes, left: list[int] = left) -> Bytes:
            left[0] -= 1
            if left[0] < 0:
                raise BackendError("the network is gone")
            return data

        backend.on_read = fail
        out = torch.full((ROWS, WIDTH), -7.0)
        told = ""
        try:
            reader.read(SPACE, prompts(EVERYTHING), SITES[1], pooling="last_token", out=out)
        except BackendError as error:
            told = str(error)
        assert ("the network is gone" in told) == (failing < 9)
        assert torch.equal(out, torch.full_like(out, -7.0) if told else VALUES[SITES[1]])
        backend.on_read = None
        check(reader)
        assert reader.verify().ok


def test_a_listing_that_fails_is_told(reader: Store, backend: Strange) -> None:
    def fail(found: list[ObjectInfo]) -> list[ObjectInfo]:
        raise BackendError("no route to the bucket")

    backend.on_list = fail
    for ask in (reader.info, reader.refresh, lambda: check(reader), lambda: reader.contains(SPACE, ["x"])):
        with pytest.raises(BackendError, match="no route"):
            ask()
    backend.on_list = None
    check(reader)
    backend.on_list = fail
    check(reader)
    with pytest.raises(BackendError, match="no route"):
        reader.contains(SPACE, ["not there"], SITES[0])


def test_an_object_that_goes_is_a_miss_after_one_look(reader: Store, backend: Strange) -> None:
    check(reader, site=SITES[0])
    (name,) = segment_names(backend)
    backend.delete(name)
    check(reader, site=SITES[0])
    backend.lists = 0
    with pytest.raises(NotCachedError):
        check(reader, site=SITES[1])
    assert backend.lists <= 2
    assert mirrors(reader) == []


def test_what_was_merged_meanwhile_is_found_where_it_went(backend: Strange, tmp_path: Path) -> None:
    for part in range(4):
        write(Store(backend, index_dir=tmp_path / "writer"), range(300 * part, 300 * part + 300))
    reader = Store(backend, index_dir=tmp_path / "reader")
    check(reader, site=SITES[0])
    old = segment_names(backend)
    write(Store(backend, index_dir=tmp_path / "other"))
    for name in old:
        backend.delete(name)
    check(reader, site=SITES[1])
    check(reader, site=SITES[2])
    assert len(mirrors(reader)) == 1


def test_objects_that_are_listed_and_gone_are_misses(reader: Store, backend: Strange) -> None:
    found = list(MemoryBackend.list(backend))
    check(reader)
    (name,) = segment_names(backend)
    backend.delete(name)
    backend.on_list = lambda _: found
    with pytest.raises(NotCachedError):
        check(reader, site=SITES[2])
    other = Store(backend, index_dir=reader.index_dir.parent / "third")
    with pytest.raises(NotCachedError):
        check(other)


def test_a_late_listing_does_not_hide_what_this_host_has_put(backend: Strange, tmp_path: Path) -> None:
    backend.on_list = lambda found: []
    store = Store(backend, index_dir=tmp_path / "writer")
    write(store)
    store.refresh()
    check(store)
    assert store.contains(SPACE, prompts(range(ROWS + 1))).sum() == ROWS
    (name,) = segment_names(backend)
    backend.delete(name)
    assert not store.contains(SPACE, ["x", *prompts(range(3))]).any()


def test_a_tomb_that_was_seen_stays_when_a_listing_is_late(reader: Store, backend: Strange, tmp_path: Path) -> None:
    Store(backend, index_dir=tmp_path / "other").invalidate(SPACE, prompts(range(10)))
    assert not reader.contains(SPACE, prompts(range(10))).any()
    backend.on_list = lambda found: [item for item in found if not item.name.endswith(".tomb")]
    reader.refresh()
    assert not reader.contains(SPACE, prompts(range(10))).any()
    check(reader, range(10, ROWS))


def test_a_tomb_that_rots_here_is_read_again(reader: Store, backend: Strange, tmp_path: Path) -> None:
    Store(backend, index_dir=tmp_path / "other").invalidate(SPACE, prompts(range(10)))
    check(reader, range(10, ROWS))
    reader.close()
    (tomb,) = reader.root.glob("*/*.tomb")
    tomb.write_bytes(b"x" * tomb.stat().st_size)
    check(reader, range(10, ROWS))
    assert not reader.contains(SPACE, prompts(range(10))).any()


def test_what_another_host_has_cleared_is_gone_here(reader: Store, backend: Strange) -> None:
    check(reader)
    for item in list(backend.list()):
        backend.delete(item.name)
    assert reader.spaces() == []
    assert reader.info().total_size_bytes == 0
    with pytest.raises(NotCachedError):
        check(reader)
