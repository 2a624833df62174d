"""Keeping in step with a folder in which others are at work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from actcache.store.listing import Listing
from actcache.store.store import Store
from store_helpers import check_pooled, make_store, pooled, segment_files, text


def test_segments_of_others_appear_and_vanish(tmp_path: Path) -> None:
    here, space = make_store(tmp_path)
    there = Store(here.location, index_dir=tmp_path / "another host")
    there.open_space({"weights": "abc"}, {"model_name": "org/model"})
    assert not check_pooled(here, space, [1]).any()
    there.append(space, pooled([1]))
    assert check_pooled(here, space, [1]).all()
    there.append(space, pooled([2]))
    assert check_pooled(here, space, [1, 2]).all()
    for file in segment_files(here, space):
        file.unlink()
    assert not check_pooled(here, space, [1, 2]).any()
    assert not check_pooled(there, space, [1, 2]).any()


def test_a_change_within_one_clock_tick_is_seen(tmp_path: Path) -> None:
    here, space = make_store(tmp_path)
    there = Store(here.location, index_dir=tmp_path / "i2")
    there.open_space({"weights": "abc"}, {"model_name": "org/model"})
    here.append(space, pooled([0]))
    folder = here.root / space
    check_pooled(here, space, [0])
    stamp = os.stat(folder).st_mtime_ns
    there.append(space, pooled([1]))
    os.utime(folder, ns=(stamp, stamp))
    assert check_pooled(here, space, [0, 1]).all()


def test_a_file_system_of_whole_seconds_is_listed_for_longer(tmp_path: Path) -> None:
    here, space = make_store(tmp_path)
    here.append(space, pooled([0]))
    folder = here.root / space
    stamp = (time.time_ns() // 1_000_000_000 - 1) * 1_000_000_000
    os.utime(folder, ns=(stamp, stamp))
    assert check_pooled(here, space, [0]).all()
    there = Store(here.location, index_dir=tmp_path / "i2")
    there.invalidate(space, [text(0)])
    os.utime(folder, ns=(stamp, stamp))
    assert not check_pooled(here, space, [0]).any()


def test_an_unchanged_folder_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    time.sleep(0.3)
    check_pooled(store, space, [1])
    monkeypatch.setattr(Listing, "_names", lambda self: pytest.fail("listed"))
    assert check_pooled(store, space, [1, 2]).tolist() == [True, False]


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_listing_that_misses_both_sides_of_a_merge_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, quiet: bool
) -> None:
    """A folder is not read in one instant: neither the old segments nor the new one need be in it, whether the reader
    knew the old ones or has just been opened, and whether nothing had happened there for long or something just did.
    """
    there, space = make_store(tmp_path)
    for i in range(4):
        there.append(space, pooled([i]))
    here = Store(there.location, index_dir=tmp_path / "i2")
    if known:
        assert check_pooled(here, space, range(4)).all()
    if quiet:
        folder = there.root / space
        stamp = os.stat(folder).st_mtime_ns - 10**10 + 1
        os.utime(folder, ns=(stamp, stamp))
    there.refresh()
    original, torn = Listing._names, []

    def listing(self: Listing) -> set[str]:
        if self is not here._index(space).listing or torn:
            return original(self)
        torn.append(True)
        before = original(self)
        assert there.merge(space) == 4
        return before & original(self)

    monkeypatch.setattr(Listing, "_names", listing)
    assert check_pooled(here, space, range(4)).all()
    assert torn
