"""A tuned lens: maps in front of the final norm, of the caller's own or out of a folder of the package tuned-lens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
import zoo
from actcache import errors
from lens_helpers import WIDTH, maps, save

IDS = [[5, 200, 31, 7, 90], [9, 14, 77]]


def by_hand(model: Any, stream: Tensor) -> Tensor:
    """Probabilities in float64: GPT-2's final norm and head."""
    norm = model.transformer.ln_f
    wide = stream.double()
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    normed = scaled * norm.weight.double() + norm.bias.double()
    return (normed @ model.lm_head.weight.double().T).softmax(-1).detach()


@pytest.fixture
def held() -> tuple[Any, ac.ActivationCache]:
    model = zoo.model_of("gpt2")
    _, cache = ac.run_with_cache(model, IDS, sites=["resid_pre", "resid_mid", "resid_post"])
    return model, cache


def test_maps_are_applied_as_they_are(held: tuple[Any, ac.ActivationCache], tmp_path: Path) -> None:
    model, cache = held
    given = maps()
    linear = {}
    for layer, (weight, bias) in given.items():
        linear[layer] = nn.Linear(WIDTH, WIDTH)
        linear[layer].load_state_dict({"weight": weight, "bias": bias})
    functions = {layer: (lambda h, w=w, b=b: h @ w.T + b) for layer, (w, b) in given.items()}
    stored = ac.UnifiedCache(model, sites=["resid_mid", "resid_post"], cache_pooled=False, store=tmp_path)
    for site in ("resid_post", "resid_mid"):
        lenses = [cache.logit_lens(site, translators=some, tokens=[7]) for some in (given, linear, functions)]
        lenses.append(stored.logit_lens(IDS, site=site, translators=given, tokens=[7]))
        for lens in lenses:
            for layer, (weight, bias) in given.items():
                stream = cache[f"{site}.{layer}"].double() @ weight.double().T + bias.double()
                chances = by_hand(model, stream)
                mine = lens.probabilities[layer][lens.mask].double()
                assert float((mine - chances.topk(5).values[lens.mask]).abs().max()) < 1e-5
                assert zoo.relative_error(lens.logits(layer).softmax(-1)[lens.mask], chances[lens.mask]) < 1e-5
                ranks = (chances > chances[..., 7, None]).sum(-1)
                assert torch.equal(lens.rank(7)[layer][lens.mask], ranks[lens.mask])
            # The final prediction is the model's own, whatever is put in front.
            final = by_hand(model, cache["resid_post.3"])
            divergence = (final * (final.log() - chances.log())).sum(-1)
            assert float((lens.kl[3] - divergence)[lens.mask].abs().max()) < 1e-5


def test_the_scale_of_the_whole_stream_comes_behind_the_maps(held: tuple[Any, ac.ActivationCache]) -> None:
    model, cache = held
    given = maps()
    lens = cache.logit_lens(layers=[1], translators=given, recompute_ln=False)
    weight, bias = (part.double() for part in given[1])
    last, early = cache["resid_post.3"].double(), cache["resid_post.1"].double() @ weight.T + bias
    norm = model.transformer.ln_f
    scale = (last.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    normed = (early - early.mean(-1, keepdim=True)) / scale * norm.weight.double() + norm.bias.double()
    logits = normed @ model.lm_head.weight.double().T
    assert zoo.relative_error(lens.logits(1)[lens.mask], logits.detach()[lens.mask]) < 1e-5


def test_a_folder_of_the_package_tuned_lens(held: tuple[Any, ac.ActivationCache], tmp_path: Path) -> None:
    """Its maps are added to the stream; number i belongs to what enters block i."""
    model, cache = held
    given = maps(1)
    folder = save(tmp_path / "lens", given)
    after, before = cache.logit_lens(translators=folder), cache.logit_lens("resid_pre", translators=str(folder))
    for layer, (weight, bias) in given.items():
        stream = cache[f"resid_pre.{layer}"].double()
        chances = by_hand(model, stream + stream @ weight.double().T + bias.double()).topk(5).values
        assert float((before.probabilities[layer] - chances)[before.mask].abs().max()) < 1e-5
        if layer:
            assert float((after.probabilities[layer - 1] - chances)[after.mask].abs().max()) < 1e-5
    # What leaves the last block has none.
    assert bool((after.kl[3][after.mask] == 0).all())
    with pytest.raises(errors.OptionError, match="maps for the stream between blocks"):
        cache.logit_lens("resid_mid", translators=folder)


def test_the_last_layer_needs_no_map_and_others_do(held: tuple[Any, ac.ActivationCache]) -> None:
    _, cache = held
    given = {layer: one for layer, one in maps().items() if layer in (0, 1)}
    some = cache.logit_lens(layers=[1, 3], translators=given)
    assert bool((some.kl[1][some.mask] == 0).all())
    assert bool((some.kl[0][some.mask] > 0).all())
    with pytest.raises(errors.OptionError, match=r"no map for resid_post\.2 \(it has 0, 1\)"):
        cache.logit_lens(translators=given)
    with pytest.raises(errors.OptionError, match=r"no map for resid_pre\.3"):
        cache.logit_lens("resid_pre", layers=[3], translators=given)
    last = {-1: maps()[3]}
    assert bool((cache.logit_lens(layers=[3], translators=last).kl[0][some.mask] > 0).all())
    with pytest.raises(errors.LayerRangeError):
        cache.logit_lens(layers=[3], translators={4: maps()[3]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((torch.zeros(16, 32), torch.zeros(16)), r"resid_post\.1 has a weight \[16, 32\], and the stream is 32 wide"),
        ((torch.zeros(32, 32), torch.zeros(16)), r"has a bias \[16\]"),
        (nn.Linear(32, 16), "takes 32 to 16 dimensions"),
        (lambda h: h[:, :3], r"makes \[8, 3\] of \[8, 32\]"),
        (lambda h: None, "makes NoneType"),
        (torch.zeros(32, 32), "is a Tensor: expected"),
    ],
)
def test_maps_that_do_not_fit(held: tuple[Any, ac.ActivationCache], wrong: Any, message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        held[1].logit_lens(layers=[1], translators={1: wrong})


def test_folders_that_do_not_fit(held: tuple[Any, ac.ActivationCache], tmp_path: Path) -> None:
    _, cache = held
    given = maps()
    with pytest.raises(errors.MissingFileError, match=r"holds no config\.json"):
        cache.logit_lens(translators=tmp_path)
    with pytest.raises(
        errors.OptionError, match=r"for 4 layers of width 768 \(gpt2\), and this model has 4 of width 32"
    ):
        cache.logit_lens(translators=save(tmp_path / "wide", given, d_model=768))
    with pytest.raises(errors.OptionError, match="for 12 layers"):
        cache.logit_lens(translators=save(tmp_path / "deep", given, num_hidden_layers=12))
    fewer = {layer: one for layer, one in given.items() if layer < 3}
    with pytest.raises(errors.FormatError, match=r"holds no tensor '3\.weight'"):
        cache.logit_lens(translators=save(tmp_path / "fewer", fewer))
    other = save(tmp_path / "other", given)
    (other / "config.json").write_text("[]")
    with pytest.raises(errors.FormatError, match="not the config of a tuned lens"):
        cache.logit_lens(translators=other)
    with pytest.raises(errors.OptionError, match="translators is a list"):
        cache.logit_lens(translators=[1])


def test_a_checkpoint_runs_no_code(held: tuple[Any, ac.ActivationCache], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    folder = save(tmp_path / "lens", maps())
    torch.save({"0.weight": Trap()}, folder / "params.pt")
    with pytest.raises(errors.FormatError, match="cannot be read as weights alone"):
        held[1].logit_lens(translators=folder)
    assert not (tmp_path / "sprung").exists()
