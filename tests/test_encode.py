"""From a cache to the features of an autoencoder or transcoder, of the right site only."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
import zoo
from actcache.capture.encoding import trained_on
from actcache.errors import LayerRangeError, OptionError, SiteUnavailableError, UnknownKeyError, WrongSiteError

IDS = [[5, 200, 31, 7, 90], [9, 14, 77]]
SITES = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
N = 40


class Plain:
    """An autoencoder of a few lines."""

    def __init__(self, width: int = 32, **said: Any) -> None:
        torch.manual_seed(3)
        self.W_enc = torch.randn(width, N)
        self.W_dec = self.W_enc.T.contiguous() / width
        self.shapes: list[tuple[int, ...]] = []
        self.__dict__.update(said)

    def encode(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return (x @ self.W_enc - 0.5).relu()

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.W_dec


def captured(ids: Any = IDS, family: str = "gpt2", **options: Any) -> ac.ActivationCache:
    return ac.run_with_cache(zoo.model_of(family), ids, sites=SITES, **options)[1]


def test_a_cache_gives_features_of_its_tokens_and_nothing_of_its_padding() -> None:
    cache, sae = captured(), Plain(site="resid_pre.2")
    features = ac.encode(cache, sae)
    assert features.shape == (2, 5, N)
    assert torch.equal(features[0], sae.encode(cache["resid_pre.2"][0]))
    assert torch.equal(features[1, :3], sae.encode(cache["resid_pre.2"][1, :3]))
    assert bool((features[1, 3:] == 0).all())
    alone = ac.encode(captured([IDS[1]]), sae)
    assert zoo.relative_error(features[1:, :3], alone) < 1e-5
    assert features.to_sparse()._nnz() == int((features > 0).sum())
    assert sae.decode(features).shape == cache["resid_pre.2"].shape
    # Each prompt went in by itself: none of them was handed padding.
    assert {shape[1] for shape in sae.shapes if len(shape) == 3} == {3, 5}


def test_left_padding_is_no_token_either() -> None:
    model = zoo.model_of("gpt2")
    ids = torch.tensor([[0, 0, 9, 14, 77], IDS[0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    _, cache = ac.run_with_cache(model, {"input_ids": ids, "attention_mask": mask}, sites="resid_pre")
    features = ac.encode(cache, Plain(site="resid_pre.1"))
    assert bool((features[0, :2] == 0).all())
    assert zoo.relative_error(features[0, 2:], ac.encode(captured([IDS[1]]), Plain(site="resid_pre.1"))[0]) < 1e-5


def test_a_vector_knows_where_it_is_from() -> None:
    cache, sae = captured(), Plain(hook_name="blocks.1.hook_resid_mid")
    vector = cache.vector("blocks.1.hook_resid_mid", 1, -1)
    assert vector.info() == {"site": "resid_mid.1", "prompt": 1, "position": 2}
    assert vector.shape == (32,)
    assert torch.equal(vector.value(), cache["resid_mid.1"][1, 2])
    assert torch.equal(torch.relu(vector), vector.value().relu())
    assert torch.equal(ac.encode(vector, sae), sae.encode(vector.value()))
    assert torch.equal(ac.encode(copy.deepcopy(vector), sae), sae.encode(vector.value()))
    assert cache.vector("resid_mid.-1", -2, 0).info() == {"site": "resid_mid.3", "prompt": 0, "position": 0}
    with_last = ac.run_with_cache(zoo.model_of("gpt2"), IDS, sites="resid_mid", positions="last")[1]
    assert with_last.vector("resid_mid.1", 1).info() == {"site": "resid_mid.1", "prompt": 1, "kept_position": 0}
    for prompt, position, message in (
        (2, 0, "prompt 2 is out of range: the cache holds 2 prompts"),
        (1, 3, r"position 3 is out of range: there are 3 \(0 to 2\)"),
    ):
        with pytest.raises(LayerRangeError, match=message):
            cache.vector("resid_mid.1", prompt, position)
    with pytest.raises(UnknownKeyError, match=r"'resid_mid\.9' is not in the cache"):
        cache.vector("resid_mid.9")
    cache["mine"] = torch.zeros(2, 5, 32)
    with pytest.raises(OptionError, match="'mine' is not a site that has one vector for each token"):
        cache.vector("mine")


def test_the_wrong_site_is_refused_with_both_names_before_any_work() -> None:
    cache, sae = captured(), Plain(cfg=SimpleNamespace(metadata=SimpleNamespace(hook_name="blocks.2.hook_resid_pre")))
    with pytest.raises(
        WrongSiteError,
        match=r"trained on blocks\.2\.hook_resid_pre \(resid_pre\.2\), and the vector is of resid_post\.2",
    ):
        ac.encode(cache.vector("resid_post.2"), sae)
    part = cache.select(sites=["resid_post"], layers=[2, 3])
    with pytest.raises(
        WrongSiteError,
        match=r"trained on blocks\.2\.hook_resid_pre \(resid_pre\.2\), and the cache holds resid_post\.2: "
        r"capture with sites=\['resid_pre'\], layers=\[2\]",
    ):
        ac.encode(part, sae)
    with pytest.raises(
        WrongSiteError, match=r"blocks\.2\.hook_resid_pre \(resid_pre\.2\), and site= says resid_post\.2"
    ):
        ac.encode(cache["resid_post.2"], sae, site="resid_post.2")
    with pytest.raises(WrongSiteError, match=r"resid_pre\.2\), and the vector is of resid_pre\.1"):
        ac.encode(cache.vector("resid_pre.1"), sae)
    with pytest.raises(WrongSiteError, match="and the cache holds no site"):
        ac.encode(ac.ActivationCache(), sae)
    parallel = ac.run_with_cache(zoo.model_of("gptj"), IDS, sites="resid_pre")[1]
    with pytest.raises(SiteUnavailableError, match="in parallel on the same stream"):
        ac.encode(parallel, Plain(site="resid_mid.1"))
    assert not sae.shapes
    with pytest.raises(OptionError, match=r"takes vectors of 33 numbers, and resid_pre\.2 has 32"):
        ac.encode(cache, wide := Plain(width=33, site="resid_pre.2"))
    with pytest.raises(OptionError, match=r"takes vectors of 33 numbers"):
        ac.encode(cache.vector("resid_pre.2"), wide)
    assert not wide.shapes


def test_one_value_may_go_by_two_names() -> None:
    cache = captured()
    after = cache.select(sites=["resid_post"])
    assert torch.equal(ac.encode(after, Plain(site="resid_pre.2")), ac.encode(cache, Plain(site="resid_post.1")))
    one = ac.encode(after.vector("resid_post.1"), Plain(site="resid_pre.2"))
    assert zoo.relative_error(one, ac.encode(cache, Plain(site="resid_pre.2"))[0, 4]) < 1e-6
    first = cache.select(sites=["embed"])
    assert torch.equal(ac.encode(first, Plain(site="resid_pre.0")), ac.encode(cache, Plain(site="embed")))


@pytest.mark.parametrize(
    "said",
    [
        {"site": "resid_post.1"},
        {"hook_name": "blocks.1.hook_resid_post"},
        {"cfg": {"hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "d_in": 32}},
        {"cfg": SimpleNamespace(hook_name="blocks.1.hook_resid_post", hook_layer=1, hook_head_index=None)},
        {"cfg": SimpleNamespace(hook_point="blocks.{layer}.hook_resid_post", hook_point_layer=1)},
        {"cfg": SimpleNamespace(metadata={"hook_name": "resid_out_1"}, d_in=32)},
        {"cfg": SimpleNamespace(metadata=SimpleNamespace(hook_name="resid_post", hook_layer=1))},
    ],
)
def test_what_it_was_trained_on_is_read_wherever_it_stands(said: dict[str, Any]) -> None:
    assert str(trained_on(Plain(**said)).site) == "resid_post.1"
    assert ac.encode(captured(), Plain(**said)).shape == (2, 5, N)


def test_what_does_not_say_enough_is_refused() -> None:
    cache = captured()
    assert torch.equal(ac.encode(cache, Plain(), site="resid_mid.1"), ac.encode(cache, Plain(site="resid_mid.1")))
    tensor = cache["resid_mid.1"]
    assert torch.equal(
        ac.encode(tensor[0], Plain(), site="resid_mid.1"), ac.encode(cache, Plain(site="resid_mid.1"))[0]
    )
    for values, sae, message in (
        (cache, Plain(), "this Plain does not say what it was trained on: give site="),
        (tensor, Plain(site="resid_mid.1"), "these values do not know their site"),
        ([1.0], Plain(site="resid_mid.1"), "not list"),
        (cache, object(), r"a object has no encode\(\)"),
        (cache, Plain(site="resid_mid"), r"'resid_mid' has no layer: give site=, such as 'resid_mid\.6'"),
        (cache, Plain(hook_name="blocks.1.hook_embed"), "trained on 'blocks.1.hook_embed', which is no site"),
        (cache, Plain(site="resid_mid.1", hook_layer=2), "contradicts itself: hook name 'resid_mid.1', layer 2"),
        (
            cache,
            Plain(site="resid_mid.1", normalize_activations="expected_average_only_in"),
            "expects scaled activations .* fold it in first",
        ),
        (
            cache,
            Plain(site="z.1", model_from_pretrained_kwargs={"fold_value_biases": True}),
            "loaded with fold_value_biases=True, which changes z",
        ),
    ):
        with pytest.raises(OptionError, match=message):
            ac.encode(values, sae)
    with pytest.raises(OptionError, match="top_k is 0"):
        ac.encode(cache, Plain(site="resid_mid.1"), top_k=0)
    sae = Plain(site="resid_mid.1")
    sae.encode = lambda x: (x, x)  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(OptionError, match="returned tuple: expected features"):
        ac.encode(cache, sae)


def test_the_strongest_features_come_sorted() -> None:
    cache, sae = captured(), Plain(site="resid_pre.2")
    vector = cache.vector("resid_pre.2")
    full = ac.encode(vector, sae)
    active = int((full > 0).sum())
    assert 0 < active < N
    values, indices = ac.encode(vector, sae, top_k=N)
    order = full.argsort(descending=True)[:active]
    assert torch.equal(indices[:active], order)
    assert torch.equal(values[:active], full[order])
    assert bool((indices[active:] == -1).all())
    assert bool((values[active:] == 0).all())
    few = ac.encode(vector, sae, top_k=3)
    assert torch.equal(few[0], values[:3])
    assert torch.equal(few[1], indices[:3])
    values, indices = ac.encode(cache, sae, top_k=3)
    assert values.shape == indices.shape == (2, 5, 3)
    assert zoo.relative_error(values[0, -1], few[0]) < 1e-6
    assert torch.equal(indices[0, -1], few[1])
    assert bool((indices[1, 3:] == -1).all())


def test_device_and_dtype_are_those_of_the_autoencoder() -> None:
    sae = Plain(site="resid_pre.2")
    sae.W_enc = sae.W_enc.bfloat16()
    features = ac.encode(captured(), sae)
    assert features.dtype == torch.bfloat16

    class Module(nn.Module):
        site = "resid_pre.2"

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(32, N, dtype=torch.float64)

        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x).relu()

    module = Module()
    found = ac.encode(captured(), module)
    assert found.dtype == torch.float64
    assert not found.requires_grad


def test_prompts_are_encoded_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actcache.capture.encoding._BYTES", 4 * 4 * N * 2)
    # Four tokens of N features, four bytes each, of two prompts.
    ids = [[5 + i, 7, 9, 11] for i in range(7)] + [[3, 4]]
    cache, sae = captured(ids), Plain(site="resid_pre.2", d_sae=N)
    features = ac.encode(cache, sae)
    assert [shape[:2] for shape in sae.shapes] == [(1, 2), (2, 4), (2, 4), (2, 4), (1, 4)]
    assert torch.equal(features[:7], sae.encode(cache["resid_pre.2"][:7]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("place", "stream"), [("ln1", "resid_pre"), ("ln2", "resid_mid")])
def test_a_normalised_stream_comes_without_weight_and_bias(family: str, place: str, stream: str) -> None:
    cache, sae = (
        captured(family=family),
        Plain(hook_name=f"blocks.1.{place}.hook_normalized", hook_name_out="mlp_out.1"),
    )
    assert str(trained_on(sae).out_site) == "mlp_out.1"
    x = cache[f"{stream}.1"].double()
    if family == "gpt2":
        x = x - x.mean(-1, keepdim=True)
    eps = 1e-5 if family == "gpt2" else 1e-6
    expected = sae.encode((x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).float())
    mask = cache.attention_mask
    assert mask is not None
    assert zoo.relative_error(ac.encode(cache, sae)[mask], expected[mask]) < 1e-5
    vector = cache.vector(f"{stream}.1", 0, 2)
    assert zoo.relative_error(ac.encode(vector, sae, model=zoo.model_of(family)), expected[0, 2]) < 1e-5
    with pytest.raises(OptionError, match="needs the model, which knows the norm: give it as model="):
        ac.encode(vector, sae)
    with pytest.raises(
        WrongSiteError, match=rf"{stream}\.1 behind its norm, without weight and bias\), and the vector is"
    ):
        ac.encode(cache.vector("mlp_out.1"), sae)


def test_the_stream_before_the_mlp_is_named_in_two_ways() -> None:
    assert str(trained_on(Plain(hook_name="blocks.3.hook_mlp_in")).site) == "resid_mid.3"
    # Where the place in transformers is named too, it is the one behind the norm.
    hf = "model.layers.3.pre_feedforward_layernorm.output"
    assert str(trained_on(Plain(hook_name="blocks.3.hook_mlp_in", hf_hook_name=hf)).site) == "mlp_in.3"


def test_centred_weights_mean_centred_values_on_models_with_layer_norms() -> None:
    sae = Plain(site="resid_pre.2", model_from_pretrained_kwargs={"center_writing_weights": True})
    cache = captured()
    value = cache["resid_pre.2"]
    expected = sae.encode(value - value.mean(-1, keepdim=True))
    mask = cache.attention_mask
    assert mask is not None
    assert zoo.relative_error(ac.encode(cache, sae)[mask], expected[mask]) < 1e-6
    assert zoo.relative_error(ac.encode(cache.vector("resid_pre.2"), sae), expected[0, 4]) < 1e-6
    # RMS norms would see a difference: TransformerLens does not centre these.
    cache = captured(family="llama")
    assert torch.equal(ac.encode(cache, sae)[0], sae.encode(cache["resid_pre.2"][0]))


def test_heads_are_joined_or_chosen() -> None:
    z = torch.randn(2, 5, 4, 8)
    cache = ac.ActivationCache({"z.1": z})
    joined = Plain(hook_name="blocks.1.attn.hook_z")
    assert torch.equal(ac.encode(cache, joined), joined.encode(z.flatten(2)))
    single = Plain(width=8, hook_name="blocks.1.attn.hook_z", hook_head_index=2)
    assert torch.equal(ac.encode(cache, single), single.encode(z[:, :, 2]))
    assert torch.equal(ac.encode(cache.vector("z.1", 1, 3), single), single.encode(z[1, 3, 2]))
    assert torch.equal(ac.encode(cache.vector("z.1", 1, 3), joined), joined.encode(z[1, 3].flatten()))
    with pytest.raises(LayerRangeError, match=r"takes head 4, and z\.1 has 4"):
        ac.encode(cache, Plain(width=8, site="z.1", hook_head_index=4))

    class Splitting(Plain):
        hook_z_reshaping_mode = True

        def encode(self, x: Tensor) -> Tensor:
            assert x.shape[-2:] == (4, 8)
            return super().encode(x.flatten(-2))

    assert torch.equal(ac.encode(cache, Splitting(site="z.1")), joined.encode(z.flatten(2)))
    assert torch.equal(ac.encode(cache.vector("z.1", 1, 3), Splitting(site="z.1")), joined.encode(z[1, 3].flatten()))


def test_a_feature_put_back_at_one_position_changes_that_position_only() -> None:
    model, sae = zoo.model_of("gpt2"), Plain(site="resid_pre.2")
    cache = captured(IDS[:1])
    _, (feature, *_) = ac.encode(cache.vector("resid_pre.2"), sae, top_k=3)
    steer = ac.steer("resid_pre.2", sae.W_dec[feature], scale=5.0, positions=3)
    with ac.edit(model, steer):
        changed = captured(IDS[:1])
    moved = (changed["resid_pre.2"] - cache["resid_pre.2"]).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False, False, False, True, False]


class Nameless:
    """Says neither its width, nor names its weights as others do."""

    def __init__(self, width: int) -> None:
        self.matrix = torch.randn(width, N)
        self.bias = torch.zeros(N)

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.bias


@pytest.mark.parametrize("width", [16, 64])
def test_weights_of_another_width_are_named(width: int) -> None:
    cache = captured()
    message = rf"encode cannot take vectors of 32 numbers, which resid_post.1 has: its weights are \[{width}, {N}\]"
    with pytest.raises(OptionError, match=message):
        ac.encode(cache, Nameless(width), site="resid_post.1")
    assert ac.encode(cache, Nameless(32), site="resid_post.1").shape[-1] == N

    class Failing(Nameless):
        def encode(self, x: Tensor) -> Tensor:
            raise RuntimeError("another reason")

    with pytest.raises(RuntimeError, match=r"^another reason$"):
        ac.encode(cache, Failing(32), site="resid_post.1")
