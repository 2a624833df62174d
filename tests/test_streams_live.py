"""Streams of a `UnifiedCache`: what is stored, and what the model gives while it runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.stream.live import Buffer
from actcache.testing.tiny import tiny_model, tiny_tokenizer

WORDS = ["the", "a", "cat", "dog", "mat", "sat", "on", "and", "dogs", "cats"]
TEXTS = [
    " ".join(WORDS[(i * 7 + k * (1 + i % 3)) % 10] for k in range(1 + i % 6)) + f" {'the ' * (i // 10)}"
    for i in range(40)
]
SITES = ["resid_post.0", "resid_post.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2", seed=1, n_layer=3).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


def cache_in(folder: Path, place: Path, **options: Any) -> ac.UnifiedCache:
    given = {"layers": [0, 2], "cache_pooled": False, "compute_perplexity": False, "store": place / "store", **options}
    return ac.UnifiedCache(str(folder), **given)


Tokens = dict[tuple[bytes, int], dict[str, torch.Tensor]]


def of_stream(stream: ac.ActivationStream, batches: Any = None) -> Tokens:
    """Every token of an epoch by the ids of its prompt and its position; none may come twice."""
    found: Tokens = {}
    for batch, tokens in stream if batches is None else batches:
        of_site = batch if isinstance(batch, dict) else {SITES[0]: batch}
        for row, (p, q, token_id) in enumerate(zip(*(t.tolist() for t in tokens), strict=True)):
            ids = stream.prompts.tokens(p)
            assert ids[q] == token_id
            assert (ids.tobytes(), q) not in found
            found[ids.tobytes(), q] = {site: vectors[row] for site, vectors in of_site.items()}
    return found


def of_store(cache: ac.UnifiedCache, sites: list[str] = SITES, leave_out: int | None = None) -> Tokens:
    """The same, read prompt by prompt."""
    found: Tokens = {}
    store = cache.store
    (space,) = store.spaces()
    table = store.prompts(space)
    rows = {site: store.read(space, table, site) for site in sites}
    for i in range(len(table)):
        ids = table.tokens(i)
        for q in range(len(ids)):
            if ids[q] != leave_out:
                found[ids.tobytes(), q] = {site: rows[site][i][q] for site in sites}
    return found


def assert_same(got: Tokens, wanted: Tokens) -> None:
    assert got.keys() == wanted.keys()
    for key, vectors in wanted.items():
        for site, vector in vectors.items():
            assert torch.equal(got[key][site], vector), (key, site)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "extraction" in thread.name]


def test_what_is_stored_of_a_cache(folder: Path, tmp_path: Path) -> None:
    cache = cache_in(folder, tmp_path)
    with pytest.raises(ac.errors.NotCachedError):
        ac.stream_activations(cache, SITES[0])
    cache.warmup(TEXTS)
    warm = cache_in(folder, tmp_path)
    stream = ac.stream_activations(warm, SITES, batch_size=16, with_tokens=True)
    assert_same(of_stream(stream), of_store(cache))
    bos = cache.tokenizer.bos_token_id
    assert bos is not None
    stream = ac.stream_activations(warm, SITES, batch_size=16, with_tokens=True, exclude="bos")
    without = of_store(cache, leave_out=bos)
    assert_same(of_stream(stream), without)
    assert len(without) < len(of_store(cache))
    assert not warm.model_loaded


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_model_is_run_for_what_is_missing(folder: Path, tmp_path: Path, shuffle: bool) -> None:
    cache = cache_in(folder, tmp_path)
    cache.warmup(TEXTS[:7])
    # Of one prompt one of the sites is there.
    cache_in(folder, tmp_path, layers=[2]).warmup(TEXTS[7:8])
    prompts = [*TEXTS, TEXTS[3], TEXTS[20]]
    stream = ac.stream_activations(cache, SITES, prompts=prompts, batch_size=16, with_tokens=True, shuffle=shuffle)
    with pytest.raises(ac.errors.OptionError, match="not stored yet"):
        stream.state_dict()
    expected, promised = len(stream), stream.num_tokens
    batches = list(stream)
    assert [len(batch[SITES[0]]) for batch, _ in batches[:-1]] == [16] * (expected - 1)
    live = of_stream(stream, batches)
    assert len(live) == promised
    assert_same(live, of_store(cache))
    assert cache.plan(TEXTS).missing == 0
    assert not threads()
    # Afterwards it is a stream of what is stored.
    assert stream.statistics[SITES[1]].count == promised
    assert_same(of_stream(stream), live)
    assert stream.state_dict()["batches"] == len(stream) == expected
    assert stream.statistics[SITES[0]].count == promised


def test_a_state_behind_a_running_model_is_of_the_next_epoch(folder: Path, tmp_path: Path) -> None:
    cache = cache_in(folder, tmp_path)
    stream = ac.stream_activations(cache, SITES[0], prompts=TEXTS, batch_size=4, with_tokens=True)
    batches = iter(stream)
    next(batches)
    # All is stored by somebody else, and yet it has no order to go on in.
    cache_in(folder, tmp_path).warmup(TEXTS)
    with pytest.raises(ac.errors.OptionError, match="no order"):
        stream.state_dict()
    left = sum(len(batch) for batch, _ in batches)
    assert 4 + left == stream.num_tokens
    state = stream.state_dict()
    assert (state["epoch"], state["batches"]) == (1, 0)
    wanted = list(of_stream(stream))
    other = ac.stream_activations(cache, SITES[0], prompts=TEXTS, batch_size=4, with_tokens=True)
    other.load_state_dict(state)
    assert list(of_stream(other)) == wanted


def test_whoever_stops_stops_the_model(folder: Path, tmp_path: Path) -> None:
    cache = cache_in(folder, tmp_path, batch_size=1)
    stream = ac.stream_activations(cache, SITES, prompts=TEXTS, batch_size=4, with_tokens=True)
    batches = iter(stream)
    first = list(itertools.islice(batches, 2))
    assert len(first) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not threads()
    assert 0 < cache.plan(TEXTS).missing < len(set(TEXTS))
    assert_same(of_stream(stream), of_store(cache))


def test_an_extraction_waits_for_whoever_takes(folder: Path, tmp_path: Path) -> None:
    """With one batch taken only a bounded number of prompts has been run, however long nobody takes another."""
    cache = cache_in(folder, tmp_path, batch_size=1)
    ran: list[int] = []
    prompts = [[1 + i // 50, 1 + i % 50] for i in range(200)]
    confirm = cache.cached.store.screen

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return confirm(*args, **kwargs)

    cache.cached.store.screen = counted  # type: ignore[method-assign]
    stream = ac.stream_activations(cache, SITES[0], prompts=prompts, batch_size=2, with_tokens=True)
    batches = iter(stream)
    next(batches)
    threading.Event().wait(0.3)
    # 8 batches of 1 prompt drawn from, 4 lying between, one on either side.
    assert len(ran) <= 8 + 4 + 3
    assert len(list(batches)) == 199


def test_errors_of_the_model_arrive(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(folder, tmp_path, batch_size=4)
    stream = ac.stream_activations(cache, SITES[0], prompts=TEXTS, batch_size=8)

    def full(*_: Any, **__: Any) -> Any:
        raise ac.errors.DiskFullError("no room")

    monkeypatch.setattr(cache.store, "screen", full)
    with pytest.raises(ac.errors.DiskFullError, match="no room"):
        list(stream)
    assert not threads()


def test_what_a_running_model_cannot_give_is_refused(folder: Path, tmp_path: Path) -> None:
    cache = cache_in(folder, tmp_path)
    with pytest.raises(ac.errors.OptionError, match="statistics"):
        ac.stream_activations(cache, SITES[0], prompts=TEXTS, normalize="mean")
    with pytest.raises(ac.errors.OptionError, match="ranks"):
        ac.stream_activations(cache, SITES[0], prompts=TEXTS, rank=0, world_size=2)
    with pytest.raises(ac.errors.OptionError, match=r"resid_post\.1"):
        ac.stream_activations(cache, "resid_post.1", prompts=TEXTS)
    none = ac.UnifiedCache(str(folder), cache_pooled=False, store=ac.Store(tmp_path / "none", limit_gb=0))
    with pytest.raises(ac.errors.OptionError, match="limit"):
        ac.stream_activations(none, SITES[0], prompts=TEXTS)
    stream = ac.stream_activations(cache, SITES[0], prompts=TEXTS)
    with pytest.raises(ac.errors.NotCachedError, match="statistics"):
        _ = stream.statistics


def test_a_buffer_gives_every_token_once() -> None:
    for shuffle, drop in itertools.product((True, False), (True, False)):

        def chunks() -> Iterator[Any]:
            at = 0
            for size in (3, 0, 50, 1, 17, 200, 6):
                numbers = np.arange(at, at + size)
                yield numbers, {"a": numbers[:, None].astype(np.float32), "b": numbers[:, None] * [1.0, 2.0]}
                at += size

        draw = np.random.default_rng(0) if shuffle else None
        batches = list(Buffer(8, 4, draw, 277).batches(chunks(), drop_last=drop))
        assert [len(numbers) for numbers, _ in batches] == [8] * 34 + ([] if drop else [5])
        together = np.concatenate([numbers for numbers, _ in batches])
        for numbers, vectors in batches:
            assert (vectors["a"][:, 0] == numbers).all()
            assert (vectors["b"] == numbers[:, None] * [1.0, 2.0]).all()
        assert len(set(together.tolist())) == len(together) == (272 if drop else 277)
        assert (together.tolist() == list(range(len(together)))) is not shuffle


def test_nobody_waits_for_a_buffer() -> None:
    """It grows with what has come and shrinks with what is to come: batches are given out from the first one on, and
    when all has come hardly any is left; in between it is drawn from as many as were asked for."""
    size, number = 4, 400
    came, held = 0, []

    def chunks() -> Iterator[Any]:
        nonlocal came
        for start in range(0, number * size, size):
            came += size
            yield np.arange(start, start + size), {"a": np.zeros((size, 1), np.float32)}

    buffer = Buffer(size, 8, np.random.default_rng(0), number * size)
    given = 0
    mixed: list[int] = []
    for numbers, _ in buffer.batches(chunks(), drop_last=False):
        given += len(numbers)
        held.append((came - given) // size)
        mixed.append(int(came - numbers.min()))
    assert given == number * size
    assert held[0] == 0
    assert max(held) == 8 - 1
    assert held[len(held) // 2] == 8 - 1
    # Of the batches that are left when the model is done, as of those that the first one waited for.
    assert sum(mine > 0 for mine in held[-8:]) <= 1
    # What is drawn has often waited for some time.
    assert np.mean([age > 8 * size for age in mixed[100:300]]) > 0.5


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_pooled_vectors_of_what_is_stored_in_full(folder: Path, tmp_path: Path, pooling: str) -> None:
    """A cache answers pooled questions out of full sequences, and so does its stream, whatever is missing."""
    cache_in(folder, tmp_path).warmup(TEXTS[:9])
    pooled = cache_in(folder, tmp_path, cache_pooled=True, pooling=pooling)
    wanted = {t: pooled.get_activations([t], site="resid_post")[0][0] for t in TEXTS[:9]}
    for prompts in (TEXTS[:9], TEXTS[:20]):
        stream = ac.stream_activations(pooled, SITES[0], prompts=prompts, batch_size=5, with_tokens=True)
        got = {stream.prompts.texts[p]: v for b, t in stream for v, p in zip(b, t.prompt.tolist(), strict=True)}
        assert len(got) == len(prompts)
        for text, value in wanted.items():
            torch.testing.assert_close(got[text], value[: len(value) // 2], atol=1e-6, rtol=0)


def test_prompts_that_were_only_pulled(folder: Path, tmp_path: Path) -> None:
    """Their features are encoded out of the dataset; a stream of the cache has what the model gives for them."""
    first = cache_in(folder, tmp_path / "first")
    first.warmup(TEXTS[:6])
    wanted = of_store(first, SITES[:1])
    (space,) = first.store.spaces()
    ac.push_dataset(tmp_path / "set", space.model_name, None, store=first.store, tensors=SITES, pooling=None)
    cache = cache_in(folder, tmp_path / "second")
    ac.pull_dataset(tmp_path / "set", store=cache.store)
    assert cache.plan(TEXTS[:6]).missing == 0
    sae = torch.nn.Linear(wanted[next(iter(wanted))][SITES[0]].shape[0], 9)
    features = ac.encode_store(cache, lambda x: sae(x).relu(), SITES[0], digest="one")
    assert (features.encoded, features.found) == (6, 0)
    table = features.prompts()
    for i, rows in enumerate(features.read(table)):
        given = torch.stack([wanted[table.tokens(i).tobytes(), q][SITES[0]] for q in range(len(table.tokens(i)))])
        torch.testing.assert_close(rows.to_dense(), sae(given).relu().detach())
    cache.warmup(TEXTS[6:9])
    assert ac.encode_store(cache, lambda x: sae(x).relu(), SITES[0], digest="one").encoded == 3
    # Of a site that the dataset has not, what is stored here is all there is.
    cache_in(folder, tmp_path / "second", layers=[1]).warmup(TEXTS[:2])
    assert ac.encode_store(cache, lambda x: sae(x).relu(), "resid_post.1", digest="one").encoded == 2
    stream = ac.stream_activations(cache, SITES[0], prompts=TEXTS[:9], batch_size=7, with_tokens=True)
    got = of_stream(stream)
    assert {key: got[key] for key in wanted}.keys() == wanted.keys()
    assert of_stream(stream).keys() == got.keys()
    for key, vectors in wanted.items():
        torch.testing.assert_close(got[key][SITES[0]], vectors[SITES[0]], atol=1e-5, rtol=1e-5)
