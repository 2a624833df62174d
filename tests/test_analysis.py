"""The residual stream of every architecture, taken apart and put together again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache.demo import model_path
from actcache.errors import (
    AdditivityError,
    LayerRangeError,
    OptionError,
    SiteUnavailableError,
    UnknownKeyError,
)
from actcache.testing.tiny import FAMILIES, tiny_model

IDS = [[5, 200, 31, 7, 90], [9, 14, 77, 250, 101]]
RAGGED = [[5, 200, 31, 7, 90], [9, 14, 77]]
POST_NORM = ("opt-350m", "bart", "bert", "distilbert", "roberta")
SUMS = [family for family in FAMILIES if family not in POST_NORM]


def captured(family: str, ids: list[list[int]] = IDS, **options: Any) -> tuple[Any, ac.ActivationCache]:
    model = zoo.model_of(family)
    return ac.run_with_cache(model, ids, sites=zoo.expected_sites(family, model), **options)


def whole(cache: ac.ActivationCache, stack: str | None, layer: int) -> Tensor:
    dot = f"{stack}." if stack else ""
    return cache[f"{dot}resid_post.{layer - 1}" if layer else f"{dot}embed"]


@pytest.mark.parametrize("family", SUMS)
def test_the_parts_add_up_to_the_stream_at_every_layer(family: str) -> None:
    _, cache = captured(family)
    for prefix, depth in zoo.stack_depths(family, zoo.model_of(family)).items():
        stack = prefix or None
        names = [name for name in zoo.FAMILIES[family].stacks[prefix].hooks if name != "resid_mid"]
        for layer in range(depth + 1):
            parts, labels = cache.decompose_resid(layer, return_labels=True, stack=stack)
            embeds = ["embed", "pos_embed"] if family in ("gpt2", "gpt_neo", "opt") else ["embed"]
            assert labels[: len(embeds)] == embeds
            assert sorted(labels[len(embeds) :]) == sorted(f"{i}_{name}" for i in range(layer) for name in names)
            assert zoo.relative_error(parts.double().sum(0), whole(cache, stack, layer)) < 1e-6
            attn, mlp = (
                cache.decompose_resid(layer, mode=mode, incl_embeds=False, stack=stack) for mode in ("attn", "mlp")
            )
            assert len(attn) + len(mlp) + len(embeds) == len(parts)
            rest = parts[: len(embeds)].sum(0) + attn.sum(0) + mlp.sum(0)
            assert zoo.relative_error(rest, whole(cache, stack, layer)) < 1e-6
        if "resid_mid" in zoo.FAMILIES[family].stacks[prefix].hooks:
            parts = cache.decompose_resid(1, mlp_input=True, stack=stack)
            assert zoo.relative_error(parts.sum(0), cache[f"{prefix}.resid_mid.1".lstrip(".")]) < 1e-6


@pytest.mark.parametrize("family", POST_NORM)
def test_on_post_norm_models_the_sum_is_refused_and_the_stream_is_not(family: str) -> None:
    _, cache = captured(family)
    stack = "decoder" if family == "bart" else None
    for method in (cache.decompose_resid, cache.stack_head_results):
        with pytest.raises(AdditivityError, match=rf"{method.__name__}: .* not the sum of its parts .* Block 0 puts"):
            method(stack=stack)
    stream, labels = cache.accumulated_resid(return_labels=True, stack=stack)
    assert labels[-1] == "final_post"
    assert torch.equal(stream[-1], whole(cache, stack, len(labels) - 1))
    # Nothing comes between the last block and the head.
    assert torch.equal(cache.accumulated_resid(apply_ln=True, stack=stack), stream)


def test_the_stream_as_it_accumulates() -> None:
    _, cache = captured("llama")
    stream, labels = cache.accumulated_resid(2, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid"]
    assert torch.equal(stream, torch.stack([cache[f"resid_{label[2:]}.{label[0]}"] for label in labels]))
    assert torch.equal(cache.accumulated_resid(-2), cache.accumulated_resid(3))
    final = cache.accumulated_resid(apply_ln=True)
    assert zoo.relative_error(final[-1], cache["final_norm"]) < 1e-6
    norm = zoo.model_of("llama").model.norm
    with torch.no_grad():
        assert zoo.relative_error(final[1], norm(cache["resid_pre.1"])) < 1e-6
    # The same tensor goes by two names.
    part = cache.select(sites=["resid_post", "embed"])
    assert torch.equal(part.accumulated_resid(), cache.accumulated_resid())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5", "falcon", "olmo2"])
def test_parts_are_scaled_as_the_whole_stream_was(family: str) -> None:
    _, cache = captured(family)
    stack, dot = ("decoder", "decoder.") if family == "t5" else (None, "")
    parts = cache.decompose_resid(2, stack=stack)
    scaled = cache.decompose_resid(2, apply_ln=True, stack=stack)
    assert torch.equal(cache.apply_ln_to_stack(parts, 2, stack=stack), scaled)
    if family == "olmo2":
        # Attention is given the stream as it is.
        assert torch.equal(scaled, parts)
        return
    stream = cache[f"{dot}resid_pre.2"].double()
    centred = family in ("gpt2", "falcon")
    eps = {"gpt2": 1e-5, "falcon": 1e-5, "gemma2": 1e-6, "t5": 1e-6}[family]
    if centred:
        stream = stream - stream.mean(-1, keepdim=True)
    scale = (stream.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = parts.double() - (parts.double().mean(-1, keepdim=True) if centred else 0)
    assert zoo.relative_error(scaled, expected / scale) < 1e-6
    assert zoo.relative_error(scaled.sum(0), stream / scale) < 1e-6


def test_the_mlp_reads_the_stream_in_between() -> None:
    _, cache = captured("llama")
    middle = cache["resid_mid.3"].double()
    expected = middle / (middle.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert zoo.relative_error(cache.decompose_resid(3, mlp_input=True, apply_ln=True).sum(0), expected) < 1e-6
    _, parallel = captured("gptj")
    for function in (parallel.decompose_resid, parallel.accumulated_resid):
        with pytest.raises(SiteUnavailableError, match=r"resid_mid.*in parallel on the same stream"):
            function(1, mlp_input=True)
    with pytest.raises(OptionError, match="behind the last block there is none: give layer=0 to 3"):
        cache.decompose_resid(mlp_input=True)


@pytest.mark.parametrize("family", [family for family in SUMS if not family.startswith("mamba")])
def test_heads_are_parts_of_what_attention_adds(family: str) -> None:
    model = zoo.model_of(family)
    stack, dot = ("decoder", "decoder.") if zoo.FAMILIES[family].encoder_decoder else (None, "")
    wanted = [f"{dot}{name}" for name in ("head_out", "attn_out", "resid_pre", "resid_post")]
    held = [str(info.site) for info in ac.sites(model) if str(info.site).rpartition(".")[0] in wanted]
    _, cache = ac.run_with_cache(model, IDS, sites=held)
    depth = len(cache.layer_numbers(f"{dot}resid_pre"))
    rest, labels = cache.stack_head_results(incl_remainder=True, return_labels=True, stack=stack)
    assert labels[-1] == "remainder"
    assert zoo.relative_error(rest.double().sum(0), cache[f"{dot}resid_post.{depth - 1}"]) < 1e-6
    numbers = cache.layer_numbers(f"{dot}head_out")
    assert labels[:-1] == [f"L{number}H{head}" for number in numbers for head in range(4)]
    assert numbers == ([1, 3] if family == "qwen3_next" else list(range(depth)))
    for at, number in enumerate(numbers):
        # What is left of attention's output is the same at every position: the bias of its projection.
        left = cache[f"{dot}attn_out.{number}"] - rest[4 * at : 4 * at + 4].sum(0)
        size = cache[f"{dot}attn_out.{number}"].abs().max()
        assert (left - left[:1, :1]).abs().max() < 1e-5 * size
    if family in ("gpt2", "llama"):
        assert torch.equal(rest[:4], cache["head_out.0"].movedim(2, 0))


def test_head_results_of_layers_and_positions() -> None:
    _, cache = ac.run_with_cache(zoo.model_of("gpt2"), IDS, sites=["head_out", "resid_pre", "resid_post"])
    stack = cache.stack_head_results(3)
    assert stack.shape == (12, 2, 5, 32)
    assert torch.equal(cache.stack_head_results(3, pos_slice=-1), stack[:, :, -1])
    assert torch.equal(cache.stack_head_results(3, apply_ln=True), cache.apply_ln_to_stack(stack, 3))
    assert cache.stack_head_results(0).shape == (0, 2, 5, 32)
    assert torch.equal(cache.stack_head_results(0, incl_remainder=True)[0], cache["resid_pre.0"])
    with pytest.raises(
        UnknownKeyError, match=r"stack_head_results needs head_out\.0, head_out\.1, .*sites=\['head_out'\]"
    ):
        captured("gpt2")[1].select(sites=["resid_pre", "resid_post"]).stack_head_results()
    with pytest.raises(SiteUnavailableError, match="MambaForCausalLM"):
        captured("mamba")[1].stack_head_results()


def test_positions_count_the_tokens_of_each_prompt() -> None:
    _, padded = captured("llama", RAGGED)
    for at in (-1, 0, (0, 2), [2, 0], slice(1, 3), torch.tensor([1])):
        picked = padded.decompose_resid(pos_slice=at)
        for number, ids in enumerate(RAGGED):
            _, alone = captured("llama", [ids])
            assert zoo.relative_error(picked[:, number], alone.decompose_resid(pos_slice=at)[:, 0]) < 1e-5
    assert padded.accumulated_resid(pos_slice=(0, 2), apply_ln=True).shape == (5, 2, 2, 32)
    with pytest.raises(OptionError, match="keeps 4, 2 positions of the prompts"):
        padded.decompose_resid(pos_slice=(1, None))
    with pytest.raises(LayerRangeError, match=r"position 3 is out of range: there are 3 \(0 to 2\)"):
        padded.accumulated_resid(pos_slice=3)
    with pytest.raises(OptionError, match="pos_slice is 'last': expected an int"):
        padded.accumulated_resid(pos_slice="last")


def test_a_capture_of_some_positions_is_analysed_as_it_is() -> None:
    _, full = captured("gpt2", RAGGED)
    _, cut = captured("gpt2", RAGGED, positions="last")
    assert zoo.relative_error(cut.decompose_resid()[:, :, 0], full.decompose_resid(pos_slice=-1)) < 1e-6
    assert zoo.relative_error(cut.logit_attrs(cut.decompose_resid(), 7), full.logit_attrs(
        full.decompose_resid(pos_slice=-1), 7, pos_slice=-1
    )[..., None]) < 1e-5  # fmt: skip


@pytest.mark.parametrize("family", [family for family in SUMS if family != "modernbert"])
def test_attributions_add_up_to_the_logit_less_a_constant_of_the_token(family: str) -> None:
    output, cache = captured(family)
    stack = "decoder" if zoo.FAMILIES[family].encoder_decoder else None
    logits = output.logits.double().detach()
    if family == "gemma2":
        cap = zoo.model_of(family).config.final_logit_softcapping
        logits = cap * torch.atanh(logits / cap)
    parts = cache.decompose_resid(stack=stack)
    for token in (7, 258):
        rest = logits[..., token] - cache.logit_attrs(parts, token, stack=stack).double().sum(0)
        assert (rest - rest.mean()).abs().max() < 1e-5 * logits[..., token].abs().max()
    difference = cache.logit_attrs(parts, 7, 258, stack=stack)
    both = cache.logit_attrs(parts, 7, stack=stack) - cache.logit_attrs(parts, 258, stack=stack)
    assert torch.allclose(difference, both, atol=1e-5)


def test_tokens_may_differ_by_prompt_and_position() -> None:
    _, cache = captured("gpt2")
    parts = cache.decompose_resid()
    each = torch.tensor([[cache.logit_attrs(parts, token)[3, b, s] for s, token in enumerate(row)]
                         for b, row in enumerate(IDS)])  # fmt: skip
    assert torch.allclose(cache.logit_attrs(parts, torch.tensor(IDS))[3], each)
    by_prompt = cache.logit_attrs(parts, [7, 8])
    assert torch.equal(by_prompt[:, 0], cache.logit_attrs(parts, 7)[:, 0])
    assert torch.equal(by_prompt[:, 1], cache.logit_attrs(parts, 8)[:, 1])
    one = cache.logit_attrs(parts, 7, batch_slice=1)
    assert torch.allclose(one, by_prompt.new_tensor(cache.logit_attrs(parts, 7)[:, 1].tolist()))
    alone = cache.logit_attrs(parts[:, 1], 7, batch_slice=1, has_batch_dim=False)
    assert torch.allclose(alone, one)
    for tokens, message in (
        ([7, 8, 9], r"tokens has the shape \[3\], and each component \[2, 5\]"),
        (259, "outside the model's vocabulary of 259"),
        (1.5, r"tokens is 1\.5: expected a token id"),
    ):
        with pytest.raises(OptionError, match=message):
            cache.logit_attrs(parts, tokens)
    with pytest.raises(OptionError, match=r"shape \[2\] and incorrect_tokens \[\]"):
        cache.logit_attrs(parts, [7, 8], 9)
    with pytest.raises(
        OptionError, match=r"the stack is \[components, 2, 5, 32\], and the stream it is part of \[2, 32\]"
    ):
        cache.logit_attrs(parts, 7, pos_slice=-1)
    with pytest.raises(OptionError, match="has_batch_dim=False is for one prompt, and the cache holds 2"):
        cache.logit_attrs(parts[:, 0], 7, has_batch_dim=False)


def test_tokens_may_be_named_by_their_text() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    _, cache = ac.run_with_cache(model, "The sky is", sites=["embed", "attn_out", "mlp_out", "resid_post"])
    parts = cache.decompose_resid()
    text = tokenizer.decode([tokenizer("The sky is")["input_ids"][-1]])
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.equal(cache.logit_attrs(parts, text), cache.logit_attrs(parts, token))
    with pytest.raises(OptionError, match=r"'The sky is' is \d+ tokens .* must be one"):
        cache.logit_attrs(parts, "The sky is", tokenizer=tokenizer)


def test_what_is_missing_is_named_with_the_capture_that_gets_it() -> None:
    model = zoo.model_of("llama")
    _, cache = ac.run_with_cache(model, IDS, sites=["attn_out", "resid_post"])
    with pytest.raises(UnknownKeyError, match=r"needs resid_pre\.0, .*sites=\[\.\.\., 'resid_pre'\]"):
        cache.decompose_resid()
    with pytest.raises(UnknownKeyError, match=r"needs mlp_out\.0, mlp_out\.1, which .*sites=\['mlp_out'\]"):
        cache.decompose_resid(2, incl_embeds=False)
    with pytest.raises(SiteUnavailableError, match="MambaForCausalLM"):
        captured("mamba")[1].accumulated_resid(incl_mid=True)
    with pytest.raises(LayerRangeError, match=r"layer 5 is out of range\. The inputs of the blocks are 0 to 3, and 4"):
        cache.accumulated_resid(5)
    with pytest.raises(OptionError, match="unknown mode 'mlps': expected one of 'all', 'attn', 'mlp'"):
        cache.decompose_resid(mode="mlps")
    with pytest.raises(OptionError, match="write stack='encoder' or stack='decoder'"):
        captured("t5")[1].accumulated_resid()
    with pytest.raises(OptionError, match="computed from the decoder, write stack='decoder'"):
        captured("t5")[1].logit_lens("encoder.resid_post")
    with pytest.raises(UnknownKeyError, match="holds no site that has a layer"):
        ac.ActivationCache().accumulated_resid()


def test_a_cache_that_was_loaded_knows_what_the_stream_is_made_of(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    _, cache = ac.run_with_cache(model, IDS, sites=["resid_pre", "resid_post", "attn_out", "mlp_out"])
    cache.save(tmp_path / "cache")
    for other in (ac.ActivationCache.load(tmp_path / "cache"), copy.deepcopy(cache), cache.select(prompts=[0, 1])):
        assert torch.equal(other.accumulated_resid(), cache.accumulated_resid())
        expected, labels = cache.decompose_resid(incl_embeds=False, return_labels=True)
        found, same = other.decompose_resid(incl_embeds=False, return_labels=True)
        assert torch.equal(found, expected)
        assert same == labels
        assert torch.equal(other.decompose_resid(model=model), cache.decompose_resid())
        given = {"apply_ln": True, "model": model}
        assert torch.equal(other.decompose_resid(2, **given), cache.decompose_resid(2, **given))
    loaded = ac.ActivationCache.load(tmp_path / "cache")
    with pytest.raises(OptionError, match="decompose_resid needs the model, which is not known to this cache: give it"):
        loaded.decompose_resid()
    del model, given
    with pytest.raises(OptionError, match="logit_lens needs the model, which is gone: give it as model="):
        cache.logit_lens()


def test_positions_without_token_ids_are_not_told_from_tokens() -> None:
    model = zoo.model_of("gpt2")
    with ac.capture(model, sites=["embed", "attn_out", "mlp_out"]) as cache, torch.no_grad():
        model(inputs_embeds=torch.randn(2, 5, 32))
    with pytest.raises(OptionError, match="the token ids are not known"):
        cache.decompose_resid()
    assert cache.decompose_resid(incl_embeds=False).shape == (8, 2, 5, 32)


def test_joined_caches_are_analysed_as_one() -> None:
    whole_cache = captured("gpt2", [*IDS, RAGGED[1]])[1]
    parts = [captured("gpt2", IDS)[1], captured("gpt2", [RAGGED[1]])[1]]
    joined = ac.ActivationCache.concatenate(parts)
    mask = whole_cache.attention_mask
    assert mask is not None
    assert zoo.relative_error(joined.decompose_resid()[:, mask], whole_cache.decompose_resid()[:, mask]) < 1e-5
