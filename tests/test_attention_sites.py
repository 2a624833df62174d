"""What attention is given, its queries, keys, values and heads: on every architecture those of its own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
import zoo
from actcache.errors import LayerRangeError, SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.testing.tiny import tiny_model

IDS = tuple(zoo.prompts_of(3, [17])[0])
SITES = ("attn_in", "q", "k", "v", "z", "head_out")
every_family = pytest.mark.parametrize("family", list(zoo.FAMILIES))


def of_attention(sites: Any) -> set[str]:
    return {site for site in sites if site.count(".") and site.split(".")[-2] in SITES}


def size(value: Tensor) -> float:
    return float(value.abs().max())


@torch.no_grad()
def captured(model: Any, sites: Any, **inputs: Any) -> ac.ActivationCache:
    with ac.capture(model, sites=sites) as cache:
        model(**inputs)
    return cache


# -- against hooks by hand


@every_family
@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_the_architecture(family: str, seed: int) -> None:
    model = zoo.model_of(family, seed)
    theirs = zoo.reference(family, seed, IDS)
    listed = {str(info.site) for info in ac.sites(model)}
    assert of_attention(listed) == of_attention(theirs)
    if not of_attention(listed):
        assert "mamba" in family
        return
    cache = captured(zoo.unused(family, model), sorted(of_attention(listed)), **zoo.inputs_of(family, model, IDS))
    for site in of_attention(listed):
        value = cache[site]
        assert value.ndim == (3 if "attn_in" in site else 4)
        if "head_out" in site:
            assert zoo.relative_error(value[0].flatten(1), theirs[site]) < 1e-6, site
        else:
            assert torch.equal(value[0].flatten(1), theirs[site]), site


@every_family
def test_heads_add_up_to_what_the_output_projection_returns(family: str) -> None:
    model = zoo.unused(family, zoo.model_of(family))
    projections = [(site, module) for site, module, _ in zoo.hooks_of(family, model) if site.split(".")[-2:-1] == ["z"]]
    sites = [site.replace("z.", "head_out.") for site, _ in projections]
    if not sites:
        assert "mamba" in family
        return
    sites += [f"{sites[-1]}.{head}" for head in range(4)]
    paths = {id(module): path for path, module in model.named_modules()}
    with torch.no_grad(), ac.capture(model, [paths[id(module)] for _, module in projections], sites=sites) as cache:
        model(**zoo.inputs_of(family, model, IDS))
    for (_, module), site in zip(projections, sites, strict=False):
        bias = getattr(module, "bias", None)
        whole = cache[site].double().sum(2) + (0 if bias is None else bias.detach().double())
        assert zoo.relative_error(whole, cache[paths[id(module)]].output) < 1e-6, site
    # One head is computed by itself.
    for head in range(4):
        assert zoo.relative_error(cache[f"{sites[-5]}.{head}"], cache[sites[-5]][:, :, head]) < 1e-6


def test_one_head_of_all_that_are_held() -> None:
    model = tiny_model("llama")
    cache = captured(model, ["head_out.3", "pattern.3"], input_ids=torch.tensor([IDS]))
    assert torch.equal(cache["head_out.3.2"], cache["head_out.3"][:, :, 2])
    assert torch.equal(cache["head_out_L3H2"], cache["head_out.3"][:, :, 2])
    assert torch.equal(cache["pattern.-1.1"], cache["pattern.3"][:, 1])


def test_one_head_costs_one_head() -> None:
    """Not the others, which are as many times as much."""
    model = tiny_model("llama")
    cache = captured(model, ["head_out.0.1"], input_ids=torch.tensor([IDS]))
    assert list(cache) == ["head_out.0.1"]
    alone = cache["head_out.0.1"]
    columns = slice(8, 16)
    projection = model.model.layers[0].self_attn.o_proj
    with torch.no_grad():
        # All other heads' weights are not a number, which every use of them would show.
        projection.weight[:, :8] = torch.nan
        projection.weight[:, 16:] = torch.nan
        weight = projection.weight[:, columns].double()
        with ac.capture(model, sites=["head_out.0.1", "z.0"], stop_after_last=True) as again:
            model(torch.tensor([IDS]))
    assert torch.equal(again["head_out.0.1"], alone)
    expected = again["z.0"][..., 1, :].double() @ weight.T
    assert zoo.relative_error(alone, expected) < 1e-6


# -- shapes that tiny models do not have


@pytest.mark.parametrize(
    ("family", "values"),
    [
        # Wider and narrower heads than the stream has room for, other numbers of groups.
        ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
        ("qwen3", {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("gemma", {"head_dim": 2, "num_attention_heads": 8, "num_key_value_heads": 8}),
        ("phi3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
        ("falcon-40b", {"num_attention_heads": 8, "num_kv_heads": 2}),
        ("gpt_oss", {"head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 1}),
        ("qwen3_next", {"head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 4}),
        ("deepseek_v3", {"v_head_dim": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "q_lora_rank": None}),
        ("olmo2", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("mpt", {"n_heads": 8}),
        # One column is a whole head.
        ("gpt2", {"n_head": 32}),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    ],
)
def test_other_numbers_and_sizes_of_heads(family: str, values: dict[str, Any]) -> None:
    model = tiny_model(family, **values)
    config, theirs = model.config, zoo.alone(family, model, IDS)
    heads = config.num_attention_heads
    groups = 2 if family == "falcon-40b" else getattr(config, "num_key_value_heads", None) or heads
    groups = heads if family in ("deepseek_v3", "mpt") else groups
    sites = of_attention(theirs)
    if family == "deepseek_v3":
        # Without a rank of their own the queries are made in one step, which the tables do not know.
        sites -= {site for site in sites if site.startswith("q.")}
    cache = captured(model, sorted(sites), input_ids=torch.tensor([IDS]))
    for site in sites:
        value, name = cache[site], site.split(".")[0]
        assert zoo.relative_error(value[0].flatten(1), theirs[site]) < 1e-6, site
        assert name == "attn_in" or value.shape[2] == (groups if name in ("k", "v") else heads), site


def test_layers_of_one_model_may_differ() -> None:
    """The third block has other heads than its brothers of the same class, and other positions for them."""
    model = tiny_model("llama")
    other = tiny_model("llama", seed=1, num_attention_heads=2, num_key_value_heads=1)
    model.model.layers[2].self_attn = other.model.layers[2].self_attn
    forward = model.model.layers[2].forward

    def with_own_positions(hidden: Tensor, **kwargs: Any) -> Any:
        own = other.model.rotary_emb(hidden, kwargs["position_ids"])
        return forward(hidden, **{**kwargs, "position_embeddings": own})

    model.model.layers[2].forward = with_own_positions
    cache = captured(model, ["q", "k", "z", "head_out", "pattern"], input_ids=torch.tensor([IDS]))
    for layer, heads, groups in [(0, 4, 2), (1, 4, 2), (2, 2, 1), (3, 4, 2)]:
        assert cache[f"q.{layer}"].shape == cache[f"z.{layer}"].shape == (1, len(IDS), heads, 32 // heads)
        assert cache[f"k.{layer}"].shape == (1, len(IDS), groups, 32 // heads)
        assert cache[f"head_out.{layer}"].shape == (1, len(IDS), heads, 32)
        assert cache[f"pattern.{layer}"].shape == (1, heads, len(IDS), len(IDS))
    with pytest.raises(LayerRangeError, match=r"pattern\.2\.3.*'pattern\.2' has 2 heads \(0 to 1\)"):
        ac.capture(model, sites="pattern.2.3")


# -- projections that are more than a matrix


def test_an_adapter_is_part_of_the_projections() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
    merged = copy.deepcopy(model).merge_and_unload().eval()
    sites = ["q", "k", "v", "z", "head_out", "head_out.2.3", "pattern"]
    ours = captured(model, sites, input_ids=torch.tensor([IDS]))
    theirs = captured(merged, sites, input_ids=torch.tensor([IDS]))
    plain = captured(tiny_model("llama"), sites, input_ids=torch.tensor([IDS]))
    for site in theirs:
        assert zoo.relative_error(ours[site], theirs[site]) < 2e-6, site
    assert zoo.relative_error(ours["head_out.0"], plain["head_out.0"]) > 0.1
    assert zoo.relative_error(ours["q.0"], plain["q.0"]) > 0.1
    paths = {site: point.path for site, point in describe(model).points(["q.0", "z.0", "head_out.0"]).items()}
    assert [path.rpartition(".")[2] for path in paths.values()] == ["q_proj", "o_proj", "o_proj"]


def test_the_parts_of_an_adapter_run_once_where_heads_are_read() -> None:
    """Each head is made by the whole projection, which nobody who reads its parts sees."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    part = "base_model.model.model.layers.0.self_attn.o_proj.base_layer"
    with torch.no_grad(), ac.capture(model, [part], sites=["head_out.0", "head_out.0.1"]) as cache:
        model(torch.tensor([IDS]))
    assert len(cache[part]) == 1


def test_a_quantised_projection_has_heads() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny_model("llama")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    path = "model.layers.1.self_attn.o_proj"
    projection = model.get_submodule(path)
    with torch.no_grad(), ac.capture(model, [path], sites=["z.1", "head_out.1"]) as cache:
        model(torch.tensor([IDS]))
    weight = projection.weight.dequantize().detach().double().unflatten(1, (4, 8))
    expected = torch.einsum("bshk,dhk->bshd", cache["z.1"].double(), weight)
    assert zoo.relative_error(cache["head_out.1"], expected) < 1e-6
    assert zoo.relative_error(cache["head_out.1"].sum(2), cache[path].output) < 1e-6


def test_weights_that_come_in_for_their_call_only() -> None:
    accelerate = pytest.importorskip("accelerate")
    sites = ["attn_in.1", "q.1", "k.1", "v.1", "z.1", "head_out.1", "head_out.1.2", "pattern.1"]
    theirs = captured(tiny_model("llama"), sites, input_ids=torch.tensor([IDS]))
    model = accelerate.cpu_offload(tiny_model("llama"), execution_device="cpu")
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    ours = captured(model, sites, input_ids=torch.tensor([IDS]))
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    for site in sites:
        assert zoo.relative_error(ours[site], theirs[site]) < 1e-6, site


def test_a_projection_that_is_not_additive_has_no_heads() -> None:
    class Rounded(nn.Linear):
        """Rounds what it is given to a few steps between its extremes, as dynamic quantisation does."""

        def forward(self, x: Tensor) -> Tensor:
            step = x.abs().amax(-1, keepdim=True) / 7
            return super().forward((x / step).round() * step)

    model = tiny_model("llama")
    for block in model.model.layers:
        own = block.self_attn.o_proj
        block.self_attn.o_proj = Rounded(32, 32, bias=False)
        block.self_attn.o_proj.weight = own.weight
    assert captured(model, ["z.0"], input_ids=torch.tensor([IDS]))["z.0"].shape == (1, len(IDS), 4, 8)
    with pytest.raises(SiteUnavailableError, match=r"head_out\.1.*o_proj returns is not the sum.*It has.* z,"):
        ac.capture(model, sites="head_out.1")


# -- attention that is more than probabilities times values


def made(model_type: str, **values: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 259, "pad_token_id": 0, **values}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **sizes)
        causal = model_type != "deberta"
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_a_norm_behind_the_heads() -> None:
    model = made("bitnet")
    norm = "model.layers.1.self_attn.attn_sub_norm"
    sites = ["q.1", "k.1", "v.1", "z.1", "pattern.1", "head_out.1"]
    with torch.no_grad(), ac.capture(model, [norm], sites=sites, include_inputs=True) as cache:
        model(torch.tensor([IDS]))
    assert torch.equal(cache["z.1"].flatten(2), cache[norm].output)
    values = cache["v.1"].double().repeat_interleave(2, 2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", cache["pattern.1"].double(), values)
    assert zoo.relative_error(mixed.flatten(2), cache[norm].input) < 1e-6


def test_a_difference_of_two_attentions_has_neither_pattern_nor_values() -> None:
    model = made("diffllama")
    names = {info.site.name for info in ac.sites(model)}
    assert {"attn_in", "q", "k"} <= names
    for site, why in (("v.0", "v_proj are the values of which head"), ("pattern.0", "nothing shows")):
        with pytest.raises(SiteUnavailableError, match=why):
            ac.capture(model, sites=site)


def test_a_bias_behind_the_projection_is_not_left_out() -> None:
    """DeBERTa adds the biases of queries and values to what one projection returns."""
    model = made("deberta", relative_attention=False, pos_att_type=[], position_biased_input=True)
    names = {info.site.name for info in ac.sites(model)}
    assert {"attn_in", "pattern", "z", "head_out"} <= names
    for name in ("q", "k", "v"):
        with pytest.raises(SiteUnavailableError, match="something is added to its values"):
            ac.capture(model, sites=f"{name}.0")
    theirs = made("deberta", relative_attention=False, pos_att_type=[], attn_implementation="eager")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True).attentions
    cache = captured(model, "pattern", input_ids=ids)
    for layer in range(2):
        assert zoo.relative_error(cache[f"pattern.{layer}"], expected[layer]) < 1e-6


# -- what there is not


def test_what_an_architecture_lacks_is_said() -> None:
    for family, site, why in [
        ("mamba", "q.0", "its block has no attention"),
        ("mamba", "attn_in.0", "its block has no attention"),
        ("deepseek_v3", "k.1", r"its keys are put together.*kv_a_proj_with_mqa, .*kv_b_proj"),
        ("qwen3_next", "pattern.0", r"no softmax over all keys.*blocks 1, 3 have it"),
    ]:
        with pytest.raises(SiteUnavailableError, match=why):
            ac.capture(tiny_model(family), sites=site)
    with pytest.raises(SiteUnavailableError, match="two stacks"):
        ac.capture(tiny_model("t5"), sites="q.0")


def test_heads_and_layers_out_of_range() -> None:
    model = tiny_model("gpt2")
    for site in ("head_out.0.4", "pattern.-1.11"):
        with pytest.raises(LayerRangeError, match=r"has 4 heads \(0 to 3\)"):
            ac.capture(model, sites=site)
    with pytest.raises(LayerRangeError, match="4 layers"):
        ac.capture(model, sites="q.4")
    assert list(ac.capture(model, sites="q.-1")._points) == [ac.Site("q", 3)]


# -- the model is left alone


def test_looking_inside_leaves_the_model_as_it_was() -> None:
    for family in ("llama", "falcon", "t5", "qwen3_next"):
        model = tiny_model(family).train()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        attributes = [dict(m.__dict__) for m in model.modules()]
        state = torch.random.get_rng_state()
        assert describe(model).inner.blocks
        assert [dict(m.__dict__) for m in model.modules()] == attributes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2", "granite", "gemma2", "t5", "falcon-40b", "qwen3_next"])
def test_half_precision_has_the_same_sites(family: str, dtype: torch.dtype) -> None:
    plain, half = tiny_model(family), tiny_model(family).to(dtype)
    assert [str(info) for info in ac.sites(half)] == [str(info) for info in ac.sites(plain)]
    inner, other = describe(half).inner.blocks, describe(plain).inner.blocks
    for at, found in inner.items():
        for name in set(found.readings) & {"q", "k", "v", "z"}:
            assert found.readings[name] == other[at].readings[name]
