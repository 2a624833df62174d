"""UnifiedCache: values are those of the model alone, however they are asked for, planned and shared."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error
from unified_helpers import FLOAT32, TEXTS, ids_of, misses, reference, saved_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=3)


class TestValues:
    def test_pooled(self, folder):
        cache = ac.UnifiedCache(folder, layers=[2, 0])
        values, mask = cache.get_activations(TEXTS)
        model = reference(folder)
        width = model.config.n_embd
        assert mask is None
        assert values.shape == (len(TEXTS), 2 * width)
        for row, text in zip(values, TEXTS, strict=True):
            expected = [alone(model, ids_of(folder, text), f"resid_post.{layer}")[-1] for layer in (2, 0)]
            assert relative_error(row, torch.cat(expected)) < FLOAT32

    def test_full_sequences(self, folder):
        cache = ac.UnifiedCache(folder, layers=[0, 1], cache_pooled=False)
        values, mask = cache.get_activations(TEXTS)
        model = reference(folder)
        for i, text in enumerate(TEXTS):
            ids = ids_of(folder, text)
            assert mask[i].sum() == len(ids)
            assert mask[i, : len(ids)].all()
            expected = torch.cat([alone(model, ids, f"resid_post.{layer}") for layer in (0, 1)], dim=1)
            assert relative_error(values[i][mask[i]], expected) < FLOAT32
            assert not values[i][~mask[i]].any()

    def test_the_same_from_storage_by_another_object(self, folder):
        first = ac.UnifiedCache(folder).get_activations(TEXTS)[0]
        again = ac.UnifiedCache(folder)
        assert torch.equal(again.get_activations(TEXTS)[0], first)
        assert not again.model_loaded

    def test_any_order_duplicates_and_subsets(self, folder):
        cache = ac.UnifiedCache(folder)
        straight = cache.get_activations(TEXTS)[0]
        order = [3, 0, 3, 4, 0]
        assert torch.equal(cache.get_activations([TEXTS[i] for i in order])[0], straight[order])

    def test_several_sites_give_a_dict_and_one_by_name(self, folder):
        cache = ac.UnifiedCache(folder, layers=[0, 1], sites=("resid_post", "mlp_out", "logits"))
        answers = cache.get_activations(TEXTS)
        model = reference(folder)
        assert set(answers) == {"resid_post", "mlp_out", "logits"}
        assert answers["logits"][0].shape == (len(TEXTS), model.config.vocab_size)
        assert torch.equal(cache.get_activations(TEXTS, site="mlp_out")[0], answers["mlp_out"][0])
        for i, text in enumerate(TEXTS):
            ids = ids_of(folder, text)
            assert relative_error(answers["logits"][0][i], alone(model, ids, "logits")[-1]) < FLOAT32
            expected = torch.cat([alone(model, ids, f"mlp_out.{layer}")[-1] for layer in (0, 1)])
            assert relative_error(answers["mlp_out"][0][i], expected) < FLOAT32

    def test_layers_of_a_call_come_in_its_order(self, folder):
        cache = ac.UnifiedCache(folder, layers="all")
        width = reference(folder).config.n_embd
        both = cache.get_activations(TEXTS, layers=[2, 0])[0]
        assert torch.equal(both[:, :width], cache.get_activations(TEXTS, layers=2)[0])
        assert torch.equal(both[:, width:], cache.get_activations(TEXTS, layers=0)[0])

    def test_a_site_by_any_of_its_names(self, folder):
        cache = ac.UnifiedCache(folder, sites=["layer_1", "blocks.0.hook_resid_post", "resid_post.1", "resid_post.-1"])
        assert cache.sites == ["resid_post.1", "resid_post.0", "resid_post.2"]
        answers = cache.get_activations(TEXTS)
        for name, site in (("layer_1", 1), ("resid_out_0", 0), ("blocks.2.hook_resid_post", 2), ("resid_post.-1", 2)):
            assert torch.equal(cache.get_activations(TEXTS, site=name)[0], answers[f"resid_post.{site}"][0])

    def test_positions_for_each_prompt(self, folder):
        cache = ac.UnifiedCache(folder, layers=1, cache_pooled=False)
        full = cache.get_activations(TEXTS[:2])[0]
        values, mask = cache.get_activations(TEXTS[:2], positions=[[3, 1], [0]])
        assert mask.tolist() == [[True, True], [True, False]]
        assert torch.equal(values[0], full[0][[3, 1]])
        assert torch.equal(values[1, 0], full[1][0])
        with pytest.raises(errors.OptionError, match="3 prompts"):
            cache.get_activations(TEXTS[:3], positions=[[3, 1], [0]])

    def test_positions_of_full_sequences(self, folder):
        cache = ac.UnifiedCache(folder, layers=1, cache_pooled=False)
        full, mask = cache.get_activations(TEXTS)
        last, one = cache.get_activations(TEXTS, positions="last")
        assert one.all()
        for i in range(len(TEXTS)):
            assert torch.equal(last[i, 0], full[i][mask[i]][-1])

    def test_pooled_is_answered_from_full_sequences(self, folder):
        ac.UnifiedCache(folder, cache_pooled=False).warmup(TEXTS)
        for pooling in ("last_token", "mean", "max", "min", "first_token"):
            pooled = ac.UnifiedCache(folder, pooling=pooling)
            assert misses(pooled) == 0
            values = pooled.get_activations(TEXTS)[0]
            assert not pooled.model_loaded
            model = reference(folder)
            rows = torch.cat(
                [alone(model, ids_of(folder, TEXTS[4]), f"resid_post.{layer}") for layer in range(3)], dim=1
            )
            expected = {
                "last_token": rows[-1],
                "first_token": rows[0],
                "mean": rows.double().mean(0),
                "max": rows.amax(0),
                "min": rows.amin(0),
            }[pooling]
            assert relative_error(values[4], expected) < FLOAT32

    def test_bfloat16_is_kept_as_it_was_computed(self, folder):
        cache = ac.UnifiedCache(folder, dtype="bfloat16", cache_pooled=False, layers=1)
        stored, mask = cache.get_activations(TEXTS)
        direct = ac.ActivationExtractor(folder, dtype="bfloat16", layers=1, batch_size=8).extract(TEXTS)
        assert stored.dtype is torch.bfloat16
        for i in range(len(TEXTS)):
            assert torch.equal(stored[i][mask[i]], direct["resid_post.1"][i])

    def test_one_liner(self, folder):
        for name, instead in ({"sites": ["mlp_out"]}, "site="), ({"cache_pooled": False}, "pooling=None"):
            with pytest.raises(errors.OptionError, match=f"no {next(iter(name))}=: give {instead}"):
                ac.activations(folder, TEXTS, **name)
        values = ac.activations(folder, TEXTS, layers=[0, 2])
        assert isinstance(values, np.ndarray)
        assert values.shape[:2] == (len(TEXTS), 2)
        rows = ac.activations(folder, TEXTS, layers=[0, 2], pooling=None)
        assert [len(r) for r in rows] == [len(ids_of(folder, t)) for t in TEXTS]
        assert np.array_equal(rows[1][-1], values[1])

    def test_results_can_be_written_to_without_changing_the_store(self, folder):
        cache = ac.UnifiedCache(folder)
        first = cache.get_activations(TEXTS)[0]
        kept = first.clone()
        first.zero_()
        assert torch.equal(cache.get_activations(TEXTS)[0], kept)


class TestPlan:
    def test_counts_and_sizes(self, folder):
        ac.UnifiedCache(folder, layers=[0, 1], cache_pooled=False).warmup(TEXTS[:2])
        cache = ac.UnifiedCache(folder, layers=[0, 1], cache_pooled=False)
        plan = cache.plan([*TEXTS, TEXTS[4]])
        tokens = sum(len(ids_of(folder, t)) for t in TEXTS[2:])
        width = reference(folder).config.n_embd
        assert (plan.cached, plan.missing, plan.tokens) == (2, 3, tokens)
        # Vectors, three numbers of perplexity for each prompt, one for each token.
        assert plan.bytes_to_write == tokens * 2 * width * 4 + 3 * 12 + tokens * 4
        assert plan.bytes_free > 0
        assert plan.seconds > 0
        assert cache.warmup(TEXTS).bytes_written == plan.bytes_to_write

    def test_planning_writes_nothing(self, folder, tmp_path):
        ac.UnifiedCache(folder, store=tmp_path / "store").plan(TEXTS)
        assert not (tmp_path / "store").exists()

    def test_a_warmup_that_does_not_fit_is_refused_before_any_work(self, folder, monkeypatch):
        import actcache.extract.plan as plan

        monkeypatch.setattr(plan, "bytes_free", lambda place: 100)
        cache = ac.UnifiedCache(folder)
        with pytest.raises(errors.DiskFullError, match=r"\b[\d.]+ KB and .* has 100 B free"):
            cache.warmup(TEXTS)
        assert not cache.model_loaded


@pytest.mark.parametrize("live", [False, True])
def test_threads_share_a_cache_from_its_first_call(folder, tmp_path, live):
    """Each loads, probes or runs the model while others do."""
    model = tiny_model("gpt2", seed=1, n_layer=3) if live else folder
    cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(bos=False), store=tmp_path / "store", cache_pooled=True)
    together = threading.Barrier(4)
    texts = [[f"{TEXTS[i % 5]} {word}" for i in range(6)] for word in ("cat", "dog", "mat", "on")]

    def read(mine):
        together.wait(30)
        return [cache.get_activations(mine[: i + 2])[0] for i in range(5)][-1]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, texts))
    for mine, vectors in zip(texts, found, strict=True):
        with ac.capture(cache.model, sites="resid_post") as one, torch.no_grad():
            cache.model(torch.tensor([tiny_tokenizer(bos=False)(mine[3])["input_ids"]]))
        expected = torch.cat([one[f"resid_post.{layer}"][0, -1] for layer in range(3)])
        assert relative_error(vectors[3], expected) < FLOAT32
