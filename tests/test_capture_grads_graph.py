"""What the graph of captured gradients is: frozen weights, blocks run again, nothing kept, nothing left behind."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.capture.values import tensors_in
from actcache.errors import GradientError
from actcache.testing.tiny import tiny_model
from edit_helpers import state
from grad_helpers import H1, H2, IDS, loss_of


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


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
