"""Two at one store in the same instant: each test makes one thing happen in the very middle of another."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store import catalog, merging, spaces, writing
from actcache.store.catalog import Catalog
from actcache.store.growing import GrowingFile
from actcache.store.index import SpaceIndex
from actcache.store.store import Store
from store_helpers import (
    SITES,
    check_pooled,
    growing_writer,
    make_store,
    make_table,
    open_files,
    pooled,
    segment_files,
    text,
)

GB = 2**30


def beside(store: Store, folder: Path) -> Store:
    """The same store as another host sees it."""
    return Store(store.location, index_dir=folder)


def once(original: Callable[..., Any], first: Callable[[], object]) -> Callable[..., Any]:
    """`original`, before whose first call `first` happens."""
    left = [first]

    def called(*args: Any, **options: Any) -> Any:
        if left:
            left.pop()()
        return original(*args, **options)

    return called


# -- in one process ------------------------------------------------------------------------------------


def test_what_is_invalidated_while_it_is_merged_stays_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index knows the tomb before it gets to know the segment which was merged without it."""
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))

    def invalidate() -> None:
        assert store.invalidate(space, [text(1)]) == 1

    monkeypatch.setattr(merging, "write_columns", once(merging.write_columns, invalidate))
    assert store.merge(space) == 4
    monkeypatch.undo()
    for reader in (store, beside(store, tmp_path / "i2")):
        assert check_pooled(reader, space, range(4)).tolist() == [True, False, True, True]
        assert reader.spaces()[0].num_prompts == 3


def test_clearing_waits_for_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what is cleared comes back in the segment that is being merged."""
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))
    other = beside(store, store.index_dir)
    clearing = threading.Thread(target=other.clear)

    def clear() -> None:
        clearing.start()
        # Enough for one that does not wait.
        clearing.join(0.3)

    monkeypatch.setattr(merging, "write_columns", once(merging.write_columns, clear))
    store.merge(space)
    clearing.join()
    assert not check_pooled(store, space, range(4)).any()
    assert store.spaces() == other.spaces() == []


def test_a_segment_that_goes_while_it_is_opened(tmp_path: Path) -> None:
    """One thread evicts, another takes notice that the segment is gone: neither trips over the other."""
    store, space = make_store(tmp_path)
    name = store.append(space, pooled(range(8))).name
    store.append(space, pooled(range(8, 16)))
    index = store._index(space)
    # The first must go, and what was read lately out of it must be copied.
    assert check_pooled(store, space, range(8, 16)).all()
    assert check_pooled(store, space, [0]).all()
    passed = []

    class Watched(OrderedDict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            found = super().get(key, default)
            if not passed and threading.current_thread() is threading.main_thread() and key == name:
                passed.append(True)
                thread = threading.Thread(target=index.forget, args=(name,))
                thread.start()
                thread.join(0.2)
            return found

    index._open = Watched(index._open)
    size = sum(file.stat().st_size for file in store.root.rglob("*") if file.is_file())
    assert store.evict((size - 100) / GB).prompts
    assert passed


def test_what_is_written_while_others_merge_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged segment is as new as something that was begun later and finished earlier, and holds an older copy."""
    store, space = make_store(tmp_path)
    old = pooled([1])
    old.data = {site: rows - 1 for site, rows in old.data.items()}
    store.append(space, old)
    store.append(space, pooled([2]))
    other = beside(store, tmp_path / "i2")
    merged = []

    def meanwhile() -> None:
        other.append(space, pooled([3]))
        merged.append(other.merge(space))

    monkeypatch.setattr(writing, "index_region", once(writing.index_region, meanwhile))
    store.append(space, pooled([1]))
    monkeypatch.undo()
    assert merged == [2], "what is older than anything that is being written"
    for reader in (store, other, beside(store, tmp_path / "i3")):
        assert check_pooled(reader, space, [1, 2, 3]).all()
    assert store.merge(space) == 3
    assert check_pooled(store, space, [1, 2, 3]).all()


@pytest.mark.parametrize("how", ["in place", "copied", "left by the dead"])
def test_what_is_written_while_a_file_that_grew_is_finished_is_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """All of the file counts as being as new as its last batch, which is newer than a write that is still under way."""
    monkeypatch.setattr(GrowingFile, "is_well_filled", how == "in place")
    store, space = make_store(tmp_path)
    other = beside(store, tmp_path / "i2")
    other.open_space({"weights": "abc"}, {"model_name": "org/model"})
    writer = growing_writer(other, space)
    old = pooled([1, 4])
    old.data = {site: rows - 1 for site, rows in old.data.items()}
    writer.append([old])
    writer.append([pooled([2])])

    def meanwhile() -> None:
        writer.append([pooled([3, 4])])
        if how == "left by the dead":
            for file in writer._files.values():
                file.close()
            other.merge(space)
        else:
            writer.finish(False)
        assert not open_files(store, space)

    monkeypatch.setattr(writing, "index_region", once(writing.index_region, meanwhile))
    store.append(space, pooled([1]))
    monkeypatch.undo()
    for reader in (store, other, beside(store, tmp_path / "i3")):
        assert check_pooled(reader, space, [1, 2, 3, 4]).all()
    assert len(segment_files(store, space)) == 3, "the older batches together, the last one apart, and what was written"
    store.merge(space)
    assert check_pooled(store, space, [1, 2, 3, 4]).all()


def test_what_vanishes_at_every_look_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody stores one prompt over and over and evicts what was there, always just before it is opened."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(4)))
    kept = set(segment_files(store, space))
    store.append(space, pooled([9]))
    reader = beside(store, tmp_path / "i2")
    looks = []

    def ask_for(index: SpaceIndex, numbers: Any) -> None:
        looks.append(numbers)
        before = set(segment_files(store, space)) - kept
        store.append(space, pooled([9]))
        for file in before:
            file.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(SpaceIndex, "ask_for", ask_for)
        assert check_pooled(reader, space, [0, 1, 2, 3, 9]).tolist() == [True] * 4 + [False]
    assert len(looks) > 1
    assert check_pooled(reader, space, [0, 1, 2, 3, 9]).all()


# -- with others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda store, space: sorted(store.prompts(space).token_ids[store.prompts(space).token_offset[:-1]].tolist()),
        lambda store, space: len(store.read(space, None, SITES[0], pooling="last_token")),
        lambda store, space: store.statistics(space, SITES[0], pooling="last_token").count,
        lambda store, space: [(s.site, s.rows) for s in store.summaries(space)],
        lambda store, space: store.sites_of(space, make_table([1])),
        lambda store, space: store.find_prompt(space, text(2)).token_ids.tolist(),
        lambda store, space: store.discover("org/model", text(3)).sites,
    ],
)  # fmt: skip
def test_nothing_is_left_out_that_is_merged_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Store, str], Any]
) -> None:
    """What is listed is opened a moment later, when another host may have merged it."""
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))
    expected = ask(store, space)
    reader = beside(store, tmp_path / "i2")
    monkeypatch.setattr(SpaceIndex, "open", once(SpaceIndex.open, lambda: merge(store, space)))
    assert ask(reader, space) == expected


def test_what_is_merged_between_listing_and_reading_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a prompt is missed, and one that is to be invalidated stays where it went."""
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))
    read = SpaceIndex._read
    for k, expected in enumerate(([True] * 4, [True, False, True, True])):
        other = beside(store, tmp_path / f"other {k}")
        if k:
            monkeypatch.setattr(SpaceIndex, "_read", once(read, lambda: store.compact()))
            assert other.invalidate(space, make_table([1])) == 1
        else:
            monkeypatch.setattr(SpaceIndex, "_read", once(read, lambda: merge(store, space)))
        for reader in (other, store, beside(store, tmp_path / f"new {k}")):
            assert check_pooled(reader, space, range(4)).tolist() == expected
        store.append(space, pooled([9]))


def merge(store: Store, space: str) -> None:
    assert store.merge(space) == 4


@pytest.mark.parametrize("take", [lambda store: store.evict(0), lambda store: store.clear()])
def test_a_space_emptied_while_something_is_stored_stays_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[[Store], object]
) -> None:
    """Whoever stores saw the description, and it goes right after: nobody would list or delete what was stored."""
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    other = beside(store, tmp_path / "i2")
    other.open_space({"weights": "abc"}, {"model_name": "org/model"})
    before = store.spaces()[0].created_ns
    monkeypatch.setattr(spaces, "remove", once(spaces.remove, lambda: other.append(space, pooled([2]))))
    take(store)
    monkeypatch.undo()
    (left,) = store.spaces()
    assert (left.model_name, left.num_prompts, left.created_ns) == ("org/model", 1, before)
    assert check_pooled(store, space, [1, 2]).tolist() == [False, True]
    assert store.clear() == 1
    assert not store.root.exists()


def test_two_that_open_a_new_index_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sees no tables yet, and must not make away with what the first has filled in meanwhile."""
    store, space = make_store(tmp_path)
    info = store.append(space, pooled([1]))
    first, second = Catalog(tmp_path / "new"), Catalog(tmp_path / "new")
    monkeypatch.setattr(catalog, "_version", late(catalog._version, lambda: first.record(space, [info], [])))
    assert [held.name for held in second.load(space)] == [info.name]
    assert [held.name for held in first.load(space)] == [info.name]


def late(original: Callable[..., Any], then: Callable[[], object]) -> Callable[..., Any]:
    """`original`, behind whose first call `then` happens."""
    left = [then]

    def called(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        if left:
            left.pop()()
        return found

    return called


def test_what_is_gone_does_not_come_back_with_a_slower_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host merges the same segments faster, and then a prompt is invalidated where it lies by now."""
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))
    fast = beside(store, tmp_path / "i2")

    def meanwhile() -> None:
        merge(fast, space)
        assert fast.invalidate(space, make_table([1])) == 1

    monkeypatch.setattr(merging, "write_columns", once(merging.write_columns, meanwhile))
    assert store.merge(space) == 0
    monkeypatch.undo()
    for reader in (store, fast, beside(store, tmp_path / "i3")):
        assert check_pooled(reader, space, range(4)).tolist() == [True, False, True, True]
    assert len(segment_files(store, space)) == 1


def test_the_index_forgets_what_others_have_removed(tmp_path: Path) -> None:
    """Also when nobody of this host was looking while it happened."""
    store, space = make_store(tmp_path)
    for i in range(4):
        store.append(space, pooled([i]))
    check_pooled(store, space, range(4))
    store.close()
    merge(beside(store, tmp_path / "i2"), space)
    again, _ = make_store(tmp_path)
    assert check_pooled(again, space, range(4)).all()
    again.close()
    (left,) = (file.name[:32] for file in segment_files(store, space))
    held = Catalog(store.index_dir)
    assert [info.name for info in held.load(space)] == [left]
    assert list(held.read_medians(space)) == [left]


# -- at exit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_reads_are_noted_at_exit_and_nothing_is_said(tmp_path: Path, kept: bool) -> None:
    """A store may outlive the modules it works with: at the end of the interpreter their names are None."""
    store, space = make_store(tmp_path)
    info = store.append(space, pooled(range(4)))
    store.close()
    program = f"""
import atexit, sys
from pathlib import Path
stores = []
@atexit.register
def at_the_very_end():
    # Registered first, so called last.
    import actcache.store.recency as recency
    recency.time = recency.median = None
    stores.clear()
from store_helpers import check_pooled, make_store
store, space = make_store(Path(sys.argv[1]))
check_pooled(store, space, [1])
check_pooled(store, space, [2])
if {kept}:
    stores.append(store)
del store
"""
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1] / "src")))
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    times = Catalog(store.index_dir).read_times(space, info.name, 4)
    assert times is not None
    assert np.flatnonzero(times > info.created_ns).tolist() == [1, 2]
