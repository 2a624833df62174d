import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import OptionError
from actcache.extract.batching import check_limits, make_batches, token_budget

lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=120)


@settings(deadline=None)
@given(lengths_of, st.integers(1, 2_000), st.none() | st.integers(1, 9))
def test_every_prompt_is_in_exactly_one_batch_within_the_limits(lengths, max_tokens, batch_size):
    batches = make_batches(lengths, max_tokens=max_tokens, batch_size=batch_size)
    assert sorted(i for b in batches for i in b.indices) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch.indices]
        assert batch.length == max(own)
        assert batch.ragged == (len(set(own)) > 1)
        assert len(own) == 1 or batch.length * len(own) <= max_tokens
        assert batch_size is None or len(own) <= batch_size


@settings(deadline=None)
@given(lengths_of)
def test_longest_batches_run_first(lengths):
    order = [b.length for b in make_batches(lengths, max_tokens=512)]
    assert order == sorted(order, reverse=True)


@settings(deadline=None)
@given(lengths_of, st.integers(1, 2_000), st.none() | st.integers(1, 9))
def test_what_may_share_a_batch(lengths, max_tokens, batch_size):
    def batches(together):
        return make_batches(lengths, max_tokens=max_tokens, batch_size=batch_size, together=together)

    equal, alone = batches("equal"), batches("alone")
    for kept in (equal, alone):
        assert sorted(i for b in kept for i in b.indices) == list(range(len(lengths)))
        assert not any(b.ragged for b in kept)
    assert all(len({lengths[i] for i in b.indices}) == 1 for b in equal)
    assert all(len(b.indices) == 1 for b in alone)


def test_equal_lengths_still_share_a_batch():
    batches = make_batches([7, 5, 7, 7, 5], max_tokens=512, together="equal")
    assert [b.indices for b in batches] == [(0, 2, 3), (1, 4)]


def test_equal_lengths_that_fill_a_batch_are_not_padded():
    lengths = [10] * 50 + [9] * 50 + [11]
    batches = make_batches(lengths, max_tokens=100)
    assert sum(not b.ragged for b in batches) >= 9
    assert sum(b.length * len(b.indices) for b in batches) <= 1.02 * sum(lengths)


def test_padding_stays_small_on_log_normal_lengths():
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(51), 0.7, 256).astype(int), 8, 256).tolist()
    batches = make_batches(lengths, max_tokens=512)
    assert sum(b.length * len(b.indices) for b in batches) <= 1.08 * sum(lengths)


def test_accelerators_get_larger_batches_than_a_cpu():
    assert token_budget("cuda:1") > token_budget("cpu")


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "8"])
@pytest.mark.parametrize("name", ["batch_size", "max_batch_tokens"])
def test_limits_must_be_positive_integers(name, bad):
    limits = {"batch_size": None, "max_batch_tokens": None, name: bad}
    with pytest.raises(OptionError, match=f"{name} is {bad!r}"):
        check_limits(**limits)
