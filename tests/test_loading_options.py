"""Options of loading that change numbers: compute dtype and attention implementation; and those that do not."""

from __future__ import annotations

import json

import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model
from reference import alone, relative_error

IDS = [5, 6, 7, 8]
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", seed=1).save_pretrained(folder)
    return folder


def opened(model, **options):
    return ac.UnifiedCache(model, layers="last", cache_pooled=False, **options)


def reference(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_every_compute_dtype(folder, name):
    dtype = getattr(torch, name)
    cache = opened(folder, dtype=name)
    assert {p.dtype for p in cache.model.parameters()} == {dtype}
    expected = alone(reference(folder, dtype=dtype), IDS, "resid_post.3")
    assert expected.dtype is dtype
    values = ac.ActivationExtractor(folder, layers="last", dtype=name).extract([IDS])["resid_post.3"][0]
    assert torch.equal(values.to(dtype), expected)
    live = ac.ActivationExtractor(reference(folder, dtype=dtype), layers="last").extract([IDS])["resid_post.3"][0]
    assert torch.equal(live, values)


def test_each_dtype_is_a_model_of_its_own(folder):
    opened(folder, dtype="bfloat16").warmup([IDS])
    assert opened(folder, dtype=torch.bfloat16).plan([IDS]).missing == 0
    for other in ("float32", "float16", "float64", None):
        assert opened(folder, dtype=other).plan([IDS]).missing == 1
    live = tiny_model("llama", seed=1)
    opened(live).warmup([IDS])
    assert opened(live.to(torch.bfloat16)).plan([IDS]).missing == 1


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_every_attention_implementation(folder, name):
    cache = opened(folder, attn_implementation=name)
    values = cache.get_activations([IDS])[0][0]
    assert cache.model.config._attn_implementation == name
    assert torch.equal(values, alone(reference(folder, attn_implementation=name), IDS, "resid_post.3"))
    other = {"eager": "sdpa", "sdpa": "eager"}[name]
    assert opened(folder, attn_implementation=other).plan([IDS]).missing == 1
    between = opened(folder, attn_implementation=other).get_activations([IDS])[0][0]
    # The same sums in another order.
    assert 0 <= relative_error(between, values) < FLOAT32


def test_the_implementation_that_transformers_picks_is_named(folder):
    opened(folder).warmup([IDS])
    assert opened(folder, attn_implementation="sdpa").plan([IDS]).missing == 0


def test_attention_of_a_live_model():
    model = tiny_model("llama", seed=1)
    model.set_attn_implementation("sdpa")
    values = opened(model).get_activations([IDS])[0][0]
    model.set_attn_implementation("eager")
    assert opened(model).plan([IDS]).missing == 1
    assert relative_error(opened(model).get_activations([IDS])[0][0], values) < FLOAT32


class TestAttentionThatCannotBe:
    @pytest.fixture
    def unreadable(self, tmp_path):
        """A folder whose weights no one can read: whatever is said of anything else was said before they were."""
        tiny_model("llama").save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
        return tmp_path

    def test_one_that_is_not_installed(self, unreadable):
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            pytest.skip("flash-attn is installed")
        cache = opened(unreadable, attn_implementation="flash_attention_2")
        # What is stored with it can be read on a machine that does not have it.
        assert cache.plan([IDS]).missing == 1
        with pytest.raises(
            errors.ModelLoadError, match=r"another attn_implementation than 'flash_attention_2'.*'eager'"
        ):
            cache.warmup([IDS])

    @pytest.mark.parametrize(
        ("name", "nearest"), [("flash_attention2", "flash_attention_2"), ("spda", "sdpa"), ("eagre", "eager")]
    )
    def test_one_that_nobody_knows(self, unreadable, name, nearest):
        with pytest.raises(errors.ModelLoadError, match=rf"{name}'.*Did you mean .*'{nearest}'"):
            opened(unreadable, attn_implementation=name)

    def test_one_that_the_architecture_does_not_have(self, tmp_path):
        tiny_model("bloom").save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
        with pytest.raises(errors.ModelLoadError, match=r"another attn_implementation than 'sdpa'"):
            opened(tmp_path, attn_implementation="sdpa").warmup([IDS])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_auth_token": "hf_secret"}, "use token="),
        ({"cache_dir": "/tmp"}, "HF_HUB_CACHE"),
        ({"proxies": {}}, "HTTPS_PROXY"),
        ({"ignore_mismatched_sizes": True}, "random"),
        ({"adapter_kwargs": {}}, "adapter's folder"),
    ],
)
def test_arguments_that_have_a_place_of_their_own(folder, kwargs, message):
    with pytest.raises(errors.OptionError, match=message):
        ac.UnifiedCache(folder, model_kwargs=kwargs)


def test_arguments_that_only_place_weights_change_nothing(folder, tmp_path):
    opened(folder).warmup([IDS])
    placed = {"offload_folder": str(tmp_path), "low_cpu_mem_usage": True, "max_memory": {"cpu": "1GB"}}
    assert opened(folder, model_kwargs=placed, device_map="auto").plan([IDS]).missing == 0
    assert opened(folder, model_kwargs={"variant": None}).plan([IDS]).missing == 1


def test_weights_of_another_shape_are_not_made_up(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(errors.ModelLoadError, match="cannot load"):
        opened(tmp_path).warmup([IDS])


def test_weights_that_cannot_be_read(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(errors.ModelLoadError, match=r"cannot load .*header"):
        opened(tmp_path).warmup([IDS])


def test_arguments_that_change_the_config_change_what_is_known_of_the_model(folder):
    short = ac.UnifiedCache(folder, cache_pooled=False, model_kwargs={"num_hidden_layers": 2})
    assert short.sites == ["resid_post.0", "resid_post.1"]
    rows, _ = short.get_activations([IDS])
    model = tiny_model("llama", seed=1)
    assert relative_error(rows[0, :, :32], alone(model, IDS, "resid_post.0")) < FLOAT32
    assert relative_error(rows[0, :, 32:], alone(model, IDS, "resid_post.1")) < FLOAT32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_kwargs": 3}, errors.OptionError, "expected a dict"),
        ({"quantization_config": "int8"}, errors.OptionError, "QuantoConfig"),
        ({"model_kwargs": {"foo": 1}}, errors.ModelLoadError, "foo"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(folder, options, error, message):
    with pytest.raises(error, match=message):
        opened(folder, **options).warmup([IDS])
