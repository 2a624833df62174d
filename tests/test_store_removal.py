"""Invalidation and clearing: what is gone is gone, foreign files stay."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.errors import FormatError, NotCachedError
from actcache.store import merging, removal, segment, tombs
from actcache.store.index import SpaceIndex
from actcache.store.store import Store
from store_helpers import SITES, check_pooled, every_token, make_store, make_table, pooled, segment_files, text

# -- tombs ---------------------------------------------------------------------------------------------


def test_invalidated_prompts_are_gone_for_everyone(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    other = Store(store.location, index_dir=tmp_path / "i2")
    store.append(space, pooled(range(6)))
    store.append(space, every_token(range(3)))
    assert check_pooled(other, space, range(6)).all()
    assert store.invalidate(space, [text(1), text(77)]) == 1
    assert store.invalidate(space, [make_table([2]).tokens(0).tolist()]) == 1
    for reader in (store, other, Store(store.location, index_dir=tmp_path / "i3")):
        assert check_pooled(reader, space, range(6)).tolist() == [True, False, False, True, True, True]
        place = reader.locate(space, table=make_table(range(3)), sites=SITES, layout="tokens")
        assert place.found.tolist() == [True, False, False]
        assert reader.discover("org/model", text(1)) is None
        assert reader.prompts(space).text_of(1) == text(3)
    assert len(list((store.root / space).glob("*.tomb"))) == 4
    assert store.invalidate(space, [text(1)]) == 0
    assert store.invalidate(space) == 4
    assert not check_pooled(store, space, range(6)).any()


def test_an_invalidated_prompt_can_be_written_again(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1, 2]))
    store.invalidate(space, make_table([1]))
    store.append(space, pooled([1]))
    assert check_pooled(store, space, [1, 2]).all()
    store.merge(space)
    assert check_pooled(store, space, [1, 2]).all()
    assert segment.open(segment_files(store, space)[0]).info.prompts == 2


def test_a_tomb_holds_every_key(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (1000, 16), np.uint8)
    path, data = tombs.write_tomb(tmp_path, "a" * 32, keys)
    np.testing.assert_array_equal(tombs.read_tomb(path), keys)
    raw = path.read_bytes()
    assert raw == data
    target = tmp_path / ("a" * 32 + "-" + "0" * 16 + ".tomb")
    for at in (*range(600), len(raw) - 1):
        target.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(FormatError):
            tombs.read_tomb(target)
    target.write_bytes(raw[:-16])
    with pytest.raises(FormatError):
        tombs.read_tomb(target)
    other = tmp_path / path.name.replace("a" * 32, "b" * 32)
    other.write_bytes(raw)
    with pytest.raises(FormatError, match="named after"):
        tombs.read_tomb(other)


def test_a_damaged_tomb_brings_nothing_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1, 2]))
    store.append(space, pooled([3]))
    store.invalidate(space, [text(1)])
    (tomb,) = (store.root / space).glob("*.tomb")
    raw = bytearray(tomb.read_bytes())
    raw[-1] ^= 1
    tomb.write_bytes(raw)
    reader = Store(store.location, index_dir=tmp_path / "i2")
    with caplog.at_level(logging.WARNING, "actcache.store"):
        assert check_pooled(reader, space, [1, 2, 3]).tolist() == [False, False, True]
    assert tomb.name in caplog.text
    reader.append(space, pooled([4]))
    reader.merge(space)
    assert tomb.name[:32] in {p.name[:32] for p in segment_files(store, space)}, "left for a person to look at"


def test_invalidation_during_a_merge_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tomb is written when the merge has already decided what to copy, and again before the old ones go."""
    store, space = make_store(tmp_path)
    other = Store(store.location, index_dir=tmp_path / "i2")
    for i in range(4):
        store.append(space, pooled([i]))
    write, remove = merging.write_columns, merging.remove

    def late_write(*args: Any, **options: Any) -> Any:
        assert other.invalidate(space, [text(1)]) == 1
        return write(*args, **options)

    removed: list[Path] = []

    def late_remove(path: Path) -> int:
        if not removed:
            assert other.invalidate(space, [text(2)]) == 1
        removed.append(path)
        return remove(path)

    monkeypatch.setattr(merging, "write_columns", late_write)
    monkeypatch.setattr(merging, "remove", late_remove)
    assert store.merge(space) == 4
    monkeypatch.undo()
    for reader in (store, other, Store(store.location, index_dir=tmp_path / "i3")):
        assert check_pooled(reader, space, range(4)).tolist() == [True, False, False, True]
    store.append(space, pooled([9]))
    store.merge(space)
    assert segment.open(segment_files(store, space)[0]).info.prompts == 3
    # The tombs have no segment any more; they go once no merge begun before them can still be under way.
    assert list((store.root / space).glob("*.tomb"))
    for tomb in (store.root / space).glob("*.tomb"):
        os.utime(tomb, (time.time() - 7200,) * 2)
    store.append(space, pooled([10]))
    store.merge(space)
    assert not list((store.root / space).glob("*.tomb"))
    assert check_pooled(store, space, range(4)).tolist() == [True, False, False, True]


def test_a_tomb_known_before_counts_for_a_segment_merged_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge was under way when the prompt went, and becomes visible together with another tomb."""
    store, space = make_store(tmp_path)
    merger = Store(store.location, index_dir=tmp_path / "i2")
    for i in range(3):
        store.append(space, pooled([i]))
    reader = Store(store.location, index_dir=tmp_path / "i3")
    write = merging.write_columns

    def late_write(*args: Any, **options: Any) -> Any:
        apart = store.append(space, pooled([7], sites=["embed"]))
        info = store._index(space).segments()
        name = next(i.name for _, i in info if i.sites == tuple(SITES) and i.name != apart.name and i.prompts == 1)
        held = segment.open(store.root / space / f"{name}.safetensors").info
        tombs.write_tomb(store.root / space, name, held.prompt_key)
        gone.append(held.prompt_key)
        # The reader knows this tomb before the merged segment is there ...
        reader.refresh()
        written = write(*args, **options)
        # ... and sees that one together with a tomb of something else.
        tombs.write_tomb(store.root / space, apart.name, apart.prompt_key)
        reader.refresh()
        return written

    gone: list[Any] = []
    assert check_pooled(reader, space, range(3)).all()
    monkeypatch.setattr(merging, "write_columns", late_write)
    assert merger.merge(space) == 3
    monkeypatch.undo()
    left = [make_table([i]).token_key.tobytes() != gone[0].tobytes() for i in range(3)]
    for each in (reader, merger, Store(store.location, index_dir=tmp_path / "i4")):
        assert check_pooled(each, space, range(3)).tolist() == left


def test_an_invalidation_outlives_two_merges_that_began_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second merges what the first has made, and knows nothing of the tomb for what the first had read."""
    store, space = make_store(tmp_path)
    first, second = (Store(store.location, index_dir=tmp_path / f"host {k}") for k in range(2))
    for i in range(3):
        store.append(space, pooled([i]))
    write, writes = merging.write_columns, []

    def late_write(*args: Any, **options: Any) -> Any:
        writes.append(True)
        if len(writes) == 2:
            # The second merge has decided what to copy; a tomb of now comes too late for it.
            assert removal.invalidate(frozen, make_table([1]).token_key) == 1
        return write(*args, **options)

    store.refresh()
    monkeypatch.setattr(merging, "write_columns", late_write)
    refresh = SpaceIndex.refresh
    frozen = store._index(space)
    passed: list[bool] = []

    def late_refresh(self: SpaceIndex, *, force: bool = False) -> None:
        # The invalidation's first look is from before the first merge.
        if self is not frozen or passed:
            refresh(self, force=force)
        else:
            passed.append(True)

    first.merge(space)
    second.append(space, pooled([9]))
    monkeypatch.setattr(SpaceIndex, "refresh", late_refresh)
    second.merge(space)
    monkeypatch.undo()
    assert len(writes) == 2
    for reader in (store, first, second, Store(store.location, index_dir=tmp_path / "i4")):
        assert check_pooled(reader, space, [0, 1, 2, 9]).tolist() == [True, False, True, True]


def test_tombs_stay_while_a_segment_cannot_be_read(tmp_path: Path) -> None:
    """A later version of the format may hold what a tomb names, and is read by a later actcache."""
    store, space = make_store(tmp_path)
    info = store.append(space, pooled([1]))
    store.invalidate(space, [text(1)])
    (tomb,) = (store.root / space).glob("*.tomb")
    os.utime(tomb, (time.time() - 7200,) * 2)
    file = store.root / space / f"{info.name}.safetensors"
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw.replace(b'"version":"1.0"', b'"version":"2.0"'))
    later = Store(store.location, index_dir=tmp_path / "i2")
    for i in range(2, 5):
        later.append(space, pooled([i]))
    assert later.merge(space) == 3
    assert tomb.exists()


# -- clearing ------------------------------------------------------------------------------------------


def test_clear_deletes_only_what_is_ours(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(5)))
    store.append(space, every_token(range(3)))
    store.invalidate(space, [text(0)])
    folder = store.root / space
    foreign = {
        folder / "notes.txt": b"mine",
        folder / "model.safetensors": b"mine",
        folder / ("a" * 32 + ".safetensors"): b"mine, by chance of this name",
        folder / ("a" * 32 + "-" + "b" * 16 + ".tomb"): b"mine",
        folder / ("c" * 32 + ".tmp"): b"mine",
        folder / "sub" / "x.txt": b"mine",
        store.root / "README": b"mine",
        store.location / "other" / ("d" * 32 + ".safetensors"): b"mine",
    }
    for path, content in foreign.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (folder / ("e" * 32 + ".safetensors")).symlink_to(store.root / "README")
    assert store.clear() == 4
    assert {p: p.read_bytes() for p in store.location.rglob("*") if p.is_file() and not p.is_symlink()} == foreign
    assert store.info().models == []
    store.append(space, pooled([1]))
    assert check_pooled(store, space, [1]).all()


def test_clear_one_model(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    other = store.open_space({"weights": "x"}, {"model_name": "other"})
    store.append(space, pooled([1]))
    store.append(other, pooled([1, 2]))
    with pytest.raises(NotCachedError, match=r"'othre'\. Did you mean 'other'\?"):
        store.clear("othre")
    assert check_pooled(store, space, [1]).all()
    assert store.clear("other") == 2
    assert not (store.root / other).exists()
    assert check_pooled(store, space, [1]).all()
    assert store.clear(space) == 1
    assert not store.root.exists()


def test_a_store_cleared_by_another_is_written_again(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with store.writer(space, linger=0) as writer:
        writer.put(pooled([1]))
        writer.flush()
        Store(store.location, index_dir=tmp_path / "i2").clear()
        writer.put(pooled([2]))
    assert check_pooled(store, space, [1, 2]).tolist() == [False, True]
    assert store.spaces()[0].model_name == "org/model"
