"""FullActivationCache: the residual stream of one prompt."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import actcache as ac
from actcache.errors import JoinError, LayerRangeError, OptionError
from actcache.testing.tiny import tiny_model


def test_layers_and_positions() -> None:
    cache = ac.FullActivationCache.with_capacity(26)
    assert cache.is_empty()
    assert cache.n_layers == len(cache) == 0
    assert cache.get_layer(0) is None
    with pytest.raises(LayerRangeError, match="empty"):
        cache.seq_len()
    with pytest.raises(LayerRangeError, match="empty"):
        cache.stack()
    layers = torch.randn(2, 10, 2304)
    for layer in layers:
        cache.push(layer)
    assert (cache.n_layers, cache.seq_len(), cache.is_empty()) == (2, 10, False)
    assert cache.get_layer(1).shape == (10, 2304)
    assert cache.get_layer(2) is None
    assert torch.equal(cache.get_position(0, 5), layers[0, 5])
    assert torch.equal(cache.get_position(1, -1), layers[1, -1])
    assert torch.equal(cache.stack(), layers)
    assert [layer.data_ptr() for layer in cache] == [layer.data_ptr() for layer in layers]
    for layer, position, message in (
        (0, 10, r"position 10 of layer 0 is out of range: seq_len is 10 \(0 to 9\)"),
        (0, -11, "position -11"),
        (5, 0, "layer 5 is not in the cache, which holds layers 0, 1"),
    ):
        with pytest.raises(IndexError, match=message):
            cache.get_position(layer, position)


def test_layers_keep_their_numbers() -> None:
    cache = ac.FullActivationCache.with_capacity(24)
    cache.push(torch.full((3, 4), 20.0), layer=20)
    cache.push(torch.full((3, 4), 5.0), layer=5)
    cache.push(torch.full((3, 4), 21.0))
    assert cache.layer_numbers() == [5, 20, 21]
    assert cache.get_layer(5)[0, 0] == 5
    assert cache.get_layer(0) is None
    assert cache.get_layer(-1) is None
    assert cache.get_layer(-4)[0, 0] == 20
    assert cache.stack()[:, 0, 0].tolist() == [5, 20, 21]
    assert "5, 20, 21" in repr(cache)
    unbounded = ac.FullActivationCache()
    unbounded.push(torch.ones(1, 1))
    assert unbounded.get_layer(-1) is not None


@pytest.mark.parametrize(
    ("tensor", "layer", "error", "message"),
    [
        (torch.ones(1, 3, 4), None, JoinError, r"layer 1 is \[1, 3, 4\]: expected a tensor \[T, D\]"),
        (torch.ones(4), None, JoinError, r"\[4\]"),
        (torch.ones(2, 4), None, JoinError, r"\[2, 4\], the layers held are .*\[3, 4\]"),
        (torch.ones(3, 5), None, JoinError, r"\[3, 5\]"),
        (torch.ones(3, 4).double(), None, JoinError, "float64"),
        (torch.ones(3, 4), 0, JoinError, "held already"),
        (torch.ones(3, 4), -1, LayerRangeError, "numbered from 0"),
        ([[1.0]], None, JoinError, "list"),
    ],
)
def test_what_cannot_be_pushed(tensor: Any, layer: int | None, error: type[Exception], message: str) -> None:
    cache = ac.FullActivationCache()
    cache.push(torch.ones(3, 4))
    with pytest.raises(error, match=message):
        cache.push(tensor, layer)
    assert cache.layer_numbers() == [0]


@pytest.mark.parametrize("n_layers", [-1, 1.5, True, None])
def test_a_capacity_is_a_number_of_layers(n_layers: Any) -> None:
    with pytest.raises(OptionError, match="n_layers"):
        ac.FullActivationCache.with_capacity(n_layers)


def test_the_stream_of_one_prompt() -> None:
    model = tiny_model("gpt2")
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    cache = ac.run_with_cache(model, prompts, sites=["resid_post", "mlp_out"], layers=[1, 3])[1]
    for prompt, ids in enumerate(prompts):
        stream = cache.residual_stream(prompt)
        alone = ac.run_with_cache(model, ids, sites=["resid_post"])[1]
        assert stream.layer_numbers() == [1, 3]
        assert stream.seq_len() == len(ids)
        assert stream.site == "resid_post"
        torch.testing.assert_close(stream.get_layer(3), alone["resid_post.3"][0], rtol=1e-5, atol=1e-5)
        assert torch.equal(stream.get_layer(-1), stream.get_layer(3))
        assert torch.equal(stream.get_position(1, -1), cache.get_position(1, -1)[prompt])
    assert cache.residual_stream(-1, site="mlp_out").seq_len() == 5
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert torch.equal(twin.stack(), stream.stack())
    with pytest.raises(LayerRangeError, match="prompt 2 is out of range: the cache holds 2 prompts"):
        cache.residual_stream(2)
    with pytest.raises(LayerRangeError, match="no layer of attn_out"):
        cache.residual_stream(site="attn_out")


def test_the_stream_of_a_stack() -> None:
    model = tiny_model("t5")
    cache = ac.run_with_cache(model, [[5, 6, 7], [8, 9]], sites=["encoder.resid_post", "decoder.resid_post"])[1]
    stream = cache.residual_stream(1, site="encoder.resid_post")
    assert torch.equal(stream.get_layer(0), cache.rows("encoder.resid_post.0")[1])
