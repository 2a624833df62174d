"""What a host has only in part, or no more as it was, never goes up in place of an object."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store import uploading
from actcache.store.backend import MemoryBackend
from actcache.store.records import BLOCK
from actcache.store.store import Store
from elsewhere import Watched, large, machine, objects
from store_helpers import make_table, segment_files


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_end() -> Iterator[None]:
    """Threads of stores that are broken on purpose end with the test."""
    yield
    uploading._at_work.clear()


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
