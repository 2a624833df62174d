"""Edits that are refused: values that do not fit, sites that cannot be written, names that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import tiny_model
from edit_helpers import in_place, moved, plain, state

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


class Block(nn.Module):
    """A block that adds its MLP to something else than what its norm is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp, self.ln_1, self.ln_2 = block.attn, block.mlp, block.ln_1, block.ln_2

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = hidden_states + plain(self.attn(self.ln_1(hidden_states)))
        return hidden_states.clone() + self.mlp(self.ln_2(hidden_states))


def test_a_middle_that_would_not_be_carried_is_refused() -> None:
    model = tiny_model("gpt2")
    if isinstance(model.transformer.h[1](torch.zeros(1, 2, 32)), tuple):
        pytest.skip("blocks of this transformers return tuples")
    model.transformer.h[1] = Block(model.transformer.h[1])
    assert "resid_mid.1" in {str(info.site) for info in ac.sites(model)}
    with pytest.raises(ac.errors.SiteUnavailableError, match=r"resid_mid\.1.*cannot be edited.*resid_post\.1"):
        ac.edit(model, {"resid_mid.1": moved})
    ac.edit(model, {"resid_mid.2": moved})


def test_a_model_whose_values_do_not_add_up_is_refused(model: Any) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return plain(self.inner(hidden_states, *args, **kwargs)) * 2

    model.transformer.h[1] = Doubled(model.transformer.h[1])
    with pytest.raises(ac.errors.AdditivityError):
        ac.edit(model, {"attn_out.1": moved})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :2], r"'resid_post\.1' returned a float32 tensor \[2, 2, 32\].*expected .*\[2, 4, 32\]"),
        (lambda x: x.double(), r"'resid_post\.1' returned a float64 tensor"),
        (lambda x: (x,), r"'resid_post\.1' returned a tuple"),
        (lambda x: 0, r"'resid_post\.1' returned a int"),
        (in_place(lambda x: x.resize_(2, 2, 32)), r"'resid_post\.1' returned a float32 tensor \[2, 2, 32\]"),
    ],
)
def test_values_that_do_not_fit(model: Any, change: Callable[[Tensor], Any], message: str) -> None:
    before = state(model)
    with torch.no_grad(), pytest.raises(ac.errors.EditError, match=message), ac.edit(model, {"resid_post.1": change}):
        model(IDS)
    assert state(model) == before


@torch.no_grad()
def test_module_values_that_do_not_fit(model: Any) -> None:
    for change in (lambda o: o[0], lambda o: o[:1], lambda o: (o[0][:, :1], *o[1:])):
        with (
            pytest.raises(ac.errors.EditError, match=r"transformer\.h\.0\.attn"),
            ac.edit(model, {"transformer.h.0.attn": change}),
        ):
            model(IDS)


def test_what_cannot_be_edited(model: Any) -> None:
    errors = ac.errors
    before = state(model)
    for target, error, message in [
        ("head_out.3.7", errors.LayerRangeError, r"head_out\.3\.7.*4 heads \(0 to 3\)"),
        ("resid_post", errors.SiteUnavailableError, r"resid_post\.0"),
        ("resid_post.9", errors.LayerRangeError, "out of range"),
        ("encoder.resid_post.0", errors.SiteUnavailableError, "one stack"),
        ("mixer_out.0", errors.SiteUnavailableError, "attention"),
        ("transformer.h.9", errors.UnknownModuleError, r"transformer\.h\."),
        ("resid_pots.1", errors.UnknownModuleError, "resid_post"),
        ("transformer.h", errors.UnknownModuleError, "only holds modules"),
        (nn.Linear(1, 1), errors.UnknownModuleError, "not a module"),
        (3, errors.OptionError, "no target"),
    ]:
        with pytest.raises(error, match=message):
            ac.edit(model, {target: moved})
    with pytest.raises(errors.OptionError, match="expected a function"):
        ac.edit(model, {"resid_post.1": torch.zeros(32)})
    for nothing in ({}, [], "resid_post.1", [moved]):
        with pytest.raises(errors.OptionError, match="edits"):
            ac.edit(model, nothing)  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match=r"torch\.nn\.Module"):
        ac.edit("gpt2", {"resid_post.1": moved})  # type: ignore[arg-type]
    assert state(model) == before


def test_an_edit_that_did_nothing_is_an_error(model: Any) -> None:
    with (
        pytest.raises(ac.errors.MissedModuleError, match=r"1 of the edits.*'resid_post\.3'"),
        ac.edit(model, {"resid_post.1": moved, "resid_post.3": moved}),
        ac.capture(model, sites="resid_post.1", stop_after_last=True),
    ):
        model(IDS)
    with pytest.raises(ZeroDivisionError), ac.edit(model, {"resid_post.3": moved}):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("family", "target", "meant"),
    [
        ("llama", "resid_pst.1", "'resid_post.1'"),
        ("llama", "resid_pst", "'resid_post.0'"),
        ("llama", "headout.1.3", "'head_out.1.3'"),
        ("t5", "encoder.resid_pst.-1", "'encoder.resid_post.-1'"),
        ("llama", "logit", "'logits'"),
    ],
)
def test_a_mistyped_site_keeps_its_stack_layer_and_head(family: str, target: str, meant: str) -> None:
    with pytest.raises(
        ac.errors.UnknownModuleError, match=rf"no module '{target}'.*Among sites it is nearest to {meant}( or |\.$)"
    ):
        ac.edit(tiny_model(family), {target: lambda x: x})
