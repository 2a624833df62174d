"""UnifiedCache where something fails: batches, chats, folders, devices, stores, weights that change."""

from __future__ import annotations

import shutil

import pytest

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from unified_helpers import CHAT, TEXTS, ids_of, misses, reference, saved_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=3)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "model")


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
