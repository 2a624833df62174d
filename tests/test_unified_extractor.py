"""CachedExtractor: masks, what it forgets, and poolings of the caller's own."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

import actcache as ac
from actcache import errors
from reference import relative_error
from unified_helpers import FLOAT32, TEXTS, misses, reference, saved_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=3)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "model")


class TestCachedExtractor:
    def test_returns_activations_and_mask(self, folder):
        extractor = ac.ActivationExtractor(folder, layers=[0, 1])
        values, mask = ac.CachedExtractor(extractor).extract(TEXTS)
        expected, expected_mask = extractor.extract(TEXTS).padded()
        assert torch.equal(mask, expected_mask)
        assert relative_error(values, expected) < FLOAT32

    def test_cache_only_and_invalidate(self, folder):
        extractor = ac.ActivationExtractor(folder, layers=[0], pooling="mean")
        cached = ac.CachedExtractor(extractor)
        assert cached.extract(TEXTS, cache_only=True) is None
        request = cached.request(TEXTS, extractor.sites)
        assert request.to_compute == 0
        values, mask = cached.extract(TEXTS, invalidate_cache=True)
        assert values.shape == (len(TEXTS), 1, reference(folder).config.n_embd)
        assert mask.all()

    def test_invalidating_reaches_what_is_stored_in_part(self, folder):
        ac.CachedExtractor(ac.ActivationExtractor(folder, layers=[0])).extract(TEXTS)
        both = ac.CachedExtractor(ac.ActivationExtractor(folder, layers=[0, 1]))
        written = []
        fill = both.fill
        both.fill = lambda request: written.append([names for names, _ in request.missing]) or fill(request)
        both.extract(TEXTS, invalidate_cache=True)
        assert list(written[0]) == [("resid_post.0", "resid_post.1")]

    def test_nothing_is_forgotten_that_cannot_be_computed_again(self, own_folder):
        cached = ac.CachedExtractor(ac.ActivationExtractor(own_folder, layers=[0], device="cuda:99"))
        ac.CachedExtractor(ac.ActivationExtractor(own_folder, layers=[0])).extract(TEXTS)
        with pytest.raises(errors.OptionError, match="not available here"):
            cached.extract(TEXTS, invalidate_cache=True)
        assert cached.request(TEXTS, cached.extractor.sites).cached == len(TEXTS)

    @pytest.mark.parametrize("pooling", [None, "mean"])
    def test_sites_of_different_widths_lie_side_by_side(self, folder, pooling):
        extractor = ac.ActivationExtractor(folder, sites=["logits", "resid_post"], pooling=pooling)
        values, mask = ac.CachedExtractor(extractor).extract(TEXTS)
        direct = extractor.extract(TEXTS)
        parts = [torch.cat(list(direct[site])) if pooling is None else direct[site] for site in direct]
        assert relative_error(values[mask], torch.cat(parts, dim=1)) < FLOAT32

    def test_positions_belong_to_reading(self, folder):
        with pytest.raises(errors.OptionError, match="get_activations"):
            ac.CachedExtractor(ac.ActivationExtractor(folder, positions="last"))

    def test_a_pooling_without_a_stable_name(self, folder):
        with pytest.raises(errors.OptionError, match="module-level"):
            ac.CachedExtractor(ac.ActivationExtractor(folder, pooling=lambda h: h[0]))

    def test_a_pooling_with_values_that_its_code_does_not_show(self, folder):
        for pooling in (Ends(1).pool, closing_over(1)):
            with pytest.raises(errors.OptionError, match="module-level"):
                ac.UnifiedCache(folder, pooling=pooling)

    def test_a_pooling_whose_default_changed(self, folder, monkeypatch):
        ac.UnifiedCache(folder, pooling=nth).warmup(TEXTS)
        assert misses(ac.UnifiedCache(folder, pooling=nth)) == 0
        monkeypatch.setattr(nth, "__defaults__", (-1,))
        assert misses(ac.UnifiedCache(folder, pooling=nth)) == len(TEXTS)


class Ends:
    def __init__(self, n):
        self.n = n

    def pool(self, rows):
        return rows[self.n]


def nth(rows, n=0):
    return rows[n]


def closing_over(n):
    @functools.wraps(nth)
    def pool(rows):
        return rows[n]

    return pool
