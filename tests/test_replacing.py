"""What a module returned, or was called with, with another tensor in it: nothing else changes, least of all the old."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from actcache.model.forms import first_input, first_tensor
from actcache.model.replacing import with_first_input, with_first_tensor, with_item, with_tensor
from actcache.model.runs import tensors_of

Pair = namedtuple("Pair", "values rest")
OLD, OTHER, NEW = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)


@pytest.mark.parametrize(
    "output",
    [
        OLD,
        (OLD, OTHER),
        [OLD, "more"],
        Pair(OLD, OTHER),
        ((OLD, OTHER), None),
        {"hidden": OLD, "other": OTHER},
        BaseModelOutput(last_hidden_state=OLD, attentions=(OTHER,)),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "nested", "dict", "model output"],
)
def test_the_first_tensor_of_an_output(output: object) -> None:
    changed = with_first_tensor(output, NEW)
    assert type(changed) is type(output)
    assert first_tensor(changed) is NEW and first_tensor(output) is OLD
    # All others are the very same.
    assert [t for t in tensors_of(changed) if t is not NEW] == [t for t in tensors_of(output) if t is not OLD]


@pytest.mark.parametrize(
    "call",
    [
        ((OLD, OTHER), {"mask": OTHER}),
        ((), {"mask": None, "hidden_states": OLD}),
        ((None, OLD), {"cache": "c"}),
        ((), {"flag": True, "inputs": OLD}),
    ],
    ids=["first", "by its name", "behind another", "by another name"],
)
def test_the_first_input_of_a_call(call: tuple[tuple[object, ...], dict[str, object]]) -> None:
    args, kwargs = with_first_input(call, NEW)
    assert first_input((args, kwargs)) is NEW and first_input(call) is OLD
    assert list(kwargs) == list(call[1]) and len(args) == len(call[0])
    was = [*call[0], *call[1].values()]
    assert [(a, b) for a, b in zip(was, [*args, *kwargs.values()], strict=True) if a is not b] == [(OLD, NEW)]


@pytest.mark.parametrize("number", range(5))
def test_any_tensor_of_an_output(number: int) -> None:
    tensors = [torch.full((1,), float(i)) for i in range(5)]
    output = (
        tensors[0],
        {"a": [tensors[1], 3], "b": OrderedDict(c=tensors[2])},
        Pair(tensors[3], "x"),
        BaseModelOutput(last_hidden_state=tensors[4]),
    )
    changed = with_tensor(output, number, NEW)
    expected = [*tensors[:number], NEW, *tensors[number + 1 :]]
    assert all(a is b for a, b in zip(tensors_of(changed), expected, strict=True))
    assert all(a is b for a, b in zip(tensors_of(output), tensors, strict=True))
    assert changed[1]["a"][1] == 3 and changed[2].rest == "x" and type(changed[3]) is BaseModelOutput


def test_an_item_of_a_model_output() -> None:
    output = BaseModelOutput(last_hidden_state=OLD, attentions=(OTHER,))
    changed = with_item(output, "last_hidden_state", NEW)
    assert changed.last_hidden_state is NEW and changed[0] is NEW and changed.attentions[0] is OTHER
    assert output.last_hidden_state is OLD
