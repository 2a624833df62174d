"""Selftests of models that compute something else than they should: each is found, by its sites and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.capture import inputs as capture_inputs
from actcache.extract.answer import Lookup
from actcache.model import forward_inputs, head_outputs, invariance
from actcache.model.anatomy import describe
from actcache.model.attention_calls import AttentionCalls
from actcache.testing.tiny import tiny_model
from selftest_helpers import check, wrong_cells, wrong_checks

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
