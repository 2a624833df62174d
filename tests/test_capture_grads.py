"""Gradients of captured values, held against autograd by hand and against what an edit of the value gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.capture.values import KVSummary, tensors_in
from actcache.capture.watching import Watcher
from actcache.errors import GradientError, OptionError, SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.model.sites import Site
from actcache.testing.tiny import FAMILIES, tiny_model
from edit_helpers import moved
from grad_helpers import H1, IDS, loss_of

# Held against the modules that make them.
INNER = ("q", "k", "v", "z", "pattern", "head_out", "router_logits")


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def by_hand(model: Any, paths: list[str], ids: Tensor = IDS) -> list[Any]:
    """Gradients of what modules return, by plain hooks and torch.autograd.grad; None for tensors that get none."""
    live: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: live.update({path: list(tensors_in(out))}) or None
        )
        for path in paths
    ]
    loss = loss_of(model, ids)
    for handle in handles:
        handle.remove()
    wanted = [t for path in paths for t in live[path] if t.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return [[next(found) if t.requires_grad else None for t in live[path]] for path in paths]


def test_every_module_by_hand(model: Any) -> None:
    with ac.capture(model, include_grads=True, include_inputs=True) as cache:
        loss_of(model).backward()
    paths = list(cache)
    assert len(paths) > 50
    for path, expected in zip(paths, by_hand(model, paths), strict=True):
        got = cache[path].grad
        found = [got] if isinstance(got, Tensor) else [] if got is None else list(tensors_in(got))
        assert len(found) == sum(gradient is not None for gradient in expected), path
        for one, other in zip(found, (e for e in expected if e is not None), strict=True):
            assert torch.equal(one, other), path
    # In the output's form: the attention's weights are None here, and the root's cache has no gradient.
    assert isinstance(cache[f"{H1}.attn"].grad, tuple)
    assert cache[f"{H1}.attn"].grad[0].shape == (2, 5, 32)
    assert torch.equal(cache[f"{H1}.attn"].hidden_grad, cache[f"{H1}.attn"].grad[0])
    root = cache[""].grad
    assert type(root) is type(cache[""].output)
    assert torch.equal(root.logits, cache["lm_head"].grad)
    assert isinstance(root.past_key_values, KVSummary)
    assert torch.equal(
        cache.transformer.h[1].hidden_grad, cache.grad(H1) if isinstance(cache.grad(H1), Tensor) else cache.grad(H1)[0]
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sites_have_the_gradient_of_an_edit_of_theirs(family: str) -> None:
    model = tiny_model(family)
    # Fused experts know no float64, and MPT of transformers 4 fills in a number that float64 has and float32 not.
    exact = family != "mpt" and not any(name.endswith("experts") for name, _ in model.named_modules())
    model = model.double() if exact else model
    sites = [str(site) for site in describe(model).sites() if site.layer in (None, 1)]
    inner = [site for site in sites if site.removeprefix("encoder.").removeprefix("decoder.")[:-2] in INNER]
    sites = [site for site in sites if site not in inner]
    with ac.capture(model, sites=sites, include_grads=True) as cache:
        loss_of(model).backward()
    checked = 0
    for site in sites:
        added = torch.zeros_like(cache[site], requires_grad=True)
        try:
            block = ac.edit(model, {site: lambda x, added=added: x + added})
        except SiteUnavailableError:
            continue
        with block:
            loss_of(model).backward()
        assert cache.grad(site).shape == cache[site].shape
        error = (cache.grad(site) - added.grad).abs().max() / added.grad.abs().max()
        assert error < (1e-11 if exact else 1e-5), site
        assert bool(added.grad.abs().max() > 0), site
        checked += 1
    assert checked >= len(sites) - 2


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt_neox", "gptj", "gemma2", "qwen3", "falcon", "falcon-40b", "bloom", "opt", "mixtral", "t5", "bert"],
)
def test_inner_sites_have_the_gradient_of_an_edit_of_theirs(family: str) -> None:
    model = tiny_model(family)
    for site in describe(model).sites():
        name = str(site)
        if site.layer != 1 or site.name not in (*INNER, "attn_in", "mlp_in", "mlp_act"):
            continue
        with ac.capture(model, sites=name, include_grads=True) as cache:
            loss_of(model).backward()
        added = torch.zeros_like(cache[name], requires_grad=True)
        try:
            with ac.edit(model, {name: lambda x, added=added: x + added}):
                loss_of(model).backward()
        except SiteUnavailableError:
            continue
        error = (cache.grad(name) - added.grad).abs().max() / added.grad.abs().max()
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("family", "projections"),
    [
        ("gpt2", {"qkv": "transformer.h.1.attn.c_attn", "z": "transformer.h.1.attn.c_proj"}),
        (
            "llama",
            {
                "q": "model.layers.1.self_attn.q_proj",
                "k": "model.layers.1.self_attn.k_proj",
                "v": "model.layers.1.self_attn.v_proj",
                "z": "model.layers.1.self_attn.o_proj",
            },
        ),
        # Query, key and value of each head lie side by side.
        (
            "gpt_neox",
            {"mixed": "gpt_neox.layers.1.attention.query_key_value", "z": "gpt_neox.layers.1.attention.dense"},
        ),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_heads(family: str, projections: dict[str, str], attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    live: dict[str, Tensor] = {}

    def note(name: str, path: str) -> Any:
        module = model.get_submodule(path)
        if name == "z":
            return module.register_forward_pre_hook(lambda m, args: live.update(z=args[0]))
        return module.register_forward_hook(lambda m, args, out: live.update({name: out}) or None)

    with ac.capture(model, sites=["q.1", "k.1", "v.1", "z.1", "pattern.1"], include_grads=True) as cache:
        loss_of(model).backward()
    model.set_attn_implementation("eager")
    handles = [note(name, path) for name, path in projections.items()]
    output = model(IDS, output_attentions=True)
    for handle in handles:
        handle.remove()
    weights = torch.linspace(-1, 2, output.logits.numel()).view(output.logits.shape)
    tensors = {**live, "pattern": output.attentions[1]}
    found = dict(
        zip(tensors, torch.autograd.grad((output.logits * weights).sin().sum(), tensors.values()), strict=True)
    )
    if "qkv" in found:
        found |= zip("qkv", found.pop("qkv").split(32, -1), strict=True)
    if "mixed" in found:
        found |= zip("qkv", found.pop("mixed").view(2, 5, 4, 24).split(8, -1), strict=True)
    for name in ("q", "k", "v", "z"):
        expected = found[name].reshape(2, 5, -1, 8)
        assert cache.grad(f"{name}.1").shape == cache[f"{name}.1"].shape
        close(cache.grad(f"{name}.1"), expected, attention)
    close(cache.grad("pattern.1"), found["pattern"], attention)
    close(cache.grad("pattern.1.2"), found["pattern"][:, 2], attention)


def close(ours: Tensor, theirs: Tensor, attention: str) -> None:
    if attention == "eager":
        assert torch.equal(ours, theirs)
    else:
        # The fused attention of the other layers rounds otherwise.
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_gradients_of_one_heads_pattern_in_half_precision() -> None:
    """A gradient of what is made in float32 and goes on in bfloat16, with and without a sink beside the keys."""
    eager = tiny_model("llama", attn_implementation="eager")
    for half in (eager.bfloat16(), tiny_model("llama").bfloat16(), tiny_model("gpt_oss").bfloat16()):
        with ac.capture(half, sites=["pattern.1", "pattern.1.2"], include_grads=True) as cache:
            loss_of(half).backward()
        whole = cache.grad("pattern.1")
        assert whole.dtype == torch.bfloat16 and bool(whole.any())
        assert torch.equal(cache.grad("pattern.1.2"), whole[:, 2])


def test_values_that_are_computed_have_no_gradient_of_their_own(model: Any) -> None:
    point, raw = describe(model).read_point(Site.parse("mlp_act.1")), torch.ones(2, 5, 96, requires_grad=True)
    with pytest.raises(GradientError, match=r"'mlp_act.1' is computed from.*what it is computed from"):
        Watcher(torch.clone).site("mlp_act.1", point, raw, raw * 2, None)


def test_factors_of_the_stream_are_part_of_the_value() -> None:
    # What is added to granite's stream is a fifth of what the modules return.
    model = tiny_model("granite")
    factor = model.config.residual_multiplier
    assert factor != 1
    with ac.capture(model, "model.layers.1.mlp", sites="mlp_out.1", include_grads=True) as cache:
        loss_of(model).backward()
    torch.testing.assert_close(cache["mlp_out.1"], cache["model.layers.1.mlp"].hidden * factor)
    torch.testing.assert_close(cache.grad("mlp_out.1"), cache["model.layers.1.mlp"].hidden_grad / factor)


def test_a_value_is_what_the_model_goes_on_with(model: Any) -> None:
    # Behind the edit, whichever block was opened first.
    double = {"resid_post.1": lambda x: x * 2}
    with ac.capture(model, sites="resid_post.1", include_grads=True) as outer, ac.edit(model, double):
        loss_of(model).backward()
    with ac.edit(model, double), ac.capture(model, H1, sites="resid_post.1", include_grads=True) as inner:
        loss_of(model).backward()
    added = torch.zeros(2, 5, 32, requires_grad=True)
    with ac.edit(model, double), ac.edit(model, {"resid_post.1": lambda x: x + added}):
        loss_of(model).backward()
    for cache in (outer, inner):
        torch.testing.assert_close(cache.grad("resid_post.1"), added.grad)
    assert torch.equal(inner[H1].hidden_grad, inner.grad("resid_post.1"))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.linear(x))
        return y


def test_tensors_that_are_changed_in_place() -> None:
    net, x = InPlace(), torch.randn(4, 3)
    with ac.capture(net, include_grads=True) as cache:
        net(x).square().sum().backward()
    before = net.linear(x).detach().requires_grad_()
    behind = before.relu()
    behind.retain_grad()
    behind.square().sum().backward()
    assert torch.equal(cache["linear"].grad, before.grad)
    assert torch.equal(cache["relu"].grad, behind.grad)
    assert torch.equal(cache[""].grad, cache[""].output * 2)


def test_options_that_make_no_sense(model: Any) -> None:
    with pytest.raises(OptionError, match="include_output"):
        ac.capture(model, H1, include_grads=True, include_output=False, include_inputs=True)
    with pytest.raises(OptionError, match="before there is a loss"):
        ac.capture(model, H1, include_grads=True, stop_after_last=True)


def test_edits_and_positions_with_moved_values(model: Any) -> None:
    # An edit that makes a new leaf: the value the model goes on with is a copy of it.
    leaf = torch.randn(2, 5, 32, requires_grad=True)
    with (
        ac.capture(model, sites="resid_post.1", include_grads=True) as cache,
        ac.edit(model, {"resid_post.1": lambda x: leaf, "resid_post.0": moved}),
    ):
        loss_of(model).backward()
    assert torch.equal(cache.grad("resid_post.1"), leaf.grad)
