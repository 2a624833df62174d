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
    with pytest.raises(errors.SiteUnavailableError, match="no mixture of experts"):
        make(ac.ablate("router_logits.0")).warmup(PROMPTS)
    for edit in (
        ac.ablate("head_out.0.4"),
        ac.ablate("z.0", heads=4),
        ac.knockout(0, 4, from_positions=1, to_positions=0),
    ):
        with pytest.raises(errors.LayerRangeError, match=r"4 heads \(0 to 3\)"):
            make(edit).warmup(PROMPTS)
    # Nothing is run when a prompt lacks the positions.
    for edit in (ac.ablate("attn_out.0", positions=5), ac.patch("attn_out.0", torch.ones(3, 32))):
        cache = make(edit)
        with pytest.raises(errors.PromptError, match=r"prompt [02] has \d+ tokens.*'attn_out\.0'"):
            cache.warmup(PROMPTS)
        assert not cache.plan([[1, 2, 3, 4, 5, 6]] if edit.positions == 5 else [[1, 2, 3]]).cached


# -- edits inside the blocks


INSIDE: list[Any] = [
    ac.knockout(1, [0, 2], from_positions=[1, "last"], to_positions=0),
    ac.ablate("head_out.2.1"),
    ac.ablate("z.0", heads=[3], positions="last"),
    ac.steer("v.1", torch.ones(8), heads=-1, positions=[0, -1]),
    ac.ablate("mlp_act.2", positions="first"),
    ac.ablate("pattern.3", heads=0, positions="last"),
]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "opt"])
def test_edits_of_heads_in_an_extraction(family: str) -> None:
    model = tiny_model(family)
    prompts = ["The sky", "Snow is white", "Grass"]
    extractor = ac.ActivationExtractor(
        model, tokenizer=tiny_tokenizer(), sites=["resid_post.3", "z.1", "head_out.2"], edits=INSIDE
    )
    got = extractor.extract(prompts)
    for site in ("resid_post.3", "z.1", "head_out.2"):
        for mine, alone in zip(got[site], expected_of(model, INSIDE, prompts, site), strict=True):
            torch.testing.assert_close(mine.flatten(1), alone.flatten(1), rtol=1e-4, atol=1e-4)
    assert not any(bool(rows[:, 32:64].any()) for rows in got["head_out.2"])


def test_a_knockout_in_an_extraction_is_a_mask_by_hand(tmp_path: Any) -> None:
    """Of a model that is loaded for it, eager and not; found again, by equal ones only."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    eager = tiny_model("llama", attn_implementation="eager")
    expected = []
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])

        def cut(module: Any, args: Any, kwargs: Any, length: int = ids.shape[1]) -> Any:
            mask = kwargs["attention_mask"].expand(1, 4, length, length).clone()
            mask[:, [0, 2], -1, 0] = -torch.inf
            return args, {**kwargs, "attention_mask": mask}

        handle = eager.model.layers[1].self_attn.register_forward_pre_hook(cut, with_kwargs=True)
        with torch.no_grad():
            expected.append(eager(ids, output_hidden_states=True).hidden_states[3][0])
        handle.remove()

    knockout = ac.knockout(1, [0, 2], from_positions="last", to_positions=0)
    for options in ({}, {"attn_implementation": "eager"}):
        extractor = ac.ActivationExtractor(path, layers=[2], edits=[knockout], **options)
        for mine, rows in zip(extractor.extract(PROMPTS[:2])["resid_post.2"], expected, strict=True):
            torch.testing.assert_close(mine, rows, rtol=1e-5, atol=1e-5)
    stored = ac.UnifiedCache(path, layers=[2], edits=[knockout])
    first = stored.get_activations(PROMPTS)[0]
    torch.testing.assert_close(first[:2], torch.stack([rows[-1] for rows in expected]), rtol=1e-5, atol=1e-5)
    others = [
        ac.knockout(1, [0, 3], from_positions="last", to_positions=0),
        ac.knockout(2, [0, 2], from_positions="last", to_positions=0),
        ac.knockout(1, [0, 2], from_positions="last", to_positions=1),
        ac.knockout(1, [0, 2], from_positions=1, to_positions=0),
        ac.knockout(1, from_positions="last", to_positions=0),
        ac.knockout("all", [0, 2], from_positions="last", to_positions=0),
        ac.ablate("z.1", heads=[0, 2], positions="last"),
        ac.ablate("z.1", heads=0, positions="last"),
        ac.ablate("z.1", positions="last"),
    ]
    for number, edit in enumerate(others):
        cache = ac.UnifiedCache(path, layers=[2], edits=[edit])
        assert cache.plan(PROMPTS).cached == 0, number
        assert not cache.model_loaded
    for same in (ac.knockout([-3], [0, 2], from_positions=-1, to_positions="first"), knockout):
        again = ac.UnifiedCache(path, layers=[2], edits=same)
        assert again.plan(PROMPTS).cached == 4
        assert torch.equal(again.get_activations(PROMPTS)[0], first)
        assert not again.model_loaded
    with pytest.raises(ac.errors.PromptError, match=r"prompt 2 has 2 tokens.*knockout of layer 1"):
        ac.UnifiedCache(path, layers=[2], edits=ac.knockout(1, from_positions=2, to_positions=0)).warmup(PROMPTS)
    for positions in ({"from_positions": [[0], [1]], "to_positions": 0}, {"from_positions": 1, "to_positions": [[0]]}):
        with pytest.raises(ac.errors.OptionError, match="listed for each prompt"):
            ac.UnifiedCache(path, layers=[2], edits=ac.knockout(1, **positions))
    with pytest.raises(ac.errors.LayerRangeError):
        ac.UnifiedCache(path, layers=[2], edits=ac.knockout(4, from_positions=1, to_positions=0))


def test_what_attention_cannot_show_is_not_stored_as_edited(model: Any) -> None:
    """An attention of the caller's that takes no softmax which could be seen: an error, and no values."""
    knockout = ac.knockout(1, from_positions="last", to_positions=0)
    extractor = ac.ActivationExtractor(model, tokenizer=tiny_tokenizer(), layers=[3], edits=knockout)
    extractor.extract(PROMPTS)
    for layer in model.transformer.h:
        attention = layer.attn

        class Other(type(attention)):  # type: ignore[misc]
            def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return self.c_proj(hidden_states), None

        attention.__class__ = Other
    with pytest.raises(ac.errors.EditError, match="without probabilities"):
        extractor.extract(PROMPTS)
