"""Which prompts may share a forward pass: what a config, arguments of loading and the modules say of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import actcache as ac
from actcache.model.invariance import BatchPolicy, batch_policy
from actcache.model.loading import open_source
from actcache.model.options import LoadOptions
from actcache.testing.tiny import VOCABULARY, tiny_model

# Values that a config of each family holds, of either generation of transformers; the rest of it does not matter here.
EQUAL: dict[str, dict[str, Any]] = {
    "dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "longrope": {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}},
    "longrope-old-name": {"model_type": "phi3", "rope_scaling": {"type": "su"}},
    "longrope-older-name": {"model_type": "phi3", "rope_scaling": {"type": "yarn"}},
    "by-layer": {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
    "nested": {"model_type": "llava", "text_config": {"rope_parameters": {"rope_type": "longrope"}}},
    "mamba": {"model_type": "mamba", "state_size": 16, "conv_kernel": 4},
    "jamba": {"model_type": "jamba", "mamba_d_state": 16},
    "granite": {"model_type": "granitemoehybrid", "layer_types": ["attention", "mamba"]},
    "qwen3_next": {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": {"linear_conv_kernel_dim": 4}},
    "recurrent_gemma": {"model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "rwkv": {"model_type": "rwkv", "attention_hidden_size": 64},
    "never-seen": {"model_type": "tomorrow", "ssm_state_size": 64},
    "fnet": {"model_type": "fnet"},
    "convbert": {"model_type": "convbert", "conv_kernel_size": 9},
    "big_bird": {"model_type": "big_bird", "attention_type": "block_sparse"},
}
ANY: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "yarn": {"model_type": "gpt_oss", "rope_scaling": {"rope_type": "yarn"}, "layer_types": ["sliding_attention"]},
    "bloom": {"model_type": "bloom", "offset_alibi": 100},
    "bert": {"model_type": "bert", "id2label": {0: "a", 1: "b"}},
    "t5": {"model_type": "t5", "is_encoder_decoder": True, "relative_attention_num_buckets": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8},
}
ALONE: dict[str, dict[str, Any]] = {
    "switch": {"model_type": "switch_transformers", "expert_capacity": 64},
    "nllb-moe": {"model_type": "nllb-moe", "expert_capacity": 64, "moe_eval_capacity_token_fraction": 0.5},
    "quantised": {"model_type": "llama", "quantization_config": {"quant_method": "something-new"}},
    "and-recurrent": {"model_type": "mamba", "state_size": 16, "expert_capacity": 4},
}


@pytest.mark.parametrize("name", [*EQUAL, *ANY, *ALONE])
def test_the_config_decides(name):
    lengths = "equal" if name in EQUAL else "any" if name in ANY else "alone"
    policy = batch_policy((EQUAL | ANY | ALONE)[name])
    assert policy.lengths == lengths
    assert policy.why.endswith(".")
    assert (policy.why == BatchPolicy.why) == (lengths == "any")


def test_what_is_reset_before_a_pass():
    assert {name for name, config in (EQUAL | ANY | ALONE).items() if batch_policy(config).forget_lengths} == {
        "dynamic",
        "longrope",
        "longrope-old-name",
        "longrope-older-name",
        "by-layer",
        "nested",
        "big_bird",
    }


class TestAttentionThatAShortPassExchanges:
    """BigBird: sparse for long sequences, full for short ones, and full for ever after the first short one."""

    SHORT, LONG = [5, 6, 7], [(7 * i) % 250 + 3 for i in range(160)]

    def model(self):
        from transformers import BigBirdConfig, BigBirdForMaskedLM

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = BigBirdConfig(
            vocab_size=VOCABULARY, block_size=8, num_random_blocks=1, max_position_embeddings=256, **sizes
        )
        torch.manual_seed(0)
        model = BigBirdForMaskedLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)
        return model

    def fresh(self, prompt):
        with torch.no_grad():
            states = self.model()(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        return states[-1][0]

    def test_each_prompt_gives_what_it_gives_a_fresh_model(self):
        extractor = ac.ActivationExtractor(self.model(), layers="last")
        for prompts in ([self.SHORT, self.LONG], [self.LONG], [self.SHORT], [self.LONG]):
            for prompt, ours in zip(prompts, extractor.extract(prompts)["resid_post.1"], strict=True):
                torch.testing.assert_close(ours, self.fresh(prompt), rtol=0, atol=1e-4)

    def test_looking_at_the_model_leaves_its_attention(self):
        model = self.model()
        ac.sites(model)
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([self.LONG]), output_hidden_states=True).hidden_states[-1][0]
        assert torch.equal(ours, self.fresh(self.LONG))

    def test_extraction_leaves_the_model_the_same(self):
        model = self.model()
        ac.UnifiedCache(model, layers="last").warmup([self.SHORT])
        assert ac.UnifiedCache(model, layers="last").plan([self.SHORT]).missing == 0

    def test_the_guard_is_needed(self):
        model = self.model()
        with torch.no_grad():
            model(input_ids=torch.tensor([self.SHORT]))
            after = model(input_ids=torch.tensor([self.LONG]), output_hidden_states=True).hidden_states[-1][0]
        assert (after - self.fresh(self.LONG)).abs().max() > 1e-2


def test_a_config_file_that_leaves_out_its_defaults(tmp_path):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("expert_capacity")
    path.write_text(json.dumps(values))
    source = open_source(str(tmp_path), LoadOptions(device="cpu"))
    source.model()
    assert source.batch_policy().lengths == "alone"


def test_arguments_of_loading_that_make_lengths_count(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    options = LoadOptions(device="cpu", model_kwargs={"rope_scaling": rope})
    source = open_source(str(tmp_path), options)
    source.model()
    policy = source.batch_policy()
    assert (policy.lengths, policy.forget_lengths) == ("equal", True)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "mpnet", "esm", "longformer", "mra"])
def test_families_that_make_their_own_positions_are_given_none(model_type):
    assert not batch_policy({"model_type": model_type}).position_ids
    assert batch_policy({"model_type": "bert"}).position_ids


def test_the_modules_tell_it_of_a_family_without_a_name():
    roberta, bert = tiny_model("roberta"), tiny_model("bert")
    assert not batch_policy({"model_type": "unknown"}, model=roberta).position_ids
    assert batch_policy({"model_type": "unknown"}, model=bert).position_ids


def test_a_model_without_a_mask_is_not_padded():
    class Unmasked(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert batch_policy({"model_type": "unknown"}, model=Unmasked()).lengths == "equal"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_activations_quantised_over_the_batch_in_memory_only():
    model = tiny_model("llama")
    assert batch_policy(model.config.to_dict(), model=model).lengths == "any"
    quantised = torch.ao.nn.quantized.dynamic.Linear(32, 32)
    model.model.layers[0].mlp.down_proj = quantised
    policy = batch_policy(model.config.to_dict(), model=model)
    assert policy.lengths == "alone"
    assert "quantised" in policy.why
