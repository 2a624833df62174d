"""Files that a process has just written are not read again to know that they are whole, until somebody touches them."""

from __future__ import annotations

import os
from pathlib import Path

from actcache.store.vouched import Vouched

SIZE = 5 << 20


def made(path: Path, size: int = SIZE) -> Path:
    path.write_bytes(bytes(size))
    # A clock that ticks slowly does not tell what follows from this.
    os.utime(path, ns=(1, 1))
    return path


def test_as_long_as_nobody_touches_it(tmp_path: Path) -> None:
    vouched, path = Vouched(), made(tmp_path / "a")
    assert path not in vouched
    vouched.add(path)
    assert path in vouched
    with path.open("r+b") as file:
        file.write(b"x")
    assert path not in vouched


def test_another_file_of_the_name_is_another(tmp_path: Path) -> None:
    vouched, path = Vouched(), made(tmp_path / "a")
    vouched.add(path)
    made(tmp_path / "b").rename(path)
    assert path not in vouched
    path.unlink()
    assert path not in vouched


def test_small_files_and_those_let_go_of(tmp_path: Path) -> None:
    vouched, small, large = Vouched(), made(tmp_path / "a", 1000), made(tmp_path / "b")
    vouched.add(small)
    vouched.add(large)
    vouched.add(tmp_path / "none")
    vouched.discard(large)
    assert not any(path in vouched for path in (small, large, tmp_path / "none"))
