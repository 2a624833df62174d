"""Features come out of a stream as vectors do: dense, shuffled, with their tokens, and with exact statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import actcache as ac
from actcache.errors import NotCachedError
from actcache.store.backend import MemoryBackend
from actcache.store.sparse import SparseSite
from actcache.store.store import Store
from elsewhere import machine
from sparse_helpers import SIZE, dense, same, sparse
from store_helpers import make_table

NUMBERS = range(60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Store, str]:
    """Several segments, one of nothing but zeros, with copies and prompts that are gone."""
    folder = tmp_path_factory.mktemp("features")
    store = Store(folder / "store", index_dir=folder / "index")
    space = store.open_space({"features": "given:test"}, {"model_name": "features"})
    store.append(space, sparse([0, 5]))
    for start in range(0, 70, 14):
        store.append(space, sparse(range(start, start + 14)))
    store.append(space, sparse([3, 4, 65]))
    store.invalidate(space, make_table(range(60, 70)))
    same(store, space, NUMBERS)
    return store, space


def everything(store: Store, space: str) -> np.ndarray:
    return np.concatenate([dense(int(ids[0])) for ids in store.prompts(space).ids if ids is not None])


def test_in_stored_order_they_are_the_dense_rows(made: tuple[Store, str]) -> None:
    store, space = made
    stream = ac.stream_activations(store, "features", space=space, batch_size=17, shuffle=False)
    batches = list(stream)
    assert batches[0].shape == (17, SIZE) and batches[0].dtype == torch.float32
    np.testing.assert_array_equal(torch.cat(batches).numpy(), everything(store, space))


@pytest.mark.parametrize("exclude", [None, "first"])
def test_shuffled_each_token_comes_once_with_what_it_is(made: tuple[Store, str], exclude: Any) -> None:
    store, space = made
    stream = ac.stream_activations(
        store, "features", space=space, batch_size=16, with_tokens=True, exclude=exclude, dtype="float64"
    )
    seen = []
    for batch, tokens in stream:
        assert batch.dtype == torch.float64
        for row, prompt, position in zip(batch, tokens.prompt.tolist(), tokens.position.tolist(), strict=True):
            number = int(stream.prompts.tokens(prompt)[0])
            np.testing.assert_array_equal(row.numpy(), dense(number)[position])
            seen.append((number, position))
    expected = {(i, t) for i in NUMBERS for t in range(bool(exclude), 1 + i % 7)}
    assert len(seen) == len(expected) and set(seen) == expected
    assert seen != sorted(seen)


def test_statistics_count_the_zeros(made: tuple[Store, str]) -> None:
    store, space = made
    stream = ac.stream_activations(store, "features", space=space, exclude="first", batch_size=8)
    rows = np.concatenate([dense(i)[1:] for i in NUMBERS]).astype(np.float64)
    found = stream.statistics["features"]
    assert isinstance(found, ac.SiteStatistics)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=1e-12, atol=1e-15)
    assert found.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-12)
    centred = torch.cat(list(ac.stream_activations(store, "features", space=space, normalize="mean")))
    np.testing.assert_allclose(centred.mean(dim=0), 0, atol=1e-6)


def test_statistics_of_features_in_a_bucket(tmp_path: Path) -> None:
    store, space = machine(MemoryBackend(), tmp_path)
    store.append(space, sparse(range(20)))
    rows = np.concatenate([dense(i) for i in range(20)]).astype(np.float64)
    found = ac.stream_activations(store, "features", space=space, batch_size=8).statistics["features"]
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=1e-12, atol=1e-15)
    centred = torch.cat(list(ac.stream_activations(store, "features", space=space, normalize="mean")))
    np.testing.assert_allclose(centred.mean(dim=0), 0, atol=1e-6)


def test_workers_of_a_loader_share_an_epoch(made: tuple[Store, str]) -> None:
    store, space = made
    stream = ac.stream_activations(store, "features", space=space, batch_size=16, seed=3)
    alone = list(ac.stream_activations(store, "features", space=space, batch_size=16, seed=3))
    loaded = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert len(loaded) == len(alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, loaded, strict=True))


def test_pooled_features_are_one_row_for_each_prompt(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", index_dir=tmp_path / "index")
    space = store.open_space({"features": "given:pooled"}, {"model_name": "features"})
    site = SparseSite("mean.features", 9)
    # Of the first and the last prompt nothing is stored but zeros.
    records = site.records(
        make_table(range(4)), np.array([0, 2, 1, 0]), [0, 0, 0], [1, 8, 4], np.array([1, 2, 3], np.float32)
    )
    store.append(space, records)
    (batch,) = ac.stream_activations(store, "features", space=space, pooling="mean", shuffle=False)
    expected = torch.zeros(4, 9)
    expected[1, 1], expected[1, 8], expected[2, 4] = 1, 2, 3
    assert torch.equal(batch, expected)
    assert torch.equal(store.read(space, None, "features", pooling="mean").to_dense(), expected)
    with pytest.raises(NotCachedError):
        ac.stream_activations(store, "features", space=space)


def test_what_is_damaged_is_not_streamed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", index_dir=tmp_path / "index")
    space = store.open_space({"features": "given:test"}, {"model_name": "features"})
    store.append(space, sparse(range(1, 30)))
    (path,) = (store.root / space).glob("*.safetensors")
    from actcache.store import segment

    (index,) = segment.open(path).parts(f"features.of{SIZE}.index")
    with path.open("r+b") as file:
        file.seek(index.start)
        file.write(b"\xff\xff\xff\x7f")
    fresh = Store(tmp_path / "store", index_dir=tmp_path / "fresh")
    with pytest.raises(NotCachedError, match="damaged"):
        list(ac.stream_activations(fresh, "features", space=space))
