"""What counts as the same activations: a hit wherever they are, a miss wherever they would be others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

import actcache as ac
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error
from unified_helpers import CHAT, FLOAT32, TEXTS, ids_of, misses, reference, saved_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=3)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "model")


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
