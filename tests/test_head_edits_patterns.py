"""Edits of patterns, and what holds for heads' edits of any kind: generation, positions, gradients, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import edit_helpers
from actcache.testing.tiny import PAD, tiny_model
from edit_helpers import moved, state
from head_edit_helpers import ATTENTIVE, IDS, LEFT, OTHER, run


@pytest.mark.parametrize("family", ATTENTIVE)
def test_patterns_are_used_as_they_are_written(family: str) -> None:
    """Weighted values are those of the new probabilities; nothing renormalises."""
    model = tiny_model(family)
    prefix = "encoder." if model.config.is_encoder_decoder else ""
    have = {str(info.site) for info in ac.sites(model)}
    layer = 1
    site, values, mixed = (f"{prefix}{name}.{layer}" for name in ("pattern", "v", "z"))
    written = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    cache = run(model, {site: lambda x: written}, sites=[s for s in (site, values, mixed, "logits") if s in have])
    assert torch.equal(cache[site], written)
    assert not torch.allclose(cache["logits"], run(model)["logits"], atol=1e-3)
    if values in have and mixed in have and family not in ("qwen3_next",):
        v = cache[values].repeat_interleave(4 // cache[values].shape[2], 2)
        expected = torch.einsum("bhqk,bkhd->bqhd", written.double(), v.double())
        torch.testing.assert_close(cache[mixed].double(), expected, rtol=1e-4, atol=1e-5)
    # One head only.
    plain = run(model, sites=[site])[site]
    cache = run(model, {f"{site}.2": lambda x: written[:, 2]}, sites=[site, f"{site}.2"])
    assert torch.equal(cache[f"{site}.2"], written[:, 2])
    assert torch.equal(cache[site][:, 2], written[:, 2])
    assert torch.equal(cache[site][:, [0, 1, 3]], plain[:, [0, 1, 3]])


def test_setting_and_scaling_of_single_entries() -> None:
    """Setting a value and renormalising, and scaling an edge, are functions of the caller's."""
    model = tiny_model("llama")

    def uniform(x: Tensor) -> None:
        x[:, 1] = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]

    def scaled(x: Tensor) -> None:
        x[:, 1, 3, 1] *= 2
        x[:, 1] /= x[:, 1].sum(-1, keepdim=True)

    with ac.edit(model, {"pattern.1": uniform}), ac.edit(model, {"pattern.1": scaled}):
        row = run(model, sites="pattern.1")["pattern.1"][:, 1, 3]
    torch.testing.assert_close(row, torch.tensor([0.2, 0.4, 0.2, 0.2, 0, 0]).expand(2, 6))

    def set_to(x: Tensor) -> None:
        rest = x[:, 1, 5].sum(-1, keepdim=True) - x[:, 1, 5, [2]]
        x[:, 1, 5] *= (1 - 0.7) / rest
        x[:, 1, 5, 2] = 0.7

    row = run(model, {"pattern.1": set_to}, sites="pattern.1")["pattern.1"][:, 1, 5]
    torch.testing.assert_close(row[:, 2], torch.full((2,), 0.7))
    torch.testing.assert_close(row.sum(-1), torch.ones(2))

    def columns(x: Tensor) -> None:
        x[..., :3] = 0

    cache = run(model, {"pattern.1": columns}, sites=["pattern.1"])
    assert not bool(cache["pattern.1"][..., :3].sum())


def test_ready_made_edits_of_patterns() -> None:
    model = tiny_model("llama")
    source, plain = run(model, sites=["pattern.1", "z.1"], ids=OTHER), run(model, sites=["pattern.1", "z.1"])
    # Positions are queries.
    cache = run(model, ac.ablate("pattern.1", heads=3, positions=["last", 2]), sites=["pattern.1", "z.1"])
    assert not bool(cache["pattern.1"][:, 3, [2, 5]].any())
    assert not bool(cache["z.1"][:, [2, 5], 3].any())
    assert torch.equal(cache["pattern.1"][:, :3], plain["pattern.1"][:, :3])
    assert torch.equal(cache["pattern.1"][:, 3, [0, 1, 3, 4]], plain["pattern.1"][:, 3, [0, 1, 3, 4]])
    for edit in (
        ac.patch("pattern.1", source),
        ac.patch("pattern.1", source["pattern.1"]),
        [ac.patch(f"pattern.1.{head}", source) for head in range(4)],
        [ac.patch(f"pattern.1.{head}", source["pattern.1"][:, head]) for head in range(4)],
    ):
        assert torch.equal(run(model, edit, sites="pattern.1")["pattern.1"], source["pattern.1"])
    cache = run(model, ac.patch("pattern.1", source, heads=[2], positions=4), sites="pattern.1")
    assert torch.equal(cache["pattern.1"][:, 2, 4], source["pattern.1"][:, 2, 4])
    assert torch.equal(cache["pattern.1"][:, [0, 1, 3]], plain["pattern.1"][:, [0, 1, 3]])
    # Keys are real tokens, wherever the padding is; a prompt that is longer has no share for what lies behind.
    mask = (LEFT != PAD).long()
    short = run(model, sites="pattern.1", ids=OTHER[:, :4])
    cache = run(model, ac.patch("pattern.1", short, positions=3), ids=LEFT, attention_mask=mask, sites="pattern.1")
    assert torch.equal(cache["pattern.1"][0, :, 5, 2:], short["pattern.1"][0, :, 3])
    assert not bool(cache["pattern.1"][0, :, 5, :2].any())
    assert torch.equal(cache["pattern.1"][1, :, 3, :4], short["pattern.1"][1, :, 3])
    assert not bool(cache["pattern.1"][1, :, 3, 4:].any())
    with pytest.raises(ac.errors.EditError, match="values for 6 keys, and row 0 of this pass has 4 real tokens"):
        run(model, ac.patch("pattern.1", source, positions="last"), ids=LEFT, attention_mask=mask)


@pytest.mark.parametrize(
    "site", ["q.1", "v.1", "z.1", "head_out.1", "head_out.1.2", "attn_in.1", "mlp_act.1", "pattern.1"]
)
@pytest.mark.parametrize("positions", ["last", "all", [0, "last"]])
def test_generation_is_the_same_with_and_without_a_kv_cache(site: str, positions: Any) -> None:
    model = tiny_model("llama")
    heads = [1] if site.count(".") == 1 and site[0] not in "am" else None
    edit = ac.ablate(site, positions=positions, heads=heads)
    edit_helpers.hold_generation(model, edit, 5, input_ids=LEFT, attention_mask=(LEFT != PAD).long())


@pytest.mark.parametrize("site", ["q.1", "z.1", "head_out.1", "mlp_act.1"])
def test_positions_count_real_tokens(site: str) -> None:
    model = tiny_model("llama")
    mask = (LEFT != PAD).long()
    places = (mask.cumsum(1) - 1).clamp_min(0)
    edit = ac.ablate(site, positions=[0, -2], heads=None if site == "mlp_act.1" else [0])
    cache = run(model, edit, ids=LEFT, attention_mask=mask, position_ids=places, sites=["logits", site])
    for row in range(2):
        real = mask[row].bool()
        alone = run(model, edit, ids=LEFT[row][real][None], sites=["logits", site])
        torch.testing.assert_close(cache["logits"][row][real], alone["logits"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache[site][row][real], alone[site][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["z.1", "head_out.1.2", "head_out.1", "q.1", "pattern.1.0", "mlp_act.1"])
def test_gradients_reach_what_was_written(site: str) -> None:
    """Also where it adds nothing, and has the numbers of what was there."""
    model = tiny_model("gpt2").double()
    shape = run(model, sites=site)[site].shape
    given = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with ac.edit(model, {site: lambda x: x + given}):
        model(IDS).logits[:, -1].square().mean().backward()
    assert given.grad is not None and bool(given.grad.any())
    # By differences.
    flat = int(given.grad.abs().argmax())
    losses = []
    for step in (1e-5, -1e-5):
        nudge = torch.zeros_like(given).detach()
        nudge.view(-1)[flat] = step
        with torch.no_grad(), ac.edit(model, {site: lambda x, nudge=nudge: x + nudge}):
            losses.append(float(model(IDS).logits[:, -1].square().mean()))
    slope = (losses[0] - losses[1]) / 2e-5
    assert slope == pytest.approx(float(given.grad.view(-1)[flat]), rel=1e-4)


def test_what_does_not_fit() -> None:
    model = tiny_model("llama")
    errors = ac.errors
    for target, function, message in [
        ("z.1", lambda x: x[..., :4], r"expected a float32 tensor \[2, 6, 4, 8\]"),
        ("head_out.1.0", lambda x: x.double(), r"float64 tensor \[2, 6, 32\].*expected a float32"),
        ("pattern.1", lambda x: x[:, 0], r"\[2, 4, 6, 6\]"),
        ("router_logits.1", lambda x: x, "no mixture of experts"),
        ("pattern.1.4", lambda x: x, r"4 heads \(0 to 3\)"),
    ]:
        with pytest.raises((errors.EditError, errors.SiteUnavailableError, errors.LayerRangeError), match=message):
            run(model, {target: function})
    with pytest.raises(errors.LayerRangeError, match=r"head 2 of 'k\.1' is out of range: it has 2 heads"):
        ac.edit(model, ac.ablate("k.1", heads=2))
    for vector, message in [(torch.ones(8, 4), "4 wide, and the value 8"), (torch.ones(3, 8), "3 heads, and 2 are")]:
        with pytest.raises(errors.EditError, match=message):
            run(model, ac.steer("z.1", vector, heads=[0, 1]))
    assert torch.equal(run(model)["logits"], run(model)["logits"])


def test_nothing_is_left_behind() -> None:
    model = tiny_model("gpt2")
    before, plain = state(model), run(model)["logits"]
    edits = dict.fromkeys(("q.1", "z.1", "head_out.1", "head_out.2.1", "pattern.0", "mlp_in.1", "mlp_act.3"), moved)

    def interrupt(x: Tensor) -> None:
        raise KeyboardInterrupt

    for target in ("pattern.1", "head_out.1", "z.2", "logits"):
        with pytest.raises(KeyboardInterrupt), ac.edit(model, edits), ac.edit(model, {target: interrupt}):
            model(IDS)
        assert state(model) == before
        assert torch._C._len_torch_function_stack() == 0

    def steps() -> Iterator[Tensor]:
        with ac.edit(model, edits), ac.capture(model, sites=["head_out", "pattern"]):
            for _ in range(3):
                yield model(IDS).logits

    running = steps()
    next(running)
    running.close()
    assert state(model) == before
    assert torch.equal(run(model)["logits"], plain)
    run(model, edits, sites=["head_out.1", "pattern.0"])
    assert state(model) == before
