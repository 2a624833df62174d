"""Quantised models: what runs on a CPU, with its values, its identity and what its batches may hold."""

from __future__ import annotations

import warnings

import pytest
import torch

from actcache.model.quantized import activation_scale
from actcache.testing.tiny import tiny_model


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
