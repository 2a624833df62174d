"""Work done twice: what two hosts make of the same segments, and what is computed again, is harmless and goes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store import duplicates, merging
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store
from actcache.store.tombs import write_tomb
from store_helpers import SITES, check_pooled, make_store, make_table, pooled, segment_files, text, vector


def two_hosts(folder: Path) -> tuple[Store, Store, str]:
    """One store, seen by two hosts: locks of one are not those of the other."""
    store, space = make_store(folder)
    return store, Store(store.location, index_dir=folder / "other index"), space


def merged_at_once(hosts: tuple[Store, Store], space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decide on the same segments before either has merged, and both find them there when they have."""
    together = threading.Barrier(2, timeout=60)
    met = threading.local()

    def meeting(name: str) -> Any:
        original = getattr(merging, name)

        def call(*args: Any) -> Any:
            if not hasattr(met, name):
                setattr(met, name, True)
                together.wait()
            return original(*args)

        return call

    errors: list[BaseException] = []

    def merge(host: Store) -> None:
        try:
            host.merge(space)
        except BaseException as error:
            errors.append(error)

    with monkeypatch.context() as patched:
        # The last thing before the new one is written, and the first when it is there.
        for name in ("drop_duplicates", "remove"):
            patched.setattr(merging, name, meeting(name))
        threads = [threading.Thread(target=merge, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_what_two_hosts_make_of_the_same_segments_is_there_twice_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, space = two_hosts(tmp_path)
    for start in range(0, 9, 3):
        one.append(space, pooled(range(start, start + 3)))
    other.refresh()
    with monkeypatch.context() as patched:
        patched.setattr(duplicates, "drop_twins", lambda *_: 0)
        merged_at_once((one, other), space, patched)
    twins = segment_files(one, space)
    assert len(twins) == 2
    for host in (one, other):
        assert check_pooled(host, space, range(9)).all()
        assert host.info().models[0].num_prompts == len(host.prompts(space)) == 9
        assert len(host.read(space, None, SITES[0], pooling="last_token")) == 9
        assert host.statistics(space, SITES[0], pooling="last_token").count == 9
        assert host.verify().ok
    # Too large to be merged with each other, as twins of full size are.
    monkeypatch.setattr(merging, "_TIERS", (1,))
    assert other.invalidate(space, [text(4)]) == 1
    assert one.merge(space) == 1
    assert len(segment_files(one, space)) == 1
    for host in (one, other):
        assert check_pooled(host, space, range(9)).tolist() == [i != 4 for i in range(9)]
        assert host.verify().ok


def test_hosts_that_merge_at_once_leave_one_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, space = two_hosts(tmp_path)
    for start in range(0, 9, 3):
        one.append(space, pooled(range(start, start + 3)))
    other.refresh()
    merged_at_once((one, other), space, monkeypatch)
    assert len(segment_files(one, space)) == 1
    for host in (one, other):
        assert check_pooled(host, space, range(9)).all()


def test_copies_in_segments_too_large_to_merge_go_when_a_store_is_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_TIERS", (1,))
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(6)))
    again = pooled(range(4, 10))
    again.data[SITES[0]][0] += 1
    store.append(space, again)
    store.append(space, pooled(range(8), sites=SITES[:1]))
    store.append(space, pooled([20]))
    size = sum(path.stat().st_size for path in segment_files(store, space))
    assert store.compact(space) == 1
    assert sum(path.stat().st_size for path in segment_files(store, space)) < size
    held = [(info.prompts, info.sites) for _, info in store._index(space).segments()]
    assert sorted(held) == [(1, tuple(SITES)), (4, tuple(SITES)), (6, tuple(SITES)), (8, (SITES[0],))]
    for host in (store, Store(store.location, index_dir=tmp_path / "fresh")):
        assert check_pooled(host, space, [*range(10), 20], SITES[1:]).all()
        # Prompt 4 was stored three times at this site: the last time as it was the first.
        assert check_pooled(host, space, [*range(10), 20], SITES[:1]).all()
    assert store.compact(space) == 0


@pytest.mark.parametrize("gone", ["damaged", "invalidated", "evicted meanwhile"])
def test_an_older_copy_stays_where_the_newer_one_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    monkeypatch.setattr(merging, "_TIERS", (1,))
    store, space = make_store(tmp_path)
    old = store.append(space, pooled(range(6)))
    new = store.append(space, pooled(range(6)))
    path = store.root / space / f"{new.name}.safetensors"
    if gone == "damaged":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(bytes(data))
    elif gone == "invalidated":
        write_tomb(store.root / space, new.name, new.prompt_key[:3])
    else:
        real = merging.drop_duplicates

        def evicting(sources: Any) -> None:
            real(sources)
            path.unlink()

        monkeypatch.setattr(merging, "drop_duplicates", evicting)
    host = Store(store.location, index_dir=tmp_path / "fresh")
    host.compact(space)
    assert (store.root / space / f"{old.name}.safetensors").exists() == (gone != "invalidated")
    for looking in (host, Store(store.location, index_dir=tmp_path / "another")):
        assert check_pooled(looking, space, range(6)).all()


def test_texts_and_ids_of_the_same_tokens_are_no_copies_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_TIERS", (1,))
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(3)))
    ids = PromptTable.build([make_table([i]).tokens(0) for i in range(3)])
    data = {site: np.stack([vector(i, site) for i in range(3)]) for site in SITES}
    store.append(space, Records.pooled(ids, "last_token", data))
    assert store.compact(space) == 0
    assert check_pooled(store, space, range(3)).all()
