"""LoRA adapters: live and by path, active, off, merged and exchanged; values and identity of each."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from reference import alone, relative_error

peft = pytest.importorskip("peft", reason="peft is not installed")

FLOAT32 = 5e-6
IDS = [5, 6, 7, 8]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def lora(family="llama", **values):
    gpt2 = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[family], lora_dropout=0.5, **{**gpt2, **values})


def fill(model, seed=0):
    """Adapter weights as training leaves them: fresh ones change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def adapted(family="llama", seed=0, **values):
    return fill(peft.get_peft_model(tiny_model(family, seed=1), lora(family, **values)), seed)


def missing(model, **options):
    return ac.UnifiedCache(model, layers="last", **options).plan([IDS]).missing


@torch.no_grad()
def last_block(model, ids=IDS):
    """By a plain hook on the last block of whatever is wrapped, from a call of the wrapper itself."""
    seen = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers
    handle = blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=torch.tensor([list(ids)]))
    handle.remove()
    return seen[0][0]


def values(model, **options):
    return ac.UnifiedCache(model, layers="last", cache_pooled=False, **options).get_activations([IDS])[0][0]


class TestLive:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_an_active_adapter_is_in_the_values(self, family):
        model = adapted(family)
        expected = last_block(model)
        assert relative_error(expected, alone(tiny_model(family, seed=1), IDS, "resid_post.3")) > 0.1
        assert relative_error(values(model), expected) < FLOAT32
        # The extractor that stores nothing, too.
        rows = ac.ActivationExtractor(model, layers="last").extract([IDS])["resid_post.3"]
        assert relative_error(rows[0], expected) < FLOAT32

    def test_by_transformers_own_integration(self):
        model = tiny_model("llama", seed=1)
        model.add_adapter(lora(), "mine")
        fill(model)
        assert relative_error(values(model), last_block(adapted())) < FLOAT32
        assert relative_error(values(model), last_block(model)) < FLOAT32
        model.disable_adapters()
        assert missing(model) == 1
        assert relative_error(values(model), alone(tiny_model("llama", seed=1), IDS, "resid_post.3")) < FLOAT32

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.base_model.disable_adapter_layers(),
            lambda m: m.set_adapter("other"),
            lambda m: m.merge_adapter(),
            lambda m: fill(m, seed=9),
            lambda m: [x.set_scale("default", 3.0) for x in m.modules() if hasattr(x, "set_scale")],
        ],
        ids=["switched off", "another one active", "merged", "trained on", "stronger"],
    )
    def test_every_state_of_it_is_a_model_of_its_own(self, change):
        model = adapted()
        model.add_adapter("other", lora())
        fill(model)
        before = values(model)
        assert missing(model) == 0
        change(model)
        assert missing(model) == 1
        after = values(model)
        assert relative_error(after, last_block(model)) < FLOAT32
        # Merging moves no number but by rounding.
        assert torch.equal(before, after) is False

    def test_switching_it_off_and_on_again_changes_nothing(self):
        model = adapted()
        values(model)
        with model.disable_adapter():
            assert missing(model) == 1
        assert missing(model) == 0

    def test_merged_for_good_it_is_an_ordinary_model(self, tmp_path):
        expected = last_block(adapted())
        merged = adapted().merge_and_unload()
        assert relative_error(values(merged), expected) < FLOAT32
        merged.save_pretrained(tmp_path)
        assert relative_error(values(tmp_path), expected) < FLOAT32

    def test_two_adapters_at_once(self):
        model = adapted()
        model.add_adapter("other", lora())
        fill(model)
        model.base_model.set_adapter(["default", "other"])
        assert relative_error(values(model), last_block(model)) < FLOAT32
        one = adapted()
        one.add_adapter("other", lora())
        assert missing(fill(one)) == 1

    @pytest.mark.parametrize(
        "config",
        [
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ],
        ids=["prompt tuning", "prefix tuning"],
    )
    def test_adapters_that_add_to_the_prompt_are_refused(self, config, tmp_path):
        model = peft.get_peft_model(tiny_model("llama", seed=1, num_key_value_heads=4), config)
        with pytest.raises(errors.OptionError, match=r"'default' .* kind PR\w+_TUNING.*LoRA"):
            ac.UnifiedCache(model)
        tiny_model("llama", seed=1, num_key_value_heads=4).save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        set_base(tmp_path / "adapter", tmp_path / "base")
        with pytest.raises(errors.ModelLoadError, match=r"kind PR\w+_TUNING.*LoRA"):
            ac.UnifiedCache(tmp_path / "adapter")

    def test_an_adapter_that_acts_from_some_token_on_is_refused(self):
        model = adapted(alora_invocation_tokens=[7], task_type="CAUSAL_LM")
        with pytest.raises(errors.OptionError, match=r"activated LoRA.*every token"):
            ac.UnifiedCache(model)

    def test_a_hook_on_the_wrapper_is_refused(self):
        model = adapted()
        model.register_forward_hook(lambda *_: None)
        with pytest.raises(errors.ForeignHooksError, match="its root"):
            ac.UnifiedCache(model).plan([IDS])


def set_base(adapter, base, **more):
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": str(base), **more}
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """base/ with its tokenizer, and adapter/ for it, as peft writes them."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama", seed=1).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    adapted().save_pretrained(folder / "adapter")
    set_base(folder / "adapter", folder / "base")
    return folder


@pytest.fixture
def folders(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    set_base(tmp_path / "saved" / "adapter", tmp_path / "saved" / "base")
    return tmp_path / "saved"


class TestByPath:
    def test_base_and_adapter_together(self, folders):
        cache = ac.UnifiedCache(folders / "adapter", layers="last", cache_pooled=False)
        rows = cache.get_activations([IDS])[0][0]
        assert relative_error(rows, last_block(adapted())) < FLOAT32
        warm = ac.UnifiedCache(folders / "adapter", layers="last", cache_pooled=False)
        assert torch.equal(warm.get_activations([IDS])[0][0], rows)
        assert not warm.model_loaded
        assert missing(folders / "base") == 1

    def test_the_same_dtype_as_peft_gives(self, folders):
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(base, folders / "adapter").eval()
        rows = values(folders / "adapter", dtype="bfloat16")
        assert torch.equal(rows, last_block(model))

    @pytest.mark.parametrize("what", ["adapter", "base", "strength"])
    def test_whatever_changes_in_its_files_is_noticed(self, folders, what):
        cache = ac.UnifiedCache(folders / "adapter", layers="last")
        cache.warmup([IDS])
        if what == "adapter":
            adapted(seed=5).save_pretrained(folders / "adapter")
            set_base(folders / "adapter", folders / "base")
        elif what == "base":
            tiny_model("llama", seed=2).save_pretrained(folders / "base")
        else:
            set_base(folders / "adapter", folders / "base", lora_alpha=32)
        assert cache.plan([IDS]).missing == 1

    def test_where_the_base_lies_and_who_wrote_the_adapter_change_nothing(self, folders):
        ac.UnifiedCache(folders / "adapter", layers="last").warmup([IDS])
        shutil.move(folders / "base", folders / "moved")
        set_base(folders / "adapter", folders / "moved", peft_version="0.0.1", inference_mode=False)
        assert missing(folders / "adapter") == 0

    def test_its_tokenizer_or_the_one_of_its_base(self, folders):
        cache = ac.UnifiedCache(folders / "adapter", cache_pooled=False)
        assert cache.get_activations("ab")[1].sum() == 3
        tiny_tokenizer(bos=False).save_pretrained(folders / "adapter")
        cache = ac.UnifiedCache(folders / "adapter", cache_pooled=False)
        assert cache.get_activations("ab")[1].sum() == 2

    def test_an_adapter_changed_in_memory(self, folders):
        cache = ac.UnifiedCache(folders / "adapter", layers="last")
        for module in cache.model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.enable_adapters(False)
        with pytest.raises(errors.ModelChangedError, match="changed in memory"):
            cache.warmup([IDS])

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_weights_that_are_missing(self, folders):
        from safetensors.torch import load_file, save_file

        path = folders / "adapter" / "adapter_model.safetensors"
        weights = load_file(path)
        name = sorted(weights)[0]
        del weights[name]
        save_file(weights, path)
        with pytest.raises(errors.ModelLoadError, match=rf"lacks {name}"):
            ac.UnifiedCache(folders / "adapter", layers="last").warmup([IDS])
        path.unlink()
        with pytest.raises(errors.ModelLoadError, match=r"adapter_model\.safetensors"):
            missing(folders / "adapter")

    def test_a_base_that_is_not_there(self, folders):
        set_base(folders / "adapter", folders / "absent")
        with pytest.raises(errors.ModelLoadError, match="absent"):
            ac.UnifiedCache(folders / "adapter")
        set_base(folders / "adapter", None)
        (folders / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(errors.ModelLoadError, match="names no base model"):
            ac.UnifiedCache(folders / "adapter")

    def test_without_peft(self, folders, monkeypatch):
        ac.UnifiedCache(folders / "adapter", layers="last").warmup([IDS])
        monkeypatch.setitem(sys.modules, "peft", None)
        # What is stored needs none.
        assert missing(folders / "adapter") == 0
        with pytest.raises(errors.MissingExtraError, match="pip install peft"):
            ac.UnifiedCache(folders / "adapter", layers=0).warmup([IDS])

    def test_an_adapter_beside_the_weights_of_a_model(self, folders):
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folders / "base" / name, folders / "adapter")
        with pytest.raises(errors.ModelLoadError, match="folder of its own"):
            ac.UnifiedCache(folders / "adapter")

    def test_code_of_a_base_model_is_not_run_on_an_adapters_word(self, folders, tmp_path):
        marker = tmp_path / "ran"
        (folders / "base" / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\n")
        config = json.loads((folders / "base" / "config.json").read_text())
        config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config"}}
        (folders / "base" / "config.json").write_text(json.dumps(config))
        with pytest.raises(errors.ModelLoadError, match="on an adapter's word"):
            ac.UnifiedCache(folders / "adapter", trust_remote_code=True).warmup([IDS])
        tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
        (folders / "base" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        with pytest.raises(errors.TokenizerError, match="trust_remote_code"):
            _ = ac.UnifiedCache(folders / "adapter", trust_remote_code=True).tokenizer
        assert not marker.exists()


@torch.no_grad()
@pytest.mark.parametrize("wrap", [False, True])
def test_end_tokens_of_an_adapted_model(wrap: bool) -> None:
    """Behind its end token a sequence has padding: a wrapper that only forwards attributes knows the token, too."""
    base = tiny_model("gpt2", seed=3)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 90, 40]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": True, "max_new_tokens": 6}
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    torch.manual_seed(1)
    free = base.generate(**given, pad_token_id=0)
    base.generation_config.eos_token_id = int(free[0, 4])
    base.generation_config.pad_token_id = 0
    # Fresh adapters change nothing.
    model = peft.get_peft_model(base, lora("gpt2")).eval() if wrap else base
    torch.manual_seed(1)
    with ac.capture(model, sites="resid_post", layers=0) as cache:
        said = model.generate(**given)
    ends = (said[:, 3:] == base.generation_config.eos_token_id).int()
    # What comes last is never run.
    real = torch.cat([torch.ones(3, 3, dtype=torch.int), 1 - (ends.cumsum(1) - ends).clamp_max(1)], 1)[:, :-1]
    assert torch.equal(cache.attention_mask, real.bool())
    assert not real.all()
