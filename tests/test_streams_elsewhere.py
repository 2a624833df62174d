"""Streams of what lies in buckets, and of datasets."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

import actcache as ac
import share_helpers
from actcache.store.backend import MemoryBackend
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.stream import elsewhere
from elsewhere import IDENTITY, Folder, machine
from servers import only_aws
from store_helpers import SITES, every_token, make_store, make_table, pooled
from stream_helpers import ALL, SITE, taken, values_of


@pytest.fixture
def bucket(tmp_path: Path) -> MemoryBackend:
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path / "writer")
    with store:
        store.append(space, every_token(range(20)))
        store.append(space, every_token(range(15, 60)))
    return backend


@pytest.fixture
def bucket_of_moto(moto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    only_aws(monkeypatch, moto.environment(tmp_path))
    return f"s3://{moto.make_bucket()}"


def stream_of(backend: Any, folder: Path, sites: Any = SITE, **options: Any) -> ac.ActivationStream:
    store, space = machine(backend, folder)
    return ac.stream_activations(store, sites, space=space, **{"batch_size": 16, "with_tokens": True, **options})


@pytest.mark.parametrize("buffer", [40, 100, 1 << 16])
def test_every_token_comes_once(bucket: MemoryBackend, tmp_path: Path, buffer: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(elsewhere.TokensElsewhere, "buffer", buffer)
    stream = stream_of(bucket, tmp_path, SITES)
    epochs = [taken(stream) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [ALL, ALL]
    assert epochs[0] != epochs[1]
    assert taken(stream_of(bucket, tmp_path, shuffle=False)) == ALL
    without = stream_of(bucket, tmp_path, exclude=["first", 3], drop_last=False)
    ids = {(i, q): ([i, *range(i % 7)])[q] for i, q in ALL}
    assert sorted(taken(without)) == [t for t in ALL if t[1] > 0 and ids[t] != 3]
    found, rows = without.statistics[SITE], values_of(sorted(taken(without)))
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stream.statistics[SITE].std, values_of(ALL).std(0), rtol=1e-12)


def test_a_state_goes_on_in_the_middle_of_a_buffer(bucket: MemoryBackend, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(elsewhere.TokensElsewhere, "buffer", 50)
    stream = stream_of(bucket, tmp_path)
    wanted = taken(stream)
    again = stream_of(bucket, tmp_path)
    batches = iter(again)
    first = [next(batches) for _ in range(5)]
    other = stream_of(bucket, tmp_path)
    other.load_state_dict(again.state_dict())
    assert taken(again, first) + taken(other) == wanted


def test_statistics_are_of_the_prompts_that_are_streamed(tmp_path: Path) -> None:
    """Not of as many tokens of others, which have taken the place of some."""
    store, space = machine(MemoryBackend(), tmp_path)
    store.append(space, every_token(range(7)))
    stream = ac.stream_activations(store, SITE, space=space)
    store.append(space, every_token(range(7, 14)))
    store.invalidate(space, make_table(range(7)))
    rows = values_of([(i, q) for i in range(7) for q in range(1 + i % 7)])
    assert store.statistics(space, SITE).count == len(rows)
    with pytest.raises(ac.errors.NotCachedError):
        _ = stream.statistics


def test_only_what_is_streamed_is_fetched(bucket: MemoryBackend, tmp_path: Path, monkeypatch: Any) -> None:
    """Buffer by buffer: after the first batch no more than two of them are here."""
    monkeypatch.setattr(elsewhere.TokensElsewhere, "buffer", 32)
    loads: list[int] = []
    load = elsewhere.TokensElsewhere.loaded

    def counted(self: Any, blocks: Any) -> Any:
        loads.append(len(blocks))
        return load(self, blocks)

    monkeypatch.setattr(elsewhere.TokensElsewhere, "loaded", counted)
    stream = stream_of(bucket, tmp_path, prefetch=0)
    batches = iter(stream)
    next(batches)
    assert len(loads) <= 2
    assert len(list(batches)) == len(stream) - 1
    assert len(loads) >= len(ALL) // 64


def test_what_goes_from_the_bucket_is_missed(bucket: MemoryBackend, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(elsewhere.TokensElsewhere, "buffer", 32)
    stream = stream_of(bucket, tmp_path / "reader")
    other, _ = machine(bucket, tmp_path / "other")
    with other:
        other.clear()
    with pytest.raises(ac.errors.NotCachedError, match=r"have no 'resid_post\.0'"):
        list(stream)


def in_files(folder: Path) -> ac.Store:
    """A store over a backend that other processes can open, too."""
    store, space = machine(Folder(folder / "objects"), folder / "copy", local_gb=3)
    store.append(space, every_token(range(60)))
    store.flush()
    return store


def test_a_stream_of_a_bucket_is_pickled_with_its_backend(bucket: MemoryBackend, tmp_path: Path) -> None:
    stream = ac.stream_activations(in_files(tmp_path), SITE, batch_size=16, with_tokens=True)
    other = pickle.loads(pickle.dumps(stream))
    opened = other._parts[0]._store
    assert (opened.folder, opened.local_limit.value) == (tmp_path / "copy", 3 << 30)
    assert pickle.loads(pickle.dumps(stream))._parts[0]._store is opened
    assert taken(other) == taken(stream)
    with pytest.raises(ac.errors.OptionError, match=r"memory of one process.*by fork"):
        pickle.dumps(stream_of(bucket, tmp_path / "reader"))


def through_spawned(stream: ac.ActivationStream) -> None:
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for _ in range(2):
        assert sorted(taken(stream, loader)) == ALL


@pytest.mark.slow
def test_workers_that_are_started_anew_open_a_backend(tmp_path: Path) -> None:
    through_spawned(ac.stream_activations(in_files(tmp_path), SITE, batch_size=16, with_tokens=True))


@pytest.mark.slow
def test_workers_that_are_started_anew_open_a_bucket(bucket_of_moto: str, tmp_path: Path) -> None:
    store = ac.Store(bucket_of_moto, index_dir=tmp_path)
    store.append(store.open_space(*IDENTITY), every_token(range(60)))
    store.flush()
    through_spawned(ac.stream_activations(store, SITE, batch_size=16, with_tokens=True))


def shared_prompts(stream: ac.ActivationStream) -> float:
    """How often a token and the next one are of the same prompt."""
    prompts = np.concatenate([tokens.prompt.numpy() for _, tokens in stream])
    return float((prompts[1:] == prompts[:-1]).mean())


def test_how_well_buffers_mix(tmp_path: Path, monkeypatch: Any) -> None:
    """Neighbours share a prompt as often as a prompt has a part in a buffer; against its part in everything in a full
    shuffle."""
    length, number, buffer = 32, 1024, 4096
    table = PromptTable.build([[i // 50, i % 50, *range(length - 2)] for i in range(number)])
    records = Records.tokens(table, {SITE: np.zeros((length * number, 1), np.float16)})
    store, space = make_store(tmp_path / "local")
    store.append(space, records)
    backend = MemoryBackend()
    far, far_space = machine(backend, tmp_path / "far")
    with far:
        far.append(far_space, records)
    monkeypatch.setattr(elsewhere.TokensElsewhere, "buffer", buffer)
    full = shared_prompts(ac.stream_activations(store, SITE, space=space, with_tokens=True))
    mixed = shared_prompts(stream_of(backend, tmp_path / "reader", batch_size=4096))
    unmixed = shared_prompts(stream_of(backend, tmp_path / "reader", batch_size=4096, shuffle=False))
    total = length * number
    # Of 32768 neighbours a full shuffle has about 31 such, buffers about 250: five standard deviations around these.
    assert abs(full - (length - 1) / total) < 5 * np.sqrt((length - 1) / total / total)
    assert abs(mixed - (length - 1) / buffer) < 5 * np.sqrt((length - 1) / buffer / total)
    assert unmixed > 0.96


def test_pooled_vectors_of_a_bucket(tmp_path: Path) -> None:
    backend = MemoryBackend()
    store, space = machine(backend, tmp_path)
    with store:
        store.append(space, pooled(range(20)))
    stream = stream_of(backend, tmp_path / "reader", pooling="last_token")
    assert sum(len(batch) for batch, _ in stream) == 20


def test_a_dataset_is_pulled_and_streamed(tmp_path: Path) -> None:
    """Rows of a dataset in a folder are those of the store that it was pushed from."""
    store = share_helpers.new_store(tmp_path)
    space = share_helpers.new_space(store)
    share_helpers.fill_tokens(store, space, range(12))
    ac.push_dataset(tmp_path / "set", share_helpers.MODEL, None, store=store)
    ac.set_cache_backend(tmp_path / "default")
    try:
        stream = ac.stream_activations(tmp_path / "set", SITE, batch_size=8)
        got = np.concatenate([batch.numpy() for batch in stream])
        some = ac.stream_activations(str(tmp_path / "set"), SITE, prompts=[share_helpers.text(3)], shuffle=False)
        np.testing.assert_array_equal(next(iter(some)), share_helpers.rows(3, SITE))
        with pytest.raises(ac.errors.OptionError, match="mlp_out"):
            ac.stream_activations(tmp_path / "set", "mlp_out.0")
    finally:
        ac.set_cache_backend(None)
    wanted = np.concatenate([share_helpers.rows(i, SITE) for i in range(12)])
    assert sorted(row.tobytes() for row in got) == sorted(row.tobytes() for row in wanted)
