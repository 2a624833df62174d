"""What people said of prompts goes with the last vectors of them: not before, and not never."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache as ac
from actcache.store import eviction, given
from actcache.store.prompts import PromptTable
from actcache.store.records import LABEL, METADATA, Records
from actcache.store.store import Store
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from store_helpers import growing_writer, make_store, open_files

GB = 2**30
SITE = "resid_post.0"


def table(numbers: Sequence[int]) -> PromptTable:
    return PromptTable.build([[i, i + 1] for i in numbers])


def vectors(numbers: Sequence[int], dim: int) -> Records:
    rows = np.random.default_rng(numbers[0]).standard_normal((len(numbers), dim)).astype(np.float32)
    return Records.pooled(table(numbers), "last_token", {SITE: rows})


def said(numbers: Sequence[int], kind: str = LABEL) -> list[Records]:
    return given.records(kind, table(numbers), [given.encoded(f"{kind} {i}" * 20) for i in numbers])


def state(store: Store, space: str, numbers: Sequence[int]) -> tuple[list[int], dict[str, list[int]]]:
    """Which prompts have vectors, and which have labels and metadata."""
    fresh = Store(store.location, index_dir=store.index_dir.parent / "fresh")
    if not fresh.spaces():
        return [], {LABEL: [], METADATA: []}
    held = fresh.contains(space, [[i, i + 1] for i in numbers], SITE, pooling="last_token")
    has = {
        kind: [
            i
            for i, text in zip(numbers, given.read(fresh, space, kind, table(numbers)), strict=True)
            if text is not None
        ]
        for kind in (LABEL, METADATA)
    }
    return [i for i, one in zip(numbers, held.tolist(), strict=True) if one], has


def on_disk(store: Store) -> int:
    return sum(min(f.stat().st_size, 512 * f.stat().st_blocks) for f in store.location.rglob("*") if f.is_file())


def growing(store: Store, space: str, files: int) -> list[int]:
    """Vectors in `files` files that grow, what is said of them in others, which are older."""
    numbers = list(range(20 * files))
    words = growing_writer(store, space)
    for each in (LABEL, METADATA):
        words.append(said(numbers, each))
    for k in range(files):
        growing_writer(store, space).append([vectors(numbers[20 * k : 20 * k + 20], 5000)])
    assert len(open_files(store, space)) == files + 2
    return numbers


def test_a_run_under_way_keeps_the_labels_of_its_vectors(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    numbers = growing(store, space, files=3)
    before = Store(store.location, index_dir=tmp_path / "other").info().total_size_bytes
    Store(store.location, index_dir=tmp_path / "other").evict((before - 1000) / GB)
    held, has = state(store, space, numbers)
    assert 0 < len(held) < len(numbers)
    assert has == {LABEL: held, METADATA: held}


def test_with_all_vectors_all_labels_go(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    numbers = growing(store, space, files=2)
    Store(store.location, index_dir=tmp_path / "other").evict(0)
    assert state(store, space, numbers) == ([], {LABEL: [], METADATA: []})
    assert not on_disk(store)


@pytest.mark.parametrize("trouble", ["kill", "damage"])
def test_labels_whose_vectors_went_in_another_way_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    store, space = make_store(tmp_path)
    numbers = list(range(100))
    made = store.append(space, vectors(numbers, 8))
    for records in (*said(numbers), *said(numbers, METADATA)):
        store.append(space, records)
    if trouble == "kill":

        def killed(*given: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(eviction._Eviction, "_drop_derived", killed)
            with pytest.raises(KeyboardInterrupt):
                store.evict(1e-6)
    else:
        path = store.root / space / f"{made.name}.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        store.verify(repair=True)
    assert state(store, space, numbers) == ([], {LABEL: numbers, METADATA: numbers})
    store = Store(store.location, index_dir=tmp_path / "other")
    # With room for them they stay: the vectors may be computed again, and what was said cannot.
    store.evict(1.0)
    assert state(store, space, numbers)[1] == {LABEL: numbers, METADATA: numbers}
    limit = on_disk(store) // 2
    report = store.evict(limit / GB)
    assert report.bytes_kept == on_disk(store) <= limit
    assert state(store, space, numbers) == ([], {LABEL: [], METADATA: []})


def test_labels_of_vectors_stay_when_those_of_none_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    # Vectors that nothing takes away: what is said of them stays however little room there is.
    numbers = list(range(100))
    store.append(space, vectors(numbers[60:], 8))
    for records in said(numbers):
        store.append(space, records)
    with monkeypatch.context() as patched:
        patched.setattr(eviction._Eviction, "_candidates", lambda self: iter(()))
        store.evict(1000 / GB)
    assert state(store, space, numbers) == (numbers[60:], {LABEL: numbers[60:], METADATA: []})


def test_labels_of_continued_prompts_are_those_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, texts = tmp_path / "gpt2", ["the sky is blue", "snow is white", "four"]
    tiny_model("gpt2", seed=3, n_layer=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    options: dict[str, Any] = {
        "store": tmp_path / "store",
        "generate": {"max_new_tokens": 3},
        "compute_perplexity": False,
    }
    ac.UnifiedCache(folder, **options).warmup(texts, labels=[1, 2, 3])
    with monkeypatch.context() as patched:
        patched.setattr(eviction._Eviction, "_candidates", lambda self: iter(()))
        Store(tmp_path / "store").evict(1000 / GB)
    assert ac.UnifiedCache(folder, **options).get_labels(texts) == [1, 2, 3]


@pytest.mark.parametrize(
    ("vector_files", "label_files"),
    [
        ([0, 140, 300], [0, 300]),
        ([0, 280, 300], [0, 150, 300]),
        ([0, 296, 300], [0, 24, 300]),
        ([0, 300], [0, 100, 300]),
    ],
)
def test_however_a_run_was_divided_into_files(
    tmp_path: Path, vector_files: Sequence[int], label_files: Sequence[int]
) -> None:
    """Which batches share a file depends on how fast they came; what is kept must not."""
    store, space = make_store(tmp_path)
    numbers = list(range(300))
    for start, stop in itertools.pairwise(vector_files):
        store.append(space, vectors(numbers[start:stop], 512))
    for start, stop in itertools.pairwise(label_files):
        short = [given.encoded(i) for i in numbers[start:stop]]
        for records in given.records(LABEL, table(numbers[start:stop]), short):
            store.append(space, records)
    store.read(space, table(numbers), SITE, pooling="last_token")
    time.sleep(0.01)
    store.read(space, table(numbers[200:]), SITE, pooling="last_token")
    limit = int(on_disk(store) * 0.7)
    report = store.evict(limit / GB)
    held, has = state(store, space, numbers)
    # 210, less what files take beside their rows, and up to a tenth of the limit that is not filled up.
    assert 150 <= len(held) <= 210
    assert set(held) > set(range(200, 300))
    assert has == {LABEL: held, METADATA: []}
    assert report.bytes_kept == on_disk(store) <= limit
    # Nor do files stay of which nothing can be read: their prompts went in two evictions.
    store.evict(1e-9)
    assert not list(store.location.rglob("*.safetensors"))
