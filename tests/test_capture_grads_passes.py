"""Gradients of several visits and passes: kept, added up, joined, saved and read back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import GradientError
from actcache.testing.tiny import tiny_model
from grad_helpers import H1, IDS, loss_of


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


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


def test_gradients_of_gradients(model: Any) -> None:
    model.set_attn_implementation("eager")
    with ac.capture(model, sites="resid_post.1", include_grads=True, detach=False) as cache:
        torch.autograd.grad(loss_of(model), model.lm_head.weight, create_graph=True)
    penalty = cache.grad("resid_post.1").square().sum()
    (found,) = torch.autograd.grad(penalty, model.transformer.wpe.weight)
    assert bool(found.abs().max() > 0)
