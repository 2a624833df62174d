"""The selftest: right on models that are right, and wrong, with the place named, wherever something is broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actcache as ac
from actcache.demo import model_path
from actcache.errors import LayerRangeError, MissedModuleError, OptionError
from actcache.model.anatomy import describe
from actcache.selftest import prompts as selftest_prompts
from actcache.selftest.ledger import tolerance_of
from actcache.selftest.prompts import make_prompts, thresholds
from actcache.testing.tiny import BOS, EOS, PAD, VOCABULARY, tiny_model
from selftest_helpers import check

# -- models that are right


def test_a_right_model_is_right_at_every_site() -> None:
    model = tiny_model("llama")
    report = ac.selftest(model)
    assert report.ok
    assert report.verdict.startswith("Right: ")
    assert report.tolerance == 1e-5
    measured = [cell for cell in report.cells if cell.verdict in ("exact", "within tolerance")]
    assert {cell.site for cell in measured} == {str(i.site) for i in ac.sites(model)}
    assert all(cell.error is not None and cell.error <= 1e-5 for cell in measured)
    verdicts = {cell.site: cell.verdict for cell in report.cells}
    assert verdicts["embed"] == "exact"
    assert verdicts["cross_attn_out"] == verdicts["mixer_out"] == "not applicable"
    done = {c.name for c in report.checks if c.verdict in ("exact", "within tolerance")}
    assert done == {
        "finite", "identities", "hidden states", "alone", "equal lengths", "padded", "right padding", "left padding",
        "store", "pooled", "heads", "patterns", "mixing",
    }  # fmt: skip
    assert check(report, "hidden states").verdict == "exact"
    assert (report.blocks, report.forms) == ({"": 4}, {"": ["sequential"]})
    assert str(report).splitlines()[-1] == report.verdict
    assert "alone: exact, largest error 0.0e+00" in str(report)


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    random_state = torch.get_rng_state()
    ac.selftest(model, layers="last")
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    foreign = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not hook.__module__.startswith("transformers")
    ]
    assert not foreign
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


def test_a_module_may_hold_the_forward_of_its_class() -> None:
    """transformers 4.57 leaves it on every block whose outputs it has recorded."""
    model = tiny_model("llama")
    layers: Any = model.model.layers
    layers[1].forward = layers[1].forward
    assert ac.selftest(model, layers=[1], max_tokens=3).ok
    # Another block's: what is to be read never runs.
    layers[1].forward = layers[0].forward
    with pytest.raises(MissedModuleError, match=r"attn_out\.1"):
        ac.selftest(model, layers=[1])


def test_a_model_by_its_folder() -> None:
    report = ac.selftest(model_path(), layers=[0, -1], seed=3)
    assert report.ok
    assert {cell.site for cell in report.cells if cell.site.startswith("resid_post")} == {
        "resid_post.0",
        "resid_post.5",
    }
    assert report.seed == 3


def test_half_precision_has_a_tolerance_of_its_own() -> None:
    report = ac.selftest(tiny_model("gpt2").to(torch.bfloat16))
    assert report.ok
    assert report.dtype == "bfloat16"
    assert report.tolerance == tolerance_of(torch.bfloat16, 4) > 1e-2
    # Prompts of one length need no mask: the very bits.
    assert check(report, "equal lengths").verdict == "exact"
    assert check(report, "padded").verdict == "within tolerance"


def test_both_stacks_of_an_encoder_decoder() -> None:
    report = ac.selftest(tiny_model("t5-v1.1"))
    assert report.ok
    assert report.blocks == {"encoder": 4, "decoder": 3}
    verdicts = {cell.site: cell.verdict for cell in report.cells}
    assert verdicts["encoder.cross_attn_out"] == "not applicable"
    assert verdicts["decoder.cross_attn_out.2"] in ("exact", "within tolerance")
    assert check(report, "left padding").verdict == "not applicable"


def test_prompts_that_may_not_meet_are_never_padded() -> None:
    report = ac.selftest(tiny_model("llama-dynamic"))
    assert report.ok
    assert report.batching == "equal"
    assert check(report, "padded").verdict == "not applicable"
    assert check(report, "padded").why == report.batching_why
    assert check(report, "equal lengths").compared > 0
    # Both sides of the threshold.
    assert {16, 17} <= set(report.prompt_lengths)


@pytest.mark.slow
def test_a_deep_model_costs_no_more_passes() -> None:
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    counts = []
    for depth in (2, 48):
        model = tiny_model("llama", num_hidden_layers=depth)
        describe(model).findings  # noqa: B018
        passes[0] = 0
        model.model.layers[0].register_forward_hook(count)
        report = ac.selftest(model, allow_hooks=[count.__qualname__])
        assert report.ok
        counts.append(passes[0])
    assert counts[0] == counts[1] < 4 * len(report.prompt_lengths)
    assert sum(cell.site.startswith("mlp_out.") for cell in report.cells) == 48


# -- prompts


def test_lengths_lie_on_both_sides_of_every_threshold() -> None:
    config = {
        "sliding_window": 8,
        "use_sliding_window": True,
        "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 30},
        "max_position_embeddings": 200,
        "id2label": {0: "sliding_window"},
    }
    made = make_prompts(config, vocabulary=100, context=200, max_tokens=160, seed=0)
    assert {1, 2, 8, 9, 30, 31} <= set(map(len, made.ids))
    assert made.not_reached == []
    made = make_prompts(config, vocabulary=100, context=200, max_tokens=20, seed=0)
    assert made.not_reached == ["original_max_position_embeddings of 30 tokens"]
    assert max(map(len, made.ids)) <= 20
    # What the context does not allow is never reached by anyone.
    made = make_prompts(config, vocabulary=100, context=20, max_tokens=160, seed=0)
    assert made.not_reached == []
    assert max(map(len, made.ids)) == 20


def test_thresholds_by_their_names() -> None:
    assert thresholds({"sliding_window": 8, "use_sliding_window": False}) == {}
    assert thresholds({"sliding_window": None, "window_size": 256}) == {"window_size": 256}
    assert thresholds({"text_config": {"attention_window": [512, 256]}}) == {"attention_window": 256}
    assert thresholds({"local_attention": 128}) == {"local_attention": 64}
    plain = {"max_position_embeddings": 16}
    assert thresholds(plain) == {}
    assert thresholds({**plain, "rope_scaling": {"type": "dynamic"}}) == {"max_position_embeddings": 16}


def test_ids_are_spread_over_the_vocabulary_and_hold_special_ones() -> None:
    config = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": [EOS], "image_token_id": 50}
    made = make_prompts(config, vocabulary=VOCABULARY, context=None, max_tokens=64, seed=1)
    ids = [i for prompt in made.ids for i in prompt]
    assert min(ids) >= 0 and max(ids) < VOCABULARY
    assert 50 not in ids
    for part in range(8):
        assert any(part * 32 <= i < (part + 1) * 32 for i in ids)
    assert any(PAD in prompt[1:-1] and EOS in prompt for prompt in made.ids)
    assert len({tuple(prompt) for prompt in made.ids}) == len(made.ids)
    assert make_prompts(config, vocabulary=VOCABULARY, context=None, max_tokens=64, seed=1) == made
    assert make_prompts(config, vocabulary=VOCABULARY, context=None, max_tokens=64, seed=2) != made


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="max_tokens is 1"):
        ac.selftest(tiny_model("gpt2"), max_tokens=1)
    with pytest.raises(LayerRangeError, match="layer 9"):
        ac.selftest(tiny_model("gpt2"), layers=9)
    assert selftest_prompts.make_prompts({}, vocabulary=9, context=None, max_tokens=2, seed=0).ids
