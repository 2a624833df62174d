"""Weights that accelerate keeps elsewhere between calls: right values, one identity, and nothing left in memory."""

from __future__ import annotations

import shutil

import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.model.offload import input_device, is_dispatched, stored_weights
from actcache.testing.tiny import tiny_model
from reference import alone, relative_error

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

FLOAT32 = 5e-6
IDS = [5, 6, 7, 8]
OFFLOADED = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
SITES = ["embed", "resid_pre", "attn_out", "mlp_out", "resid_post", "final_norm", "logits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", seed=1).save_pretrained(folder)
    return folder


def options(tmp_path, device_map=None):
    kwargs = {"offload_folder": str(tmp_path / "offloaded")}
    return {"device_map": device_map or OFFLOADED, "model_kwargs": kwargs}


def load(folder, tmp_path, **more):
    from transformers import AutoModelForCausalLM

    kwargs = {"device_map": OFFLOADED, "offload_folder": str(tmp_path / "offloaded"), "dtype": torch.float32, **more}
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def by_block(seed=1, device="cpu"):
    """A model whose blocks come and go as a whole, from a state dict in memory."""
    model = tiny_model("llama", seed=seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return accelerate.cpu_offload(model, device, state_dict=state, preload_module_classes=["LlamaDecoderLayer"])


def in_memory(model):
    """The offloaded weights that are in memory."""
    names = stored_weights(model.named_modules())
    assert names
    return [name for name, p in model.named_parameters() if name in names and not p.is_meta]


class TestByPath:
    def test_values_and_an_identity_that_knows_no_place(self, folder, tmp_path):
        reference = tiny_model("llama", seed=1)
        extractor = ac.ActivationExtractor(folder, sites=SITES, layers=[1, 2], **options(tmp_path))
        rows = extractor.extract([IDS, IDS[:1]])
        assert len(rows) == 2 and len(list(rows)) == 11
        for site in rows:
            for i, ids in enumerate([IDS, IDS[:1]]):
                assert relative_error(rows[site][i], alone(reference, ids, site)) < FLOAT32
        model = extractor.source.model()
        assert is_dispatched(model) and in_memory(model) == []
        # Neither where weights are, nor where that is kept, is part of what the values are.
        ac.UnifiedCache(folder, layers="last", **options(tmp_path)).warmup([IDS])
        assert ac.UnifiedCache(folder, layers="last").plan([IDS]).missing == 0

    def test_weights_changed_in_memory_are_noticed(self, folder, tmp_path):
        cache = ac.UnifiedCache(folder, layers="last", **options(tmp_path))
        cache.warmup([IDS])
        cache.warmup([IDS[:2]])
        with torch.no_grad():
            cache.model.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(errors.ModelChangedError, match="changed in memory"):
            cache.warmup([IDS[:3]])

    def test_files_replaced_under_a_model_that_reads_them_as_it_runs(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "copy")
        cache = ac.UnifiedCache(copy, layers="last", **options(tmp_path))
        cache.warmup([IDS])
        tiny_model("llama", seed=2).save_pretrained(copy)
        values = cache.get_activations([IDS])[0]
        assert relative_error(values[0], alone(tiny_model("llama", seed=2), IDS, "resid_post.3")[-1]) < FLOAT32

    def test_several_places_without_the_disk(self, folder, tmp_path):
        everything = dict.fromkeys(OFFLOADED, "cpu")
        cache = ac.UnifiedCache(folder, layers="last", **options(tmp_path, everything))
        values = cache.get_activations([IDS])[0]
        assert relative_error(values[0], alone(tiny_model("llama", seed=1), IDS, "resid_post.3")[-1]) < FLOAT32

    def test_what_auto_finds_no_room_for_lies_on_disk(self, folder, tmp_path):
        prompts = [IDS, IDS[:3], IDS[1:]]
        model = tiny_model("llama", seed=1)
        memory = sum(p.numel() * p.element_size() for p in model.parameters()) * 3 // 4
        kwargs = {"max_memory": {"cpu": memory}, "offload_folder": str(tmp_path / "offloaded")}
        cache = ac.UnifiedCache(folder, layers="last", cache_pooled=False, device_map="auto", model_kwargs=kwargs)
        values, mask = cache.get_activations(prompts)
        assert set(cache.model.hf_device_map.values()) == {"cpu", "disk"}
        for i, prompt in enumerate(prompts):
            assert relative_error(values[i][mask[i]], alone(model, prompt, "resid_post.3")) < FLOAT32
        assert in_memory(cache.model) == []


class TestLive:
    def test_it_is_the_model_it_would_be_in_memory(self, folder, tmp_path):
        model = load(folder, tmp_path)
        cache = ac.UnifiedCache(model, layers="last", cache_pooled=False)
        values = cache.get_activations([IDS])[0][0]
        assert relative_error(values, alone(tiny_model("llama", seed=1), IDS, "resid_post.3")) < FLOAT32
        assert in_memory(model) == []
        whole = load(folder, tmp_path, device_map=None)
        assert ac.UnifiedCache(whole, layers="last", cache_pooled=False).plan([IDS]).missing == 0
        other = tiny_model("llama", seed=2)
        assert ac.UnifiedCache(other, layers="last", cache_pooled=False).plan([IDS]).missing == 1

    def test_the_dtype_it_computes_in_and_not_the_one_on_disk(self, folder, tmp_path):
        half = load(folder, tmp_path, dtype=torch.bfloat16)
        ac.UnifiedCache(half, layers="last").warmup([IDS])
        whole = load(folder, tmp_path, device_map=None, dtype=torch.bfloat16)
        assert ac.UnifiedCache(whole, layers="last").plan([IDS]).missing == 0
        assert ac.UnifiedCache(load(folder, tmp_path), layers="last").plan([IDS]).missing == 1

    def test_offloaded_weights_that_change(self):
        model = by_block()
        cache = ac.UnifiedCache(model, layers="last")
        cache.warmup([IDS])
        assert cache.plan([IDS]).missing == 0
        with torch.no_grad():
            weights = model.model.layers[1]._hf_hook.weights_map
            weights["mlp.up_proj.weight"].mul_(2)
        assert cache.plan([IDS]).missing == 1

    def test_a_hook_or_forward_of_somebody_else_is_still_seen(self, folder, tmp_path):
        class Doubling(accelerate.hooks.ModelHook):
            def post_forward(self, module, output):
                return output * 2

        def put_a_hook(model):
            accelerate.hooks.add_hook_to_module(model.model.norm, Doubling(), append=True)

        def put_a_forward(model):
            model.model.norm.forward = lambda hidden: hidden * 2

        for put in (put_a_hook, put_a_forward):
            model = load(folder, tmp_path)
            ac.UnifiedCache(model).plan([IDS])
            put(model)
            with pytest.raises(errors.ForeignHooksError, match=r"model\.norm"):
                ac.UnifiedCache(model).plan([IDS])
        # A forward that was there before the weights went away is wrapped, and still somebody else's.
        model = tiny_model("llama")
        put_a_forward(model)
        with pytest.raises(errors.ForeignHooksError, match=r"model\.norm"):
            ac.UnifiedCache(accelerate.cpu_offload(model, "cpu")).plan([IDS])


class TestAfterAPass:
    """A block that is left by an exception keeps its weights in memory: stopping early would stop inside of it."""

    def test_an_extraction_leaves_nothing(self):
        model = by_block()
        assert in_memory(model) == []
        ac.ActivationExtractor(model, sites="attn_out", layers=1).extract([IDS])
        assert in_memory(model) == []

    def test_a_capture_leaves_nothing(self):
        model = by_block()
        with torch.no_grad(), ac.capture(model, sites=["attn_out"], layers=[1], stop_after_last=True) as cache:
            output = model(input_ids=torch.tensor([IDS]))
        assert in_memory(model) == []
        assert output.logits.shape[1] == len(IDS)
        expected = alone(tiny_model("llama", seed=1), IDS, "attn_out.1")
        assert relative_error(cache["attn_out.1"][0], expected) < FLOAT32

    def test_what_an_exception_would_leave(self):
        model = by_block()
        handle = model.model.layers[1].self_attn.register_forward_hook(lambda *_: 1 / 0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            model(input_ids=torch.tensor([IDS]))
        handle.remove()
        assert {name.split(".")[2] for name in in_memory(model)} == {"1"}

    def test_the_probe_of_the_identities_leaves_nothing(self):
        model = by_block()
        ac.capture(model, sites="attn_out", layers=0)
        assert in_memory(model) == []


def test_what_counts_as_dispatched(folder, tmp_path):
    assert not is_dispatched(tiny_model("llama"))
    assert not is_dispatched(load(folder, tmp_path, device_map={"": "cpu"}))
    assert is_dispatched(by_block())
    assert is_dispatched(load(folder, tmp_path))
    later = tiny_model("llama")
    accelerate.cpu_offload_with_hook(later, "cpu")
    assert is_dispatched(later)


def test_the_device_of_the_inputs(folder, tmp_path):
    assert input_device(load(folder, tmp_path)) == torch.device("cpu")
    assert input_device(by_block()) == torch.device("cpu")
    assert input_device(tiny_model("gpt2")) == torch.device("cpu")
    assert input_device(by_block(device="meta")) == torch.device("meta")


def test_an_adapter_is_not_put_on_weights_that_are_elsewhere(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(errors.ModelLoadError, match=r"offloaded: merge it first"):
        ac.ActivationExtractor(tmp_path / "adapter", **options(tmp_path)).extract([IDS])
