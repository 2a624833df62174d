"""What is stored in a store elsewhere gets there: in few objects, soon, at the end in any case, and errors are told."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actcache.store import merging, uploading
from actcache.store.backend import MemoryBackend
from actcache.store.records import Records
from actcache.store.store import Store
from elsewhere import Folder, Watched, large, machine, objects, seen, soon
from store_helpers import check_pooled, growing_writer, in_child, make_table, pooled, wait_for


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_end() -> Iterator[None]:
    """Threads of stores that are broken on purpose end with the test."""
    yield
    uploading._at_work.clear()


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
