"""From a name to a model: local folders, the Hub's cache, live models, and the tokenizer they come with."""

from __future__ import annotations

import shutil

import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.model.loading import open_source
from actcache.model.options import LoadOptions, dtype_name
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["the cat", "a", "dogs and cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The Hub's local cache as huggingface_hub keeps it, holding org/tiny at one commit; no network."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    repo = cache / "models--org--tiny"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in ("huggingface_hub._snapshot_download", "huggingface_hub.file_download", "transformers.utils.hub"):
        loaded = __import__(module, fromlist=["_"])
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(loaded, name):
                monkeypatch.setattr(loaded, name, str(cache))
    return repo


def test_a_hub_id_is_its_commit_and_loads_by_the_ordinary_path(hub, folder):
    cache = ac.UnifiedCache("org/tiny", layers="last")
    identity = cache.extractor.source.identity()
    assert identity.values["weights"] == f"commit:{COMMIT}"
    assert identity.label["model_name"] == "org/tiny"
    assert identity.label["revision"] == COMMIT
    values = cache.get_activations(TEXTS)[0]
    model = tiny_model("llama", seed=3)
    ids = tiny_tokenizer()(TEXTS[0])["input_ids"]
    assert relative_error(values[0], alone(model, ids, "resid_post.3")[-1]) < 5e-6
    warm = ac.UnifiedCache("org/tiny", layers="last", revision="main")
    assert torch.equal(warm.get_activations(TEXTS)[0], values)
    assert not warm.model_loaded


def test_another_commit_of_a_hub_id_is_another_model(hub):
    ac.UnifiedCache("org/tiny").warmup(TEXTS)
    newer = "f" * 40
    (hub / "snapshots" / COMMIT).rename(hub / "snapshots" / newer)
    (hub / "refs" / "main").write_text(newer)
    assert ac.UnifiedCache("org/tiny").plan(TEXTS).missing == len(TEXTS)


def test_a_hub_id_that_is_not_to_be_had(hub):
    with pytest.raises(errors.ModelLoadError, match=r"org/absent.*network"):
        ac.UnifiedCache("org/absent")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_a_tokenizer_changes_nothing(folder, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    model = tiny_model("gpt2", seed=3)
    cache = ac.UnifiedCache(model, tokenizer=tokenizer, cache_pooled=False, layers="last")
    values, mask = cache.get_activations(TEXTS)
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        assert mask[i].tolist() == [True] * len(ids) + [False] * (mask.shape[1] - len(ids))
        assert relative_error(values[i][mask[i]], alone(model, ids, "resid_post.3")) < 5e-6


def test_a_tokenizer_whose_pad_is_its_eos_loses_no_token(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model("gpt2", seed=3)
    text = "a<eos>b<eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.pad_token_id) == 2
    cache = ac.UnifiedCache(model, tokenizer=tokenizer, cache_pooled=False, layers="last")
    values, mask = cache.get_activations([text, "longer than the other one"])
    assert relative_error(values[0][mask[0]], alone(model, ids, "resid_post.3")) < 5e-6


def test_truncation_left_on_in_a_tokenizer_is_not_applied(folder):
    tokenizer = tiny_tokenizer()
    tokenizer("warm it up", truncation=True, max_length=4)
    cache = ac.UnifiedCache(folder, tokenizer=tokenizer, cache_pooled=False, layers="last")
    assert cache.get_activations(["a prompt of many tokens"])[1].sum() == 24


def test_no_second_special_token_through_the_chat_template(tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    source = open_source(tiny_model("gpt2"), LoadOptions(), tokenizer)
    from actcache.extract.prompts import read_prompts, tokenize

    read = read_prompts([[{"role": "user", "content": "hi"}]])
    tokenize(read, [0], source, add_special_tokens=True)
    assert read.ids[0].tolist() == tokenizer("hi")["input_ids"]


def test_a_chat_without_a_template_is_refused(folder):
    with pytest.raises(errors.TokenizerError, match="chat template"):
        ac.UnifiedCache(folder).plan([[{"role": "user", "content": "hi"}]])


def test_dtype_names():
    assert dtype_name(torch.bfloat16) == dtype_name("bf16") == dtype_name("bfloat16") == "bfloat16"
    assert dtype_name(None) is None
    for bad in ("float8", "int8", 16, torch.int64):
        with pytest.raises(errors.OptionError):
            dtype_name(bad)


def test_the_compute_dtype_is_float32_whatever_the_checkpoint(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    cache = ac.UnifiedCache(tmp_path, layers="last")
    assert cache.get_activations([[1, 2, 3]])[0].dtype is torch.float32
    assert next(cache.model.parameters()).dtype is torch.float32


def test_sharded_weights_and_safetensors_or_bin(tmp_path):
    model = tiny_model("llama", seed=8)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    values = ac.UnifiedCache(tmp_path / "sharded", layers="last").get_activations([[1, 2, 3]])[0]
    assert relative_error(values[0], alone(model, [1, 2, 3], "resid_post.3")[-1]) < 5e-6


def test_options_that_a_live_model_cannot_take():
    model = tiny_model("gpt2")
    for option in ({"revision": "main"}, {"attn_implementation": "eager"}, {"model_kwargs": {"a": 1}}):
        with pytest.raises(errors.OptionError, match=next(iter(option))):
            ac.UnifiedCache(model, **option)
    ac.UnifiedCache(model, dtype="float32")


def test_revision_of_a_local_folder_is_refused(folder):
    with pytest.raises(errors.OptionError, match="revision"):
        ac.UnifiedCache(folder, revision="main")


def test_a_config_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.ModelLoadError, match="model_type"):
        ac.UnifiedCache(tmp_path).plan([[1]])
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(errors.ModelLoadError, match="Save the model again"):
        ac.UnifiedCache(tmp_path).plan([[1]])


def test_weights_that_change_between_identity_and_loading_are_not_mixed_up(tmp_path):
    tiny_model("gpt2", seed=1).save_pretrained(tmp_path)
    source = open_source(tmp_path, LoadOptions())
    source.model()
    first = source.identity()
    tiny_model("gpt2", seed=2).save_pretrained(tmp_path)
    second = source.identity()
    assert first.values != second.values
    reloaded = source.model()
    assert torch.equal(reloaded.transformer.wte.weight, tiny_model("gpt2", seed=2).transformer.wte.weight)


def test_a_shard_that_is_not_there(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(errors.ModelLoadError, match=r"model-1\.safetensors .* is missing"):
        ac.UnifiedCache(copy).plan(TEXTS)
    index.write_text("{")
    with pytest.raises(errors.ModelLoadError, match=r"index .* cannot be read"):
        ac.UnifiedCache(copy).plan(TEXTS)


def test_planning_for_a_hub_model_whose_shards_are_not_downloaded(hub):
    snapshot = hub / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert ac.UnifiedCache("org/tiny").plan(TEXTS).missing == len(TEXTS)


def test_a_tokenizer_of_another_repository_is_not_looked_for_at_the_models_revision(hub):
    other = hub.parent / "models--org--other"
    shutil.copytree(hub, other)
    (other / "snapshots" / COMMIT).rename(other / "snapshots" / ("e" * 40))
    (other / "refs" / "main").write_text("e" * 40)
    assert ac.UnifiedCache("org/tiny", revision=COMMIT, tokenizer="org/other").plan(TEXTS).missing == len(TEXTS)


def test_a_head_that_was_not_saved_is_not_made_up(tmp_path):
    model = tiny_model("llama", seed=3)
    model.model.save_pretrained(tmp_path)
    values = ac.UnifiedCache(tmp_path, layers="last").get_activations([[1, 2, 3]])[0]
    assert relative_error(values[0], alone(model, [1, 2, 3], "resid_post.3")[-1]) < 5e-6
    with pytest.raises(errors.SiteUnavailableError, match="no language-model head"):
        ac.UnifiedCache(tmp_path, sites="logits").get_activations([[1, 2, 3]])


def test_weights_that_are_not_in_the_files_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("llama", seed=3).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.ModelLoadError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        ac.UnifiedCache(tmp_path).warmup([[1, 2]])
