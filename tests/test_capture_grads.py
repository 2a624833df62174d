"""Gradients of captured values, held against autograd by hand and against what an edit of the value gives."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
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
from edit_helpers import moved, state

IDS = torch.tensor([[5, 9, 100, 7, 31], [8, 3, 4, 50, 6]])
H1, H2 = "transformer.h.1", "transformer.h.2"
# Held against the modules that make them.
INNER = ("q", "k", "v", "z", "pattern", "head_out", "router_logits")


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def loss_of(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids[:, :3]
    logits: Tensor = model(ids, **kwargs).logits
    # Every token and every word counts, each in its own way.
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits * weights).sin().sum()


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


# -- right values


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


class Often(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x).tanh()
        return x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return self(x * self.weight, depth - 1) * 2 if depth else x.square()


@pytest.mark.parametrize("include_inputs", [False, True])
def test_every_visit_has_its_own(include_inputs: bool) -> None:
    net, x = Often(), torch.randn(2, 3)
    with ac.capture(net, include_grads=True, include_inputs=include_inputs) as cache:
        net(x).square().sum().backward()
    values, y = [], x
    for _ in range(3):
        values.append(net.step(y))
        y = values[-1].tanh()
    expected = torch.autograd.grad(y.square().sum(), values)
    assert len(cache["step"]) == 3
    assert all(map(torch.equal, cache["step"].grad, expected))
    assert torch.equal(cache["step"][-1].grad, expected[-1])
    nested = Nested()
    with ac.capture(nested, include_grads=True, include_inputs=include_inputs) as cache:
        nested(torch.tensor(2.0, requires_grad=True), 2).backward()
    # The innermost ends first: its output is doubled twice.
    assert [float(visit.grad) for visit in cache[""]] == [4.0, 2.0, 1.0]


# -- what is kept


def test_gradients_are_kept_as_values_are(model: Any) -> None:
    options: dict[str, Any] = {"sites": "resid_post", "modules": [H1, f"{H1}.attn"], "include_grads": True}
    with (
        ac.capture(model, **options) as whole,
        ac.capture(model, positions=[0, "last"], dtype="float64", **options) as cut,
        ac.capture(model, device=None, copy=False, **options) as live,
        ac.capture(model, positions={"subject": (1, 3), "last": -1}, **options) as named,
    ):
        loss_of(model).backward()
    full = whole.grad("resid_post.1")
    assert torch.equal(cut.grad("resid_post.1"), full[:, [0, 4]].double())
    assert torch.equal(cut[f"{H1}.attn"].hidden_grad, whole[f"{H1}.attn"].hidden_grad[:, [0, 4]].double())
    assert torch.equal(live.grad("resid_post.1"), full)
    assert torch.equal(named.gradients().at("subject")["resid_post.1"], full[:, 1:3])
    assert named.gradients().map_to_dict("resid_post.1")["last"].shape == (2, 32)
    for cache in (whole, cut, live, named):
        assert not cache.grad("resid_post.1").requires_grad
        assert not cache["resid_post.1"].requires_grad
    # What is kept does not change when the caller changes what it got.
    before = whole.grad("resid_post.2")
    live.grad("resid_post.2").zero_()
    assert torch.equal(whole.grad("resid_post.2"), before)


def test_backward_passes_add_up(model: Any) -> None:
    with ac.capture(model, H1, sites="resid_post.1", include_grads=True) as cache:
        logits = model(IDS).logits
        logits[:, -1].sum().backward(retain_graph=True)
        first, mine = cache.grad("resid_post.1"), cache[H1].hidden_grad
    # Behind the block, and not into the tensors that were handed out.
    kept = first.clone()
    logits[:, 0].sum().backward(retain_graph=True)
    logits[:, -1].sum().backward()
    assert torch.equal(first, kept) and torch.equal(mine, kept)
    with ac.capture(model, sites="resid_post.1", include_grads=True) as other:
        model(IDS).logits[:, 0].sum().backward()
    torch.testing.assert_close(cache.grad("resid_post.1"), 2 * kept + other.grad("resid_post.1"))
    torch.testing.assert_close(cache[H1].hidden_grad, cache.grad("resid_post.1"))


def test_several_passes_are_joined_as_their_values_are(model: Any) -> None:
    one, two = IDS, IDS[:1, :3]
    with ac.capture(model, H1, sites="resid_post.1", include_grads=True) as cache:
        loss_of(model, one)
        loss_of(model, two).backward()
    with ac.capture(model, sites="resid_post.1", include_grads=True) as alone:
        loss_of(model, two).backward()
    got = cache.grad("resid_post.1")
    assert got.shape == cache["resid_post.1"].shape == (3, 5, 32)
    # The loss does not depend on the first pass, nor on padding.
    assert not got[:2].any() and not got[2, 3:].any()
    assert torch.equal(got[2:, :3], alone.grad("resid_post.1"))
    assert cache[H1].grad[0] is None
    assert torch.equal(cache[H1][1].hidden_grad, alone.grad("resid_post.1"))
    # Steps of one's own with a KV cache.
    with ac.capture(model, sites="resid_post.1", include_grads=True) as steps:
        past = model(IDS[:, :3], use_cache=True).past_key_values
        model(IDS[:, 3:], past_key_values=past).logits.square().sum().backward()
    with ac.capture(model, sites="resid_post.1", include_grads=True) as at_once:
        model(IDS).logits[:, 3:].square().sum().backward()
    torch.testing.assert_close(steps.grad("resid_post.1"), at_once.grad("resid_post.1"), rtol=1e-3, atol=1e-5)


def test_run_with_cache(model: Any) -> None:
    model.train()
    output, cache = ac.run_with_cache(model, [[5, 9, 100], [7, 31]], sites=["embed", "resid_post"], include_grads=True)
    assert model.training
    assert not cache["resid_post.1"].requires_grad
    # The gradient of one word's logit has the form of what it is the gradient of.
    output.logits[0, 2, 17].backward()
    assert cache.grad("embed").shape == cache["embed"].shape == (2, 3, 32)
    assert not cache.grad("embed")[1].any()
    assert bool(cache.grad("embed")[0].abs().sum() > 0)
    rows = cache.gradients().rows("resid_post.1")
    assert [len(row) for row in rows] == [3, 2]
    assert torch.equal(cache.gradients().input_ids, cache.input_ids)


def test_all_tools_of_a_cache_work_on_gradients(model: Any, tmp_path: Any) -> None:
    with ac.capture(model, H1, sites="resid_post", include_grads=True) as cache:
        loss_of(model).backward()
    gradients = cache.gradients()
    assert list(gradients) == list(cache)
    assert torch.equal(gradients.stack("resid_post")[1], cache.grad("resid_post.1"))
    assert torch.equal(gradients[H1].hidden, cache[H1].hidden_grad)
    gradients.save(tmp_path / "g.safetensors")
    assert ac.ActivationCache.load(tmp_path / "g.safetensors") == gradients
    assert gradients.cat(cache.gradients())["resid_post.1"].shape == (4, 5, 32)
    # Parts and copies of the cache itself.
    part = cache.select(prompts=1)
    assert torch.equal(part[H1].hidden_grad, cache[H1].hidden_grad[1:])
    with pytest.raises(GradientError, match=r"what gradients\(\) gives"):
        part.grad("resid_post.1")
    assert torch.equal(cache.gradients().select(prompts=1)["resid_post.1"], cache.grad("resid_post.1")[1:])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other.grad("resid_post.1"), cache.grad("resid_post.1"))
        assert torch.equal(other[H1].hidden_grad, cache[H1].hidden_grad)
    joined = ac.ActivationCache.concatenate([cache, cache])
    with pytest.raises(GradientError, match="joined caches"):
        _ = joined[H1].grad
    with pytest.raises(GradientError, match=r"what gradients\(\) gives"):
        joined.grad("resid_post.1")
    before = cache[H1].hidden_grad
    assert cache.to("float64")[H1].hidden_grad.dtype == torch.float64
    assert torch.equal(cache[H1].hidden_grad, before.double())


def test_gradients_arrive_at_what_was_made_of_the_cache_before(model: Any) -> None:
    with ac.capture(model, H1, include_grads=True) as cache:
        loss = loss_of(model)
    part = cache.to("float64").select(prompts=[1])
    assert part[H1].grad is None
    loss.backward(retain_graph=True)
    expected = cache[H1].hidden_grad
    assert expected.dtype == torch.float64
    assert torch.equal(part[H1].hidden_grad, expected[1:])
    loss.backward()
    assert torch.equal(part[H1].hidden_grad, expected[1:] * 2)
    # Also when nothing but the part is left.
    with ac.capture(model, H1, include_grads=True) as gone:
        loss = loss_of(model)
    part = gone.select(prompts=0)
    del gone
    loss.backward()
    assert torch.equal(part[H1].hidden_grad, expected[:1].float())


# -- graphs


def test_weights_that_are_frozen(model: Any) -> None:
    reference = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("transformer.h.2.mlp"))
    with ac.capture(model, [H1, H2], sites=["resid_post", "mlp_out"], include_grads=True) as cache:
        loss_of(model).backward()
    with ac.capture(reference, [H1, H2], sites=["resid_post", "mlp_out"], include_grads=True) as whole:
        loss_of(reference).backward()
    for key in (*(f"{name}.{layer}" for name in ("mlp_out", "resid_post") for layer in range(4)), H1, H2):
        torch.testing.assert_close(cache.grad(key), whole.grad(key))
    # Training goes on as without the capture.
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name).grad if parameter.requires_grad else None
        torch.testing.assert_close(parameter.grad, expected)


def test_where_there_is_no_graph(model: Any) -> None:
    before = state(model)
    for context in (torch.no_grad, torch.inference_mode):
        for request in ({"modules": H1}, {"sites": "resid_post.1"}, {"modules": H1, "include_inputs": True}):
            with (
                pytest.raises(GradientError, match="ran without one"),
                context(),
                ac.capture(model, include_grads=True, **request),
            ):
                model(IDS)
        with pytest.raises(GradientError, match="gradients enabled"), context():
            ac.run_with_cache(model, IDS, sites="resid_post", include_grads=True)
    with pytest.raises(GradientError, match="generate"), ac.capture(model, sites="resid_post", include_grads=True):
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)
    numbers = nn.Sequential(nn.Flatten())
    with (
        pytest.raises(GradientError, match="no floating-point tensor"),
        ac.capture(numbers, include_grads=True) as cache,
    ):
        numbers(IDS)
    assert torch.equal(cache["0"].output, IDS)
    with pytest.raises(GradientError, match="this value has no gradient: it holds no floating-point tensor"):
        _ = cache["0"].grad
    assert state(model) == before


def test_gradients_that_have_not_arrived(model: Any) -> None:
    with ac.capture(model, [H1, "lm_head"], sites=["resid_post.1", "resid_post.3"], include_grads=True) as cache:
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert cache[H1].grad is None
    with pytest.raises(GradientError, match="has arrived"):
        cache.grad("resid_post.1")
    hidden[2].sum().backward()
    assert bool((cache.grad("resid_post.1") == 1).all())
    # The loss does not depend on these.
    assert cache["lm_head"].grad is None
    for key in ("resid_post.3", "lm_head"):
        with pytest.raises(GradientError, match="has arrived"):
            cache.grad(key)
    with ac.capture(model, H1, sites="resid_post.1") as without:
        loss_of(model).backward()
    assert without[H1].grad is None
    for key in ("resid_post.1", H1):
        with pytest.raises(GradientError, match="include_grads=True"):
            without.grad(key)


def test_options_that_make_no_sense(model: Any) -> None:
    with pytest.raises(OptionError, match="include_output"):
        ac.capture(model, H1, include_grads=True, include_output=False, include_inputs=True)
    with pytest.raises(OptionError, match="before there is a loss"):
        ac.capture(model, H1, include_grads=True, stop_after_last=True)


def test_a_pass_that_is_ended_with_the_last_value(model: Any) -> None:
    with ac.capture(
        model, sites="resid_post", layers=[0, 2], include_grads=True, stop_after_last=True, detach=False
    ) as cache:
        assert model(IDS) is None
        cache["resid_post.2"].sin().sum().backward()
    expected = by_hand_of_hidden(model)
    torch.testing.assert_close(cache.grad("resid_post.0"), expected)


def by_hand_of_hidden(model: Any) -> Tensor:
    hidden = model(IDS, output_hidden_states=True).hidden_states
    (found,) = torch.autograd.grad(hidden[3].sin().sum(), hidden[1])
    return found


def test_gradients_of_gradients(model: Any) -> None:
    model.set_attn_implementation("eager")
    with ac.capture(model, sites="resid_post.1", include_grads=True, detach=False) as cache:
        torch.autograd.grad(loss_of(model), model.lm_head.weight, create_graph=True)
    penalty = cache.grad("resid_post.1").square().sum()
    (found,) = torch.autograd.grad(penalty, model.transformer.wpe.weight)
    assert bool(found.abs().max() > 0)


@pytest.mark.parametrize("inputs", [False, True])
def test_blocks_run_again_for_the_gradient(model: Any, inputs: bool) -> None:
    sites = ["resid_pre", "resid_mid", "attn_out", "resid_post"]
    request: dict[str, Any] = {
        "modules": [f"{H1}.*", f"{H1}.mlp.*"],
        "sites": sites,
        "include_grads": True,
        "include_inputs": inputs,
    }
    with ac.capture(model, **request) as expected:
        loss_of(model, use_cache=False).backward()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with ac.capture(model, **request) as cache:
        loss_of(model, use_cache=False).backward()
    assert list(cache) == list(expected)
    for key, value in cache.items():
        if "." in key and key in cache.gradients():
            one, other = cache.grad(key), expected.grad(key)
            assert all(map(torch.equal, tensors_in(one), tensors_in(other))), key
        assert isinstance(value, Tensor) or len(value) == 1
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(GradientError, match='"use_reentrant": False'), ac.capture(model, **request):
        loss_of(model, use_cache=False).backward()


def test_embeddings_of_the_callers(model: Any) -> None:
    # Llama's first block is given the very tensor: a leaf, which lives on.
    llama = tiny_model("llama")
    llama.requires_grad_(False)
    given = llama.get_input_embeddings()(IDS).detach().requires_grad_()
    request: dict[str, Any] = {
        "modules": "model.layers.0.input_layernorm",
        "sites": ["embed", "resid_pre.0", "resid_post.0"],
    }
    with ac.capture(llama, include_grads=True, **request) as first:
        llama(inputs_embeds=given).logits.square().sum().backward()
    assert torch.equal(first.grad("embed"), given.grad)
    assert torch.equal(first.grad("resid_pre.0"), given.grad)
    kept, before = first.grad("embed"), first[next(iter(first))]
    # The next pass is another one's.
    with ac.capture(llama, include_grads=True, **request) as second:
        llama(inputs_embeds=given).logits.sum().backward()
    llama(inputs_embeds=given).logits.sum().backward()
    assert torch.equal(first.grad("embed"), kept)
    assert first[next(iter(first))] is before
    torch.testing.assert_close(given.grad, kept + 2 * second.grad("embed"))
    assert not given._backward_hooks


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.held = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return {"kept": (self.held(x), self.held(self.weight)), "number": 3}


def test_modules_that_hand_on_leaves() -> None:
    net, x = Identity(), torch.ones(3, requires_grad=True)
    caches = []
    for _ in range(2):
        with ac.capture(net, include_grads=True) as cache:
            one, other = net(x)["kept"]
            (one * 2 + other * 5).sum().backward()
        caches.append(cache)
    for cache in caches:
        assert [gradient.tolist() for gradient in cache["held"].grad] == [[2.0] * 3, [5.0] * 3]
        assert cache[""].grad["number"] == 3
        assert torch.equal(cache[""].grad["kept"][1], torch.full((3,), 5.0))
    assert not x._backward_hooks and not net.weight._backward_hooks


# -- what is left behind


def test_gradients_keep_no_graph(model: Any) -> None:
    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            nodes.append(weakref.ref(ctx))
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient

    nodes: list[weakref.ref[Any]] = []
    gc.collect()
    gc.disable()
    try:
        with (
            ac.edit(model, {"resid_post.1": Node.apply, "resid_mid.2": Node.apply}),
            ac.capture(model, include_grads=True, sites="resid_post") as cache,
        ):
            loss = loss_of(model)
            assert len(nodes) == 2 and all(node() is not None for node in nodes)
            loss.backward()
            del loss
            # In the open block already.
            assert [node() for node in nodes] == [None, None]
    finally:
        gc.enable()
    assert cache.grad("resid_post.1").grad_fn is None


def test_nothing_arrives_at_a_cache_that_is_gone(model: Any) -> None:
    with ac.capture(model, H1, sites="resid_post.1", include_grads=True) as cache:
        loss = loss_of(model)
    held = weakref.ref(cache[H1]._gradients[0])
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None and held() is None
    finally:
        gc.enable()
    loss.backward()


def test_nothing_is_left_on_the_model(model: Any) -> None:
    before = state(model)
    own = tiny_model("gpt2", seed=1)
    for _ in range(20):
        with ac.capture(model, include_grads=True), ac.capture(model, sites="resid_mid", include_grads=True):
            loss_of(model).backward()
    model.zero_grad()
    assert state(model) == before
    with ac.capture(own, H1, sites="resid_post", include_grads=True) as cache:
        loss_of(own).backward()
    gone = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert gone() is None
    finally:
        gc.enable()
    assert cache.grad("resid_post.1").shape == (2, 5, 32)


def test_capturing_gradients_changes_none(model: Any) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss_of(model).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with ac.capture(model, include_grads=True, modules=[H1, f"{H1}.*"], sites=["resid_mid", "attn_out"]):
        captured = gradients()
    assert all(map(torch.equal, plain, captured))


def test_threads_get_their_own(model: Any) -> None:
    prompts = [IDS, IDS.flip(1)]
    expected = []
    for ids in prompts:
        with ac.capture(model, sites="resid_post.1", include_grads=True) as cache:
            loss_of(model, ids).backward()
        expected.append(cache.grad("resid_post.1"))
    start, wrong = threading.Barrier(2), []

    def work(number: int) -> None:
        start.wait()
        for _ in range(10):
            with ac.capture(model, sites="resid_post.1", include_grads=True) as cache:
                loss_of(model, prompts[number]).backward()
            if not torch.equal(cache.grad("resid_post.1"), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_edits_and_positions_with_moved_values(model: Any) -> None:
    # An edit that makes a new leaf: the value the model goes on with is a copy of it.
    leaf = torch.randn(2, 5, 32, requires_grad=True)
    with (
        ac.capture(model, sites="resid_post.1", include_grads=True) as cache,
        ac.edit(model, {"resid_post.1": lambda x: leaf, "resid_post.0": moved}),
    ):
        loss_of(model).backward()
    assert torch.equal(cache.grad("resid_post.1"), leaf.grad)
