"""Capture of modules: what is selected, what is kept, what a visit is."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.capture.values import KVSummary
from actcache.errors import OptionError, UnknownModuleError
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
BLOCKS = [f"transformer.h.{i}" for i in range(4)]
Pair = namedtuple("Pair", "left right")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return isinstance(one, KVSummary) or one is other or one == other


def plain(model: nn.Module, run: Any) -> dict[str, list[Any]]:
    """Every module's outputs by ordinary torch hooks, tensors copied when returned."""
    found: dict[str, list[Any]] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, (tuple, list)):
            return type(value)(copied(v) for v in value)
        return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value

    handles = [
        module.register_forward_hook(
            lambda _, args, out, path=path: found.setdefault(path, []).append(copied(out)) and None
        )
        for path, module in model.named_modules()
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_everything_that_runs(model: Any) -> None:
    expected = plain(model, lambda: model(IDS))
    with ac.capture(model) as cache:
        model(IDS)
    assert list(cache) == [path for path, _ in model.named_modules() if path in expected]
    for path, outputs in expected.items():
        assert len(cache[path]) == 1
        assert cache[path].inputs is None
        assert cache[path].input is None
        if path not in ("", "transformer"):
            assert same(cache[path].output, outputs[0]), path
    assert torch.equal(cache["model"].output.logits, expected[""][0]["logits"])
    assert type(cache[""].output) is type(model(IDS))
    assert cache.missed == []


@torch.no_grad()
def test_selection(model: Any) -> None:
    reference = model(IDS, output_hidden_states=True).hidden_states
    mlps = [block.mlp for block in model.transformer.h]
    with (
        ac.capture(model, BLOCKS) as by_path,
        ac.capture(model, list(model.transformer.h)) as by_object,
        ac.capture(model, "transformer.h.*") as by_pattern,
        ac.capture(model, model.transformer.h[2]) as one,
        ac.capture(model, "model.transformer.h.2") as prefixed,
        ac.capture(model, ["**.attn", mlps[1], "transformer.h.[02].ln_?"]) as mixed,
        ac.capture(model, ["transformer.h.3", "transformer.h.1"]) as ordered,
    ):
        model(IDS)
    assert list(by_path) == list(by_object) == list(by_pattern) == BLOCKS
    assert by_path == by_object == by_pattern
    for i in range(3):
        assert torch.equal(by_path[BLOCKS[i]].hidden, reference[i + 1])
    assert list(one) == list(prefixed) == ["transformer.h.2"]
    assert "transformer.h.1" not in one
    attn = [f"{b}.attn" for b in BLOCKS]
    norms = [f"transformer.h.{i}.ln_{j}" for i in (0, 2) for j in (1, 2)]
    assert list(mixed) == [*attn, "transformer.h.1.mlp", *norms]
    assert list(ordered) == ["transformer.h.3", "transformer.h.1"]


@torch.no_grad()
def test_inputs_and_outputs(model: Any) -> None:
    with ac.capture(model, BLOCKS, include_inputs=True) as both:
        model(IDS)
    assert torch.equal(both[BLOCKS[0]].hidden, both[BLOCKS[1]].input)
    args, kwargs = both[BLOCKS[1]].inputs
    assert torch.equal(args[0], both[BLOCKS[1]].input)
    assert any(isinstance(v, KVSummary) for v in (*args, *kwargs.values()))
    with ac.capture(model, BLOCKS, include_inputs=True, include_output=False) as inputs:
        model(IDS)
    assert inputs[BLOCKS[2]].hidden is None
    assert inputs[BLOCKS[2]].hidden is None
    assert torch.equal(inputs[BLOCKS[2]].input, both[BLOCKS[2]].input)


@torch.no_grad()
def test_kv_caches_become_summaries(model: Any) -> None:
    with ac.capture(model, ["", "transformer.h.0"], include_inputs=True) as cache:
        model(IDS, use_cache=True)
    whole = cache[""].output.past_key_values
    assert (whole.kind, whole.layers, whole.seq_len) == ("DynamicCache", 4, 6)
    assert whole.nbytes == 4 * 2 * IDS.numel() * 32 * 4
    args, kwargs = cache["transformer.h.0"].inputs
    # At the first block nothing was cached yet, and what the later ones added is not seen.
    seen = next(v for v in (*args, *kwargs.values()) if isinstance(v, KVSummary))
    assert seen.seq_len == 0


@torch.no_grad()
def test_recurrent_states_become_summaries() -> None:
    mamba = tiny_model("mamba")
    with ac.capture(mamba, ["backbone.layers.3"], include_inputs=True) as cache:
        mamba(IDS, use_cache=True)
    args, kwargs = cache["backbone.layers.3"].inputs
    (state,) = [v for v in (*args, *kwargs.values()) if isinstance(v, KVSummary)]
    assert (state.layers, state.seq_len) == (4, 0)
    # Layers before it have run: two prompts, 64 channels, a window of 4 and a state of 8 each.
    assert state.nbytes >= 3 * 2 * 64 * (4 + 8) * 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("transformer.h.0.atn", r"Did you mean 'transformer\.h\.0\.attn'"),
        ("transformer.h.9", "no module 'transformer.h.9'"),
        ("transformer.*.nothing", "matches no module"),
        ("transformer.h", "ModuleList, which only holds modules"),
        (nn.Linear(2, 2), "not a module of the GPT2LMHeadModel"),
    ],
)
def test_unknown_modules_are_refused_before_the_pass(model: Any, request_: Any, message: str) -> None:
    with pytest.raises(UnknownModuleError, match=message) as caught:
        ac.capture(model, request_)
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownModuleError):
        ac.capture(model, [BLOCKS[0], request_])


@pytest.mark.parametrize(
    "options",
    [
        {"modules": []},
        {"modules": [3]},
        {"include_output": False},
        {"modules": BLOCKS, "include_output": False},
        {"modules": BLOCKS, "layers": [1]},
        {"sites": []},
        {"device": "cpuu"},
        {"device": "cuda:99"},
        {"dtype": "float23"},
        {"dtype": torch.int8},
        {"positions": "lst"},
        {"positions": (1, 2, 3)},
        {"positions": []},
        {"positions": 1.5},
        {"stop_after_last": True},
    ],
)
def test_options_that_make_no_sense(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ac.capture(model, **options)
    with pytest.raises(OptionError, match=r"torch\.nn\.Module"):
        ac.capture("gpt2")


@torch.no_grad()
def test_dtype_casts_floating_tensors_only(model: Any) -> None:
    with ac.capture(model, include_inputs=True, dtype="bfloat16") as cache:
        model(input_ids=torch.tensor([[257, 5]]), attention_mask=torch.ones(1, 2, dtype=torch.bool))
    kwargs = cache[""].inputs[1]
    assert kwargs["input_ids"].tolist() == [[257, 5]]
    assert kwargs["input_ids"].dtype == torch.int64
    assert kwargs["attention_mask"].dtype == torch.bool
    assert cache[""].output.logits.dtype == torch.bfloat16
    assert cache["transformer.h.0.attn"].output[0].dtype == torch.bfloat16
    with ac.capture(model, "transformer.h.0", dtype=torch.float64) as wide:
        model(IDS)
    assert torch.equal(wide[BLOCKS[0]].hidden, model(IDS, output_hidden_states=True).hidden_states[1].double())


def test_detach(model: Any) -> None:
    with ac.capture(model, ["", *BLOCKS]) as cache:
        output = model(IDS)
    assert output.logits.requires_grad
    assert not cache[""].output.logits.requires_grad
    assert not cache[BLOCKS[0]].hidden.requires_grad
    with ac.capture(model, BLOCKS, detach=False, dtype="float64") as attached:
        model(IDS)
    (gradient,) = torch.autograd.grad(attached[BLOCKS[3]].hidden.sum(), model.transformer.wte.weight)
    assert bool(gradient.abs().sum() > 0)


class InPlace(nn.Module):
    """What it returns is changed afterwards, and so is what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.linear(x))
        x.zero_()
        return y.add_(1)


@torch.no_grad()
def test_copies_never_change() -> None:
    model = InPlace()
    x = torch.randn(4, 3)
    given = x.clone()
    with ac.capture(model, include_inputs=True) as cache:
        out = model(x)
    straight = model.linear(given)
    assert torch.equal(cache["linear"].output, straight)
    assert torch.equal(cache["linear"].input, given)
    assert torch.equal(cache["relu"].input, straight)
    assert torch.equal(cache["relu"].output, straight.relu())
    assert torch.equal(cache[""].input, given)
    assert torch.equal(cache[""].output, straight.relu() + 1)
    out.fill_(7)
    assert torch.equal(cache[""].output, straight.relu() + 1)
    with ac.capture(model, ["linear"], copy=False) as shared:
        again = model(given.clone())
    assert shared["linear"].output.data_ptr() == again.data_ptr()


@torch.no_grad()
def test_a_tensor_handed_on_is_copied_once(model: Any) -> None:
    with ac.capture(model, ["transformer.h.0.mlp.c_proj", "transformer.h.0.mlp"]) as cache:
        model(IDS)
    assert cache.nbytes == cache["transformer.h.0.mlp"].output.nbytes


@torch.inference_mode()
def test_captures_of_inference_mode_can_be_trained_on() -> None:
    layer = nn.Linear(3, 3)
    with ac.capture(layer) as cache:
        layer(torch.randn(2, 3))
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.ones(3, requires_grad=True)
        (cache[""].output * weight).sum().backward()
        assert weight.grad is not None


@dataclasses.dataclass
class Result:
    value: Tensor
    note: str


class Containers(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {
            "tuple": (x, None, [x + 1]),
            "pair": Pair(x, x * 2),
            "dataclass": Result(x, "n"),
            "plain": 3,
            "empty": (),
        }


def test_tensors_in_containers() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    model = Containers()
    with ac.capture(model, dtype="bfloat16") as cache:
        raw = model(x)
    out = cache[""].output
    expected = x.detach().bfloat16()
    assert type(out["pair"]) is Pair
    assert type(out["dataclass"]) is Result
    assert out["dataclass"].note == "n"
    assert out["plain"] == 3
    assert out["empty"] == ()
    assert out["tuple"][1] is None
    for value in (out["tuple"][0], out["pair"].left, out["dataclass"].value):
        assert torch.equal(value, expected)
        assert not value.requires_grad
    assert raw["dataclass"].value is x


class Several(nn.Module):
    """One module three times, one that returns None, one without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(2, 2)
        self.silent = Silent()
        self.source = Source()

    def forward(self) -> Tensor:
        x = self.source()
        for _ in range(3):
            x = self.step(x)
            self.silent(x)
        return x


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Source(nn.Module):
    def forward(self) -> Tensor:
        return torch.ones(1, 2)


@torch.no_grad()
def test_several_visits() -> None:
    model = Several()
    with ac.capture(model, include_inputs=True) as cache:
        model()
    step = cache["step"]
    assert len(step) == 3
    assert isinstance(step.output, list)
    x = torch.ones(1, 2)
    for visit in step:
        assert torch.equal(visit.input, x)
        x = model.step(x)
        assert torch.equal(visit.output, x)
    assert torch.equal(step[-1].output, x)
    assert cache["silent"].output == [None, None, None]
    assert [torch.equal(a, b) for a, b in zip(cache["silent"].input, step.output, strict=True)] == [True] * 3
    assert cache["source"].inputs == ((), {})
    assert cache["source"].input is None
    assert len(cache["source"]) == 1
    with pytest.raises(IndexError):
        step[3]


class Nested(nn.Module):
    """Calls itself."""

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        return self(x + 1, depth=depth - 1) * 2 if depth else x


@torch.no_grad()
def test_visits_pair_under_recursion() -> None:
    model = Nested()
    for hook in (False, True):
        handle = model.register_forward_pre_hook(lambda *_: None) if hook else None
        with ac.capture(model, include_inputs=True) as cache:
            model(torch.tensor(1.0), depth=2)
        got = [(float(v.input), v.inputs[1].get("depth", 0), float(v.output)) for v in cache[""]]
        assert got == [(3.0, 0, 3.0), (2.0, 1, 6.0), (1.0, 2, 12.0)]
        if handle is not None:
            handle.remove()


@torch.no_grad()
def test_only_keyword_arguments() -> None:
    class Keyword(nn.Module):
        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    model = Keyword()
    with ac.capture(model, include_inputs=True) as cache:
        model(b=torch.ones(1), a=torch.zeros(1))
    assert float(cache[""].input) == 1.0
