"""The order of a stream: permutations, mixtures of several sources and their shares, another in each epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.stream.mixture import Mixture
from actcache.stream.permutation import Permutation
from store_helpers import every_token, make_store
from stream_helpers import ALL, SITE, stream_of, streamed, taken, values_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ac.Store, str]:
    return streamed(tmp_path_factory.mktemp("store"))


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
