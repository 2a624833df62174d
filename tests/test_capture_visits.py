"""Modules that run more than once, and what belongs to which run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import actcache as ac
from actcache.errors import AdditivityError, MissedModuleError, SiteUnavailableError
from actcache.testing.tiny import PAD, tiny_model

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
H1 = "transformer.h.1"


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def hooked(module: nn.Module, run: Any) -> list[tuple[Tensor, Any]]:
    """First input and output of every run, by a plain hook."""
    found: list[tuple[Tensor, Any]] = []
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: found.append((first(args, kwargs).clone(), out)) or None, with_kwargs=True
    )
    run()
    handle.remove()
    return found


def first(args: Any, kwargs: Any) -> Tensor:
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


# -- recursion


class Tree(nn.Module):
    """Calls itself twice: halves, then their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Any:
        if len(x) == 1:
            return self.leaf(x)
        left, right = self(x[: len(x) // 2]), self(x[len(x) // 2 :])
        return left + right


@torch.no_grad()
def test_inputs_and_outputs_of_nested_calls_belong_together() -> None:
    tree, x = Tree(), torch.arange(4.0)[:, None]
    with ac.capture(tree, include_inputs=True) as cache:
        tree(x)
    entry = cache[""]
    # As they end: leaves before what is made of them.
    assert [visit.input[:, 0].tolist() for visit in entry] == [[0], [1], [0, 1], [2], [3], [2, 3], [0, 1, 2, 3]]
    for visit in entry:
        assert torch.equal(visit.output, tree(visit.input))
    assert len(cache["leaf"]) == 4


@torch.no_grad()
def test_a_nested_call_that_fails() -> None:
    class Trying(nn.Module):
        def forward(self, depth: int) -> int:
            if depth == 2:
                raise ValueError("too deep")
            try:
                return int(self(depth + 1)) + 1
            except ValueError:
                return -depth

    net = Trying()
    with ac.capture(net, include_inputs=True) as cache:
        assert net(0) == 0
    assert [(visit.input, visit.output) for visit in cache[""]] == [(2, None), (1, -1), (0, 0)]


# -- several runs in one pass


class Thrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.silent = Silent()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            self.silent(x + i)
        return x


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


@torch.no_grad()
def test_none_is_an_output() -> None:
    model = Thrice()
    with ac.capture(model, "silent", include_inputs=True) as cache:
        model(torch.zeros(2))
    assert cache["silent"].output == [None, None, None]
    assert [value.tolist() for value in cache["silent"].input] == [[0, 0], [1, 1], [2, 2]]
    assert cache["silent"].hidden == [None, None, None]
    with ac.capture(model, "silent") as outputs:
        model(torch.zeros(2))
    assert outputs["silent"].output == [None, None, None]


@torch.no_grad()
def test_layers_that_share_one_block() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
    )
    albert: Any = transformers.AlbertForMaskedLM(config).eval()
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    with ac.capture(albert, [path, f"{path}.attention"], include_inputs=True) as cache:
        hidden = albert(IDS % 99, output_hidden_states=True).hidden_states
    assert len(cache[path]) == len(cache[f"{path}.attention"]) == 4
    for layer, visit in enumerate(cache[path]):
        assert torch.equal(visit.input, hidden[layer])
        assert torch.equal(visit.hidden, hidden[layer + 1])
        assert torch.equal(cache[f"{path}.attention"][layer].input, hidden[layer])
    # A site is one value of one layer. The refusal says where the values are; with transformers 4 the blocks cannot be
    # told from the config.
    where = rf"4 times in one pass.*'{path}'|capture by module path"
    for site in ("resid_post", "attn_out.0", "attn_in.0", "mlp_in.0", "z"):
        with pytest.raises((AdditivityError, SiteUnavailableError), match=where):
            ac.capture(albert, sites=site)


@torch.no_grad()
def test_one_module_under_two_names() -> None:
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"first": nn.Sequential(shared, nn.ReLU()), "second": nn.Sequential(nn.Tanh(), shared)})
    net.forward = lambda x: net["second"](net["first"](x))  # type: ignore[method-assign]
    x = torch.randn(3, 2)
    with ac.capture(net) as everything, ac.capture(net, ["second.1", "first.0"]) as named:
        net(x)
    # One module has one key: the first of its names, or the one it was asked for by.
    assert list(everything) == ["", "first", "first.0", "first.1", "second", "second.0"]
    assert len(everything["first.0"]) == 2
    assert torch.equal(everything["first.0"][0].output, shared(x))
    assert torch.equal(everything["first.0"][1].output, shared(shared(x).relu().tanh()))
    assert all(len(entry) == 2 for entry in named.values())


@torch.no_grad()
def test_a_module_whose_forward_is_called_directly(model: Any) -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.forward(x)

    net = Direct()
    with ac.capture(net) as cache:
        net(torch.ones(1, 2))
    assert list(cache) == [""]
    # What was asked for is never left out in silence.
    with pytest.raises(MissedModuleError, match=r"'inner'.*forward\(\) is called"), ac.capture(net, "inner"):
        net(torch.ones(1, 2))


# -- generation


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_visit_for_each_step(model: Any, use_cache: bool) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    block = model.transformer.h[1]
    expected = hooked(block, lambda: model.generate(IDS, use_cache=use_cache, **options))
    with ac.capture(model, [H1, "lm_head"], include_inputs=True, sites="resid_post.1") as cache:
        made = model.generate(IDS, use_cache=use_cache, **options)
    lengths = [4, 1, 1, 1] if use_cache else [4, 5, 6, 7]
    assert [visit.input.shape[1] for visit in cache[H1]] == lengths
    for visit, (given, output) in zip(cache[H1], expected, strict=True):
        assert torch.equal(visit.input, given)
        assert torch.equal(visit.hidden, output if isinstance(output, Tensor) else output[0])
    # Logits are those of the last token of each step.
    assert [visit.output.shape for visit in cache["lm_head"]] == [(2, 1, 259)] * 4
    assert torch.equal(torch.cat([visit.output.argmax(-1) for visit in cache["lm_head"]], 1), made[:, 4:])
    assert cache["resid_post.1"].shape == (2, 7, 32)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"num_beams": 3}, 6),
        ({"num_beams": 3, "num_return_sequences": 2}, 6),
        ({"num_return_sequences": 2, "do_sample": True}, 4),
    ],
)
@torch.no_grad()
def test_rows_of_beams_and_of_several_sequences(model: Any, options: dict[str, Any], rows: int) -> None:
    torch.manual_seed(0)
    with ac.capture(model, H1, sites="resid_post.1") as cache:
        made = model.generate(
            IDS, **{"do_sample": False, **options}, max_new_tokens=3, pad_token_id=PAD, eos_token_id=None
        )
    assert [visit.hidden.shape for visit in cache[H1]] == [(rows, 4, 32), (rows, 1, 32), (rows, 1, 32)]
    # The site follows the sequences that were returned.
    assert cache["resid_post.1"].shape == (len(made), 6, 32)
    for row, sequence in zip(cache["resid_post.1"], made, strict=True):
        with ac.capture(model, sites="resid_post.1") as alone:
            model(sequence[None, :-1])
        torch.testing.assert_close(row, alone["resid_post.1"][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_of_the_callers_own(model: Any) -> None:
    with ac.capture(model, H1) as cache:
        x = torch.randn(2, 3, 32)
        for _ in range(5):
            x = model.transformer.h[1](x)
            x = x if isinstance(x, Tensor) else x[0]
    assert len(cache[H1]) == 5
    assert torch.equal(cache[H1][-1].hidden, x)
