"""Prompts that share a forward pass give what each gives alone, and are off where the guards are taken away."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.model.invariance import batch_policy
from actcache.model.source import ModelSource
from actcache.testing.tiny import PAD, VOCABULARY, tiny_model

FLOAT32 = 1e-5


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
