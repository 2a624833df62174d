"""What a host has of objects, and what a backend does, is never believed over checksums."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import BackendError, DiskFullError, NotCachedError
from actcache.store import fetching, mirror
from actcache.store import segment as segments
from actcache.store.backend import Bytes, LocalBackend, MemoryBackend, ObjectInfo
from actcache.store.store import Store
from store_helpers import in_child, wait_for

SPACE = ac.new_space("org/model", revision="r1")
SITES = [f"resid_post.{layer}" for layer in range(3)]
WIDTH, ROWS = 160, 1200
EVERYTHING = range(ROWS)


def value(site: str) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(SITES.index(site)))


VALUES = {site: value(site) for site in SITES}


def prompts(numbers: range) -> list[str]:
    return [f"prompt {n}" for n in numbers]


def write(store: Store, numbers: range = EVERYTHING) -> None:
    store.write(SPACE, prompts(numbers), {s: list(v[numbers]) for s, v in VALUES.items()}, pooling="last_token")
    store.close()


def check(store: Store, numbers: range = EVERYTHING, site: str = SITES[1]) -> None:
    found = store.read(SPACE, prompts(numbers), site, pooling="last_token")
    assert torch.equal(found, VALUES[site][numbers])


def segment_names(backend: MemoryBackend) -> list[str]:
    return [item.name for item in MemoryBackend.list(backend) if item.name.endswith(".safetensors")]


def mirrors(store: Store) -> list[Path]:
    return sorted(store.root.glob("*/*.safetensors"))


def rows_at(data: bytes, site: str) -> int:
    """Where in a segment of all prompts the rows of a site begin."""
    at = data.index(VALUES[site].numpy().tobytes())
    assert data.count(VALUES[site].numpy().tobytes()) == 1
    return at


class Strange(MemoryBackend):
    """Does what a test tells it to, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []
        self.lists = 0
        self.on_read: Callable[[str, int, int, Bytes], Bytes] | None = None
        self.on_list: Callable[[list[ObjectInfo]], list[ObjectInfo]] | None = None
        self._guard = threading.Lock()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.lists += 1
        found = list(super().list(prefix))
        yield from found if self.on_list is None else self.on_list(found)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        data = super().read(name, start, stop)
        with self._guard:
            self.reads.append((name, start, len(data)))
        return data if self.on_read is None else self.on_read(name, start, len(data), data)

    def change(self, name: str, at: int, data: bytes) -> None:
        whole = bytearray(super().read(name))
        whole[at : at + len(data)] = data
        self._objects[name] = bytes(whole)


@pytest.fixture
def backend() -> Strange:
    return Strange()


@pytest.fixture
def reader(backend: Strange, tmp_path: Path) -> Store:
    """A store on another host than the one that has written everything."""
    write(Store(backend, index_dir=tmp_path / "writer"))
    backend.reads.clear()
    return Store(backend, index_dir=tmp_path / "reader")


# -- what is here is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 100, 256, 257, 260, 10_000])
def test_a_sidecar_of_any_length_does(reader: Store, length: int) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    os.truncate(mirror.sidecar_of(path), length)
    check(reader)
    check(reader, range(5, 600, 7), SITES[2])


@pytest.mark.parametrize("content", [b"", b"\1" * 5000, b"\xff" * 5000, b"{}", b'{"__metadata__":{"size":"x"}}'])
def test_a_sidecar_of_any_content_does(reader: Store, content: bytes) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    mirror.sidecar_of(path).write_bytes(content)
    check(reader)
    check(reader, site=SITES[0])


def test_marks_over_holes_are_not_believed(reader: Store, backend: Strange) -> None:
    check(reader, range(10))
    (path,) = mirrors(reader)
    said = mirror.read_sidecar(path)
    assert said is not None and said.blocks == 3 * -(-ROWS * WIDTH * 4 // segments.BLOCK)
    reader.close()
    mirror.write_sidecar(path, said, whole=True)
    for site in SITES:
        check(reader, site=site)
    reader.close()
    backend.reads.clear()
    check(reader)
    assert backend.reads == []


def test_bytes_that_rot_here_are_read_again_whatever_they_are(reader: Store, backend: Strange) -> None:
    rng = random.Random(0)
    for _ in range(12):
        for site in SITES:
            check(reader, site=site)
        (path,) = mirrors(reader)
        reader.close()
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(8, len(data))
            size = rng.choice([1, 500, 200_000])
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        path.write_bytes(data)
        for site in rng.sample(SITES, 3):
            check(reader, site=site)
    assert reader.verify().ok


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_a_mirror_that_was_cut_is_made_anew(reader: Store, size: int) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    os.truncate(path, size)
    check(reader)


def test_a_mirror_that_somebody_deletes_is_made_anew(reader: Store) -> None:
    check(reader)
    (path,) = mirrors(reader)
    reader.close()
    path.unlink()
    check(reader)
    reader.close()
    mirror.sidecar_of(path).unlink()
    path.unlink()
    check(reader)


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


# -- this host's disk --------------------------------------------------------------------------------------


def on_disk(store: Store) -> int:
    return sum(512 * path.stat().st_blocks for path in mirrors(store))


def test_what_was_read_longest_ago_goes_when_there_is_too_much(backend: Strange, tmp_path: Path) -> None:
    for part in range(4):
        write(Store(backend, index_dir=tmp_path / "writer"), range(300 * part, 300 * part + 300))
    limit = 1 << 20
    reader = Store(backend, index_dir=tmp_path / "reader", local_gb=limit / 2**30)
    placement = reader.locate(
        SPACE.space, texts=prompts(EVERYTHING), text_context="external", sites=SITES, layout="last_token"
    )
    for _ in range(3):
        for part in range(4):
            for site in SITES:
                check(reader, range(300 * part, 300 * part + 300), site)
                assert on_disk(reader) <= limit
    assert np.array_equal(placement.take(), torch.stack(list(VALUES.values()), 1).numpy())
    reader.close()
    backend.reads.clear()
    check(reader, range(900, 1200), SITES[2])
    assert backend.reads == [], "what was read last is still here"
    check(reader, range(300), SITES[0])
    assert backend.reads != []


def test_a_host_that_only_writes_keeps_to_its_size_too(backend: Strange, tmp_path: Path) -> None:
    limit = 1 << 20
    store = Store(backend, index_dir=tmp_path / "writer", local_gb=limit / 2**30)
    for part in range(4):
        numbers = range(300 * part, 300 * part + 300)
        store.write(SPACE, prompts(numbers), {s: list(v[numbers]) for s, v in VALUES.items()}, pooling="last_token")
        store.flush()
        assert on_disk(store) <= limit
    assert len(segment_names(backend)) == 4
    for site in SITES:
        check(Store(backend, index_dir=tmp_path / "reader"), site=site)


def test_writing_on_a_full_disk_makes_room_of_what_was_read(
    reader: Store, backend: Strange, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in SITES:
        check(reader, site=site)
    real = segments.write

    def write_there(folder: Path, *args: object, **options: object) -> object:
        if on_disk(reader) > 1 << 20:
            raise DiskFullError("no room")
        return real(folder, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(segments, "write", write_there)
    reader.write(SPACE, ["another"], {SITES[0]: [torch.ones(WIDTH)]}, pooling="last_token")
    reader.flush()
    assert reader.contains(SPACE, ["another"]).all()
    check(reader)


def test_a_full_disk_makes_room_first_and_is_told_then(
    reader: Store, backend: Strange, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(reader, site=SITES[0])
    real, full = fetching.write_all, [1]

    def write_all(*args: object) -> int:
        if full[0] > 0:
            full[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fetching, "write_all", write_all)
    check(reader, site=SITES[1])
    assert on_disk(reader) < 2 * ROWS * WIDTH * 4, "the rows of the first site have gone"
    full[0] = 1 << 30
    with pytest.raises(DiskFullError, match=r"no room in .*ACTCACHE_LOCAL_GB"):
        check(reader, site=SITES[2])
    full[0] = 0
    check(reader, site=SITES[2])


def test_a_host_that_cannot_write_works_in_a_temporary_folder(
    backend: Strange, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(Store(backend, index_dir=tmp_path / "writer"))
    reader = Store(backend, index_dir=Path("/proc/actcache/index"))
    assert "/proc/actcache/index cannot be written" in caplog.text
    check(reader)
    assert reader.index_dir.is_dir()
    assert Store(backend, index_dir=Path("/proc/actcache/index")).index_dir == reader.index_dir


@pytest.mark.parametrize("fails", [False, True])
def test_a_temporary_folder_goes_with_its_process_unless_it_holds_the_only_copy(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "temporary").mkdir()
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_mirrors import Remote, Store, write
from actcache.errors import BackendError
class Backend(Remote):
    def put(self, name, source):
        if {fails}:
            raise BackendError("down")
        super().put(name, source)
try:
    write(Store(Backend({str(tmp_path / "bucket")!r}), index_dir=Path("/proc/actcache/index")), range(5))
except BackendError:
    pass
"""
    told = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    left = list((tmp_path / "temporary").glob("actcache-*"))
    assert len(left) == fails
    assert ("lies nowhere else" in told.stderr) == fails


# -- several at once ---------------------------------------------------------------------------------------


def test_threads_share_a_store(reader: Store) -> None:
    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            start = rng.randrange(ROWS)
            check(reader, range(start, rng.randrange(start + 1, ROWS + 1)), rng.choice(SITES))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result()


class Remote(LocalBackend):
    """Objects in a folder, taken for what lies elsewhere."""


def test_processes_share_a_working_copy(tmp_path: Path) -> None:
    for part in range(4):
        write(Store(Remote(tmp_path / "bucket"), index_dir=tmp_path / "writer"), range(300 * part, 300 * part + 300))

    def work(seed: int) -> None:
        rng = random.Random(seed)
        # Little, so that they take from each other what they read.
        store = Store(Remote(tmp_path / "bucket"), index_dir=tmp_path / "reader", local_gb=1 / 1024)
        for _ in range(25):
            start = rng.randrange(ROWS)
            check(store, range(start, rng.randrange(start + 1, ROWS + 1)), rng.choice(SITES))
            if rng.random() < 0.2:
                store.close()

    children = [in_child(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
    assert [wait_for(pid) for pid in children] == [0] * 4


def test_there_may_be_more_segments_than_files_can_be_open(tmp_path: Path) -> None:
    # A store on files, copied to a bucket, is a store.
    local = Store(tmp_path / "bucket", index_dir=tmp_path / "index")
    for n in range(300):
        local.write(SPACE, [f"prompt {n}"], {SITES[0]: [VALUES[SITES[0]][n]]}, pooling="last_token")
    local.close()

    def work() -> None:
        # Beside those that are open: what tests before this one have left open is theirs.
        used = set(map(int, os.listdir("/dev/fd")))
        limit = next(itertools.islice((fd + 1 for fd in itertools.count() if fd not in used), 199, None))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        store = Store(Remote(tmp_path / "bucket"), index_dir=tmp_path / "reader")
        check(store, range(300), SITES[0])
        assert torch.equal(store.read(SPACE, None, SITES[0], pooling="last_token"), VALUES[SITES[0]][:300])
        assert store.verify().ok

    assert wait_for(in_child(work)) == 0


def test_a_forked_child_reads_on(tmp_path: Path) -> None:
    write(Store(Remote(tmp_path / "bucket"), index_dir=tmp_path / "writer"))
    store = Store(Remote(tmp_path / "bucket"), index_dir=tmp_path / "reader")
    check(store, site=SITES[0])
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            store.refresh()
            check(store, site=SITES[1])

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(go_on) for _ in range(2)]
        try:
            for _ in range(10):
                assert wait_for(in_child(lambda: check(store, site=SITES[2]))) == 0
        finally:
            stop.set()
        for done in busy:
            done.result()


# -- every way to ask --------------------------------------------------------------------------------------


def test_verification_reads_the_objects_and_not_what_is_here(reader: Store, backend: Strange) -> None:
    check(reader)
    report = reader.verify()
    assert report.ok and report.segments == 1
    (name,) = segment_names(backend)
    at = rows_at(bytes(MemoryBackend.read(backend, name)), SITES[1])
    backend.change(name, at, b"\1\2\3")
    report = reader.verify()
    assert [(damage.site, damage.rows[0]) for damage in report.damaged] == [(SITES[1], 0)]
    check(reader)


def test_verification_sees_damage_to_heads_and_tombs(reader: Store, backend: Strange, tmp_path: Path) -> None:
    reader.invalidate(SPACE, prompts(range(3)))
    check(reader, range(3, ROWS))
    (tomb,) = [item.name for item in MemoryBackend.list(backend) if item.name.endswith(".tomb")]
    (name,) = segment_names(backend)
    before = bytes(MemoryBackend.read(backend, tomb))
    backend.change(tomb, len(before) - 5, b"xxxxx")
    assert [Path(d.segment).name for d in reader.verify().damaged] == [Path(tomb).name]
    backend.change(tomb, 0, before)
    assert reader.verify().ok
    backend.change(name, 3000, b"yyyyy")
    assert [Path(d.segment).name for d in reader.verify().damaged] == [Path(name).name]


@pytest.mark.parametrize("host", ["reader", "fresh"])
@pytest.mark.parametrize("failing", range(4))
def test_a_repair_that_cannot_read_removes_nothing(
    reader: Store, backend: Strange, tmp_path: Path, failing: int, host: str
) -> None:
    reader.invalidate(SPACE, prompts(range(3)))
    reader.flush()
    before = dict(backend._objects)
    left = [failing]

    def fail(name: str, start: int, size: int, data: Bytes) -> Bytes:
        left[0] -= 1
        if left[0] < 0:
            raise BackendError("the network is gone")
        return data

    backend.on_read = fail
    with pytest.raises(BackendError, match="the network is gone"):
        Store(backend, index_dir=tmp_path / host).verify(repair=True)
    assert backend._objects == before
    backend.on_read = None
    assert Store(backend, index_dir=tmp_path / "fresh").verify(repair=True).damaged == []
    assert backend._objects == before


def test_statistics_of_what_is_left_are_exact(reader: Store, backend: Strange, tmp_path: Path) -> None:
    whole = reader.statistics(SPACE, SITES[0], pooling="last_token")
    assert np.allclose(whole.mean, VALUES[SITES[0]].double().mean(0).numpy())
    assert len(backend.reads) <= 3, "the head says it"
    Store(backend, index_dir=tmp_path / "other").invalidate(SPACE, prompts(range(0, ROWS, 50)))
    reader.refresh()
    left = [n for n in EVERYTHING if n % 50]
    found = reader.statistics(SPACE, SITES[0], pooling="last_token")
    assert found.count == len(left)
    assert np.allclose(found.mean, VALUES[SITES[0]][left].double().mean(0).numpy())
    assert {summary.site: summary.rows for summary in reader.summaries(SPACE)} == dict.fromkeys(SITES, len(left))


def test_describing_fetches_no_rows(reader: Store, backend: Strange) -> None:
    reader.info()
    backend.reads.clear()
    assert reader.contains(SPACE, prompts(EVERYTHING)).all()
    assert len(reader.prompts(SPACE)) == ROWS
    found = reader.discover("org/model", "prompt 7")
    assert found is not None and found.variants
    assert len(reader.summaries(SPACE)) == 3
    assert reader.spaces()[0].num_prompts == ROWS
    placement = reader.locate(
        SPACE.space, texts=prompts(EVERYTHING), text_context="external", sites=SITES, layout="last_token", check=False
    )
    assert placement.found.all()
    assert backend.reads == []
    assert np.array_equal(placement.take(), torch.stack(list(VALUES.values()), 1).numpy())


def test_what_belongs_together_lists_once(reader: Store, backend: Strange) -> None:
    check(reader)
    lists = backend.lists
    with reader.looking_once():
        for asked in ("not there", "nor there"):
            assert not reader.contains(SPACE, [asked]).any()
            assert not reader.locate_sites(SPACE, [asked], SITES, "last_token").found.any()
    assert backend.lists == lists + 1
    assert not reader.contains(SPACE, ["not there"]).any()
    assert backend.lists == lists + 2


def test_prompts_of_a_tokenizer_that_is_new_are_found(backend: Strange, tmp_path: Path) -> None:
    reader = Store(backend, index_dir=tmp_path / "reader")
    given = {SITES[0]: [torch.ones(WIDTH)]}
    for context in ("one", "two"):
        with Store(backend, index_dir=tmp_path / "writer") as writer:
            writer.write(SPACE, [f"of {context}"], given, pooling="last_token", text_context=context)
        assert reader.locate_sites(SPACE, [f"of {context}"], SITES[:1], "last_token").found.all()
        assert reader.contains(SPACE, [f"of {context}"]).all()
        assert torch.equal(reader.read(SPACE, [f"of {context}"], SITES[0], pooling="last_token")[0], given[SITES[0]][0])


def test_everything_is_read_in_stored_order(reader: Store, backend: Strange) -> None:
    assert torch.equal(reader.read(SPACE, None, SITES[2], pooling="last_token"), VALUES[SITES[2]])
    backend.reads.clear()
    lists = backend.lists
    assert torch.equal(reader.read(SPACE, None, SITES[2], pooling="last_token"), VALUES[SITES[2]])
    assert backend.reads == [] and backend.lists == lists


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3", "bfloat16"])
def test_every_dtype_reads_as_from_a_store_on_disk(backend: Strange, tmp_path: Path, dtype: str) -> None:
    local = Store(tmp_path / "local", dtype=dtype, index_dir=tmp_path / "index")
    write(local)
    write(Store(backend, dtype=dtype, index_dir=tmp_path / "writer"))
    reader = Store(backend, index_dir=tmp_path / "reader")
    for numbers in (range(700, 710), range(0, ROWS, 3), EVERYTHING):
        both = [s.read(SPACE, prompts(numbers), SITES[1], pooling="last_token") for s in (local, reader)]
        assert torch.equal(*both)


def test_sequences_are_read_by_rows(backend: Strange, tmp_path: Path) -> None:
    given = [torch.randn(1 + n % 50, 300) for n in range(400)]
    asked = [f"sequence {n}" for n in range(400)]
    tokens = [list(range(n, n + len(rows))) for n, rows in enumerate(given)]
    writer = Store(backend, index_dir=tmp_path / "writer")
    writer.write(SPACE, tokens, {"resid_post.0": given, "resid_post.1": given})
    writer.close()
    backend.reads.clear()
    reader = Store(backend, index_dir=tmp_path / "reader")
    some = [3, 399, 200, 201, 202]
    found = reader.read(SPACE, [tokens[n] for n in some], "resid_post.1")
    assert all(torch.equal(a, given[n]) for a, n in zip(found, some, strict=True))
    assert len(asked) == 400
    assert sum(size for *_, size in backend.reads) < sum(rows.numel() * 4 for rows in given)
    last = reader.read(SPACE, tokens, "resid_post.0", positions="last")
    assert all(torch.equal(a.reshape(-1), rows[-1]) for a, rows in zip(last, given, strict=True))
