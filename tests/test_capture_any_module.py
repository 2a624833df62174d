"""Capture and edits of models that are no language models, or run in unusual ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import MissedModuleError, OptionError, SiteUnavailableError, UnknownModuleError
from actcache.testing.tiny import tiny_model
from edit_helpers import state

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])


def plain(model: nn.Module, *args: Any) -> dict[str, list[Any]]:
    """Outputs by plain hooks, copied as they are returned."""
    found: dict[str, list[Any]] = {}

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else tuple(map(copied, value))

    handles = [
        module.register_forward_hook(lambda m, a, out, p=path: found.setdefault(p, []).append(copied(out)) or None)
        for path, module in model.named_modules()
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    return found


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else all(map(same, one, other))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        out: Tensor = self.relu(y)
        return out


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), Residual(4), Residual(4), nn.Flatten(), nn.Linear(144, 5)
    )
    return net.eval()


# -- convolutions


@torch.no_grad()
def test_a_convolutional_network_that_works_in_place() -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    expected = plain(net, x)
    before = state(net)
    with ac.capture(net, include_inputs=True) as cache:
        out = net(x)
    assert state(net) == before
    assert list(cache) == [path for path, _ in net.named_modules()]
    for path, outputs in expected.items():
        assert len(cache[path]) == len(outputs)
        assert same([visit.output for visit in cache[path]], outputs), path
    # The block's relu runs twice, the second time over the sum.
    assert len(cache["2.relu"]) == 2
    assert torch.equal(cache["2.relu"][1].input, cache["2.bn2"].output + cache["2"].input)
    # What a convolution returned is not what the relu made of it.
    assert bool((cache["0"].output < 0).any())
    assert torch.equal(cache["5"].output, out)


def test_edits_and_gradients_of_a_convolutional_network() -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    with ac.edit(net, {"2.bn1": lambda y: y * 0}), ac.capture(net, ["2.relu", "2.conv2"], include_grads=True) as cache:
        net(x).sum().backward()
    assert not cache["2.relu"][0].output.any()
    assert torch.equal(cache["2.conv2"].output, net[2].conv2(torch.zeros(2, 4, 6, 6)))
    assert cache["2.conv2"].grad.shape == (2, 4, 6, 6)
    expected = torch.autograd.grad(net[5](net[4](net[3](y := cache["2.relu"][1].output.requires_grad_()))).sum(), y)
    torch.testing.assert_close(cache["2.relu"][1].grad, expected[0])


# -- recurrent networks


class Unrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[0], 2)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return hidden


@torch.no_grad()
def test_the_hidden_state_of_every_timestep() -> None:
    torch.manual_seed(0)
    net, x = Unrolled(), torch.randn(1, 5, 3)
    with ac.capture(net, "cell", include_inputs=True) as cache:
        net(x)
    assert len(cache["cell"]) == 5
    hidden = torch.zeros(1, 2)
    for t, visit in enumerate(cache["cell"]):
        assert torch.equal(visit.input, x[:, t])
        torch.testing.assert_close(visit.inputs[0][1], hidden)
        hidden = torch.tanh(
            x[:, t] @ net.cell.weight_ih.T + net.cell.bias_ih + hidden @ net.cell.weight_hh.T + net.cell.bias_hh
        )
        assert visit.output.shape == (1, 2)
        torch.testing.assert_close(visit.output, hidden)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_recurrent_modules_of_torch(kind: Any) -> None:
    torch.manual_seed(0)
    net, x = kind(3, 4, num_layers=2, batch_first=True), torch.randn(2, 5, 3)
    output, last = net(x)
    with ac.capture(net) as cache:
        net(x)
    assert same(cache[""].output, (output, last))
    assert torch.equal(cache[""].hidden, output)
    # With the batch first there are rows of positions to choose from; the last states have none.
    with ac.capture(net, positions="last") as cut:
        net(x)
    assert torch.equal(cut[""].hidden, output[:, -1:])
    assert same(cut[""].output[1], last)


# -- transformers of torch


@torch.no_grad()
def test_the_transformer_of_torch() -> None:
    torch.manual_seed(0)
    net, x = nn.Transformer(8, 2, 2, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    expected = net(x, x[:, :3])
    with ac.capture(
        net, ["encoder.layers.*", "decoder.layers.*", "decoder.layers.0.linear1"], include_inputs=True
    ) as cache:
        assert torch.equal(net(x, x[:, :3]), expected)
    assert torch.equal(cache["encoder.layers.0"].output, cache["encoder.layers.1"].input)
    assert torch.equal(cache["decoder.layers.0"].output, cache["decoder.layers.1"].input)
    assert cache["decoder.layers.0.linear1"].output.shape == (2, 3, 16)
    with pytest.raises(SiteUnavailableError):
        ac.capture(net, sites="resid_post")


@torch.no_grad()
def test_what_a_fused_layer_holds_is_not_said_to_have_run() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    with pytest.raises(MissedModuleError, match=r"'layers\.0\.linear1'"), ac.capture(net, "layers.0.linear1"):
        net(x)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ac.capture(net, ["layers.0.linear1", "layers.0.self_attn"]) as cache:
            net(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert cache["layers.0.linear1"].output.shape == (2, 5, 16)


# -- positions


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)),
        # Positions come first here.
        (nn.LSTM(3, 4), torch.randn(5, 2, 3)),
        (nn.TransformerEncoderLayer(8, 2, 16), None),
    ],
)
def test_positions_where_there_are_no_tokens(net: nn.Module, x: Any) -> None:
    if x is None:
        net, x = nn.Sequential(nn.Unflatten(0, (2, 5)), net, nn.Flatten(0, 1)), torch.randn(10, 8)
    before = state(net)
    for inputs in (False, True):
        with pytest.raises(OptionError, match="shows none"), ac.capture(net, positions="last", include_inputs=inputs):
            net(x)
    assert state(net) == before
    # Without positions there is no such question.
    with ac.capture(net) as cache:
        net(x)
    assert cache[""].hidden.shape[0] == len(x)


# -- modules of other kinds


class Nothing(nn.Module):
    def forward(self, x: Tensor, *rest: Any, scale: float = 1.0) -> Any:
        return {"x": x * scale, "rest": rest}


def test_a_module_without_parameters() -> None:
    net = Nothing()
    with ac.capture(net, include_inputs=True) as own:
        net(torch.ones(2), "text", scale=3.0)
    assert own[""].output["x"].tolist() == [3, 3]
    assert own[""].output["rest"] == ("text",)
    assert own[""].inputs[1] == {"scale": 3.0}


@torch.no_grad()
def test_modules_compiled_by_jit() -> None:
    def inner() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    x = torch.randn(2, 4)
    for script in (torch.jit.script(inner()), torch.jit.trace(inner(), x)):
        # As a whole, by itself and as a part.
        with ac.capture(script, include_inputs=True) as alone, ac.edit(script, {"": lambda y: y + 1}):
            script(x)
        assert torch.equal(alone[""].output, inner()(x) + 1)
        assert list(alone) == [""]
        whole = nn.ModuleDict({"linear": nn.Linear(4, 4), "script": script})
        whole.forward = lambda x, whole=whole: whole["script"](whole["linear"](x))  # type: ignore[method-assign]
        before = set(vars(script))
        with ac.capture(whole) as cache, ac.capture(whole, script) as by_object:
            y = whole(x)
        assert list(cache) == ["", "linear", "script"]
        assert torch.equal(cache["script"].output, y)
        assert by_object == cache.__class__({"script": cache["script"]})
        assert set(vars(script)) == before
        with pytest.raises(UnknownModuleError, match=r"'script\.0' lies inside 'script', which torch\.jit compiled"):
            ac.capture(whole, "script.0")
        with pytest.raises(UnknownModuleError, match="lies inside 'model'"):
            ac.edit(script, {"0": lambda y: y})
        with pytest.raises(SiteUnavailableError):
            ac.capture(script, sites="resid_post")


@torch.no_grad()
def test_compiled_parts_and_wholes() -> None:
    def block() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    x = torch.randn(2, 4)
    reference = block()
    with ac.capture(reference) as expected, ac.edit(reference, {"1": lambda y: y * 2}):
        reference(x)
    whole = torch.compile(block(), backend="eager")
    whole(x)
    with ac.capture(whole) as cache, ac.edit(whole, {"1": lambda y: y * 2}):
        whole(x)
    assert cache == expected
    part = block()
    part[1] = torch.compile(part[1], backend="eager")
    part(x)
    with ac.capture(part, ["0", "1", "2"]) as cache, ac.edit(part, {"1": lambda y: y * 2}):
        part(x)
    for name in ("0", "1", "2"):
        assert torch.equal(cache[name].output, expected[name].output)
    in_place = block()
    in_place.compile(backend="eager")
    in_place[1].compile(backend="eager")
    in_place(x)
    with ac.capture(in_place) as cache, ac.edit(in_place, {"1": lambda y: y * 2}):
        in_place(x)
    assert cache == expected
    # Compiled for the first time in the block.
    fresh = block()
    with ac.capture(fresh) as cache, ac.edit(fresh, {"1": lambda y: y * 2}):
        torch.compile(fresh, backend="eager")(x)
    assert cache == expected


@torch.no_grad()
def test_functional_calls_and_transforms() -> None:
    from torch.func import functional_call, vmap

    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    twice = {name: parameter * 2 for name, parameter in net.named_parameters()}
    with ac.capture(net) as cache:
        out = functional_call(net, twice, (x,))
    assert torch.equal(cache["1"].output, out)
    traced = torch.fx.symbolic_trace(net)
    with ac.capture(traced) as cache:
        traced(x)
    assert torch.equal(cache["1"].output, net(x))
    with ac.capture(net) as cache:
        vmap(net)(x)
    assert len(cache["0"]) == 1


# -- weights that are elsewhere


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@torch.no_grad()
def test_models_dispatched_by_accelerate(offload: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("gpt2")
    sites = ["resid_mid", "mlp_out"]
    request: dict[str, Any] = {"modules": ["transformer.h.1", "transformer.h.2.mlp.c_fc"], "include_inputs": True}
    edits = {"transformer.h.0.mlp": lambda y: y * 2}
    with ac.capture(model, sites=sites, **request) as expected, ac.edit(model, edits):
        model(IDS, use_cache=False)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    before = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert "meta" in before.values()
    with ac.capture(model, sites=sites, **request) as cache, ac.edit(model, edits):
        model(IDS, use_cache=False)
    assert cache == expected
    assert {name: parameter.device.type for name, parameter in model.named_parameters()} == before
