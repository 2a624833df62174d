"""Quantised models: what runs on a CPU, with its values, its identity and what its batches may hold."""

from __future__ import annotations

import warnings

import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.model.in_memory import live_weights_digest
from actcache.model.quantized import activation_scale
from actcache.testing.tiny import tiny_model
from reference import relative_error

FLOAT32 = 5e-6


def dynamic(model, dtype=torch.qint8):
    """The model with its linear layers quantised by torch as it runs: one activation scale for a whole batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=dtype)


def quantization(method, **values):
    return {"quantization_config": {"quant_method": method, **values}}


class TestActivationScale:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"model_type": "llama"}, "none"),
            (quantization("gptq", bits=4), "none"),
            (quantization("mxfp4"), "none"),
            (quantization("quanto", weights="int8"), "none"),
            (quantization("bitsandbytes", load_in_4bit=True), "none"),
            (quantization("bitsandbytes", load_in_8bit=True), "per_batch"),
            (quantization("bitsandbytes", load_in_8bit=True, llm_int8_threshold=0.0), "per_token"),
            (quantization("fp8", activation_scheme="dynamic"), "per_token"),
            (quantization("fp8", activation_scheme="static"), "none"),
            (quantization("fp8", activation_scheme="dynamic", dequantize=True), "none"),
            (quantization("fbgemm_fp8"), "per_token"),
            (quantization("auto-round", bits=4), "none"),
            (quantization("auto-round", bits=4, act_bits=8), "per_batch"),
            (quantization("compressed-tensors", config_groups={"a": {"weights": {}}}), "none"),
            (
                quantization(
                    "compressed-tensors",
                    config_groups={"a": {"input_activations": {"dynamic": True, "strategy": "token"}}},
                ),
                "per_token",
            ),
            (
                quantization(
                    "compressed-tensors",
                    config_groups={
                        "a": {"input_activations": {"dynamic": True, "strategy": "token"}},
                        "b": {"input_activations": {"dynamic": True, "strategy": "tensor"}},
                    },
                ),
                "per_batch",
            ),
            (
                quantization(
                    "compressed-tensors",
                    config_groups={"a": {"input_activations": {"dynamic": False, "strategy": "tensor"}}},
                ),
                "none",
            ),
            (quantization("torchao", quant_type="int8_weight_only"), "none"),
            (quantization("torchao", quant_type="int8_dynamic_activation_int8_weight"), "per_token"),
            (
                quantization(
                    "torchao",
                    quant_type={"default": {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {}}},
                ),
                "per_batch",
            ),
            (
                quantization(
                    "torchao",
                    quant_type={
                        "default": {
                            "_type": "Float8DynamicActivationFloat8WeightConfig",
                            "_data": {"granularity": [{"_type": "PerRow"}]},
                        }
                    },
                ),
                "per_token",
            ),
            (quantization("a method of tomorrow"), "per_batch"),
            ({"text_config": quantization("a method of tomorrow")}, "per_batch"),
        ],
    )
    def test_by_configuration(self, config, expected):
        assert activation_scale(config) == expected
        # As a loading option instead, on an ordinary model.
        if "quantization_config" in config:
            assert activation_scale({"model_type": "llama"}, config["quantization_config"]) == expected

    def test_of_models_in_memory(self):
        assert activation_scale(tiny_model("llama")) == "none"
        assert activation_scale(dynamic(tiny_model("llama"))) == "per_batch"
        assert activation_scale(dynamic(tiny_model("llama"), torch.float16)) == "none"

    def test_the_claim_itself(self):
        """With torch's int8 layers a prompt's values do depend on its companions; with float16 ones they do not."""
        ids = torch.tensor([[5, 6, 7], [200, 201, 202]])
        model = dynamic(tiny_model("llama"))
        with torch.no_grad():
            error = (model(input_ids=ids).logits[0] - model(input_ids=ids[:1]).logits[0]).abs().max()
            half = dynamic(tiny_model("llama"), torch.float16)
            small = (half(input_ids=ids).logits[0] - half(input_ids=ids[:1]).logits[0]).abs().max()
        assert error > 1e-3
        assert small < 1e-5


IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", seed=1).save_pretrained(folder)
    return folder


@torch.no_grad()
def last_block(model, ids):
    seen = []
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0]


def rows(model, prompts, **options):
    values, mask = ac.UnifiedCache(model, layers="last", cache_pooled=False, **options).get_activations(prompts)
    return [value[there] for value, there in zip(values, mask, strict=True)]


def missing(model, **options):
    return ac.UnifiedCache(model, layers="last", cache_pooled=False, **options).plan([IDS]).missing


class TestDynamicallyByTorch:
    def test_every_prompt_as_it_is_alone(self):
        model = dynamic(tiny_model("llama", seed=1))
        prompts = [IDS, [200, 201, 202, 203], [9], [30, 31, 32, 33, 34, 35, 36]]
        for ids, value in zip(prompts, rows(model, prompts), strict=True):
            assert torch.equal(value, last_block(model, ids))
        assert relative_error(last_block(model, IDS), last_block(tiny_model("llama", seed=1), IDS)) > 1e-3

    def test_packed_weights_are_part_of_the_identity(self):
        """They are neither parameters nor buffers."""

        def other_weight(value):
            model = tiny_model("llama", seed=1)
            with torch.no_grad():
                model.model.layers[2].mlp.up_proj.weight[0, 0] = value
            return dynamic(model)

        rows(other_weight(1.0), [IDS])
        assert missing(other_weight(1.0)) == 0
        assert missing(other_weight(-1.0)) == 1
        assert missing(tiny_model("llama", seed=1)) == 1

    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
    def test_packed_weights_that_are_replaced(self, dtype):
        model = dynamic(tiny_model("llama", seed=1), dtype)
        rows(model, [IDS])
        assert missing(model) == 0
        part = model.model.layers[2].mlp.up_proj
        weight, bias = part._weight_bias()
        part.set_weight_bias(dynamic(tiny_model("llama", seed=2), dtype).model.layers[2].mlp.up_proj.weight(), bias)
        assert missing(model) == 1
        part.set_weight_bias(weight, bias)
        assert missing(model) == 0

    def test_8_bits_and_16_bits_are_two_models(self):
        rows(dynamic(tiny_model("llama", seed=1)), [IDS])
        assert missing(dynamic(tiny_model("llama", seed=1), torch.float16)) == 1


class TestQuanto:
    @pytest.fixture
    def quanto(self):
        return pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")

    def quantized(self, quanto, weights="int8", seed=1, frozen=True, **more):
        model = tiny_model("llama", seed=seed)
        quanto.quantize(model, weights=getattr(quanto, f"q{weights}"), **more)
        if frozen:
            quanto.freeze(model)
        return model

    def test_live(self, quanto):
        model = self.quantized(quanto)
        expected = last_block(model, IDS)
        assert relative_error(expected, last_block(tiny_model("llama", seed=1), IDS)) > 1e-3
        # Weights alone are quantised: batches of any lengths.
        assert activation_scale(model) == "none"
        values = rows(model, [IDS, [9]])
        assert relative_error(values[0], expected) < FLOAT32
        assert relative_error(values[1], last_block(model, [9])) < FLOAT32
        assert missing(self.quantized(quanto)) == 0

    @pytest.mark.parametrize(
        "other",
        [{"seed": 2}, {"weights": "int4"}, {"exclude": "*.mlp.*"}],
        ids=["other weights", "fewer bits", "fewer modules"],
    )
    def test_another_quantised_model(self, quanto, other):
        rows(self.quantized(quanto), [IDS])
        assert missing(self.quantized(quanto, **other)) == 1
        assert missing(tiny_model("llama", seed=1)) == 1

    def test_weights_that_are_quantised_as_they_are_used(self, quanto):
        """Not frozen: the parameters are those of the plain model, whatever they are rounded to."""
        model = self.quantized(quanto, frozen=False)
        assert relative_error(rows(model, [IDS])[0], last_block(model, IDS)) < FLOAT32
        assert missing(self.quantized(quanto, weights="int4", frozen=False)) == 1
        assert missing(tiny_model("llama", seed=1)) == 1

    def test_weights_that_change(self, quanto):
        model = self.quantized(quanto)
        rows(model, [IDS])
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight._data[0, 0] += 1
        assert missing(model) == 1

    def test_activations_too(self, quanto):
        model = self.quantized(quanto, activations=quanto.qint8, frozen=False)
        with torch.no_grad(), quanto.Calibration():
            model(input_ids=torch.tensor([list(range(20))]))
        quanto.freeze(model)
        expected = last_block(model, IDS)
        assert relative_error(expected, last_block(self.quantized(quanto), IDS)) > 1e-3
        # By scales that were fixed on the calibration, so that no prompt sees another.
        assert activation_scale(model) == "none"
        values = rows(model, [IDS, [200, 201, 202]])
        assert relative_error(values[0], expected) < FLOAT32
        assert missing(self.quantized(quanto)) == 1

    def test_by_path(self, quanto, folder):
        from transformers import AutoModelForCausalLM, QuantoConfig

        config = QuantoConfig(weights="int8")
        reference = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=QuantoConfig(weights="int8")
        ).eval()
        cache = ac.UnifiedCache(folder, layers="last", cache_pooled=False, quantization_config=config)
        values, mask = cache.get_activations([IDS, [9]])
        assert relative_error(values[0][mask[0]], last_block(reference, IDS)) < FLOAT32
        assert relative_error(values[1][mask[1]], last_block(reference, [9])) < FLOAT32
        # Written another way it is the same; without loading, and whatever transformers noted on the object.
        for same in (config, QuantoConfig(weights="int8"), {"quant_method": "quanto", "weights": "int8"}):
            assert missing(folder, quantization_config=same) == 0
        assert missing(folder, quantization_config=QuantoConfig(weights="int4")) == 1
        assert missing(folder) == 1

    def test_by_path_a_change_in_memory_is_noticed(self, quanto, folder):
        cache = ac.UnifiedCache(
            folder, layers="last", quantization_config={"quant_method": "quanto", "weights": "int8"}
        )
        cache.warmup([IDS])
        with torch.no_grad():
            cache.model.model.norm.weight.mul_(2)
        with pytest.raises(errors.ModelChangedError):
            cache.warmup([IDS[:2]])


def test_a_method_that_is_not_there(folder):
    config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(errors.ModelLoadError, match=r"cannot load .*llama"):
        ac.UnifiedCache(folder, quantization_config=config).warmup([IDS])
    with pytest.raises(errors.OptionError, match="expected a config object of transformers"):
        ac.UnifiedCache(folder, quantization_config=object())


def test_scales_that_a_quantiser_keeps_on_its_parameters():
    """As bitsandbytes does: the same bytes with another scale are another weight."""

    class Packed(torch.nn.Parameter):
        pass

    class State:
        def __init__(self, scale):
            self.absmax = torch.tensor([scale])

    def digest(scale, state):
        layer = torch.nn.Linear(2, 2)
        layer.weight = Packed(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        layer.bias = None
        layer.weight.SCB = torch.tensor([scale])
        layer.weight.quant_state = State(state)
        return live_weights_digest(layer)

    assert digest(1.0, 1.0) == digest(1.0, 1.0)
    assert len({digest(1.0, 1.0), digest(2.0, 1.0), digest(1.0, 2.0)}) == 3
