"""Edits beside the store: ready-made ones are part of the key, functions never reach it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actcache as ac
from actcache.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["The sky", "Snow is white", "a", "Grass is green"]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


def test_a_model_inside_an_edit_block_is_not_extracted(model: Any) -> None:
    cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), layers=[1])
    cache.get_activations(PROMPTS)
    for edits in ({"resid_post.0": lambda x: x * 2}, ac.ablate("resid_post.0")):
        message = r"inside an ac\.edit block.*'transformer\.h\.0'"
        with pytest.raises(ac.errors.ForeignHooksError, match=message), ac.edit(model, edits):
            cache.get_activations(["another"])
    # A capture changes nothing.
    with ac.capture(model, sites="resid_post", layers=1) as captured:
        assert torch.equal(cache.get_activations(["another"])[0], captured["resid_post.1"][:, -1])


def expected_of(model: Any, edits: Any, prompts: list[str], site: str = "resid_post.3") -> list[torch.Tensor]:
    """Each prompt alone, in an edit block."""
    rows = []
    for prompt in prompts:
        with torch.no_grad(), ac.edit(model, edits), ac.capture(model, sites=site) as cache:
            model(torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]))
        rows.append(cache[site][0])
    return rows


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "mamba"])
def test_extraction_runs_with_its_edits(family: str) -> None:
    model = tiny_model(family)
    branch = "mixer_out.1" if family == "mamba" else "attn_out.1"
    edits = [
        ac.ablate(branch),
        ac.steer("resid_post.0", VECTOR, scale=2.0, positions="last"),
        ac.patch("resid_pre.2", torch.stack([VECTOR, -VECTOR]), positions=[0, -1]),
    ]
    extractor = ac.ActivationExtractor(model, tokenizer=tiny_tokenizer(), layers=[3], edits=edits)
    got = extractor.extract(PROMPTS)["resid_post.3"]
    for mine, alone in zip(got, expected_of(model, edits, PROMPTS), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)
    plain = ac.ActivationExtractor(model, tokenizer=tiny_tokenizer(), layers=[3]).extract(PROMPTS)["resid_post.3"]
    assert not torch.allclose(got[0], plain[0], atol=1e-2)


def test_encoder_decoders() -> None:
    model = tiny_model("t5")
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    edits = [ac.ablate("encoder.resid_post.1", positions="last"), ac.ablate("decoder.resid_post.1", positions="last")]
    sites = ["encoder.resid_post.1", "decoder.resid_post.1"]
    for wanted in (sites, sites[:1]):
        got = ac.ActivationExtractor(model, sites=wanted, edits=edits).extract(prompts)
        for site in wanted:
            assert not any(rows[-1].any() for rows in got[site])
            assert all(rows[:-1].abs().sum(-1).min() > 0 for rows in got[site])


def test_what_is_stored_is_kept_apart(tmp_path: Any) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    steer = ac.steer("resid_post.0", VECTOR, positions="last")
    plain = ac.UnifiedCache(path, layers=[3]).get_activations(PROMPTS)[0]
    steered = ac.UnifiedCache(path, layers=[3], edits=[steer]).get_activations(PROMPTS)[0]
    expected = torch.stack([rows[-1] for rows in expected_of(model, steer, PROMPTS)])
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, steered, atol=1e-2)
    # Found again without a model, by an equal edit; others, and none, find what is theirs.
    for edits, count in [
        (steer, 4),
        ([ac.steer("resid_post.-4", VECTOR.clone(), scale=1, positions=-1)], 4),
        ([], 4),
        ([ac.steer("resid_post.0", VECTOR * 1.01, positions="last")], 0),
        ([steer, ac.ablate("attn_out.3")], 0),
    ]:
        cache = ac.UnifiedCache(path, layers=[3], edits=edits)
        assert cache.plan(PROMPTS).cached == count
        assert not cache.model_loaded
    again = ac.UnifiedCache(path, layers=[3], edits=[steer])
    assert torch.equal(again.get_activations(PROMPTS)[0], steered)
    assert not again.model_loaded
    assert ac.activations(path, PROMPTS, layers=[3], edits=[steer]).shape == (4, 1, 32)


def test_an_edit_cannot_be_changed_afterwards(model: Any) -> None:
    vector = VECTOR.clone()
    cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), layers=[3], edits=ac.steer("resid_post.0", vector))
    before = cache.get_activations(PROMPTS[:2])[0]
    vector.zero_()
    assert cache.plan(PROMPTS[:2]).cached == 2
    rows = expected_of(model, ac.steer("resid_post.0", VECTOR), PROMPTS)
    torch.testing.assert_close(cache.get_activations(PROMPTS)[0][2:], torch.stack([r[-1] for r in rows])[2:])
    torch.testing.assert_close(before, torch.stack([r[-1] for r in rows])[:2])


def test_the_model_is_as_before_and_runs_in_two_caches(model: Any) -> None:
    edited = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), layers=[3], edits=ac.ablate("attn_out.0"))
    plain = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), layers=[3])
    first = edited.get_activations(PROMPTS)[0]
    second = plain.get_activations(PROMPTS)[0]
    assert not torch.allclose(first, second, atol=1e-2)
    assert not any("_call_impl" in vars(module) for module in model.modules())
    # While one of them runs, the other is refused.
    running = edited.extractor.batches([torch.tensor([5, 6, 7]).numpy()], edited.sites)
    next(running)
    with pytest.raises(ac.errors.ForeignHooksError, match=r"inside an ac\.edit block"):
        list(plain.extractor.batches([torch.tensor([5, 6, 7]).numpy()], plain.sites))
    running.close()
    list(plain.extractor.batches([torch.tensor([5, 6, 7]).numpy()], plain.sites))


def test_what_cannot_be_stored(model: Any) -> None:
    def make(edits: Any) -> Any:
        return ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), layers=[3], edits=edits)

    errors = ac.errors
    for edits in ({"resid_post.0": lambda x: x}, [lambda x: x], lambda x: x, "attn_out.0"):
        with pytest.raises(errors.OptionError, match=r"cannot be stored: use ac\.ablate.*run_with_cache"):
            make(edits)
    for edit, why in [
        (ac.ablate("attn_out.0", positions=[[0], [1]]), "its positions are listed for each prompt"),
        (ac.patch("attn_out.0", torch.ones(2, 1, 32), positions=0), "values for each of several prompts"),
    ]:
        with pytest.raises(errors.OptionError, match=why):
            make(edit)
    with pytest.raises(errors.OptionError, match="as a list"):
        make({"attn_out.1": ac.ablate("attn_out.0")})
    with pytest.raises(errors.LayerRangeError):
        make(ac.ablate("attn_out.4"))
    with pytest.raises(errors.SiteUnavailableError, match=r"attn_out\.0"):
        make(ac.ablate("attn_out"))
    with pytest.raises(errors.SiteUnavailableError, match="one stack"):
        make(ac.ablate("encoder.attn_out.0"))
    with pytest.raises(errors.SiteUnavailableError, match="head_out"):
        make(ac.ablate("head_out.0.1")).warmup(PROMPTS)
    # Nothing is run when a prompt lacks the positions.
    for edit in (ac.ablate("attn_out.0", positions=5), ac.patch("attn_out.0", torch.ones(3, 32))):
        cache = make(edit)
        with pytest.raises(errors.PromptError, match=r"prompt [02] has \d+ tokens.*'attn_out\.0'"):
            cache.warmup(PROMPTS)
        assert not cache.plan([[1, 2, 3, 4, 5, 6]] if edit.positions == 5 else [[1, 2, 3]]).cached
