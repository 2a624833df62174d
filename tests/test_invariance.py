"""Which prompts may share a forward pass, on which model, and what happens to those that share one wrongly."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.model.invariance import BatchPolicy, batch_policy
from actcache.model.loading import open_source
from actcache.model.options import LoadOptions
from actcache.model.source import ModelSource
from actcache.testing.tiny import EOS, PAD, VOCABULARY, tiny_model

FLOAT32 = 1e-5

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


def prompts_with_padding_inside() -> list[list[int]]:
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 17, 6, 40, 12, 33, 17, 9)]
    # The padding id is a token like any other, at the start, inside and at the end of a prompt.
    prompts[2] = [PAD, 5, PAD, PAD, 6, PAD]
    prompts[6][8] = PAD
    return prompts


def worst(family: str, batch_size: int | None = 8) -> float:
    """The largest relative error over all prompts, of the last block's output against each prompt by itself."""
    model = zoo.model_of(family)
    dot = "decoder." if zoo.FAMILIES[family].encoder_decoder else ""
    site = f"{dot}resid_post.{zoo.stack_depths(family, model)[dot[:-1]] - 1}"
    prompts = prompts_with_padding_inside()
    ours = ac.ActivationExtractor(model, sites=site, batch_size=batch_size).extract(prompts)
    return max(
        zoo.relative_error(ours[site][i], zoo.reference(family, 0, tuple(ids))[site]) for i, ids in enumerate(prompts)
    )


FAMILIES = [
    "llama-dynamic",
    "llama-longrope",
    "phi3-longrope",
    "mamba",
    "mamba2",
    "qwen3_next",
    "roberta",
    "bert",
    "modernbert",
    "opt",
    "opt-350m",
    "bloom",
    "falcon-rw",
    "mistral",
    "gpt_oss",
    "t5",
    "bart",
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_gives_what_it_gives_alone(family, batch_size):
    assert worst(family, batch_size) < FLOAT32


class TestWithoutTheGuard:
    """Each of these is far off when the policy is taken away: the guards above are needed."""

    @pytest.fixture
    def policy(self, monkeypatch):
        def change(**values):
            right = ModelSource.batch_policy
            monkeypatch.setattr(ModelSource, "batch_policy", lambda self: dataclasses.replace(right(self), **values))

        return change

    @pytest.mark.parametrize("family", ["llama-dynamic", "llama-longrope", "phi3-longrope"])
    def test_lengths_mixed_where_the_longest_counts(self, family, policy):
        policy(lengths="any")
        assert worst(family) > 1e-2

    def test_a_longer_pass_remembered(self, policy):
        policy(forget_lengths=False)
        assert worst("llama-dynamic") > 1e-3

    def test_positions_counted_for_a_model_that_counts_from_its_ids(self, policy):
        policy(position_ids=True)
        assert worst("roberta") > 1e-2

    @pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::DeprecationWarning")
    def test_activations_quantised_over_the_batch(self, policy):
        model = tiny_model("llama")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)
        prompts = prompts_with_padding_inside()
        expected = [zoo.alone("llama", model, ids)["resid_post.3"] for ids in prompts]

        def error() -> float:
            ours = ac.ActivationExtractor(model, layers=3).extract(prompts)["resid_post.3"]
            return max(zoo.relative_error(one, other) for one, other in zip(ours, expected, strict=True))

        assert error() < FLOAT32
        policy(lengths="any")
        assert error() > 1e-2

    @pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "t5", "bart"])
    def test_padding_unmasked_where_tokens_look_ahead(self, family, monkeypatch):
        from actcache.model.forward_inputs import ForwardInputs

        make = ForwardInputs.make
        monkeypatch.setattr(
            ForwardInputs, "make", lambda *args: {k: v for k, v in make(*args).items() if k != "attention_mask"}
        )
        assert worst(family) > 1e-2


def bert_like(kind: str, **more: Any) -> Any:
    """A model of a family outside the zoo, whose layers mix what a mask should keep apart."""
    import transformers

    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "vocab_size": VOCABULARY, "pad_token_id": PAD,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**values, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("kind", ["fnet", "convbert", "mobilebert"])
def test_padding_reaches_real_tokens_through_any_mask_here(kind):
    more = {"fnet": {}, "convbert": {"embedding_size": 32}, "mobilebert": {"embedding_size": 32}}[kind]
    model = bert_like(kind, **more)
    short, long = [5, 6, 7], [8, 9, 10, 11, 12]
    ids = torch.tensor([short + [3] * 2, long])
    inputs = {"input_ids": ids} | ({} if kind == "fnet" else {"attention_mask": (ids != 3).long()})
    with torch.no_grad():
        together = model(**inputs).last_hidden_state[0, :3]
        alone = model(input_ids=torch.tensor([short])).last_hidden_state[0]
        twice = model(input_ids=torch.tensor([short, [9, 9, 9]])).last_hidden_state[0]
    assert zoo.relative_error(together, alone) > 1e-3
    assert zoo.relative_error(twice, alone) < FLOAT32
    for known in (None, model):
        policy = batch_policy(model.config.to_dict(), model=known)
        assert policy.lengths == "equal" and policy.coupled


def test_a_capacity_shared_by_a_batch_displaces_tokens():
    """NLLB's experts, given two prompts, drop tokens that neither prompt loses alone."""
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    config = NllbMoeConfig(
        d_model=16, num_experts=4, expert_capacity=4, moe_eval_capacity_token_fraction=0.0, router_jitter_noise=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = NllbMoeSparseMLP(config, ffn_dim=24).eval()
        prompts = torch.randn(4, 6, 16)

    def run(hidden):
        with torch.no_grad():
            output = layer(hidden, None) if "padding_mask" in layer.forward.__code__.co_varnames else layer(hidden)
        return output[0] if isinstance(output, tuple) else output

    together = run(prompts)
    alone = torch.cat([run(prompt[None]) for prompt in prompts])
    assert zoo.relative_error(together, alone) > 1e-2
    assert batch_policy(config.to_dict()).lengths == "alone"


def test_each_prompt_runs_alone_where_it_must(monkeypatch):
    from actcache.extract.backends.local import LocalSession

    sizes = []
    run = LocalSession.run
    monkeypatch.setattr(LocalSession, "run", lambda self, ids, *rest: sizes.append(len(ids)) or run(self, ids, *rest))
    model = tiny_model("llama")
    model.config.expert_capacity = 8
    ac.ActivationExtractor(model, layers=0).extract([[1, 2], [3, 4], [5, 6, 7]])
    assert sizes == [1, 1, 1]


def test_the_plan_says_why_lengths_are_kept_apart():
    assert ac.UnifiedCache(tiny_model("llama")).plan([[1]]).batching == ""
    plan = ac.UnifiedCache(tiny_model("llama-longrope")).plan([[1]])
    assert plan.batching == "The frequencies of its rotary embedding depend on the longest prompt of the batch."


def test_rows_that_are_not_the_prompts_tokens_are_refused(monkeypatch):
    """A model that puts tokens of its own in front would have them read as the prompt's."""
    model = tiny_model("llama")
    forward = type(model.model.layers[0]).forward

    def with_a_token_more(self, hidden_states, *args, **kwargs):
        output = forward(self, hidden_states, *args, **kwargs)
        return torch.cat([output[:, :1], output], 1) if self is model.model.layers[0] else output

    extractor = ac.ActivationExtractor(model, sites="resid_post.0")
    extractor.extract([[1, 2]])
    monkeypatch.setattr(type(model.model.layers[0]), "forward", with_a_token_more)
    with pytest.raises(errors.SiteUnavailableError, match=r"shape \[1, 3, 32\] for 1 prompts of up to 2 tokens"):
        extractor.extract([[1, 2]])


class TestOnePass:
    """`run_with_cache` makes one pass of what it is given."""

    def test_prompts_that_would_change_each_other_are_refused(self):
        model = tiny_model("llama-longrope")
        with pytest.raises(errors.PromptError, match=r"longest prompt of the batch\. Pass prompts of one length"):
            ac.run_with_cache(model, [[5, 6, 7], [8, 9]], sites="resid_post")
        model = tiny_model("llama")
        model.config.expert_capacity = 8
        with pytest.raises(errors.PromptError, match="Pass one prompt at a time"):
            ac.run_with_cache(model, [[5, 6], [8, 9]], sites="resid_post")
        ac.run_with_cache(model, [[5, 6]], sites="resid_post")

    def test_a_longer_pass_before_does_not_count(self):
        model = tiny_model("llama-dynamic")
        short = zoo.prompts_of(0, [18])[0]
        fresh = ac.run_with_cache(tiny_model("llama-dynamic"), short, sites="resid_post")[1]
        ac.run_with_cache(model, zoo.prompts_of(0, [40])[0], sites="resid_post")
        assert torch.equal(
            ac.run_with_cache(model, short, sites="resid_post")[1]["resid_post.3"], fresh["resid_post.3"]
        )

    def test_a_padded_batch_of_a_family_with_positions_of_its_own(self):
        model = zoo.model_of("roberta")
        prompts = prompts_with_padding_inside()
        cache = ac.run_with_cache(model, prompts, sites="resid_post")[1]
        for row, ids in zip(cache.rows("resid_post.3"), prompts, strict=True):
            assert zoo.relative_error(row, zoo.reference("roberta", 0, tuple(ids))["resid_post.3"]) < FLOAT32

    def test_states_run_padded_all_the_same(self):
        model = zoo.model_of("mamba")
        prompts = prompts_with_padding_inside()
        cache = ac.run_with_cache(model, prompts, sites="resid_post")[1]
        for row, ids in zip(cache.rows("resid_post.3"), prompts, strict=True):
            assert zoo.relative_error(row, zoo.reference("mamba", 0, tuple(ids))["resid_post.3"]) < FLOAT32


class _Config(ModelSource):
    """What is known of a model by its config alone: loading it would be an error."""

    name = "a model"

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    config = property(lambda self: self._config)
    loaded = property(lambda self: False)
    weight_bytes = property(lambda self: 0)
    dtype = "float32"

    def identity(self):
        raise AssertionError

    tokenizer_source = model = model_to_run = head = predicts_next = end_tokens = identity


SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({"n_embd": 8, "n_layer": 3, "n_positions": 50}, {"d_model": 8, "n_layers": 3, "context_length": 50}),
    "gptj": ({"n_embd": 8, "n_layer": 3, "n_positions": 50}, {"d_model": 8, "n_layers": 3, "context_length": 50}),
    "gpt_neo": (
        {"hidden_size": 8, "num_layers": 2, "max_position_embeddings": 50,
         "attention_types": [[["global", "local"], 1]]},
        {"d_model": 8, "n_layers": 2, "context_length": 50},
    ),
    "llama": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 50, "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "opt": (
        {"hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 3, "max_position_embeddings": 50,
         "num_attention_heads": 4},
        {"d_model": 32, "n_layers": 3, "context_length": 50},
    ),
    "bloom": ({"hidden_size": 8, "n_layer": 3}, {"d_model": 8, "n_layers": 3, "context_length": None}),
    "falcon": (
        {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "alibi": True},
        {"d_model": 8, "n_layers": 3, "context_length": None},
    ),
    "mpt": ({"d_model": 8, "n_layers": 3, "max_seq_len": 50}, {"d_model": 8, "n_layers": 3, "context_length": 50}),
    "mamba": ({"hidden_size": 8, "num_hidden_layers": 3}, {"d_model": 8, "n_layers": 3, "context_length": None}),
    "t5": (
        {"d_model": 8, "num_layers": 3, "num_decoder_layers": 2, "n_positions": 50},
        {"d_model": 8, "encoder": 3, "decoder": 2, "n_layers": 5, "context_length": None},
    ),
    "bart": (
        {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 50},
        {"d_model": 8, "encoder": 3, "decoder": 2, "n_layers": 5, "context_length": 50},
    ),
    "bert": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 50, "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "distilbert": (
        {"dim": 8, "hidden_dim": 99, "n_layers": 3, "max_position_embeddings": 50, "n_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "roberta": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 514, "pad_token_id": 1,
         "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 512},
    ),
    "modernbert": (
        {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 50, "num_attention_heads": 2},
        {"d_model": 8, "n_layers": 3, "context_length": 50},
    ),
    "led": (
        {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "max_encoder_position_embeddings": 60,
         "max_decoder_position_embeddings": 50},
        {"d_model": 8, "encoder": 3, "decoder": 2, "n_layers": 5, "context_length": 50},
    ),
}  # fmt: skip


@pytest.mark.parametrize("raw", [False, True], ids=["object", "file"])
@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_known_from_the_config(kind, raw, tmp_path):
    """From ``config.to_dict()`` of a live model, and from the file that `save_pretrained` writes."""
    import json

    from transformers import AutoConfig

    values, expected = SIZES[kind]
    made = AutoConfig.for_model(kind, vocab_size=77, **values)
    config = made.to_dict()
    if raw:
        made.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
    source = _Config(config)
    assert source.vocab_size == 77
    for name, value in expected.items():
        found = source.depth(name) if name in ("encoder", "decoder") else getattr(source, name)
        assert found == value, name


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 200),
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 4}}, 400),
        (
            {"max_position_embeddings": 100,
             "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}},
            400,
        ),
        (
            {"max_position_embeddings": 800,
             "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 100}},
            800,
        ),
        (
            {"max_position_embeddings": 100, "model_type": "gemma3_text",
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            100,
        ),
        ({"max_position_embeddings": 514, "model_type": "xlm-roberta"}, 512),
        ({"max_position_embeddings": -1, "model_type": "xlnet"}, None),
        ({"text_config": {"max_position_embeddings": 30}, "max_position_embeddings": 9}, 30),
    ],
)  # fmt: skip
def test_the_longest_prompt(config, length):
    assert _Config(config).context_length == length


def test_the_last_position_of_the_limit_runs_and_the_next_does_not():
    model = zoo.model_of("roberta")
    extractor = ac.ActivationExtractor(model, layers=0)
    limit = extractor.source.context_length
    extractor.extract([[7] * limit])
    with pytest.raises(errors.PromptError, match=f"the context of .* is {limit}"):
        extractor.extract([[7] * (limit + 1)])
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(input_ids=torch.full((1, limit + 1), 7))


def test_bart_alone_without_its_encoder():
    config = {"model_type": "bart", "is_decoder": True, "encoder_layers": 3, "decoder_layers": 2, "bos_token_id": EOS}
    source = _Config(config)
    assert source.stacks == (None,)
    assert source.n_layers == 2
