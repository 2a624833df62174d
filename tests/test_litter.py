"""What nobody needs any more: unfinished files of writers that are gone, tombs of segments that are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from actcache.store import files
from actcache.store.store import Store
from store_helpers import check_pooled, in_child, kill, make_store, pooled, segment_files, text


@pytest.mark.parametrize("local", [True, False])
def test_unfinished_files_go_only_when_their_writer_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """On a file system that other hosts may use not within a minute: their locks may be unknown here."""
    monkeypatch.setattr(files, "_is_local", lambda fd: local)
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    folder = store.root / space
    read, write = os.pipe()

    def work() -> None:
        with files.atomic_file(folder, "a" * 32 + ".safetensors") as fd:
            os.write(fd, segment_files(store, space)[0].read_bytes()[:100])
            os.write(write, b"x")
            signal.pause()

    pid = in_child(work)
    assert os.read(read, 1) == b"x"
    (living,) = folder.glob("*.tmp")
    empty, foreign = folder / ("0" * 32 + ".tmp"), folder / ("1" * 32 + ".tmp")
    empty.write_bytes(b"")
    foreign.write_bytes(b"somebody's notes")
    files.sweep(folder)
    assert living.exists()
    assert empty.exists() is not local
    old = time.time() - 1000
    for path in (living, foreign, *([] if local else [empty])):
        os.utime(path, (old, old))
    files.sweep(folder)
    assert living.exists(), "its writer holds the lock"
    assert not empty.exists()
    assert foreign.exists(), "it does not begin as our files do"
    kill(pid)
    files.sweep(folder)
    assert not living.exists()
    assert check_pooled(store, space, [1]).all()


@pytest.mark.parametrize("work", ["open", "merge", "compact", "evict", "verify"])
def test_who_opens_or_tidies_a_store_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    monkeypatch.setattr(files, "_is_local", lambda fd: True)
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))
    litter = store.root / space / ("0" * 32 + ".tmp")
    litter.write_bytes(segment_files(store, space)[0].read_bytes()[:100])
    if work == "open":
        assert check_pooled(Store(store.location, index_dir=tmp_path / "i2"), space, [1]).all()
    elif work == "merge":
        assert store.merge(space) == 4
    elif work == "evict":
        assert store.evict(0).segments == 4
    else:
        getattr(store, work)()
    assert not litter.exists()


def test_what_is_known_of_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proc is of this machine, and none of those where stores are kept: unknown."""
    with open("/proc/self/status") as file:
        assert not files._is_local(file.fileno())
    with open(tmp_path / "file", "w") as file:
        kind = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True).stdout
        local = ("ef53", "58465342", "9123683e", "1021994", "794c7630", "2fc12fc1", "f2f52010", "ca451a4e")
        assert files._is_local(file.fileno()) is (kind.strip() in local)
        monkeypatch.setattr(files.sys, "platform", "darwin")
        assert not files._is_local(file.fileno())


def test_tombs_do_not_pile_up(tmp_path: Path) -> None:
    """Of segments that are gone they are kept for an hour, whatever is done meanwhile, and no longer."""
    store, space = make_store(tmp_path)
    folder = store.root / space
    for turn in range(12):
        store.append(space, pooled([turn, turn + 100]))
        assert store.invalidate(space, [text(turn)]) == 1
        assert store.compact() == 2 - (not turn)
        tombs = list(folder.glob("*.tomb"))
        assert len(tombs) == 1 + turn % 4
        if turn % 4 == 3:
            for tomb in tombs:
                os.utime(tomb, (time.time() - 3700,) * 2)
            assert store.compact() == 0
            assert not list(folder.glob("*.tomb")), "also those that the segment of now was made with"
    assert check_pooled(store, space, range(112)).nonzero()[0].tolist() == list(range(100, 112))
