"""ValueWithInfo: the value wherever a value is expected, and its note wherever it goes."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac


@pytest.fixture
def value() -> torch.Tensor:
    return torch.tensor([[1.0, -2.0], [3.0, 4.0]])


@pytest.fixture
def noted(value: torch.Tensor) -> Any:
    return ac.ValueWithInfo(value, {"layer": 3})


def test_torch_functions(value: torch.Tensor, noted: Any) -> None:
    assert torch.equal(torch.relu(noted), torch.relu(value))
    assert torch.equal(torch.cat([noted, value]), torch.cat([value, value]))
    assert torch.equal(torch.stack((noted, noted), dim=1), torch.stack((value, value), dim=1))
    assert torch.equal(torch.nn.functional.linear(noted, value), torch.nn.functional.linear(value, value))
    assert torch.equal(torch.einsum("ij,jk->ik", noted, noted), value @ value)
    assert torch.allclose(noted, value)
    assert torch.equal(torch.where(noted > 0, noted, 0), torch.where(value > 0, value, 0))
    assert type(torch.relu(noted)) is torch.Tensor
    assert not isinstance(noted, torch.Tensor)
    assert np.array_equal(np.asarray(noted), value.numpy())


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"])
def test_arithmetic(value: torch.Tensor, noted: Any, name: str) -> None:
    function = getattr(operator, name)
    expected = function(value, value)
    for one, other in ((noted, value), (value, noted), (noted, noted)):
        result = function(one, other)
        torch.testing.assert_close(result, expected, equal_nan=True)
        assert type(result) is torch.Tensor
    if name != "matmul":
        torch.testing.assert_close(function(2.0, noted), function(2.0, value), equal_nan=True)
        changed = getattr(operator, f"i{name}")(copy.deepcopy(noted), 2.0)
        torch.testing.assert_close(changed.value(), function(value, 2.0))
        assert changed.info() == {"layer": 3}


def test_indexing_and_comparison(value: torch.Tensor, noted: Any) -> None:
    assert torch.equal(noted[0], value[0])
    assert torch.equal(noted[:, 1], value[:, 1])
    noted[0, 0] = 7.0
    assert value[0, 0] == 7
    assert len(noted) == 2
    assert [row.tolist() for row in noted] == value.tolist()
    assert 4.0 in noted
    assert torch.equal(noted > 3, value > 3)
    assert (noted == value).all()
    assert not (noted != value).any()
    assert torch.equal(-noted, -value) and torch.equal(abs(noted), abs(value))
    assert noted.shape == (2, 2) and noted.mean() == value.mean()
    number = ac.ValueWithInfo(3, "three")
    assert float(number) == 3.0 and int(number) == 3 and [10, 11, 12, 13][number] == 13
    assert 10 - number == 7 and number // 2 == 1 and bool(number)
    assert {noted: 1}[noted] == 1
    with pytest.raises(AttributeError):
        _ = noted.no_such_thing
    assert "info={'layer': 3}" in repr(noted)


def test_copies_keep_the_info(value: torch.Tensor, noted: Any) -> None:
    for twin in (copy.copy(noted), copy.deepcopy(noted), pickle.loads(pickle.dumps(noted))):
        assert type(twin) is ac.ValueWithInfo
        assert torch.equal(twin.value(), value)
        assert twin.info() == {"layer": 3}
    twin = copy.deepcopy(noted)
    twin[0, 0] = 9.0
    assert value[0, 0] == 1


def test_notes_in_a_cache(value: torch.Tensor) -> None:
    cache = ac.ActivationCache({"plain": value})
    cache.add_with_info("resid_post.0", value, "why")
    assert cache.info("resid_post.0") == cache.info("resid_out_0") == "why"
    assert cache.info("plain") is None
    with pytest.raises(KeyError, match="Did you mean 'plain'"):
        cache.info("plan")
    assert cache.layer_numbers("resid_post") == [0]
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache | {}):
        assert twin == cache
        assert twin.info("resid_post.0") == "why"
    other = ac.ActivationCache({"plain": value, "resid_post.0": ac.ValueWithInfo(value, "other")})
    assert other != cache


def test_moving_reaches_everything_and_keeps_its_type(value: torch.Tensor) -> None:
    ids = torch.tensor([1, 2])
    cache = ac.ActivationCache(
        {
            "tensor": value, "list": [value, ids], "tuple": (value, [value]), "nested": {"a": {"b": value}},
            "noted": ac.ValueWithInfo(value, "why"), "text": "text",
        }
    )  # fmt: skip
    assert cache.to(torch.float64) is cache
    assert cache["tensor"].dtype == cache["list"][0].dtype == cache["tuple"][1][0].dtype == torch.float64
    assert cache["nested"]["a"]["b"].dtype == cache["noted"].dtype == torch.float64
    assert cache["list"][1].dtype == torch.int64
    assert type(cache["tuple"]) is tuple
    assert cache["tensor"] is cache["list"][0]
    assert cache.info("noted") == "why"
    assert cache["text"] == "text"
    assert cache.cpu() is cache.to("bfloat16") is cache
    assert cache["tensor"].dtype == torch.bfloat16
    assert torch.equal(cache.to("float32")["tensor"], value)
    assert cache.to(torch.device("meta"))["nested"]["a"]["b"].is_meta
    with pytest.raises(ac.ActCacheError):
        cache.to(torch.int64)
    with pytest.raises(ac.ActCacheError, match="unknown device 'gpu'"):
        cache.to("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_moving_to_a_gpu_that_is_not_there(value: torch.Tensor) -> None:
    cache = ac.ActivationCache({"x": value})
    with pytest.raises(ac.ActCacheError, match="does not find"):
        cache.cuda()
    assert cache["x"] is value
