"""Merging: what is kept is the same, what is damaged is dropped, and which segments are merged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store import merging, segment
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store
from actcache.testing.memory import anonymous
from store_helpers import CONTEXT, SITES, check_pooled, every_token, make_store, pooled, segment_files, text, vector


@pytest.mark.parametrize("again", [[SITES[0], "embed"], [SITES[0]]])
def test_merging_brings_no_older_copy_to_the_front(tmp_path: Path, again: list[str]) -> None:
    """The newer copy lies in a segment that is not merged: what is merged must not look newer than it."""
    store, space = make_store(tmp_path)
    old = pooled([1, 2], sites=[SITES[0]])
    old.data = {site: rows - 1 for site, rows in old.data.items()}
    store.append(space, old)
    # Left alone for its sites, or for its size.
    store.append(space, pooled(range(1, 3 if len(again) == 2 else 9_000), sites=again))
    for i in range(10_000, 10_000 + merging.FEW):
        store.append(space, pooled([i], sites=[SITES[0]]))
    index = store._index(space)
    merging.merge_space(index, tmp_path / "locks", few=merging.FEW)
    assert check_pooled(store, space, [1, 2, *range(10_000, 10_000 + merging.FEW)], [SITES[0]]).all()
    assert len(segment_files(store, space)) == 3, "the others are merged all the same"


def test_merging_changes_nothing_but_the_files(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for i in range(0, 60, 4):
        store.append(space, pooled(range(i, i + 6)))
        store.append(space, every_token(range(i, i + 3)))
    store.append(space, pooled([500], sites=["embed"]))
    store.append(space, pooled([600], dtype=np.float16))
    store.invalidate(space, [text(i) for i in range(10, 15)])
    before = len(segment_files(store, space))
    reference = {i: text(i) for i in range(62) if not 10 <= i < 15}

    assert store.merge(space) == before - 2
    assert len(segment_files(store, space)) == 4
    found = check_pooled(store, space, range(65))
    assert [i for i in range(65) if found[i]] == sorted(reference)
    for path in segment_files(store, space):
        assert segment.validate(path) == []
        info = segment.open(path).info
        keys = np.hstack([info.prompt_key, info.text_key])
        assert len({k.tobytes() for k in keys}) == info.prompts, "one copy of each prompt"
    place = store.locate(space, texts=[text(8)], text_context=CONTEXT, sites=SITES, layout="tokens")
    np.testing.assert_array_equal(place.rows(0)[1], vector(8, SITES[1]) + np.arange(2, dtype=np.float32)[:, None])
    assert store.merge(space) == 0


def test_merged_statistics_are_those_of_the_rows(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(50)))
    store.append(space, pooled(range(40, 90)))
    store.invalidate(space, [text(i) for i in range(5)])
    rows = np.stack([vector(i, SITES[0]) for i in range(5, 90)]).astype(np.float64)
    for _ in range(2):
        moments = store.statistics(space, SITES[0], pooling="last_token")
        assert moments.count == 85
        np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.std, rows.std(0), rtol=1e-5)
        store.merge(space)
    assert len(segment_files(store, space)) == 1


def test_damaged_rows_are_dropped_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    info = store.append(space, pooled([2]))
    store.append(space, pooled([3]))
    file = store.root / space / f"{info.name}.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    fresh = Store(store.location, index_dir=tmp_path / "i2")
    fresh.merge(space)
    assert f"{SITES[1]} of 1 prompts is damaged, and dropped" in caplog.text
    assert check_pooled(fresh, space, [1, 2, 3]).tolist() == [True, False, True]
    assert check_pooled(fresh, space, [1, 2, 3], SITES[:1]).all()
    assert [segment.validate(p) for p in segment_files(store, space)] == [[], []]


def test_merging_needs_memory_for_the_prompts_only(tmp_path: Path) -> None:
    """64 MB of vectors pass through without a copy in anonymous memory."""
    store, space = make_store(tmp_path)
    for i in range(8):
        table = PromptTable.build([[i, k] for k in range(16)])
        store.append(space, Records.pooled(table, "mean", {"x": np.full((16, 128 << 10), i, np.float32)}))
    before = anonymous()
    peak = [before]
    original = os.pwritev

    def watching(*args: Any) -> int:
        peak[0] = max(peak[0], anonymous())
        return original(*args)

    os.pwritev = watching
    try:
        assert store.merge(space) == 8
    finally:
        os.pwritev = original
    assert peak[0] - before < 16 << 20


def test_segments_of_all_sizes_are_merged_by_class(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    index = store._index(space)
    with store.writer(space, linger=0) as writer:
        for i in range(2 * merging.MANY):
            writer.put(pooled([i]))
            writer.flush()
    assert len(segment_files(store, space)) < merging.FEW
    index.refresh(force=True)
    assert merging.plan(index) == []
    assert check_pooled(store, space, range(2 * merging.MANY)).all()


def test_large_segments_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "TARGET", 4 * 5000)
    monkeypatch.setattr(merging, "_TIERS", (6000,))
    store, space = make_store(tmp_path)
    big = store.append(space, pooled(range(100)))
    for i in range(10):
        store.append(space, pooled([i]))
    store.merge(space)
    sizes = [p.stat().st_size for p in segment_files(store, space)]
    assert (store.root / space / f"{big.name}.safetensors").exists()
    assert 1 < len(sizes) < 11
    assert check_pooled(store, space, range(100)).all()
