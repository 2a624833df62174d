"""What is stored in a store elsewhere gets there: in few objects, soon, at the end in any case, and errors are told."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import BackendError
from actcache.store import merging, spool, uploading
from actcache.store.backend import MemoryBackend
from actcache.store.records import BLOCK, Records
from actcache.store.store import Store
from elsewhere import Folder, Watched, failing, machine, objects
from store_helpers import check_pooled, growing_writer, in_child, make_table, pooled, segment_files, wait_for


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_end() -> Iterator[None]:
    """Threads of stores that are broken on purpose end with the test."""
    yield
    uploading._at_work.clear()


def soon(true: Callable[[], Any], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.01)
    return False


def seen(backend: Any, folder: Path, numbers: Any) -> list[bool]:
    """Which prompts a machine finds that has never been there before."""
    store, space = machine(backend, folder)
    found: list[bool] = check_pooled(store, space, numbers).tolist()
    return found


def test_what_is_written_waits_for_more_and_goes_as_one_object(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    for i in range(12):
        store.append(space, pooled([i]))
    assert objects(backend) == []
    # Durable and readable here all the same.
    assert check_pooled(store, space, range(12)).all()
    store.flush()
    assert len(objects(backend)) == 1
    assert seen(backend, tmp_path / "b", range(12)) == [True] * 12
    assert check_pooled(store, space, range(12)).all()
    calls = len(backend.calls)
    store.flush()
    assert len(backend.calls) == calls, "nothing waits, and nothing is asked"


def test_what_is_written_is_there_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "LINGER_S", 0.05)
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    store.append(space, pooled([2]))
    assert soon(lambda: objects(backend))
    assert soon(lambda: not any(f.suffix == ".sent" for f in (store.root / space).iterdir()))
    assert seen(backend, tmp_path / "b", [1, 2, 3])[:2] == [True, True]


def test_closing_uploads(tmp_path: Path) -> None:
    backend = MemoryBackend()
    with Store(backend, index_dir=tmp_path / "a") as store:
        space = machine(backend, tmp_path / "a")[0].open_space({"weights": "abc"}, {"model_name": "org/model"})
        store.open_space({"weights": "abc"}, {"model_name": "org/model"})
        store.append(space, pooled([1]))
        assert not objects(backend)
    assert len(objects(backend)) == 1


def test_a_store_that_nobody_holds_any_more_is_uploaded(tmp_path: Path) -> None:
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    del store
    gc.collect()
    assert soon(lambda: objects(backend))


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from elsewhere import Folder, machine
from store_helpers import pooled
from actcache.store import uploading
# So that nothing but the end of the process uploads anything, however slow it is.
uploading.LINGER_S = 3600.0
store, space = machine(Folder(Path(sys.argv[1]) / "objects"), Path(sys.argv[1]) / "a")
for i in range(5):
    store.append(space, pooled([i]))
    # Of another kind, and so an object of its own.
    store.append(space, pooled([i], sites=["embed"]))
with store.writer(space) as writer:
    for i in range(5, 9):
        writer.put(pooled([i]))
        writer.flush()
    if len(sys.argv) > 3:
        raise SystemExit("left in the middle")
"""


@pytest.mark.parametrize("more", [[], ["in the middle"]])
def test_the_end_of_the_process_uploads(tmp_path: Path, more: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, Path(__file__).parent, *more],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stderr.strip() == ("left in the middle" if more else "")
    backend = Folder(tmp_path / "objects")
    assert seen(backend, tmp_path / "b", range(9)) == [True] * 9
    assert len(objects(backend)) == 2


def test_an_error_of_an_upload_is_told_and_loses_nothing(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    backend.before = failing("put", ".safetensors")
    with pytest.raises(BackendError, match="cut off"):
        store.flush()
    assert check_pooled(store, space, [1]).all()
    with pytest.raises(BackendError):
        store.close()
    backend.before = lambda *_: None
    assert objects(backend) == []
    again, _ = machine(backend, tmp_path / "a")
    assert check_pooled(again, space, [1]).all()
    again.flush()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_an_error_of_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploading, "LINGER_S", 0.01)
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    backend.before = failing("put", ".safetensors")
    with caplog.at_level(logging.WARNING, "actcache.store"):
        store.append(space, pooled([1]))
        assert soon(lambda: "cut off" in caplog.text)

    def raised() -> bool:
        try:
            store.append(space, pooled([2]))
        except BackendError:
            return True
        return False

    assert soon(raised)
    # Reading goes on.
    assert check_pooled(store, space, [1]).all()
    backend.before = lambda *_: None
    store.flush()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_the_thread_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "LINGER_S", 0.01)
    monkeypatch.setattr(uploading, "_AGAIN_S", 0.05)
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    backend.before = failing("put", ".safetensors")
    store.append(space, pooled([1]))
    assert soon(lambda: backend.count("put", ".safetensors") > 1)
    backend.before = lambda *_: None
    assert soon(lambda: objects(backend))
    assert soon(lambda: not store._uploader._errors)  # type: ignore[union-attr]
    # It is there after all.
    store.append(space, pooled([2]))


def test_an_error_that_comes_when_all_is_done_is_none(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    backend.after = failing("put", ".safetensors")
    store.flush()
    assert backend.count("put", ".safetensors") == 1
    store.close()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_an_upload_of_unknown_outcome_is_looked_for_before_it_is_done_again(tmp_path: Path) -> None:
    """The object is there, but nobody could be told."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))

    def gone(method: str, name: str) -> None:
        failing("put", ".safetensors")(method, name)
        if backend.count("put", ".safetensors"):
            failing("read")(method, name)

    backend.after = gone
    with pytest.raises(BackendError):
        store.flush()
    backend.after = lambda *_: None
    store.flush()
    assert backend.count("put", ".safetensors") == 1
    assert len(objects(backend)) == 1
    assert seen(backend, tmp_path / "b", [1]) == [True]


def test_an_upload_of_unknown_outcome_does_not_bring_back_what_others_have_dropped(tmp_path: Path) -> None:
    """It had been there; somebody else invalidated a prompt of it, and has made another segment of what is left."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    other, _ = machine(backend, tmp_path / "b")
    store.append(space, pooled([1, 2]))

    def gone(method: str, name: str) -> None:
        failing("put", ".safetensors")(method, name)
        if backend.count("put", ".safetensors"):
            failing("read")(method, name)

    backend.after = gone
    with pytest.raises(BackendError):
        store.flush()
    backend.after = lambda *_: None
    assert other.invalidate(space, make_table([1])) == 1
    assert other.compact() == 1
    for tomb in objects(backend, ".tomb"):
        backend.delete(tomb)
    store.refresh()
    store.flush()
    assert seen(backend, tmp_path / "c", [1, 2]) == [False, True]


def test_a_writer_uploads_at_its_end(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    with store.writer(space, linger=0) as writer:
        for i in range(40):
            writer.put(pooled([i]))
            writer.flush()
        assert objects(backend) == []
    assert len(objects(backend)) == 1
    assert not [f for f in (store.root / space).iterdir() if f.suffix in (".open", ".sent")]
    assert seen(backend, tmp_path / "b", range(40)) == [True] * 40


def test_flushing_takes_what_a_writer_has_stored_so_far(tmp_path: Path) -> None:
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path / "a")
    with store.writer(space, linger=0) as writer:
        for i in range(6):
            writer.put(pooled([i]))
            writer.flush()
        store.flush()
        assert seen(backend, tmp_path / "b", range(6)) == [True] * 6
        writer.put(pooled([6]))
    assert seen(backend, tmp_path / "c", range(7)) == [True] * 7


def test_an_error_surfaces_where_the_writer_closes(tmp_path: Path) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    writer = store.writer(space)
    writer.put(pooled([1]))
    backend.before = failing("put")
    with pytest.raises(BackendError):
        writer.close()
    backend.before = lambda *_: None
    assert check_pooled(store, space, [1]).all()
    store.close()
    assert seen(backend, tmp_path / "b", [1]) == [True]


def large(numbers: range, sites: int = 4, dim: int = 256) -> Records:
    data = {f"resid_post.{k}": np.stack([np.full(dim, 100 * i + k, np.float32) for i in numbers]) for k in range(sites)}
    return Records.pooled(make_table(numbers), "last_token", data)


def test_much_is_uploaded_behind_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that grow are as large as one upload; when enough of them are finished they go."""
    monkeypatch.setattr(merging, "GATHERED", 1 << 20)
    monkeypatch.setattr(uploading, "_LEAST", 1 << 18)
    monkeypatch.setattr("actcache.store.appending._SIZES", (1 << 18, 1 << 19, 1 << 20, 1 << 28))
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path / "a")
    with store.writer(space, linger=0) as writer:
        for i in range(60):
            writer.put(large(range(16 * i, 16 * i + 16)))
            writer.flush()
        assert soon(lambda: objects(backend))
    sizes = [info.size for info in backend.list() if info.name.endswith(".safetensors")]
    assert max(sizes) <= 1.2 * (1 << 20)
    assert len(sizes) <= 8
    reader, _ = machine(backend, tmp_path / "b")
    place = reader.locate(space, table=make_table(range(960)), sites=["resid_post.3"], layout="last_token")
    assert place.found.all()
    assert (place.take()[:, 0, 0] == 100 * np.arange(960) + 3).all()


def test_what_cannot_be_uploaded_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "_MOST_SPOOLED", 1 << 20)
    monkeypatch.setattr(uploading, "_LEAST", 1 << 10)
    monkeypatch.setattr("actcache.store.appending._SIZES", (1 << 18, 1 << 19))
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    backend.before = failing("put", ".safetensors")
    writer = store.writer(space, linger=0)

    def run() -> None:
        for i in range(1000):
            writer.put(large(range(16 * i, 16 * i + 16)))
            writer.flush()

    with pytest.raises(BackendError):
        run()
    writer.close(merge=False)
    assert 1 << 20 < sum(f.stat().st_size for f in segment_files(store, space)) < 3 << 20


def test_ten_thousand_prompts_take_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth in width and size of 10,000 prompts of 24 x 1024 float16 in batches of 64, with limits to match."""
    scale = 16
    for module, name in ((merging, "GATHERED"), (merging, "TARGET"), (uploading, "_LEAST")):
        monkeypatch.setattr(module, name, getattr(module, name) // scale)
    monkeypatch.setattr("actcache.store.appending._SIZES", tuple(s << 16 for s in (16, 32, 64, 128, 256)))
    monkeypatch.setattr("actcache.store.writer._GROUP_BYTES", 2 << 20)
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    rows = {f"resid_post.{k}": np.ones((64, 64), np.float16) for k in range(24)}
    with store.writer(space, max_bytes=4 << 20) as writer:
        for start in range(0, 10_000, 64):
            count = min(64, 10_000 - start)
            table = make_table(range(start, start + count))
            writer.put(Records.pooled(table, "last_token", {site: values[:count] for site, values in rows.items()}))
    assert len(backend.calls) <= 20, backend.calls
    reader, _ = machine(backend, tmp_path / "b")
    assert reader.contains(space, make_table(range(10_000)), "resid_post.7", pooling="last_token").all()


def test_a_forked_child_leaves_what_waits_to_its_parent(tmp_path: Path) -> None:
    backend = Folder(tmp_path / "objects")
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    # Nobody has this one any more, but its thread, which the child has not.
    uploading._at_work.add(Store(backend, index_dir=tmp_path / "x")._uploader)  # type: ignore[arg-type]

    def child() -> None:
        assert not uploading._at_work
        assert check_pooled(store, space, [1]).all()
        store.append(space, pooled([2]))
        store.close()

    assert wait_for(in_child(child)) == 0
    store.flush()
    assert seen(backend, tmp_path / "b", [1, 2]) == [True, True]


def without_sidecar(backend: Any, folder: Path, read: range) -> tuple[Store, str, Path]:
    """A machine that has read these prompts of the one object, and has lost the sidecar of its mirror."""
    store, space = machine(backend, folder)
    place = store.locate(space, table=make_table(read), sites=["resid_post.3"], layout="last_token")
    assert place.found.all()
    (path,) = segment_files(store, space)
    path.with_suffix(".have").unlink()
    return store, space, path


def check_large(backend: Any, folder: Path, numbers: range) -> Store:
    """A machine that has never been there before finds all these prompts, and every value is right."""
    store, space = machine(backend, folder)
    for k in range(4):
        place = store.locate(space, table=make_table(numbers), sites=[f"resid_post.{k}"], layout="last_token")
        assert place.found.all()
        assert (place.take()[:, 0] == (100 * np.array(numbers) + k)[:, None]).all()
    return store


@pytest.mark.parametrize("found", ["when the store is opened", "when it would be uploaded"])
def test_a_mirror_that_lost_its_sidecar_is_one_again(tmp_path: Path, found: str) -> None:
    """It is full of holes: under its name lies the object that they are holes of."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, large(range(2000)))
    store.flush()
    reader, _, path = without_sidecar(backend, tmp_path / "b", range(2000))
    if found == "when the store is opened":
        reader, _ = machine(backend, tmp_path / "b")
    backend.calls.clear()
    reader.flush()
    assert path.with_suffix(".have").exists()
    assert backend.count("put") == 0
    # What is there is not read again, and what is not comes from the object.
    backend.calls.clear()
    check_large(backend, tmp_path / "b", range(2000))
    assert len(objects(backend)) == 1
    assert check_large(backend, tmp_path / "c", range(2000)).verify().damaged == []


@pytest.mark.parametrize("left", [0, 1000, 10**6])
def test_a_mirror_without_a_sidecar_that_cannot_be_read_does_not_hide_its_object(tmp_path: Path, left: int) -> None:
    """Whoever copied it was interrupted."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, large(range(2000)))
    store.flush()
    _, _, path = without_sidecar(backend, tmp_path / "b", range(2000))
    os.truncate(path, left)
    backend.calls.clear()
    check_large(backend, tmp_path / "b", range(2000)).flush()
    assert backend.count("put") == 0
    assert path.with_suffix(".have").exists()
    assert check_large(backend, tmp_path / "c", range(2000)).verify().damaged == []


def test_a_mirror_whose_holes_were_filled_by_a_copy_is_not_uploaded_either(tmp_path: Path) -> None:
    """As a backup does that knows no sparse files: zeros take the place of holes."""
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, large(range(2000)))
    store.flush()
    reader, _, path = without_sidecar(backend, tmp_path / "b", range(2000))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert 512 * path.stat().st_blocks >= len(content)
    backend.calls.clear()
    reader.flush()
    assert backend.count("put") == 0
    assert check_large(backend, tmp_path / "c", range(2000)).verify().damaged == []


def test_a_mirror_without_a_sidecar_whose_object_was_removed_does_not_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path / "a")
    store.append(space, large(range(2000)))
    store.flush()
    reader, _, path = without_sidecar(backend, tmp_path / "b", range(2000))
    store.clear()
    with caplog.at_level(logging.WARNING, "actcache.store"):
        reader.flush()
    assert "gone" in caplog.text
    assert not path.exists()
    assert objects(backend) == []


def test_what_is_intact_of_a_segment_that_rots_before_its_upload_is_uploaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, large(range(2000)))
    place = store.locate(space, table=make_table(range(2000)), sites=["resid_post.3"], layout="last_token")
    assert place.found.all(), "it was looked at, and was right"
    (path,) = segment_files(store, space)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with caplog.at_level(logging.WARNING, "actcache.store"):
        store.flush()
    assert "damaged" in caplog.text
    assert not path.exists()
    assert path.name not in "".join(objects(backend))
    fresh, _ = machine(backend, tmp_path / "b")
    assert fresh.verify().damaged == []
    for k in range(4):
        place = fresh.locate(space, table=make_table(range(2000)), sites=[f"resid_post.{k}"], layout="last_token")
        lost = np.flatnonzero(~place.found)
        # The last block of one site, of rows of 1 KB.
        assert len(lost) == (2000 * 1024 % BLOCK // 1024 if k == 3 else 0)
        assert (place.take(index=np.flatnonzero(place.found))[:, 0, 0] % 100 == k).all()
    backend.calls.clear()
    store.flush()
    assert backend.calls == [], "nothing waits any more"


def test_that_an_upload_has_begun_is_durable_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would know after a loss of power that there may be an object, which others may have removed."""
    synced: list[set[str]] = []
    monkeypatch.setattr(spool, "sync_folder", lambda folder: synced.append({f.suffix for f in folder.iterdir()}))
    backend = Watched(MemoryBackend())
    store, space = machine(backend, tmp_path / "a")
    store.append(space, pooled([1]))
    seen: list[bool] = []
    backend.before = lambda method, name: seen.append(any(".sent" in names for names in synced))
    store.flush()
    assert seen
    assert all(seen)


def test_a_process_that_only_reads_uploads_what_another_has_left(tmp_path: Path) -> None:
    def child() -> None:
        store, space = machine(backend, tmp_path / "a")
        store.append(space, pooled([1]))
        grown = growing_writer(store, space)
        grown.append([pooled([2])])
        # Here, where it still has its store: without one, it would begin to upload.
        os._exit(0)

    backend = Folder(tmp_path / "objects")
    # It ends without any of its own exit handlers, as one that is killed.
    assert wait_for(in_child(child)) == 0
    assert objects(backend) == []
    store, space = machine(backend, tmp_path / "a")
    assert check_pooled(store, space, [1, 2]).all()
    assert soon(lambda: objects(backend))
    assert soon(lambda: not [f for f in (store.root / space).iterdir() if f.suffix in (".sent", ".open")])
    assert seen(backend, tmp_path / "b", [1, 2]) == [True, True]
