"""`ac.stream_activations` out of a store on disk: every token once, with its own values, in an order of each epoch."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import actcache as ac
from actcache.store.records import Records
from actcache.stream.mixture import Mixture
from actcache.stream.permutation import Permutation
from store_helpers import SITES, every_token, make_store, make_table, pooled, segment_files, vector

SITE = SITES[0]
Token = tuple[int, int]


@pytest.fixture(autouse=True)
def _forks() -> Iterator[None]:
    with warnings.catch_warnings():
        # From Python 3.12 a fork beside idle threads of a numerical library warns.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ac.Store, str]:
    """Prompts 0 to 59, a few of them twice, in three segments."""
    store, space = make_store(tmp_path_factory.mktemp("store"))
    store.append(space, every_token(range(20)))
    store.append(space, every_token(range(15, 45)))
    store.append(space, every_token(range(45, 60)))
    return store, space


ALL = [(i, position) for i in range(60) for position in range(1 + i % 7)]


def expected(token: Token, site: str = SITE) -> npt.NDArray[np.float32]:
    return vector(token[0], site) + np.float32(token[1])


def tokens_of(stream: ac.ActivationStream, tokens: ac.TokenBatch) -> list[Token]:
    """The first id of each of these prompts, which is its number, and the positions."""
    first = [int(stream.prompts.tokens(i)[0]) for i in range(len(stream.prompts))]
    return [(first[p], q) for p, q in zip(tokens.prompt.tolist(), tokens.position.tolist(), strict=True)]


def taken(stream: ac.ActivationStream, batches: Any = None) -> list[Token]:
    """The tokens of an epoch in their order; each must have its own values."""
    found: list[Token] = []
    for batch, tokens in stream if batches is None else batches:
        names = tokens_of(stream, tokens)
        of_site = batch if isinstance(batch, dict) else {SITE: batch}
        for site, vectors in of_site.items():
            np.testing.assert_array_equal(vectors.numpy(), np.stack([expected(name, site) for name in names]))
        ids = [([i, *range(i % 7)])[q] for i, q in names]
        assert tokens.token_id.tolist() == ids
        found += names
    return found


def stream_of(made: tuple[ac.Store, str], sites: str | Sequence[str] = SITE, **options: Any) -> ac.ActivationStream:
    given = {"batch_size": 16, "with_tokens": True, **options}
    return ac.stream_activations(made[0], sites, space=made[1], **given)


# -- the order ---------------------------------------------------------------------------------------------


@given(st.integers(1, 300) | st.integers(16380, 16390) | st.integers(1 << 16, 1 << 18), st.integers(0, 1 << 70))
@settings(max_examples=40, deadline=None)
def test_a_permutation_has_every_index_once(size: int, seed: int) -> None:
    found = Permutation(size, [seed])(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_a_permutation_is_the_same_everywhere() -> None:
    """What a resumed run of another version depends on."""
    assert Permutation(10, [1, 2])(np.arange(10)).tolist() == [8, 5, 3, 2, 6, 1, 4, 9, 7, 0]
    assert Permutation(10**12, [1, 2])(np.arange(5) * 10**11).tolist() == [
        394055683613,
        393362331159,
        526781296679,
        237045980961,
        182929986594,
    ]


@pytest.mark.parametrize("size", [40_000, 1 << 17])
def test_a_permutation_mixes(size: int) -> None:
    """Where an index goes says nothing of where its neighbours go: pairs fill a grid as evenly as chance does."""
    found = Permutation(size, [7])(np.arange(size))
    for apart in (1, 2, 255, 256, 1024):
        grid = np.histogram2d(found[:-apart], found[apart:], bins=20, range=[[0, size]] * 2)[0]
        even = (size - apart) / 400
        # 399 degrees of freedom: five standard deviations on either side.
        assert 399 - 5 * 28.3 < ((grid - even) ** 2 / even).sum() < 399 + 5 * 28.3
    other = Permutation(size, [8])(np.arange(size))
    assert (found == other).sum() < 12


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 50), st.data())
@settings(max_examples=60, deadline=None)
def test_a_mixture_takes_every_token_once_and_keeps_the_shares(
    sizes: list[int], step: int, data: st.DataObject
) -> None:
    weights = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    try:
        mixture = Mixture(sizes, weights)
    except ac.errors.OptionError:
        assert weights is not None
        return
    at = [0] * len(sizes)
    for start in range(0, mixture.total, step):
        stop = min(mixture.total, start + step)
        parts = mixture.between(start, stop)
        assert sum(b - a for a, b in parts) == stop - start
        for i, (begin, end) in enumerate(parts):
            assert begin == at[i] <= end
            at[i] = end
            assert abs(end - stop * mixture.counts[i] / mixture.total) <= len(sizes)
    assert at == mixture.counts
    assert all(count <= size for count, size in zip(mixture.counts, sizes, strict=True))
    if weights is None:
        assert mixture.counts == sizes


# -- the tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_epoch_has_every_token_once_in_another_order(made: tuple[ac.Store, str], prefetch: int) -> None:
    stream = stream_of(made, prefetch=prefetch)
    epochs = [taken(stream) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [ALL] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again, other = stream_of(made), stream_of(made, seed=1)
    assert [taken(again), taken(again)] == epochs[:2]
    assert taken(other) not in epochs
    assert len(stream) == -(-len(ALL) // 16)
    assert stream.num_tokens == len(ALL)


def test_unshuffled_it_is_as_stored(made: tuple[ac.Store, str]) -> None:
    stream = stream_of(made, shuffle=False)
    assert taken(stream) == taken(stream) == ALL


def test_batches_have_their_size(made: tuple[ac.Store, str]) -> None:
    sizes = [len(batch) for batch, _ in stream_of(made, batch_size=50)]
    assert sizes == [50] * (len(ALL) // 50) + [len(ALL) % 50]
    dropping = stream_of(made, batch_size=50, drop_last=True)
    assert [len(batch) for batch, _ in dropping] == [50] * (len(ALL) // 50)
    assert len(dropping) == len(ALL) // 50
    (one,) = stream_of(made, batch_size=10**6)
    assert len(one[0]) == len(ALL)


def test_a_stream_of_no_batch_is_refused(made: tuple[ac.Store, str]) -> None:
    """Trainers ask for epoch after epoch, and would wait for ever."""
    with pytest.raises(ac.errors.OptionError, match="drop_last=True give no batch"):
        next(itertools.chain.from_iterable(itertools.repeat(stream_of(made, batch_size=len(ALL) + 1, drop_last=True))))
    (whole,) = stream_of(made, batch_size=len(ALL), drop_last=True)
    assert len(whole[0]) == len(ALL)
    assert len(list(stream_of(made, batch_size=len(ALL), rank=0, world_size=2))) == 1
    with pytest.raises(ac.errors.OptionError, match="for rank 1 of 2"):
        iter(stream_of(made, batch_size=len(ALL), rank=1, world_size=2))


def test_sites_are_aligned(made: tuple[ac.Store, str]) -> None:
    stream = stream_of(made, SITES)
    assert sorted(taken(stream)) == ALL
    assert [list(batch) for batch, _ in stream] == [SITES] * len(stream)


@pytest.mark.parametrize("shuffle", [True, False])
def test_sites_that_lie_in_different_segments_are_aligned(tmp_path: Path, shuffle: bool) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30), SITES[:1]))
    store.append(space, every_token([*range(29, 9, -1)], SITES[1:]))
    stream = stream_of((store, space), SITES, shuffle=shuffle, batch_size=7)
    assert sorted(taken(stream)) == [token for token in ALL if 10 <= token[0] < 30]


def test_only_the_prompts_that_were_asked_for(made: tuple[ac.Store, str]) -> None:
    wanted = [make_table([i]).text_of(0) for i in (50, 3, 17, 3)]
    stream = stream_of(made, shuffle=False, prompts=wanted)
    assert taken(stream) == [token for i in (50, 3, 17) for token in ALL if token[0] == i]
    with pytest.raises(ac.errors.NotCachedError, match=r"1 of 2 prompts .* prompt 1"):
        stream_of(made, prompts=[wanted[0], "never seen"])


def test_tokens_are_left_out(made: tuple[ac.Store, str]) -> None:
    assert sorted(taken(stream_of(made, exclude="first"))) == [token for token in ALL if token[1] > 0]
    ids = {(i, q): ([i, *range(i % 7)])[q] for i, q in ALL}
    for shuffle in (True, False):
        stream = stream_of(made, exclude=[0, 3, 59], shuffle=shuffle)
        assert sorted(taken(stream)) == [token for token in ALL if ids[token] not in (0, 3, 59)]
    assert sorted(taken(stream_of(made, exclude=["first", 1]))) == [t for t in ALL if t[1] > 0 and ids[t] != 1]
    with pytest.raises(ac.errors.OptionError, match="does not know"):
        stream_of(made, exclude="bos")
    with pytest.raises(ac.errors.OptionError, match=r"'frist'.*'first'"):
        stream_of(made, exclude="frist")
    with pytest.raises(ac.errors.OptionError, match="nothing is left"):
        stream_of(made, exclude=list(range(60)))


def test_pooled_vectors(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(20)))
    stream = stream_of((store, space), pooling="last_token", batch_size=6)
    found = []
    for batch, tokens in stream:
        assert set(tokens.position.tolist()) == set(tokens.token_id.tolist()) == {-1}
        names = [int(stream.prompts.tokens(p)[0]) for p in tokens.prompt.tolist()]
        np.testing.assert_array_equal(batch.numpy(), np.stack([vector(i, SITE) for i in names]))
        found += names
    assert sorted(found) == list(range(20))
    with pytest.raises(ac.errors.OptionError, match="exclude"):
        stream_of((store, space), pooling="last_token", exclude="first")
    with pytest.raises(ac.errors.NotCachedError, match="last_token"):
        stream_of((store, space))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_values_are_those_that_reading_gives(tmp_path: Path, dtype: str) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token([59]))
    store = ac.Store(store.location, index_dir=store.index_dir, dtype=dtype)
    store.append(space, every_token(range(40)))
    stream = stream_of((store, space), batch_size=33)
    rows = dict(enumerate(store.read(space, None, SITE)))
    for batch, tokens in stream:
        for value, p, q in zip(batch, tokens.prompt.tolist(), tokens.position.tolist(), strict=True):
            assert torch.equal(value, rows[p][q])
    wide = stream_of((store, space), batch_size=33, dtype=torch.float64)
    assert next(iter(wide))[0].dtype == torch.float64


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    rows = np.full((3, 4), 1e6, np.float32)
    store.append(space, Records.tokens(make_table([2]), {SITE: rows}))
    with pytest.raises(ac.errors.ValueOverflowError, match=SITE):
        list(stream_of((store, space), dtype="float16"))


# -- statistics --------------------------------------------------------------------------------------------


def values_of(tokens: Sequence[Token], site: str = SITE) -> npt.NDArray[np.float64]:
    return np.stack([expected(token, site) for token in tokens]).astype(np.float64)


@pytest.mark.parametrize("exclude", [None, "first", [2, 5]])
def test_statistics_are_those_of_the_tokens_that_come(made: tuple[ac.Store, str], exclude: Any) -> None:
    stream = stream_of(made, SITES, exclude=exclude)
    tokens = taken(stream)
    for site in SITES:
        rows, found = values_of(tokens, site), stream.statistics[site]
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-12)
        np.testing.assert_allclose(found.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


@pytest.mark.parametrize("exclude", [None, "first"])
def test_normalized(made: tuple[ac.Store, str], exclude: Any) -> None:
    def rows(normalize: str | None, **options: Any) -> npt.NDArray[Any]:
        stream = stream_of(made, exclude=exclude, normalize=normalize, **options)
        return torch.cat([batch for batch, _ in stream]).numpy()

    plain = rows(None).astype(np.float64)
    np.testing.assert_allclose(rows("mean"), plain - plain.mean(0), atol=1e-5)
    np.testing.assert_allclose(rows("mean_std"), (plain - plain.mean(0)) / plain.std(0), atol=1e-5)
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(rows("unit"), plain / lengths, atol=1e-6)
    assert rows("mean_std", dtype="float16").dtype == np.float16
    with pytest.raises(ac.errors.OptionError, match=r"normalize 'means'.*'mean'"):
        stream_of(made, normalize="means")


def test_what_does_not_vary_becomes_zero(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, Records.tokens(make_table([2]), {SITE: np.array([[3, 1], [3, 2], [3, 3]], np.float32)}))
    ((batch, _),) = stream_of((store, space), normalize="mean_std", shuffle=False)
    np.testing.assert_allclose(batch, [[0, -1.2247449], [0, 0], [0, 1.2247449]], atol=1e-6)


# -- several sources ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[ac.Store]:
    """Stores of prompts 0 to 29 and of prompts 30 to 59."""
    stores = []
    for numbers in (range(30), range(30, 60)):
        store, space = make_store(tmp_path_factory.mktemp("one"))
        store.append(space, every_token(numbers))
        stores.append(store)
    return stores


def test_several_sources_give_all_their_tokens(two: list[ac.Store]) -> None:
    stream = ac.stream_activations(two, SITE, batch_size=16, with_tokens=True)
    epochs = [taken(stream), taken(stream)]
    assert [sorted(epoch) for epoch in epochs] == [ALL, ALL]
    assert epochs[0] != epochs[1]
    # Every batch has of both.
    assert all({i < 30 for i, _ in epochs[0][at : at + 16]} == {True, False} for at in range(0, 224, 16))


def test_weights_are_the_shares(two: list[ac.Store]) -> None:
    stream = ac.stream_activations({two[0]: 3, two[1]: 1}, SITE, batch_size=20, with_tokens=True)
    tokens = taken(stream)
    first = sum(1 for i, _ in ALL if i < 30)
    assert len(set(tokens)) == len(tokens) == stream.num_tokens == first + first // 3
    for at in range(0, len(tokens) - 20, 20):
        assert 14 <= sum(i < 30 for i, _ in tokens[at : at + 20]) <= 16
    # Of the second other tokens come in other epochs.
    assert {t for t in tokens if t[0] >= 30} != {t for t in taken(stream) if t[0] >= 30}
    part = values_of([t for t in ALL if t[0] < 30]), values_of([t for t in ALL if t[0] >= 30])
    mean = (part[0].mean(0) * first + part[1].mean(0) * (first // 3)) / (first + first // 3)
    np.testing.assert_allclose(stream.statistics[SITE].mean, mean, rtol=1e-12)
    with pytest.raises(ac.errors.OptionError, match="weight"):
        ac.stream_activations({two[0]: 0, two[1]: 1}, SITE)


# -- what changes meanwhile --------------------------------------------------------------------------------


def test_what_is_stored_meanwhile_comes_in_another_stream(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    stream = stream_of((store, space))
    batches = iter(stream)
    first = [next(batches) for _ in range(3)]
    store.append(space, every_token(range(30, 60)))
    assert sorted(taken(stream, [*first, *batches])) == sorted(taken(stream)) == [t for t in ALL if t[0] < 30]
    assert sorted(taken(stream_of((store, space)))) == ALL


def test_what_is_removed_meanwhile_still_comes(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    store.append(space, every_token(range(30, 60)))
    stream = stream_of((store, space), prefetch=0)
    batches = iter(stream)
    first = [next(batches)]
    assert ac.Store(store.location, index_dir=tmp_path / "other").evict(0).prompts == 60
    assert not segment_files(store, space)
    assert sorted(taken(stream, [*first, *batches])) == sorted(taken(stream)) == ALL
    with pytest.raises(ac.errors.NotCachedError):
        stream_of((store, space))


def test_damage_is_an_error_that_says_where(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(60)))
    (path,) = segment_files(store, space)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    stream = stream_of((ac.Store(store.location, index_dir=tmp_path / "other"), space), SITES)
    with pytest.raises(ac.errors.NotCachedError, match=f"{path.name}.*{SITES[1]} is damaged"):
        list(stream)
    assert sorted(taken(stream_of((ac.Store(store.location, index_dir=tmp_path / "third"), space)))) == ALL


def test_batches_are_the_callers(made: tuple[ac.Store, str]) -> None:
    for options in ({}, {"shuffle": False}, {"exclude": "first"}):
        kept = [(batch, tokens) for batch, tokens in stream_of(made, **options)]
        before = [batch.clone() for batch, _ in kept]
        kept[0][0].zero_()
        assert all(torch.equal(a[0], b) for a, b in zip(kept[1:], before[1:], strict=True))
    assert sorted(taken(stream_of(made))) == ALL


# -- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("place", [0, 1, 7, 23, 24, 30])
def test_a_state_goes_on_at_the_exact_batch(made: tuple[ac.Store, str], place: int, prefetch: int) -> None:
    stream = stream_of(made, batch_size=10, prefetch=prefetch)
    assert len(stream) == 24
    through = stream_of(made, batch_size=10)
    everything = [batch for _ in range(3) for batch, _ in through]

    def endless() -> Iterator[Any]:
        while True:
            yield from stream

    first = list(itertools.islice(endless(), place))
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    other = stream_of(made, batch_size=10)
    other.load_state_dict(state)
    rest = [batch for batch, _ in other] + [batch for batch, _ in other]
    assert len(first) + len(rest) in (2 * 24, 3 * 24)
    for got, wanted in zip([*(batch for batch, _ in first), *rest], everything, strict=False):
        assert torch.equal(got, wanted)


def test_a_state_of_another_stream_is_refused(made: tuple[ac.Store, str], tmp_path: Path) -> None:
    state = stream_of(made).state_dict()
    for name, value in {"seed": 3, "batch_size": 8, "shuffle": False, "drop_last": True}.items():
        with pytest.raises(ac.errors.OptionError, match=f"{name}="):
            stream_of(made, **{name: value}).load_state_dict(state)
    with pytest.raises(ac.errors.OptionError, match="world_size=1"):
        stream_of(made, rank=0, world_size=2).load_state_dict(state)
    with pytest.raises(ac.errors.OptionError, match="prompts"):
        stream_of(made, exclude="first").load_state_dict(state)
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(59)))
    with pytest.raises(ac.errors.OptionError, match="60 prompts"):
        stream_of((store, space)).load_state_dict(state)


def test_what_is_no_state_is_refused(made: tuple[ac.Store, str]) -> None:
    state = stream_of(made).state_dict()
    (source,) = state["sources"]
    for wrong in (
        None, {}, [state], {**state, "batches": -3}, {**state, "batches": "4"}, {**state, "epoch": -1},
        {**state, "epoch": 1.5}, {**state, "sources": 5}, {**state, "sources": [{}]},
        {**state, "sources": [{**source, "prompts": 10**6, "pieces": [[1, "zz", "00"]]}]},
        {**state, "sources": [{**source, "digest": "00" * 16, "pieces": [[1, "00", "00"]]}]},
        {**state, "sources": [{**source, "prompts": True}]},
    ):  # fmt: skip
        stream = stream_of(made)
        with pytest.raises(ac.errors.OptionError):
            stream.load_state_dict(wrong)  # type: ignore[arg-type]
        assert sorted(taken(stream)) == ALL
    # Pieces that lie nowhere, or of which one has another content.
    for pieces in ([[1, "00" * 8, "00" * 8]], [[59, source["pieces"][0][1], "00" * 8]], []):
        with pytest.raises(ac.errors.OptionError, match="not all among"):
            stream_of(made).load_state_dict({**state, "sources": [{**source, "digest": "00" * 16, "pieces": pieces}]})


def test_a_state_goes_on_where_more_has_been_stored_since(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    stream = stream_of((store, space))
    batches = iter(stream)
    first, state, rest = next(batches), stream.state_dict(), list(batches)
    store.append(space, every_token(range(30, 60)))
    other = stream_of((store, space))
    other.load_state_dict(state)
    got = list(other)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, rest, strict=True))
    assert sorted(taken(other, [first, *got])) == [token for token in ALL if token[0] < 30]


def test_a_state_goes_on_after_a_merge(tmp_path: Path) -> None:
    """Segments of one signature are merged past another, so that prompts come in another order than before."""
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(20), SITES[:1]))
    store.append(space, every_token(range(20, 40)))
    store.append(space, every_token([*range(40, 60), 3], SITES[:1]))
    stream, other = stream_of((store, space)), stream_of((store, space), shuffle=False, exclude="first")
    wanted, plain = taken(stream), taken(other)
    stream = stream_of((store, space))
    first = list(itertools.islice(stream, 4))
    state, of_other = json.loads(json.dumps(stream.state_dict())), other.state_dict(batches=2)
    assert len(json.dumps(state)) < 1000
    before = store.common_prompts(space, [SITE]).token_key.tobytes()
    store.compact()
    assert len(segment_files(store, space)) == 2
    assert store.common_prompts(space, [SITE]).token_key.tobytes() != before
    store.append(space, every_token([1000]))
    again = stream_of((store, space))
    again.load_state_dict(state)
    assert again.num_tokens == len(ALL)
    assert taken(stream, first) + taken(again) == wanted
    assert sorted(taken(again)) == ALL
    # What was gone on with can be gone on with again.
    third = stream_of((store, space))
    third.load_state_dict({**again.state_dict(), "epoch": 0, "batches": 4})
    assert taken(third) == wanted[4 * 16 :]
    again = stream_of((store, space), shuffle=False, exclude="first")
    again.load_state_dict(of_other)
    assert taken(again) == plain[2 * 16 :]
    # One of the prompts is no longer there, though as many are.
    store.invalidate(space, [make_table([7]).text_of(0)])
    with pytest.raises(ac.errors.OptionError, match="removed or stored anew"):
        stream_of((store, space)).load_state_dict(state)


# -- workers and ranks -------------------------------------------------------------------------------------


def loader(stream: ac.ActivationStream, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(stream, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_what_one_process_gives(made: tuple[ac.Store, str], persistent: bool) -> None:
    alone = stream_of(made)
    wanted = [taken(alone) for _ in range(3)]
    stream = stream_of(made)
    batches = loader(stream, 2, persistent_workers=persistent)
    assert len(batches) == len(stream)
    assert [taken(stream, batches) for _ in range(3)] == wanted


def test_workers_go_on_where_another_number_of_them_stood(made: tuple[ac.Store, str]) -> None:
    alone = stream_of(made)
    wanted = taken(alone) + taken(alone)
    stream = stream_of(made)
    first = list(itertools.islice(loader(stream, 2), 5))
    with pytest.raises(ac.errors.OptionError, match="batches="):
        stream.state_dict()
    state = stream.state_dict(batches=5)
    for workers in (0, 1):
        other = stream_of(made)
        other.load_state_dict(copy.deepcopy(state))
        rest = taken(other, loader(other, workers)) + taken(other, loader(other, 2))
        assert taken(stream, first) + rest == wanted


def _asked(_: int) -> None:
    torch.utils.data.get_worker_info().dataset.state_dict(batches=1)


def test_workers_say_nothing_of_where_it_stands(made: tuple[ac.Store, str]) -> None:
    """Each knows of its own batches alone, so that what goes by its state would give some twice."""
    stream = stream_of(made)
    batches = iter(loader(stream, 2, worker_init_fn=_asked))
    with pytest.raises(ac.errors.OptionError, match="in the process that made the loader"):
        list(batches)
    # The error holds the loader and its other worker for a while.
    batches._shutdown_workers()
    assert stream.state_dict()["batches"] == 0


def test_workers_that_persist_do_not_go_on_elsewhere(made: tuple[ac.Store, str]) -> None:
    """They have the stream as it was when they began."""
    stream = stream_of(made)
    batches = loader(stream, 1, persistent_workers=True)
    first = taken(stream, batches)
    state = stream.state_dict(batches=2)
    stream.load_state_dict(state)
    with pytest.raises(ac.errors.OptionError, match="make a new DataLoader"):
        list(batches)
    rest = taken(stream, loader(stream, 1))
    assert rest == first[32:]


def test_ranks_share_an_epoch(made: tuple[ac.Store, str]) -> None:
    for world in (2, 3):
        parts = [taken(s) for s in (stream_of(made, rank=r, world_size=world) for r in range(world))]
        assert sorted(token for part in parts for token in part) == ALL
        lengths = [len(stream_of(made, rank=r, world_size=world)) for r in range(world)]
        assert sum(lengths) == len(stream_of(made))
        even = [len(list(stream_of(made, rank=r, world_size=world, drop_last=True))) for r in range(world)]
        assert set(even) == {len(ALL) // 16 // world}
    with pytest.raises(ac.errors.OptionError, match="world_size"):
        stream_of(made, rank=2, world_size=2)


def test_ranks_come_from_the_environment(made: tuple[ac.Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        stream = stream_of(made)
        found += taken(stream, loader(stream, 2))
    assert sorted(found) == ALL


def test_a_stream_is_pickled_by_its_place(made: tuple[ac.Store, str]) -> None:
    stream = stream_of(made, exclude=[0])
    data = pickle.dumps(stream)
    other = pickle.loads(data)
    assert taken(other) == taken(stream)
    big = len(pickle.dumps(stream_of(made)._parts[0]))
    assert big < 60 * 16 + 1000


# -- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"batch_size": 0}, {"batch_size": True}, {"seed": -1}, {"prefetch": -1}, {"dtype": "int32"}]
)
def test_options_that_are_none(made: tuple[ac.Store, str], option: dict[str, Any]) -> None:
    with pytest.raises(ac.errors.OptionError, match=next(iter(option)) if "dtype" not in option else "int32"):
        stream_of(made, **option)


def test_sites_that_are_none(made: tuple[ac.Store, str]) -> None:
    for sites in ([], [SITE, SITE], 5):
        with pytest.raises((ac.errors.OptionError, TypeError)):
            stream_of(made, sites)  # type: ignore[arg-type]
    with pytest.raises(ac.errors.NotCachedError, match=r"resid_post.7.*Did you mean 'resid_post"):
        stream_of(made, "resid_post.7")


def test_sites_have_the_names_of_other_libraries(made: tuple[ac.Store, str], tmp_path: Path) -> None:
    wanted = taken(stream_of(made))
    for name in (ac.Site.parse(SITE), "blocks.0.hook_resid_post", "layer_0"):
        assert taken(stream_of(made, name)) == wanted
    both = stream_of(made, ["blocks.0.hook_resid_post", ac.Site.parse(SITES[1])])
    assert list(next(iter(both))[0]) == SITES
    with pytest.raises(ac.errors.OptionError, match="sites="):
        stream_of(made, [SITE, "layer_0"])
    store, space = make_store(tmp_path)
    store.write(space, ["a b"], {"layer_0": [torch.ones(3, 2)]})
    (batch, _) = next(iter(stream_of((store, space), "layer_0")))
    assert torch.equal(batch, torch.ones(3, 2))


def test_numbers_of_numpy(made: tuple[ac.Store, str]) -> None:
    wanted = taken(stream_of(made, seed=3, rank=1, world_size=2))
    odd = stream_of(made, seed=np.int64(3), batch_size=np.int32(16), rank=np.int64(1), world_size=np.int64(2))
    assert taken(odd) == wanted
    assert json.loads(json.dumps(odd.state_dict()))["seed"] == 3
    with pytest.raises(ac.errors.OptionError, match="rank=True"):
        stream_of(made, rank=True, world_size=2)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", 3.5])
def test_devices_that_are_not_there(made: tuple[ac.Store, str], device: Any) -> None:
    with pytest.raises(ac.errors.OptionError, match=r"device"):
        stream_of(made, device=device)
    assert next(iter(stream_of(made, device="auto")))[0].device.type in ("cpu", "cuda", "mps")


def test_spaces_are_named(two: list[ac.Store], tmp_path: Path) -> None:
    assert ac.stream_activations(two[0], SITE).num_tokens == sum(1 for i, _ in ALL if i < 30)
    store, space = make_store(tmp_path)
    store.append(space, every_token([1]))
    other = store.open_space({"weights": "other"}, {"model_name": "other/model"})
    store.append(other, every_token([2]))
    with pytest.raises(ac.errors.OptionError, match=f"space=.*{space}.*other/model"):
        ac.stream_activations(store, SITE)
    with pytest.raises(ac.errors.OptionError, match="source is a int"):
        ac.stream_activations(5, SITE)


@pytest.mark.parametrize("wrong", [-1, len(ALL), 1 << 40])
def test_rows_that_there_are_not_are_never_read(made: tuple[ac.Store, str], wrong: int) -> None:
    rows = made[0].numbered(made[1], made[0].common_prompts(made[1], SITES), SITES)
    with pytest.raises(ac.errors.NotCachedError, match=str(wrong)):
        rows.take(np.array([3, wrong]), SITE)
    assert rows.take(np.array([], np.int64), SITE).shape == (0, 8)


@pytest.mark.slow
def test_two_processes_share_an_epoch(made: tuple[ac.Store, str], tmp_path: Path) -> None:
    """Ranks of a process group, each with a worker that is started anew."""
    store, space = made
    script = Path(__file__).with_name("stream_rank.py")
    outs = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meeting"), str(store.location),
             str(store.index_dir), space, SITE, str(out)]
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        assert [process.wait(timeout=180) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    parts = [json.loads(out.read_text()) for out in outs]
    whole = stream_of(made)
    prompts = [int(whole.prompts.tokens(i)[0]) for i in range(len(whole.prompts))]
    assert sorted((prompts[p], q) for found, _ in parts for p, q in found) == ALL
    assert sum(length for _, length in parts) == len(whole)
