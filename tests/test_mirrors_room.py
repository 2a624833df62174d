"""How much room is taken by what a host has of objects, and what becomes of it when there is none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.errors import DiskFullError
from actcache.store import behind, bringing, fetching, wanted
from actcache.store import segment as segments
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
    on_disk,
    other_host,
    prompts,
    segment_names,
    write,
)


@pytest.fixture
def backend() -> Strange:
    return Strange()


@pytest.fixture
def reader(backend: Strange, tmp_path: Path) -> Store:
    return other_host(backend, tmp_path)


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


@pytest.mark.parametrize("length", [1 << 18, 1 << 24])
def test_a_mirror_that_another_process_has_replaced_is_mapped_anew(
    reader: Store, backend: Strange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Otherwise what is read would be written nowhere, and read again each time."""
    monkeypatch.setattr(bringing, "_LEAST_BEHIND", 1)
    monkeypatch.setattr(fetching, "_SHORT_READ", length)

    def read(site: str) -> int:
        """How many bytes it takes."""
        backend.reads.clear()
        assert torch.equal(reader.read(SPACE, None, site, pooling="last_token"), VALUES[site])
        behind.settle()
        return sum(size for _, _, size in backend.reads)

    each = read(SITES[0])
    assert each >= VALUES[SITES[0]].nbytes
    before = [path.stat().st_ino for path in mirrors(reader)]
    check(Store(backend, index_dir=tmp_path / "reader", local_gb=1e-6), site=SITES[2])
    behind.settle()
    assert [path.stat().st_ino for path in mirrors(reader)] != before
    # What comes before that is noticed comes twice, with the head.
    assert read(SITES[1]) < 3 * each
    assert read(SITES[1]) == 0


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
    real, full = wanted.write_all, [1]

    def write_all(*args: object) -> int:
        if full[0] > 0:
            full[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(wanted, "write_all", write_all)
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
from elsewhere import Folder
from mirrors_helpers import write
from actcache.errors import BackendError
from actcache.store.store import Store
class Backend(Folder):
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
