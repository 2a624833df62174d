"""Changes after the cache object was made: never a value of before, nor a changed one under the old identity."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error
from unified_helpers import saved_gpt2

FLOAT32 = 5e-6
TEXT = "ab"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return saved_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=2)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = tiny_tokenizer(bos=True).backend_tokenizer.post_processor


class TestFiles:
    def test_a_config_changed_before_the_first_request(self, folder):
        before = ac.UnifiedCache(folder).get_activations(TEXT)[0]
        cache = ac.UnifiedCache(folder)
        change_json(folder / "config.json", layer_norm_epsilon=0.5)
        assert not torch.equal(cache.get_activations(TEXT)[0], before)

    def test_a_tokenizer_replaced_under_its_path(self, folder):
        cache = ac.UnifiedCache(folder, cache_pooled=False)
        assert cache.get_activations(TEXT)[1].sum() == 2
        tiny_tokenizer(bos=True).save_pretrained(folder)
        assert cache.get_activations(TEXT)[1].sum() == 3
        assert cache.get_activations("xyz")[1].sum() == 4

    def test_weights_that_other_arguments_choose(self, folder):
        shutil.copy(folder / "model.safetensors", folder / "model.other.safetensors")
        options = {"model_kwargs": {"variant": "other"}}
        before = ac.UnifiedCache(folder, **options).get_activations(TEXT)[0]
        assert ac.UnifiedCache(folder, **options).plan(TEXT).missing == 0
        tiny_model("gpt2", seed=2, n_layer=2).save_pretrained(folder / "new")
        (folder / "new" / "model.safetensors").rename(folder / "model.other.safetensors")
        assert not torch.equal(ac.UnifiedCache(folder, **options).get_activations(TEXT)[0], before)


class TestTokenizerObjects:
    @pytest.mark.parametrize(
        ("change", "text", "counts"),
        [(add_bos, "ab", (2, 3)), (lambda t: setattr(t, "split_special_tokens", True), "a<eos>", (2, 6))],
        ids=["its rules", "special tokens in text"],
    )
    def test_changed_after_the_cache_was_made(self, folder, change, text, counts):
        tokenizer = tiny_tokenizer(bos=False)
        cache = ac.UnifiedCache(folder, tokenizer=tokenizer, cache_pooled=False)
        assert cache.get_activations(text)[1].sum() == counts[0]
        change(tokenizer)
        assert cache.get_activations(text)[1].sum() == counts[1]

    def test_changed_after_it_was_loaded_from_a_folder(self, folder):
        cache = ac.UnifiedCache(folder, cache_pooled=False)
        cache.warmup("other")
        add_bos(cache.tokenizer)
        assert cache.get_activations(TEXT)[1].sum() == 3
        assert ac.UnifiedCache(folder, cache_pooled=False).get_activations(TEXT)[1].sum() == 2

    def test_loading_it_changes_nothing(self, folder, monkeypatch):
        ac.UnifiedCache(folder).warmup(TEXT)
        cache = ac.UnifiedCache(folder)
        monkeypatch.setattr(type(cache.tokenizer), "__call__", lambda *a, **k: pytest.fail("found by its text"))
        assert cache.plan(TEXT).missing == 0

    def test_a_chat_template_that_reads_the_clock(self, folder, monkeypatch):
        (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}{{ messages[0]['content'] }}")
        chat = [{"role": "user", "content": "hi"}]
        cache = ac.UnifiedCache(folder, cache_pooled=False, layers=0)
        cache.warmup([chat])
        tokenizer = cache.tokenizer
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: {"input_ids": [9, 9]})
        assert cache.get_activations([chat])[1].sum() == 2
        # As a new process would, tomorrow: nothing loaded yet.
        fresh = ac.UnifiedCache(folder, cache_pooled=False, layers=0)
        monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *a, **k: {"input_ids": [8, 8, 8]})
        assert fresh.get_activations([chat])[1].sum() == 3


class TestModelsInMemory:
    def test_a_loaded_model_with_a_hook(self, folder):
        cache = ac.UnifiedCache(folder)
        handle = cache.model.transformer.h[0].register_forward_hook(lambda *_: None)
        with pytest.raises(errors.ForeignHooksError, match=r"transformer\.h\.0"):
            cache.get_activations(TEXT)
        handle.remove()
        cache.get_activations(TEXT)

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.transformer.wpe.weight.mul_(2),
            lambda m: m.half(),
            lambda m: m.set_attn_implementation("eager"),
            lambda m: setattr(m.transformer.h[0].ln_1, "eps", 0.5),
        ],
        ids=["weights", "dtype", "attention", "an epsilon"],
    )
    def test_a_loaded_model_that_was_changed(self, folder, change):
        cache = ac.UnifiedCache(folder)
        with torch.no_grad():
            change(cache.model)
        with pytest.raises(errors.ModelChangedError, match="changed in memory"):
            cache.get_activations(TEXT)
        # What its files give is still read.
        ac.UnifiedCache(folder).warmup(TEXT)
        cache.get_activations(TEXT)

    def test_a_loaded_model_that_was_moved_or_set_to_training(self, folder):
        cache = ac.UnifiedCache(folder)
        cache.model.train().to("cpu")
        assert torch.equal(cache.get_activations(TEXT)[0], ac.UnifiedCache(folder).get_activations(TEXT)[0])

    def test_a_forward_put_on_a_module_of_a_live_model(self):
        model = tiny_model("gpt2")
        forward = model.transformer.h[0].mlp.forward
        model.transformer.h[0].mlp.forward = lambda x: forward(x) * 2
        with pytest.raises(errors.ForeignHooksError, match=r"h\.0\.mlp"):
            ac.UnifiedCache(model).get_activations([[1, 2]])
        with pytest.raises(errors.ForeignHooksError, match=r"h\.0\.mlp"):
            ac.ActivationExtractor(model).extract([[1, 2]])

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m.transformer.h[0].ln_1, "eps", 0.5),
            lambda m: setattr(m.config, "layer_norm_epsilon", 0.5),
            lambda m: m.set_attn_implementation("eager"),
        ],
        ids=["an epsilon", "the config", "attention"],
    )
    def test_a_live_model_whose_numbers_changed_without_its_weights(self, change):
        model = tiny_model("gpt2")
        cache = ac.UnifiedCache(model)
        cache.warmup([[1, 2]])
        assert ac.UnifiedCache(tiny_model("gpt2")).plan([[1, 2]]).missing == 0
        change(model)
        assert cache.plan([[1, 2]]).missing == 1

    def test_a_compiled_model_is_its_original(self):
        model = tiny_model("gpt2")
        ac.UnifiedCache(model).warmup([[1, 2]])
        compiled = ac.UnifiedCache(torch.compile(model, backend="eager"), sites=["resid_post", "logits"])
        values = compiled.get_activations([[1, 2]])["logits"][0]
        assert relative_error(values[0], alone(model, [1, 2], "logits")[-1]) < FLOAT32
        assert ac.UnifiedCache(torch.compile(model, backend="eager")).plan([[1, 2]]).missing == 0

    def test_weights_that_are_elsewhere(self):
        with pytest.raises(errors.OptionError, match="not in memory"):
            ac.UnifiedCache(tiny_model("gpt2").to("meta"))

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            model = tiny_model("gpt2")
            model.lm_head.weight = torch.nn.Parameter(torch.ones_like(model.lm_head.weight), requires_grad=False)
        values = ac.UnifiedCache(model, layers=1).get_activations([[1, 2]])[0]
        assert relative_error(values[0], alone(model, [1, 2], "resid_post.1")[-1]) < FLOAT32


class TestWhatCannotBeFollowed:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"dtype": "bfloat16"}, "parameter of that name"),
            ({"torch_dtype": torch.bfloat16}, "use dtype="),
            ({"subfolder": "x"}, "pass the subfolder"),
            ({"state_dict": {}}, "pass it"),
            ({"other": object()}, "a object among"),
        ],
    )
    def test_model_kwargs(self, folder, kwargs, message):
        with pytest.raises(errors.OptionError, match=message):
            ac.UnifiedCache(folder, model_kwargs=kwargs)
