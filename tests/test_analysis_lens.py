"""The logit lens over a cache."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import actcache as ac
import zoo
from actcache.demo import model_path
from actcache.errors import LayerRangeError, OptionError, SiteUnavailableError, UnknownKeyError
from actcache.testing.tiny import FAMILIES

IDS = [[5, 200, 31, 7, 90], [9, 14, 77]]
EQUAL = [[5, 200, 31, 7, 90], [9, 14, 77, 250, 101]]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_last_layer_predicts_what_the_model_predicts(family: str) -> None:
    model = zoo.model_of(family)
    zoo_family = zoo.FAMILIES[family]
    stack = "decoder" if zoo_family.encoder_decoder else None
    site = f"{stack}.resid_post" if stack else "resid_post"
    output, cache = ac.run_with_cache(model, EQUAL, sites=site)
    lens = cache.logit_lens(site)
    assert zoo.relative_error(lens.logits(-1), output.logits) < 1e-6
    stack_of = zoo_family.stacks[stack or ""]
    norm = model.get_submodule(stack_of.final_norm) if stack_of.final_norm else torch.nn.Identity()
    for number, layer in enumerate(lens.layers):
        by_hand = zoo_family.head(model, norm(cache[f"{site}.{layer}"]))
        assert zoo.relative_error(lens.logits(layer), by_hand) < 1e-6
        best = by_hand.softmax(-1).topk(5)
        assert torch.allclose(lens.probabilities[number], best.values, atol=1e-6)
        assert torch.equal(by_hand.softmax(-1).gather(-1, lens.tokens[number]), best.values) or torch.allclose(
            by_hand.softmax(-1).gather(-1, lens.tokens[number]), best.values, atol=1e-6
        )


def test_a_lens_has_layers_prompts_positions_and_the_best_tokens() -> None:
    model = zoo.model_of("llama")
    _, cache = ac.run_with_cache(model, IDS, sites=["resid_pre", "resid_post"])
    lens = cache.logit_lens(top_k=3)
    assert lens.layers == [0, 1, 2, 3]
    assert lens.tokens.shape == lens.probabilities.shape == (4, 2, 5, 3)
    assert lens.logits(2).shape == (2, 5, 259)
    # No predictions from padding.
    assert bool((lens.tokens[:, 1, 3:] == -1).all())
    assert bool((lens.probabilities[:, 1, 3:] == 0).all())
    assert lens.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    _, alone = ac.run_with_cache(model, [IDS[1]], sites="resid_post")
    assert zoo.relative_error(lens.probabilities[:, 1, :3], alone.logit_lens(top_k=3).probabilities[:, 0]) < 1e-5
    last = cache.logit_lens(layers=[-1, 0], pos_slice=-1, top_k=3)
    assert last.layers == [3, 0]
    assert torch.equal(last.tokens[:, 0, 0], lens.tokens[[3, 0], 0, 4])
    assert torch.equal(last.tokens[:, 1, 0], lens.tokens[[3, 0], 1, 2])
    before = cache.logit_lens("resid_pre", layers=[1, 2, 3])
    assert zoo.relative_error(before.logits(1), lens.logits(0)) < 1e-7


def test_ranks_and_first_layers() -> None:
    _, cache = ac.run_with_cache(zoo.model_of("gpt2"), IDS, sites="resid_post")
    lens = cache.logit_lens(layers=[1, 3])
    for token in (7, 46):
        ranks = lens.rank(token)
        for number, layer in enumerate(lens.layers):
            logits = lens.logits(layer)
            order = logits.argsort(-1, descending=True)
            for b, s in lens.mask.nonzero().tolist():
                assert order[b, s, ranks[number, b, s]] == token
        assert bool((ranks[:, ~lens.mask] == -1).all())
        for k in (1, 30, 259):
            first = lens.first_layer(token, k)
            expected = torch.where(ranks[0] < k, 1, torch.where(ranks[1] < k, 3, -1))
            assert torch.equal(first, torch.where(lens.mask, expected, -1))
    assert bool((lens.first_layer(int(lens.tokens[1, 0, 2, 0]))[0, 2] > 0).all())
    with pytest.raises(OptionError, match="token 259 is outside the model's vocabulary"):
        lens.rank(259)


def test_the_scale_of_the_whole_stream_may_be_used_for_every_layer() -> None:
    model = zoo.model_of("gpt2")
    _, cache = ac.run_with_cache(model, IDS, sites="resid_post")
    own, shared = cache.logit_lens(), cache.logit_lens(recompute_ln=False)
    assert zoo.relative_error(shared.logits(3), own.logits(3)) < 1e-6
    last, early = cache["resid_post.3"].double(), cache["resid_post.1"].double()
    scale = (last.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm = model.transformer.ln_f
    normed = (early - early.mean(-1, keepdim=True)) / scale * norm.weight.double() + norm.bias.double()
    expected = normed @ model.lm_head.weight.double().T
    real = own.mask
    assert zoo.relative_error(shared.logits(1)[real], expected.detach()[real]) < 1e-6
    assert zoo.relative_error(own.logits(1)[real], expected.detach()[real]) > 1e-3


def test_an_empty_analysis_is_empty() -> None:
    _, cache = ac.run_with_cache(zoo.model_of("gpt2"), IDS, sites="resid_post")
    lens = cache.logit_lens(layers=[])
    assert lens.tokens.shape == (0, 2, 5, 5)
    assert lens.first_layer(7).tolist() == [[-1] * 5] * 2
    assert lens.table() == ""
    assert "0 layers" in repr(lens)


def test_a_lens_is_shown_with_its_tokens() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    output, cache = ac.run_with_cache(model, "The Eiffel Tower is in the city of", sites="resid_post")
    lens = cache.logit_lens(top_k=2)
    lines = lens.table().splitlines()
    assert lines[0] == "prompt 0, position 8, behind ' of'"
    assert len(lines) == 2 + len(lens.layers)
    best = re.escape(repr(tokenizer.decode([int(output.logits[0, -1].argmax())])))
    assert re.match(rf"resid_post\.{lens.layers[-1]} +\d\.\d+ +0\.000 +{best} 0\.\d+ ", lines[-1])
    assert lines[-1] in repr(lens)
    nameless = zoo.model_of("gpt2")
    _, cache = ac.run_with_cache(nameless, IDS, sites="resid_post")
    assert re.match(r"resid_post\.0 +\d\.\d+ +\d\.\d+ +'\d+' 0\.\d+", cache.logit_lens().table(1, 0).splitlines()[2])
    with pytest.raises(LayerRangeError, match="position 3 is out of range: prompt 1 has 3 here"):
        cache.logit_lens().table(1, 3)


def test_of_chosen_positions_those_are_counted(tmp_path: Path) -> None:
    """Which tokens of their prompts they were is not known any more: it must not look as if it were."""
    model = zoo.model_of("gpt2")
    _, whole = ac.run_with_cache(model, IDS, sites="resid_post")
    _, some = ac.run_with_cache(model, IDS, sites="resid_post", positions=[1, 2])
    lens, all_of = some.logit_lens(), whole.logit_lens()
    assert lens.kept and lens.positions.tolist() == [[0, 1]] * len(IDS)
    assert lens.table(1).startswith("prompt 1, kept position 1, behind")
    assert '"counted":"kept position"' in lens.to_html(tmp_path / "a.html").read_text().replace(": ", ":")
    assert not all_of.kept and all_of.table(1, 2).startswith("prompt 1, position 2, behind")
    torch.testing.assert_close(lens.entropy[:, 1], all_of.entropy[:, 1, 1:3])
    # Positions that are chosen of what was kept whole are the prompt's.
    picked = whole.logit_lens(pos_slice=[1, 2])
    assert not picked.kept and picked.positions.tolist() == [[1, 2]] * len(IDS)


def test_what_cannot_be_read_is_refused() -> None:
    model = zoo.model_of("gpt2")
    _, cache = ac.run_with_cache(model, IDS, sites=["resid_post", "attn_out"], layers=[1])
    with pytest.raises(OptionError, match=r"unknown site of the residual stream 'attn_out'"):
        cache.logit_lens("attn_out")
    with pytest.raises(UnknownKeyError, match=r"logit_lens needs resid_post\.2, which"):
        cache.logit_lens(layers=[1, 2])
    with pytest.raises(UnknownKeyError, match=r"logit_lens needs resid_mid\.0"):
        cache.logit_lens("resid_mid")
    with pytest.raises(UnknownKeyError, match=r"needs resid_post\.3"):
        cache.logit_lens(recompute_ln=False)
    with pytest.raises(OptionError, match="top_k is 0: expected 1 to 259"):
        cache.logit_lens(top_k=0)
    with pytest.raises(LayerRangeError, match="layer 0 was not read: the lens has layers 1"):
        cache.logit_lens().logits(0)
    backbone = model.transformer
    _, cache = ac.run_with_cache(backbone, IDS, sites="resid_post")
    with pytest.raises(SiteUnavailableError, match="GPT2Model gives no logits"):
        cache.logit_lens()
    assert cache.accumulated_resid.__self__ is cache
