"""What is kept for the time of a request only: it goes with the request, or with the next process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from actcache.extract import scratch
from actcache.extract.scratch import scratch_folder, sweep, sweep_once
from store_helpers import in_child, kill, wait_for


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they lie in these tests: the folder that everybody shares is none of their business."""
    monkeypatch.setattr(scratch, "_places", lambda: [str(tmp_path)])
    sweep_once.cache_clear()
    return tmp_path


def left_by_a_killed_process(place: Path) -> Path:
    """The folder of a process that was killed in the middle of a request."""
    read, write = os.pipe()

    def work() -> None:
        with scratch_folder() as folder:
            (folder / "store" / "v1").mkdir(parents=True)
            (folder / "store" / "v1" / "segment").write_bytes(b"vectors")
            (folder / "index").mkdir()
            os.write(write, bytes(folder))
            os.read(os.pipe()[0], 1)

    pid = in_child(work)
    folder = Path(os.fsdecode(os.read(read, 4096)))
    os.close(read)
    os.close(write)
    assert folder.parent == place and folder.is_dir()
    sweep(str(place))
    assert (folder / "store" / "v1" / "segment").exists(), "its process lives"
    kill(pid)
    return folder


def test_it_goes_with_the_request_whatever_happens_in_it(place: Path) -> None:
    with contextlib.suppress(KeyError), scratch_folder() as folder:
        (folder / "store").mkdir()
        (folder / "store" / "x").write_bytes(b"x")
        raise KeyError
    assert not list(place.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_one(place: Path) -> None:
    left = left_by_a_killed_process(place)
    with scratch_folder() as mine, scratch_folder() as other:
        sweep_once()
        assert not left.exists()
        assert mine.is_dir() and other.is_dir()
        again = left_by_a_killed_process(place)
        sweep_once()
        assert again.is_dir(), "a process looks once"
    sweep(str(place))
    assert not list(place.iterdir())


def test_only_what_is_ours_goes(place: Path) -> None:
    name = "actcache-request-" + "0" * 31
    foreign = place / f"{name}1" / "results.txt"
    foreign.parent.mkdir(mode=0o700)
    foreign.write_text("somebody's")
    (place / f"{name}2").symlink_to(foreign.parent, target_is_directory=True)
    (place / f"{name}3").mkdir(mode=0o700)
    os.chmod(place / f"{name}3", 0o755)
    (place / f"{name}4").write_text("a file")
    (place / f"{name}-5").mkdir(mode=0o700)
    (place / f"{name}6").mkdir(mode=0o700)
    sweep(str(place))
    assert sorted(path.name[-1] for path in place.iterdir()) == ["1", "2", "3", "4", "5"]
    assert foreign.read_text() == "somebody's"
    sweep(str(place / "nowhere"))


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = os.open, []

    def opening(path: Any, *args: int, **options: Any) -> int:
        fd = real(path, *args, **options)
        if not taken:
            taken.append(path)
            assert wait_for(in_child(lambda: sweep(str(place)))) == 0
        return fd

    monkeypatch.setattr(os, "open", opening)
    with scratch_folder() as folder:
        assert folder.is_dir() and taken != [folder]
        assert list(place.iterdir()) == [folder]


def test_the_places_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert tempfile.gettempdir() in scratch._places()
