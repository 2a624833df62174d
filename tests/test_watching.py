"""Gradients of what heads add, and where weights are frozen: against autograd by hand, and the weights free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import actcache as ac
from actcache.errors import GradientError
from actcache.model.anatomy import describe
from actcache.testing.tiny import FAMILIES, tiny_model
from reference import relative_error

IDS = torch.tensor([[5, 9, 100, 7, 31], [8, 3, 4, 50, 6]])


def loss_of(model: Any, **kwargs: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = IDS[:, :3]
    logits: Tensor = model(IDS, **kwargs).logits
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits * weights).sin().sum()


@pytest.mark.parametrize(
    ("family", "site", "path"),
    [
        ("gpt2", "head_out.1", "transformer.h.1.attn.c_proj"),
        ("llama", "head_out.1", "model.layers.1.self_attn.o_proj"),
        # A norm, or a factor, stands between attention and the stream.
        ("gemma2", "head_out.1", "model.layers.1.self_attn.o_proj"),
        ("granite", "head_out.1", "model.layers.1.self_attn.o_proj"),
        ("gpt_oss", "head_out.1", "model.layers.1.self_attn.o_proj"),
        ("opt", "head_out.1", "model.decoder.layers.1.self_attn.out_proj"),
        ("bart", "decoder.head_out.1", "model.decoder.layers.1.self_attn.out_proj"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_heads_of_which_the_output_is_the_explicit_sum(family: str, site: str, path: str, frozen: bool) -> None:
    model = tiny_model(family)
    projection = model.get_submodule(path)
    parts: list[Tensor] = []

    def explicit(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        rows = args[0]
        width = rows.shape[-1] // 4
        spans = [slice(h * width, (h + 1) * width) for h in range(4)]
        parts[:] = [F.linear(rows[..., span], weight[:, span]) for span in spans]
        total = torch.stack(parts).sum(0)
        torch.testing.assert_close(total if module.bias is None else total + module.bias, output)
        return total if module.bias is None else total + module.bias

    handle = projection.register_forward_hook(explicit)
    expected = torch.stack(torch.autograd.grad(loss_of(model), parts), -2)
    handle.remove()
    assert bool(expected.any())
    model.requires_grad_(not frozen)
    with ac.capture(model, sites=[site, f"{site}.2"], include_grads=True) as cache:
        loss_of(model).backward()
    assert relative_error(cache.grad(site), expected.reshape(cache[site].shape)) < 1e-5
    assert cache.grad(site).shape == cache[site].shape
    assert torch.equal(cache.grad(f"{site}.2"), cache.grad(site)[..., 2, :])
    with ac.capture(model, sites=f"{site}.2", include_grads=True, positions="last") as last:
        loss_of(model).backward()
    torch.testing.assert_close(last.grad(f"{site}.2"), cache.grad(f"{site}.2")[:, -1:])


def test_attribution_of_heads_is_that_of_removing_them() -> None:
    """Gradient times value is what the loss loses, to first order, when a head gives a little less."""
    model = tiny_model("gpt2").double()
    with ac.capture(model, sites="head_out.1", include_grads=True) as cache:
        loss_of(model).backward()
    attribution = (cache.grad("head_out.1") * cache["head_out.1"]).sum((0, 1, 3))
    small = 1e-6
    for head in range(4):
        losses = []
        for step in (small, -small):
            with torch.no_grad(), ac.edit(model, {f"head_out.1.{head}": lambda x, step=step: x * (1 + step)}):
                losses.append(loss_of(model))
        assert float((losses[0] - losses[1]) / (2 * small)) == pytest.approx(float(attribution[head]), rel=1e-5)


def of_the_graph(model: Any, site: str) -> bool:
    """Some routers of transformers 4 go on with others than the logits that they return."""
    try:
        with ac.capture(model, sites=site, include_grads=True):
            loss_of(model)
    except GradientError:
        if not transformers.__version__.startswith("4."):
            raise
        return False
    return True


def frozen_and_free(family: str, alone: bool) -> None:
    model = tiny_model(family)
    sites = [str(site) for site in describe(model).sites() if site.layer in (None, 1)]
    sites = [site for site in sites if not site.startswith("router_logits") or of_the_graph(model, site)]
    groups = [[site] for site in sites] if alone else [sites]
    found: list[dict[str, Tensor]] = []
    for free in (True, False):
        model.requires_grad_(free)
        found.append({})
        for group in groups:
            with ac.capture(model, sites=group, include_grads=True) as cache:
                loss_of(model).backward()
            found[-1] |= {site: cache.grad(site) for site in group}
            assert free or all(parameter.grad is None for parameter in model.parameters())
        model.zero_grad()
    for site in sites:
        assert relative_error(found[1][site], found[0][site]) < 3e-5, site


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gemma2", "mixtral", "bert"])
@pytest.mark.parametrize("alone", [False, True])
def test_frozen_weights_change_no_gradient(family: str, alone: bool) -> None:
    frozen_and_free(family, alone)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("alone", [False, True])
def test_frozen_weights_change_no_gradient_of_any_family(family: str, alone: bool) -> None:
    frozen_and_free(family, alone)


def test_the_graph_of_frozen_weights_begins_at_what_is_captured() -> None:
    model = tiny_model("gpt2").requires_grad_(False)
    graphs: dict[int, bool] = {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.register_forward_hook(
            lambda m, args, out, layer=layer: graphs.update({layer: out[0].requires_grad}) or None
        )
    # The middle of a block goes on beside its MLP, and so the graph begins with the block.
    for site, first in (("resid_post.1", 2), ("resid_mid.1", 1), ("attn_in.2", 2)):
        with ac.capture(model, sites=site, include_grads=True) as cache:
            loss_of(model).backward()
        assert graphs == {layer: layer >= first for layer in range(4)}, site
        assert bool(cache.grad(site).any())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_weights_with_checkpoints_and_edits(family: str) -> None:
    model = tiny_model(family)
    request: dict[str, Any] = {"sites": ["resid_mid.1", "z.2", "head_out.2"], "include_grads": True}
    found = []
    for free in (True, False):
        model.requires_grad_(free)
        with ac.edit(model, {"attn_out.1": lambda x: x * 0.5}), ac.capture(model, **request) as cache:
            loss_of(model).backward()
        found.append(cache)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with ac.edit(model, {"attn_out.1": lambda x: x * 0.5}), ac.capture(model, **request) as cache:
        loss_of(model, use_cache=False).backward()
    for site in found[0]:
        assert relative_error(found[1].grad(site), found[0].grad(site)) < 1e-5
        assert relative_error(cache.grad(site), found[0].grad(site)) < 1e-5


def test_any_module_with_frozen_weights_also_where_it_goes_on_in_place() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    grads = []
    for free in (True, False):
        net.requires_grad_(free)
        with ac.capture(net, ["0", "1"], include_grads=True) as cache:
            loss = net(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        grads.append([cache["0"].grad, cache["1"].grad])
    made = F.linear(x, net[0].weight, net[0].bias)
    behind = 2 * (2 * F.linear(made.relu(), net[2].weight, net[2].bias)) @ net[2].weight
    for found in grads:
        torch.testing.assert_close(found[0], behind * (made > 0))
        torch.testing.assert_close(found[1], behind)


def test_what_is_given_to_the_model_is_left_alone() -> None:
    model = tiny_model("llama").requires_grad_(False)
    given = model.get_input_embeddings()(IDS)
    with ac.capture(model, sites="embed", include_grads=True) as cache:
        model(inputs_embeds=given).logits.sum().backward()
    assert not given.requires_grad
    assert given.grad is None
    assert bool(cache.grad("embed").any())


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "falcon", "bert", "mixtral", "opt", "modernbert", "deepseek_v3", "t5"]
)
def test_probabilities_that_stay_in_the_graph(family: str) -> None:
    """Also without a cache of gradients: the captured value is part of the graph of the loss."""
    model = tiny_model(family)
    name = "decoder.pattern.1" if family == "t5" else "pattern.1"
    with ac.capture(model, sites=name, include_grads=True) as cache:
        loss_of(model).backward()
    with ac.capture(model, sites=name, detach=False, copy=False) as kept:
        loss = loss_of(model)
    (found,) = torch.autograd.grad(loss, kept[name])
    assert relative_error(found, cache.grad(name)) < 1e-5
