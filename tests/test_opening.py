"""A segment is opened as what it is known as, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import FormatError, NewerFormatError
from actcache.store import segment
from actcache.store.opening import open_known, open_segment, read_info
from store_helpers import SITES, pooled, vector

SPACE, OTHER = "0" * 32, "1" * 32


class Copy:
    """A working copy whose mirrors are healed by `heal`; without, none of them is a mirror. Nothing is fetched."""

    def __init__(self, heal: Any = None) -> None:
        self.heal, self.renewed = heal, 0

    def renew(self, path: Path) -> bool:
        self.renewed += 1
        if self.heal is not None:
            self.heal(path)
        return self.heal is not None

    def fetcher(self, path: Path, fd: int) -> None:
        return None


def write(folder: Path, records: Any, space: str = SPACE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{segment.write(folder, records, space=space).name}.safetensors"


def test_what_is_not_of_the_space_it_lies_in_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / SPACE, pooled([1, 2]))
    assert read_info(path, None).prompts == 2
    moved = tmp_path / OTHER / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    with pytest.raises(FormatError, match=f"belongs to space '{SPACE}'"):
        read_info(moved, None)


@pytest.mark.parametrize(
    "other",
    [pooled([1, 2, 3]), pooled([1, 4]), pooled([2, 1]), pooled([1, 2], SITES[:1]), pooled([1, 2], dim=4)],
    ids=["more prompts", "another prompt", "another order", "fewer sites", "another width"],
)
def test_a_file_that_took_the_place_of_another_is_refused(tmp_path: Path, other: Any) -> None:
    """Under the same name: what was indexed would be read at wrong rows."""
    path = write(tmp_path / SPACE, pooled([1, 2]))
    info = read_info(path, None)
    opened = open_known(path, info, None)
    replaced = write(tmp_path / "made" / SPACE, other)
    path.unlink()
    path.write_bytes(replaced.read_bytes())
    with pytest.raises(FormatError, match="is not the file it was when it was indexed"):
        open_known(path, info, None)
    # What is mapped already stays what it was.
    np.testing.assert_array_equal(opened.values(SITES[0], 0, 2), [vector(i, SITES[0]) for i in (1, 2)])
    assert len(opened.prompts) == 2


def test_the_head_of_a_mirror_is_read_once_more(tmp_path: Path) -> None:
    path = write(tmp_path / SPACE, pooled([1, 2]))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(FormatError):
        open_segment(path, None)
    # No mirror: nothing could heal it.
    with pytest.raises(FormatError):
        open_segment(path, Copy())  # type: ignore[arg-type]
    copy = Copy(lambda p: p.write_bytes(whole))
    assert open_segment(path, copy).info.prompts == 2  # type: ignore[arg-type]
    # Once, not for ever.
    copy = Copy(lambda p: p.write_bytes(b"\0" * len(whole)))
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(FormatError):
        open_segment(path, copy)  # type: ignore[arg-type]
    assert copy.renewed == 1


def test_what_a_later_actcache_wrote_is_not_read_again_from_its_source(tmp_path: Path) -> None:
    """It is right as it is: reading its head once more would give the same."""
    path = write(tmp_path / SPACE, pooled([1]))
    whole = path.read_bytes()
    version = b'"1.'
    assert version in whole
    path.write_bytes(whole.replace(version, b'"9.', 1))
    copy = Copy(lambda p: p.write_bytes(whole))
    with pytest.raises(NewerFormatError, match="newer actcache"):
        open_segment(path, copy)  # type: ignore[arg-type]
    assert copy.renewed == 0
