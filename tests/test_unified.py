"""UnifiedCache: computed once, read afterwards, and never a stale or foreign value."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error

FLOAT32 = 5e-6
TEXTS = ["the cat sat on the mat", "a", "dogs and cats and dogs", "the mat sat", "on a mat the cat sat and sat"]
CHAT = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A gpt2-like model with a tokenizer, as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2", seed=1, n_layer=3).save_pretrained(folder)
    tiny_tokenizer(bos=False).save_pretrained(folder)
    return folder


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "model")


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ids_of(folder, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def misses(cache, prompts=TEXTS):
    return cache.plan(prompts).missing


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


class TestHits:
    def test_everything_is_a_hit_the_second_time(self, folder):
        cache = ac.UnifiedCache(folder)
        cold = cache.warmup([*TEXTS, TEXTS[0]])
        warm = ac.UnifiedCache(folder)
        stats = warm.warmup(TEXTS)
        assert (cold.activations_cached, cold.activations_extracted) == (0, len(TEXTS))
        assert (stats.activations_cached, stats.activations_extracted) == (len(TEXTS), 0)
        assert stats.cache_hit_rate == 1.0
        assert not warm.model_loaded

    def test_a_warm_run_does_not_even_tokenise(self, folder, monkeypatch):
        ac.UnifiedCache(folder).warmup(TEXTS)
        warm = ac.UnifiedCache(folder)
        monkeypatch.setattr(type(warm.extractor.source), "tokenizer", lambda self: pytest.fail("tokenised"))
        warm.get_activations(TEXTS)

    def test_a_warm_run_in_a_new_process_imports_no_transformers(self, folder, _own_cache_folders):
        ac.UnifiedCache(folder).warmup(TEXTS)
        code = (
            "import sys, actcache as ac; cache = ac.UnifiedCache(sys.argv[1]); cache.get_activations(sys.argv[2:]);"
            "print(cache.model_loaded, 'transformers' in sys.modules)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(folder), *TEXTS], capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == ["False", "False"]

    def test_text_and_its_ids_are_one_entry(self, folder):
        ac.UnifiedCache(folder).warmup(TEXTS)
        ids = [ids_of(folder, t) for t in TEXTS]
        assert misses(ac.UnifiedCache(folder), ids) == 0
        cache = ac.UnifiedCache(folder)
        assert torch.equal(cache.get_activations(ids)[0], cache.get_activations(TEXTS)[0])

    def test_ids_first_then_text(self, folder):
        ac.UnifiedCache(folder).warmup([ids_of(folder, t) for t in TEXTS])
        assert misses(ac.UnifiedCache(folder)) == 0
        assert ac.UnifiedCache(folder).warmup(TEXTS).activations_extracted == 0

    def test_the_same_model_loaded_twice(self, folder):
        tokenizer = tiny_tokenizer(bos=False)
        ac.UnifiedCache(reference(folder), tokenizer=tokenizer).warmup(TEXTS)
        assert misses(ac.UnifiedCache(reference(folder), tokenizer=tiny_tokenizer(bos=False))) == 0

    def test_only_missing_layers_are_computed(self, folder):
        ac.UnifiedCache(folder, layers=[0, 1]).warmup(TEXTS)
        cache = ac.UnifiedCache(folder, layers="all")
        written = cache.warmup(TEXTS).bytes_written
        model = reference(folder)
        assert written == len(TEXTS) * (model.config.n_layer - 2) * model.config.n_embd * 4
        assert torch.equal(
            cache.get_activations(TEXTS)[0],
            torch.cat([cache.get_activations(TEXTS, layers=i)[0] for i in range(3)], dim=1),
        )

    def test_a_mix_of_stored_and_new_and_kinds(self, folder):
        cache = ac.UnifiedCache(folder)
        cache.warmup(TEXTS[:2])
        cache.warmup([ids_of(folder, TEXTS[2])])
        mixed = [TEXTS[3], TEXTS[2], ids_of(folder, TEXTS[0]), TEXTS[1], [3, 1, 2], TEXTS[3]]
        values = cache.get_activations(mixed)[0]
        model = reference(folder)
        for row, prompt in zip(values, mixed, strict=True):
            ids = prompt if isinstance(prompt, list) else ids_of(folder, prompt)
            assert relative_error(row[-model.config.n_embd :], alone(model, ids, "resid_post.2")[-1]) < FLOAT32

    def test_chat_goes_through_the_template_once(self, own_folder):
        tokenizer = tiny_tokenizer(bos=False)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        tokenizer.save_pretrained(own_folder)
        cache = ac.UnifiedCache(own_folder, layers="last")
        values = cache.get_activations([CHAT])[0]
        ids = tokenizer("user the cat sat ", add_special_tokens=False)["input_ids"]
        assert relative_error(values[0], alone(reference(own_folder), ids, "resid_post.2")[-1]) < FLOAT32
        assert misses(ac.UnifiedCache(own_folder, layers="last"), [CHAT]) == 0


class TestMisses:
    """Whatever changes a number is a miss."""

    def test_other_weights_under_the_same_path(self, own_folder):
        cache = ac.UnifiedCache(own_folder)
        before = cache.get_activations(TEXTS)[0]
        tiny_model("gpt2", seed=99, n_layer=3).save_pretrained(own_folder)
        assert misses(ac.UnifiedCache(own_folder)) == len(TEXTS)
        # The object made before the change notices too, and loads the new weights.
        after = cache.get_activations(TEXTS)[0]
        assert not torch.equal(before, after)
        assert (
            relative_error(
                after[0, -32:], alone(reference(own_folder), ids_of(own_folder, TEXTS[0]), "resid_post.2")[-1][-32:]
            )
            < FLOAT32
        )

    def test_another_dtype(self, folder):
        ac.UnifiedCache(folder).warmup(TEXTS)
        assert misses(ac.UnifiedCache(folder, dtype="bfloat16")) == len(TEXTS)
        assert misses(ac.UnifiedCache(folder, dtype="float32")) == 0

    def test_another_attention_implementation(self, folder):
        ac.UnifiedCache(folder, attn_implementation="sdpa").warmup(TEXTS)
        assert misses(ac.UnifiedCache(folder, attn_implementation="eager")) == len(TEXTS)

    def test_the_default_attention_implementation_is_its_name(self, folder):
        default = reference(folder).config._attn_implementation
        ac.UnifiedCache(folder).warmup(TEXTS)
        assert misses(ac.UnifiedCache(folder, attn_implementation=default)) == 0

    def test_a_config_value(self, own_folder):
        ac.UnifiedCache(own_folder).warmup(TEXTS)
        path = own_folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
        assert misses(ac.UnifiedCache(own_folder)) == len(TEXTS)

    def test_special_tokens(self, own_folder):
        tiny_tokenizer(bos=True).save_pretrained(own_folder)
        ac.UnifiedCache(own_folder, add_special_tokens=False).warmup(TEXTS)
        assert misses(ac.UnifiedCache(own_folder, add_special_tokens=True)) == len(TEXTS)
        assert misses(ac.UnifiedCache(own_folder, add_special_tokens=False)) == 0

    def test_a_live_model_that_was_trained_on(self, folder):
        model = reference(folder)
        cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(bos=False))
        cache.warmup(TEXTS)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.bias.add_(0.5)
        assert misses(cache) == len(TEXTS)
        ids = ids_of(folder, TEXTS[0])
        values = cache.get_activations(TEXTS, layers=2)[0]
        assert relative_error(values[0], alone(model, ids, "resid_post.2")[-1]) < FLOAT32

    def test_another_tokenizer_that_gives_other_ids(self, own_folder):
        ac.UnifiedCache(own_folder).warmup(TEXTS)
        tiny_tokenizer(bos=True).save_pretrained(own_folder)
        assert misses(ac.UnifiedCache(own_folder)) == len(TEXTS)

    def test_pooling_of_another_kind(self, folder):
        ac.UnifiedCache(folder, pooling="mean").warmup(TEXTS)
        assert misses(ac.UnifiedCache(folder, pooling="last_token")) == len(TEXTS)


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


class TestFailures:
    def test_a_batch_that_fails_does_not_stop_the_others(self, folder):
        model = reference(folder)
        original = model.transformer.wte.forward
        bad = 7

        def broken(ids):
            if (ids == bad).any():
                raise RuntimeError("no such luck")
            return original(ids)

        model.transformer.wte.forward = broken
        cache = ac.UnifiedCache(model, batch_size=1, allow_hooks=[broken.__qualname__])
        prompts = [[1, 2], [3, bad, 1], [4]]
        with pytest.raises(errors.PartialWarmupError, match="prompt 1: RuntimeError: no such luck") as caught:
            cache.warmup(prompts)
        assert caught.value.failed[0][0] == 1
        assert caught.value.stats.activations_extracted == 2
        assert misses(cache, prompts) == 1

    def test_layers_that_are_not_kept(self, folder):
        cache = ac.UnifiedCache(folder, layers=[0])
        with pytest.raises(errors.OptionError, match=r"resid_post\.1"):
            cache.get_activations(TEXTS, layers=1)
        with pytest.raises(errors.UnknownSiteError, match="mlp_out"):
            cache.get_activations(TEXTS, site="mlp_out")

    def test_positions_of_a_pooled_cache(self, folder):
        with pytest.raises(errors.OptionError, match="cache_pooled=False"):
            ac.UnifiedCache(folder).get_activations(TEXTS, positions="last")

    def test_positions_that_are_none(self, folder):
        cache = ac.UnifiedCache(folder, cache_pooled=False)
        with pytest.raises(errors.OptionError, match="lst"):
            cache.get_activations(TEXTS, positions="lst")
        assert not cache.model_loaded

    def test_a_chat_that_the_template_refuses(self, own_folder):
        (own_folder / "chat_template.jinja").write_text("{{ raise_exception('only users may speak') }}")
        with pytest.raises(errors.PromptError, match=r"prompt 1 .*only users may speak"):
            ac.UnifiedCache(own_folder).plan(["a", CHAT])

    def test_a_device_that_is_not_here(self, folder):
        cache = ac.UnifiedCache(folder, device="cuda:99")
        with pytest.raises(errors.OptionError, match="not available here"):
            cache.plan(TEXTS)
        with pytest.raises(errors.OptionError, match="not available here"):
            _ = cache.model

    def test_a_folder_that_is_no_model(self, tmp_path):
        with pytest.raises(errors.ModelLoadError, match=r"config\.json"):
            ac.UnifiedCache(tmp_path)
        with pytest.raises(errors.ModelLoadError, match="does not exist"):
            ac.UnifiedCache(str(tmp_path / "absent"))

    def test_a_model_without_weights(self, own_folder):
        (own_folder / "model.safetensors").unlink()
        with pytest.raises(errors.ModelLoadError, match="no weights"):
            ac.UnifiedCache(own_folder).warmup(TEXTS)

    def test_a_model_without_tokenizer(self, own_folder):
        for path in own_folder.glob("*token*"):
            path.unlink()
        with pytest.raises(errors.TokenizerError, match="tokenizer="):
            ac.UnifiedCache(own_folder).warmup(TEXTS)
        ac.UnifiedCache(own_folder).warmup([[1, 2]])
        ac.UnifiedCache(own_folder, tokenizer=tiny_tokenizer(bos=False)).warmup(TEXTS)

    def test_a_store_that_cannot_be_written(self, folder, tmp_path):
        (tmp_path / "file").write_text("")
        cache = ac.UnifiedCache(folder, store=tmp_path / "file" / "store")
        with pytest.raises(errors.StoreAccessError):
            cache.warmup(TEXTS)
        assert not cache.model_loaded

    def test_a_store_where_no_folder_can_be_made(self, folder):
        with pytest.raises(errors.StoreAccessError, match="/proc"):
            ac.UnifiedCache(folder, store="/proc/actcache").warmup(TEXTS)

    def test_weights_replaced_while_a_run_begins_are_not_stored_as_the_old_ones(self, own_folder, tmp_path):
        cache = ac.UnifiedCache(own_folder, store=tmp_path / "store")
        request = cache.cached.request(TEXTS, cache.sites)
        open_space = cache.store.open_space

        def replaced(*arguments):
            tiny_model("gpt2", seed=77, n_layer=3).save_pretrained(own_folder)
            return open_space(*arguments)

        cache.store.open_space = replaced
        with pytest.raises(errors.ModelChangedError, match="run again"):
            cache.cached.fill(request)
        cache.store.open_space = open_space
        assert misses(cache) == len(TEXTS)
        assert not cache.store.contains(request.space, [ids_of(own_folder, t) for t in TEXTS]).any()


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
