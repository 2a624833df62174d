"""The selftest: right on models that are right, and wrong, with the place named, wherever something is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.capture import inputs as capture_inputs
from actcache.demo import model_path
from actcache.errors import LayerRangeError, MissedModuleError, OptionError
from actcache.extract.answer import Lookup
from actcache.model import forward_inputs, head_outputs, invariance
from actcache.model.anatomy import describe
from actcache.model.attention_calls import AttentionCalls
from actcache.selftest import prompts as selftest_prompts
from actcache.selftest.ledger import Ledger, row_errors, row_scale, tolerance_of
from actcache.selftest.prompts import make_prompts, thresholds
from actcache.testing.tiny import BOS, EOS, PAD, VOCABULARY, tiny_model


def wrong_cells(report: ac.SelftestReport) -> set[str]:
    return {cell.site for cell in report.cells if cell.verdict == "wrong"}


def wrong_checks(report: ac.SelftestReport) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "wrong"}


def check(report: ac.SelftestReport, name: str) -> Any:
    return next(check for check in report.checks if check.name == name)


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


# -- something is broken


class Meddling(nn.Module):
    """A module whose output depends on what else is in its batch."""

    def __init__(self, inner: nn.Module, meddle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self._meddle = meddle

    def forward(self, hidden: Tensor) -> Any:
        output = self.inner(hidden)
        # Mixtures of experts return their routing beside it in transformers 4.57.
        return (self._meddle(output[0]), *output[1:]) if isinstance(output, tuple) else self._meddle(output)


def mlp_of(layer: nn.Module) -> str:
    return "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"


def mix_rows(hidden: Tensor) -> Tensor:
    return hidden + 0.01 * (hidden.mean(0, keepdim=True) - hidden)


def by_batch_size(hidden: Tensor) -> Tensor:
    return hidden * (1 + 1e-3 * (hidden.shape[0] - 1))


@pytest.mark.parametrize("meddle", [mix_rows, by_batch_size])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_block_that_looks_at_the_batch_is_found(family: str, meddle: Callable[[Tensor], Tensor]) -> None:
    model = tiny_model(family)
    layer = model.model.layers[2]
    setattr(layer, mlp_of(layer), Meddling(getattr(layer, mlp_of(layer)), meddle))
    report = ac.selftest(model)
    assert not report.ok
    assert {"equal lengths", "padded", "right padding", "left padding", "pooled"} <= wrong_checks(report)
    assert check(report, "alone").verdict == check(report, "store").verdict == "exact"
    assert {"mlp_out.2", "resid_post.2", "resid_pre.3", "logits"} <= wrong_cells(report)
    assert not wrong_cells(report) & {"resid_post.1", "resid_mid.2", "attn_out.2", "mlp_out.1"}
    assert report.verdict.startswith("Wrong: mlp_out.2 ")


def test_what_is_read_from_the_store_is_held_against_what_was_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Lookup.rows

    def one_bit_off(self: Lookup) -> list[list[Any]]:
        rows = whole(self)
        if len(rows[3]) > 1:
            place = list(self.question.names).index("attn_out.1")
            rows[3][place] = rows[3][place].copy()
            rows[3][place].view("uint8")[0, 0] ^= 1
        return rows

    monkeypatch.setattr(Lookup, "rows", one_bit_off)
    report = ac.selftest(tiny_model("llama"))
    assert not report.ok
    assert wrong_checks(report) == {"store"}
    assert wrong_cells(report) == {"attn_out.1"}
    assert "attn_out.1" in report.verdict


def test_an_error_of_a_check_is_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_there(self: Lookup) -> list[list[Any]]:
        raise ac.errors.NotCachedError("3 of 15 prompts are not stored")

    monkeypatch.setattr(Lookup, "rows", nothing_there)
    report = ac.selftest(tiny_model("llama"), layers="last")
    assert not report.ok
    assert wrong_checks(report) == {"store"}
    assert "3 of 15 prompts are not stored" in report.verdict


def scale_the_output(layer: Any) -> None:
    class Scaling(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            output: Tensor = super().forward(hidden_states, **kwargs)
            return output * 1.01

    layer.__class__ = Scaling


def test_a_model_that_computes_no_numbers_is_not_called_right() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = torch.nan
    report = ac.selftest(model)
    assert not report.ok
    assert "finite" in wrong_checks(report)
    assert "inf or nan" in report.verdict
    assert wrong_cells(report) == {"logits"}
    refused = {cell.site: cell.why for cell in report.cells if cell.verdict == "refused"}
    assert refused["resid_post"] == "block 2 (model.layers.2) returns nan"


def test_an_identity_that_held_once_and_does_no_more_is_found() -> None:
    model = tiny_model("llama")
    assert describe(model).findings.refused == {}
    scale_the_output(model.model.layers[1])
    report = ac.selftest(model)
    assert not report.ok
    assert wrong_checks(report) == {"identities"}
    assert wrong_cells(report) == {"mlp_out.1", "resid_post.1"}
    assert "resid_mid + mlp_out = resid_post is off by 0.0" in report.verdict


def test_an_identity_that_never_holds_refuses_its_sites() -> None:
    model = tiny_model("llama")
    scale_the_output(model.model.layers[1])
    report = ac.selftest(model)
    assert report.ok
    refused = {cell.site: cell.why for cell in report.cells if cell.verdict == "refused"}
    assert {"attn_out", "mlp_out", "resid_mid"} <= set(refused)
    assert "block 1" in str(refused["mlp_out"])
    assert "Refused" in report.verdict and "mlp_out" in report.verdict
    stream = {cell.verdict for cell in report.cells if cell.site.startswith("resid_post.")}
    assert stream <= {"exact", "within tolerance"}


def test_hidden_states_that_are_something_else_are_found() -> None:
    model = tiny_model("llama")

    class Lying(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if output.hidden_states is not None:
                states = list(output.hidden_states)
                states[2] = states[2] + 1e-3
                output.hidden_states = tuple(states)
            return output

    model.__class__ = Lying
    report = ac.selftest(model)
    assert wrong_checks(report) == {"hidden states"}
    assert wrong_cells(report) == {"resid_pre.2"}


def test_heads_whose_bias_is_spread_over_them_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = head_outputs.all_heads

    def with_bias(module: nn.Module, given: Tensor, columns: Any, draws: Any = None) -> Tensor:
        return whole(module, given, columns, draws) + module.bias / columns.heads

    model = tiny_model("gpt2")
    describe(model).findings  # noqa: B018 - found by what is right
    monkeypatch.setattr(head_outputs, "all_heads", with_bias)
    report = ac.selftest(model)
    assert wrong_checks(report) == {"heads"}
    assert wrong_cells(report) == {f"head_out.{layer}" for layer in range(4)}


def test_patterns_that_are_another_heads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    describe(model).require(ac.Site("pattern", 0))
    found = AttentionCalls.pattern
    monkeypatch.setattr(AttentionCalls, "pattern", lambda self, head=None: found(self, head).roll(1, 1))
    report = ac.selftest(model)
    assert wrong_checks(report) == {"patterns"}
    assert wrong_cells(report) == {f"pattern.{layer}" for layer in range(4)}
    # Where all of them are wrong, it might have been a gate.
    assert check(report, "mixing").verdict == "not applicable"
    of_one = {"once": True}

    def first_only(self: AttentionCalls, head: int | None = None) -> Tensor:
        value = found(self, head)
        return value.roll(1, 1) if of_one.setdefault("calls", self) is self else value

    monkeypatch.setattr(AttentionCalls, "pattern", first_only)
    assert {"patterns", "mixing"} == wrong_checks(ac.selftest(model))


def test_patterns_that_are_no_shares_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_next")
    describe(model).require(ac.Site("pattern", 1))
    found = AttentionCalls.pattern
    monkeypatch.setattr(AttentionCalls, "pattern", lambda self, head=None: found(self, head) * 1.01)
    report = ac.selftest(model, layers=1)
    assert "pattern.1" in wrong_cells(report)
    assert "no shares of one" in report.verdict


@pytest.mark.slow
def test_heads_in_half_precision() -> None:
    for family in ("llama", "bert", "t5"):
        report = ac.selftest(tiny_model(family).to(torch.bfloat16), max_tokens=9)
        assert report.ok, report.verdict
        assert check(report, "heads").verdict == check(report, "mixing").verdict == "within tolerance"


def test_positions_that_count_padding_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 has a table of positions: without position ids every left-padded row is another."""
    monkeypatch.setattr(capture_inputs, "accepts", lambda module, name: False)
    report = ac.selftest(tiny_model("gpt2"))
    assert wrong_checks(report) == {"left padding"}
    assert "padding stands in front of tokens" in report.verdict
    # And by its values where it is not refused.
    monkeypatch.setattr(capture_inputs, "effect_of_front_padding", lambda *given: 0.0)
    report = ac.selftest(tiny_model("gpt2"))
    assert wrong_checks(report) == {"left padding"}
    assert "embed" in wrong_cells(report)


def test_a_rotary_embedding_that_remembers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies that follow the longest pass so far, not put back: every prompt after it is another."""
    from actcache.extract.backends import local

    monkeypatch.setattr(local, "forget_lengths", lambda model: None)
    # Those of the longest pass stay until a pass is shorter than the threshold.
    report = ac.selftest(tiny_model("llama-dynamic"))
    assert not report.ok
    assert {"alone", "equal lengths", "pooled"} & wrong_checks(report)


@pytest.mark.parametrize("family", ["llama-longrope", "phi3-longrope"])
def test_lengths_that_may_not_meet_are_found_when_they_do(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    policy = invariance.batch_policy

    def lenient(*args: Any, **kwargs: Any) -> invariance.BatchPolicy:
        return dataclasses.replace(policy(*args, **kwargs), lengths="any", coupled=False)

    monkeypatch.setattr(invariance, "batch_policy", lenient)
    report = ac.selftest(tiny_model(family))
    assert wrong_checks(report) == {"padded", "right padding", "left padding", "pooled", "patterns"}


@pytest.mark.parametrize(("family", "found"), [("bert", "padded"), ("bart", "alone")])
def test_inputs_that_are_made_wrongly_are_found(monkeypatch: pytest.MonkeyPatch, family: str, found: str) -> None:
    """No mask for a model that looks ahead; a decoder that is given what it should predict."""
    make = forward_inputs.ForwardInputs.make

    def wrongly(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = make(*args, **kwargs)
        made.pop("attention_mask", None)
        return made | ({"decoder_input_ids": made["input_ids"]} if "decoder_input_ids" in made else {})

    monkeypatch.setattr(forward_inputs.ForwardInputs, "make", wrongly)
    report = ac.selftest(tiny_model(family))
    assert not report.ok
    assert found in wrong_checks(report)


# -- mixtures of experts


class OtherExperts(nn.Module):
    """A router that sends the first rows of larger passes elsewhere."""

    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        self.inner = inner
        self._rows = rows

    def forward(self, hidden: Tensor) -> Any:
        output = self.inner(hidden)
        if len(hidden) < 40:
            return output
        if isinstance(output, Tensor):
            return torch.cat([output[: self._rows].roll(1, -1), output[self._rows :]])
        logits, scores, chosen = output
        chosen = chosen.clone()
        chosen[: self._rows] = (chosen[: self._rows] + 1) % 4
        return logits, scores, chosen


@pytest.mark.parametrize("rows", [1, 1000])
def test_rows_whose_experts_flipped_are_counted_and_not_compared(rows: int) -> None:
    model = tiny_model("mixtral")
    experts: Any = getattr(model.model.layers[1], mlp_of(model.model.layers[1]))
    experts.gate = OtherExperts(experts.gate, rows)
    report = ac.selftest(model)
    assert report.flipped_experts is not None
    assert not wrong_cells(report)
    assert report.ok == (rows == 1)
    if rows == 1:
        assert 0 < report.flipped_experts < 0.02
    else:
        assert wrong_checks(report) == {"experts"}
        assert "routings" in report.verdict


def test_a_model_without_experts_has_no_routings() -> None:
    assert ac.selftest(tiny_model("gpt2"), layers="last").flipped_experts is None


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


# -- errors


def test_a_large_token_hides_no_other() -> None:
    theirs = torch.ones(4, 8)
    theirs[0] *= 1e4
    ours = theirs.clone()
    ours[2, 3] += 1e-3
    assert float(row_errors(ours, theirs, row_scale(theirs))[2]) == pytest.approx(1e-3, rel=1e-3)
    # One that gives almost nothing is measured by the others.
    theirs[3] = 1e-6
    ours = theirs.clone()
    ours[3] += 1e-7
    assert float(row_errors(ours, theirs, row_scale(theirs))[3]) == pytest.approx(1e-7, rel=1e-2)


def compared(ledger: Ledger, check: str, site: str, ours: Tensor, theirs: Tensor, prompt: int = 0) -> bool:
    return ledger.compare(check, site, ours, theirs, row_scale(theirs), prompts=[prompt] * len(ours))


def test_what_is_no_number_is_no_rounding() -> None:
    numbers = torch.ones(2, 3)
    none = torch.tensor([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]])
    ledger = Ledger(1e-5)
    ledger.expect("alone", "")
    assert compared(ledger, "alone", "a", none, none.clone())
    assert not compared(ledger, "alone", "b", none, numbers)
    assert not compared(ledger, "alone", "c", numbers, none)
    assert not compared(ledger, "alone", "d", numbers[:, :2], numbers)
    assert not compared(ledger, "alone", "e", torch.full((2, 3), torch.inf), numbers)
    assert not compared(ledger, "alone", "f", numbers, torch.zeros(2, 3))
    verdicts = [cell.verdict for name in "abcdef" if (cell := ledger.cell(name)) is not None]
    assert verdicts == ["exact", "wrong", "wrong", "wrong", "wrong", "wrong"]


def test_the_worst_of_many_comparisons_counts() -> None:
    ledger = Ledger(1e-3)
    ledger.expect("alone", "one by one")
    ledger.expect("padded", "in batches")
    value = torch.ones(3, 2)
    assert compared(ledger, "alone", "embed", value, value)
    assert compared(ledger, "padded", "embed", value * (1 + 1e-4), value)
    cell = ledger.cell("embed")
    assert cell is not None
    assert (cell.verdict, cell.check) == ("within tolerance", "padded")
    assert cell.error == pytest.approx(1e-4, rel=1e-2)
    assert not compared(ledger, "padded", "embed", value * 1.01, value, prompt=7)
    assert compared(ledger, "padded", "embed", value, value)
    cell = ledger.cell("embed")
    assert cell is not None
    assert cell.verdict == "wrong"
    assert "in batches" in str(cell.why) and "prompt 7" in str(cell.why)
    alone, padded = ledger.checks()
    assert (alone.verdict, alone.compared) == ("exact", 1)
    assert (padded.verdict, padded.compared, padded.site) == ("wrong", 3, "embed")


def test_excused_rows_are_left_out_only_where_they_are_off() -> None:
    theirs = torch.ones(3, 2)
    ours = theirs.clone()
    ours[0] *= 2
    ours[1] *= 1 + 1e-4
    for skip, right in [([True, True, False], True), ([False, True, True], False)]:
        ledger = Ledger(1e-3)
        ledger.expect("padded", "")
        assert ledger.compare("padded", "mlp_out.0", ours, theirs, row_scale(theirs), skip=torch.tensor(skip)) == right
        cell = ledger.cell("mlp_out.0")
        assert cell is not None
        assert cell.error == pytest.approx(1e-4 if right else 1.0, rel=1e-2)
