"""ActivationCache as a container: keys, attributes, layers, positions, parts."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actcache as ac
from actcache.errors import LayerRangeError, OptionError, UnknownKeyError
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def cache(gpt2: Any) -> ac.ActivationCache:
    return ac.run_with_cache(gpt2, IDS, sites=["resid_post", "mlp_out"])[1]


@pytest.fixture(scope="module")
def everything(gpt2: Any) -> ac.ActivationCache:
    return ac.run_with_cache(gpt2, IDS, include_inputs=True)[1]


def test_keys_of_modules(everything: ac.ActivationCache) -> None:
    h0 = everything["transformer.h.0"]
    assert everything["model.transformer.h.0"] is h0
    assert everything["model"] is everything[""]
    assert "model.transformer.h.0" in everything
    assert "transformer.h.9" not in everything
    assert 3 not in everything
    with pytest.raises(UnknownKeyError, match=r"Did you mean 'transformer\.h\.0") as caught:
        everything["transformer.h.0.atn"]
    assert isinstance(caught.value, KeyError)
    assert everything.get("nothing") is None


def test_keys_when_the_model_has_a_child_called_model(llama: Any) -> None:
    cache = ac.run_with_cache(llama, IDS)[1]
    # As written first: "model" is the child, whose output has no logits.
    assert "logits" not in cache["model"].output
    assert "logits" in cache[""].output
    assert cache["model.layers.0"] is cache["model.model.layers.0"]
    assert torch.equal(cache.model.layers[0].hidden, cache["model.layers.0"].hidden)
    assert torch.equal(cache.model.model.layers[-1].hidden, cache["model.layers.3"].hidden)


def test_keys_of_sites(cache: ac.ActivationCache) -> None:
    value = cache["resid_post.3"]
    for name in ("resid_post.-1", "blocks.3.hook_resid_post", "resid_out_3", "layer_3"):
        assert cache[name] is value
        assert name in cache
    assert list(cache)[:2] == ["resid_post.0", "resid_post.1"]
    assert len(cache) == 8
    with pytest.raises(UnknownKeyError, match=r"Did you mean 'resid_post\.3'"):
        cache["resid_psot.3"]
    with pytest.raises(UnknownKeyError):
        cache["attn_out.0"]


def test_attribute_access(everything: ac.ActivationCache) -> None:
    h = everything.transformer.h
    assert torch.equal(h[0].hidden, everything["transformer.h.0"].hidden)
    assert torch.equal(h[-1].attn.output[0], everything["transformer.h.3.attn"].output[0])
    assert torch.equal(everything.model.transformer.h[1].input, everything["transformer.h.1"].input)
    assert torch.equal(everything.transformer["h.2"].hidden, everything["transformer.h.2"].hidden)
    assert torch.equal(everything.output.logits, everything[""].output.logits)
    assert [torch.equal(node.hidden, everything[f"transformer.h.{i}"].hidden) for i, node in enumerate(h)] == [True] * 4
    with pytest.raises(IndexError, match="holds 4 modules"):
        h[4]
    with pytest.raises(AttributeError, match="not captured"):
        _ = h[0].crossattention
    with pytest.raises(AttributeError):
        _ = everything.nothing
    with pytest.raises(KeyError):
        everything.transformer["h.9"]
    with pytest.raises(KeyError):
        _ = h.output


@torch.no_grad()
def test_negative_indices_count_from_the_models_end(gpt2: Any) -> None:
    with ac.capture(gpt2, ["transformer.h.1", "transformer.h.3"]) as cache:
        gpt2(IDS)
    assert torch.equal(cache.transformer.h[-1].hidden, cache["transformer.h.3"].hidden)
    with pytest.raises(LayerRangeError, match="not captured"):
        cache.transformer.h[-2]


@torch.no_grad()
def test_a_module_called_output_is_reached_by_key() -> None:
    model = nn.ModuleDict({"output": nn.Linear(2, 2)})
    inner = nn.Sequential(model["output"])
    with ac.capture(inner) as cache:
        inner(torch.ones(1, 2))
    assert torch.equal(cache["0"].output, cache.output)
    assert len(cache[""]) == 1


@torch.no_grad()
def test_visits_by_attribute(gpt2: Any) -> None:
    with ac.capture(gpt2, "transformer.h.*") as cache:
        gpt2(IDS)
        gpt2(IDS[:1])
    entry = cache.transformer.h[2]
    assert len(entry) == 2
    assert [tuple(v.hidden.shape) for v in entry] == [(2, 6, 32), (1, 6, 32)]
    assert torch.equal(entry[1].hidden, cache["transformer.h.2"][1].hidden)


def test_layers_and_positions(cache: ac.ActivationCache) -> None:
    assert cache.n_layers == 4
    assert cache.layer_numbers("resid_post") == [0, 1, 2, 3]
    assert cache.layer_numbers("attn_out") == []
    assert cache.seq_len() == 6
    assert not cache.is_empty()
    assert cache.get_layer(-1) is cache["resid_post.3"]
    assert cache.get_layer(1, site="mlp_out") is cache["mlp_out.1"]
    assert torch.equal(cache.get_position(2, -1), cache["resid_post.2"][:, -1])
    assert torch.equal(cache.get_position(2, 3, site="mlp_out"), cache["mlp_out.2"][:, 3])
    assert torch.equal(cache.stack("resid_post"), torch.stack([cache[f"resid_post.{i}"] for i in range(4)]))
    for call in (lambda: cache.get_layer(4), lambda: cache.get_layer(-5), lambda: cache.get_layer(0, "attn_out")):
        with pytest.raises(LayerRangeError, match="is not in the cache"):
            call()
    with pytest.raises(IndexError, match="position 6 of layer 0 is out of range: prompt 0 has 6 tokens"):
        cache.get_position(0, 6)
    with pytest.raises(LayerRangeError):
        cache.stack("attn_out")
    with pytest.raises(LayerRangeError, match="empty"):
        ac.ActivationCache().seq_len()
    assert ac.ActivationCache().is_empty()


def test_positions_of_ragged_prompts(gpt2: Any) -> None:
    cache = ac.run_with_cache(gpt2, [[5, 6, 7], [8, 9, 10, 11, 12]], sites="resid_post")[1]
    value = cache["resid_post.1"]
    assert torch.equal(cache.get_position(1, -1), torch.stack([value[0, 2], value[1, 4]]))
    assert [tuple(r.shape) for r in cache.rows("resid_post.1")] == [(3, 32), (5, 32)]
    with pytest.raises(LayerRangeError, match="prompt 0 has 3 tokens"):
        cache.get_position(1, 3)


@pytest.mark.parametrize("wrong", ["last", None, 1.0, True, [0, 1], (0, 1), torch.tensor(1.0), torch.tensor([0, 1])])
def test_a_layer_or_position_that_is_no_number(cache: ac.ActivationCache, wrong: Any) -> None:
    stream = cache.residual_stream(0)
    for calls, expected in (
        (
            (lambda: cache.get_position(1, wrong), lambda: stream.get_position(1, wrong)),
            "position is .*: expected one int",
        ),
        ((lambda: cache.get_layer(wrong), lambda: stream.get_layer(wrong)), "layer is .*: expected one int"),
        (
            (lambda: cache.get_position(wrong, 1), lambda: stream.get_position(wrong, 1)),
            "layer is .*: expected one int",
        ),
    ):
        for call in calls:
            with pytest.raises(OptionError, match=expected):
                call()
    for one in (torch.tensor(2), np.int64(2)):
        assert torch.equal(cache.get_position(one, one), cache["resid_post.2"][:, 2])
        assert torch.equal(stream.get_position(one, one), cache["resid_post.2"][0, 2])


def test_selection(cache: ac.ActivationCache, everything: ac.ActivationCache) -> None:
    part = cache.select(prompts=1, sites="resid_post", layers=[0, -1])
    assert list(part) == ["resid_post.0", "resid_post.3"]
    assert torch.equal(part["resid_post.3"], cache["resid_post.3"][1:2])
    assert part["resid_post.3"].data_ptr() == cache["resid_post.3"][1:].data_ptr()
    assert part.input_ids.tolist() == IDS[1:].tolist()
    swapped = cache.select(prompts=[1, 0, 1])
    assert torch.equal(swapped["mlp_out.1"], cache["mlp_out.1"][[1, 0, 1]])
    assert cache.select(prompts=slice(-1, None)).input_ids.tolist() == IDS[1:].tolist()
    assert cache.select(prompts=-1).input_ids.tolist() == IDS[1:].tolist()
    assert list(cache.select(sites=["mlp_out.2"])) == ["mlp_out.2"]
    modules = everything.select(prompts=[1])
    assert torch.equal(modules.transformer.h[1].hidden, everything.transformer.h[1].hidden[1:])
    assert torch.equal(modules[""].output.logits, everything[""].output.logits[1:])
    with pytest.raises(UnknownKeyError):
        cache.select(sites="attn_out")


def test_a_mapping(cache: ac.ActivationCache) -> None:
    mine = ac.ActivationCache(dict(cache))
    assert mine == cache
    mine["note to self"] = [1, 2]
    assert mine["note to self"] == [1, 2]
    assert mine != cache
    assert mine.pop("note to self") == [1, 2]
    assert mine == cache
    mine["resid_post.0"] = cache["resid_post.0"] + 1
    assert mine != cache
    del mine["resid_out_0"]
    assert "resid_post.0" not in mine
    mine.update({"resid_post.0": cache["resid_post.0"].clone()})
    assert mine == cache
    assert cache != 3
    with pytest.raises(TypeError):
        hash(cache)


def test_bytes_and_display(cache: ac.ActivationCache, everything: ac.ActivationCache) -> None:
    assert cache.nbytes == 8 * 2 * 6 * 32 * 4
    assert "8 entries" in repr(cache)
    assert "float32[2, 6, 32]" in repr(cache)
    assert "transformer.h.0" in repr(everything)
    assert "more" in repr(everything)
    assert "Entry(float32[2, 6, 32])" in repr(everything["transformer.h.1.mlp"])
    for shown in (
        everything[""][0],
        everything.transformer.h[0],
        ac.ActivationCache(),
        everything["transformer.h.0.attn"],
    ):
        assert repr(shown)


def test_copies_are_equal_and_independent(everything: ac.ActivationCache, cache: ac.ActivationCache) -> None:
    for original in (everything, cache):
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert twin == original
            assert torch.equal(twin.attention_mask, original.attention_mask)
    twin = copy.deepcopy(cache)
    twin["resid_post.0"].zero_()
    assert cache["resid_post.0"].any()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("resid_psot.3", "resid_post.3"),
        ("encoder.resid_pst.0", "encoder.resid_post.0"),
        ("resid_mdi_4", "resid_mid_4"),
        ("patern_L1H2", "pattern_L1H2"),
        ("router_logit.2", "router_logits.2"),
    ],
)
def test_mistyped_sites_are_no_keys(key: str, meant: str) -> None:
    cache = ac.ActivationCache()
    with pytest.raises(ac.errors.UnknownSiteError, match=f"Did you mean '{meant}'"):
        cache[key] = torch.ones(1)
    assert cache.is_empty()
    cache[meant] = torch.ones(1)
    with pytest.raises(UnknownKeyError, match=f"Did you mean '{meant}'"):
        cache[key]


@pytest.mark.parametrize(
    "key", ["my note", "layers.3", "run 4", "resid_post", "logits_3", "transformer.h.0", "x_1", "é"]
)
def test_other_text_is_a_key(key: str) -> None:
    cache = ac.ActivationCache()
    cache[key] = 3
    assert cache[key] == 3
    assert list(cache) == [key]
    with pytest.raises(ac.ActCacheError, match="keys of a cache are strings"):
        cache[3] = 1  # type: ignore[index]


def test_sites_under_names_that_others_use() -> None:
    cache = ac.ActivationCache()
    cache["resid_out_0"] = torch.zeros(1, 2, 3)
    assert list(cache) == ["resid_out_0"]
    assert cache["resid_post.0"] is cache["blocks.0.hook_resid_post"] is cache["resid_out_0"]
    assert cache.layer_numbers("resid_post") == [0]
    assert cache.get_layer(-1) is cache["resid_out_0"]
    cache["resid_post.10"] = torch.ones(1, 2, 3)
    cache["resid_out_10"] = torch.full((1, 2, 3), 2.0)
    assert list(cache) == ["resid_out_0", "resid_post.10"]
    assert cache.stack("resid_post")[:, 0, 0, 0].tolist() == [0, 2]
    assert cache.get_position(10, -1).tolist() == [[2, 2, 2]]
    del cache["layer_0"]
    assert cache.n_layers == 1


def test_the_dictionary_methods(cache: ac.ActivationCache) -> None:
    mine = copy.copy(cache)
    assert mine.pop("resid_out_0") is cache["resid_post.0"]
    assert mine.setdefault("resid_post.1", 3) is cache["resid_post.1"]
    assert mine.setdefault("note", 3) == 3
    mine.update([("note", 4)], more=5)
    assert list(mine)[-2:] == ["note", "more"]
    assert dict(mine.items())["note"] == 4
    assert mine.popitem()[0] in cache
    mine.clear()
    assert not mine
    assert len(cache) == 8


def test_a_site_that_was_not_captured(gpt2: Any) -> None:
    _, cache = ac.run_with_cache(gpt2, IDS, ["transformer.h.1"], sites=["resid_post", "mlp_out.2"])
    for key, message in (
        ("attn_out.1", r"Add it where the cache is captured, sites=\[..., 'attn_out.1'\]"),
        ("blocks.1.hook_attn_out", r"sites=\[..., 'attn_out.1'\]"),
        ("mlp_out.1", r"It holds 'mlp_out.2': add layer 1 to layers= where it is captured"),
        ("resid_post.4", r"The model has 4 layers \(0 to 3\)\.$"),
        ("resid_pots.1", r"Did you mean 'resid_post.1'"),
    ):
        with pytest.raises(UnknownKeyError, match=message):
            cache[key]
    for path, message in (
        ("transformer.hh", "'hh' was not captured below 'transformer', which has h. Did you mean 'h'"),
        ("transformer.ln_ff", "which has h. Did you mean 'ln_f'"),
        ("lm_heads", "which has transformer. Did you mean 'lm_head'"),
    ):
        with pytest.raises(AttributeError, match=message):
            operator.attrgetter(path)(cache)


def test_modules_where_only_sites_were_captured(llama: Any) -> None:
    _, cache = ac.run_with_cache(llama, IDS, sites="resid_post")
    with pytest.raises(AttributeError, match=r"nothing captured below it. Did you mean 'layers'"):
        _ = cache.model.layer
