"""Prompts that the model continues: what it says, and the activations of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer

NEW = 6
PROMPTS = zoo.prompts_of(3, [1, 4, 9, 4])[:4]
TEXTS = ["hello", "The cat sat", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model: Any = tiny_model("llama")
    # What a file of this name says must not be what is done.
    model.generation_config.update(do_sample=True, temperature=0.1, repetition_penalty=9.0, eos_token_id=2)
    model.save_pretrained(place)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(place)
    return place


def greedy(ids: list[int], count: int = NEW) -> list[int]:
    """The likeliest token after each prefix, every prefix run by itself."""
    said: list[int] = []
    while len(said) < count:
        with torch.no_grad():
            logits = zoo.model_of("llama")(torch.tensor([[*ids, *said]])).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == 2:
            break
    return said


def cache_of(folder: Any, store: Any, **generate: Any) -> ac.UnifiedCache:
    return ac.UnifiedCache(
        folder, cache_pooled=False, layers=[1, -1], store=store, generate={"max_new_tokens": NEW, **generate}
    )


def test_completions_are_the_models_own(folder: Path, tmp_path: Path) -> None:
    cache = cache_of(folder, tmp_path)
    said = cache.get_completions([*PROMPTS, PROMPTS[0]])
    assert [one.ids for one in said] == [greedy(p) for p in [*PROMPTS, PROMPTS[0]]]
    assert [one.prompt_ids for one in said] == [*PROMPTS, PROMPTS[0]]
    texts = [tiny_tokenizer().decode(one.ids, skip_special_tokens=True) for one in said]
    assert [one.text for one in said] == texts
    assert (said[1].prompt_span, said[1].completion_span) == ((0, 4), (4, 4 + len(said[1].ids)))


def test_activations_and_perplexity_are_those_of_the_sequence(folder: Path, tmp_path: Path) -> None:
    cache = cache_of(folder, tmp_path)
    plan = cache.plan(PROMPTS)
    stats = cache.warmup(PROMPTS)
    said = cache.get_completions(PROMPTS)
    assert stats.tokens_extracted == sum(len(one.prompt_ids) + len(one.ids) for one in said)
    assert (plan.missing, plan.tokens >= stats.tokens_extracted) == (4, True)
    warm = cache_of(folder, tmp_path)
    assert (warm.plan(PROMPTS).missing, warm.warmup(PROMPTS).tokens_extracted) == (0, 0)
    values, mask = warm.get_activations(PROMPTS)  # type: ignore[misc]
    spans = {part: warm.get_activations(PROMPTS, positions=part) for part in ("prompt", "completion")}
    perplexity, each = warm.get_perplexity(PROMPTS), warm.get_token_perplexity(PROMPTS)
    assert not warm.model_loaded
    for i, one in enumerate(said):
        ids = (*one.prompt_ids, *one.ids)
        alone = zoo.reference("llama", 0, ids)
        expected = torch.cat([alone["resid_post.1"], alone["resid_post.3"]], dim=-1)
        assert zoo.relative_error(values[i][mask[i]], expected) < 1e-5  # type: ignore[index]
        for part, (start, stop) in (("prompt", one.prompt_span), ("completion", one.completion_span)):
            found, real = spans[part]  # type: ignore[misc]
            assert zoo.relative_error(found[i][real[i]], expected[start:stop]) < 1e-5  # type: ignore[index]
        losses = torch.nn.functional.cross_entropy(
            alone["logits"].double()[:-1], torch.tensor(ids[1:]), reduction="none"
        )
        np.testing.assert_allclose(each[i], losses.exp().numpy(), rtol=1e-4)
        np.testing.assert_allclose(perplexity[i, 0], losses.mean().exp().item(), rtol=1e-4)


def test_texts_and_chats_are_continued_where_they_end(folder: Path, tmp_path: Path) -> None:
    cache = cache_of(folder, tmp_path)
    tokenizer = cache.tokenizer
    chat = [{"role": "user", "content": "hi"}]
    said = cache.get_completions([*TEXTS, chat])
    written = [*(tokenizer(t)["input_ids"] for t in TEXTS), tokenizer.encode("user: hi;assistant: ")[1:]]
    for one, ids in zip(said, written, strict=True):
        assert one.prompt_ids == ids
        assert one.ids == greedy(one.prompt_ids)
    assert tokenizer.decode(said[3].prompt_ids, skip_special_tokens=True).endswith("assistant: ")
    warm = cache_of(folder, tmp_path)
    assert warm.get_completions([*TEXTS, chat]) == said
    assert not warm.model_loaded


def test_what_is_drawn_depends_on_the_seed_and_on_the_prompt_alone(folder: Path, tmp_path: Path) -> None:
    drawn = {}
    for seed in (1, 2):
        cache = cache_of(folder, tmp_path / "one", do_sample=True, seed=seed)
        drawn[seed] = cache.get_completions(PROMPTS)
    assert [one.ids for one in drawn[1]] != [one.ids for one in drawn[2]]
    state = torch.random.get_rng_state()
    again = cache_of(folder, tmp_path / "other", do_sample=True, seed=1).get_completions(PROMPTS[::-1])
    assert again[::-1] == drawn[1]
    assert torch.equal(state, torch.random.get_rng_state())
    # All in one store, each under its own settings.
    assert cache_of(folder, tmp_path / "one", do_sample=True, seed=1).get_completions(PROMPTS) == drawn[1]
    assert len(ac.Store(tmp_path / "one").spaces()) == 2
    plain = ac.UnifiedCache(folder, cache_pooled=False, store=tmp_path / "one")
    assert plain.plan(PROMPTS).missing == len(PROMPTS)


def test_prompts_draw_their_own_numbers(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        # Every token is as likely as any other after every prompt.
        model.lm_head.weight.zero_()
    said = cache_of(model, tmp_path, do_sample=True).get_completions(PROMPTS)
    assert len({tuple(one.ids) for one in said}) == len(PROMPTS)


def test_a_temperature_near_zero_draws_the_likeliest(folder: Path, tmp_path: Path) -> None:
    cache = cache_of(folder, tmp_path, do_sample=True, temperature=1e-4, seed=5)
    assert [one.ids for one in cache.get_completions(PROMPTS)] == [greedy(p) for p in PROMPTS]


def test_a_completion_ends_where_the_model_ends_it(folder: Path, tmp_path: Path) -> None:
    first = greedy(PROMPTS[1])
    ends = first[2]
    said = cache_of(folder, tmp_path, eos_token_id=ends).get_completions(PROMPTS[1:2])[0]
    assert said.ids == first[: first.index(ends) + 1]


def test_edits_change_what_is_said(folder: Path, tmp_path: Path) -> None:
    edits = [ac.steer("resid_post.2", torch.linspace(-30, 30, 32))]
    cache = ac.UnifiedCache(
        folder, cache_pooled=False, edits=edits, store=tmp_path, generate={"max_new_tokens": NEW}, layers=-1
    )
    said = cache.get_completions(PROMPTS[:2])
    model = zoo.model_of("llama")
    for one in said:
        with torch.no_grad(), ac.edit(model, edits):
            logits: Tensor = model(torch.tensor([[*one.prompt_ids, *one.ids]])).logits[0]
        assert logits.argmax(-1)[len(one.prompt_ids) - 1 : -1].tolist() == one.ids
    assert [one.ids for one in said] != [greedy(p) for p in PROMPTS[:2]]
    with pytest.raises(errors.OptionError, match="takes edits of every token only"):
        ac.UnifiedCache(
            folder, edits=[ac.ablate("resid_post.0", positions="last")], generate={"max_new_tokens": 2}, store=tmp_path
        )


def test_a_loaded_model_is_left_as_it_was(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2").train()
    before = model.generation_config
    cache = cache_of(model, tmp_path)
    said = cache.get_completions(PROMPTS[:2])
    assert model.generation_config is before
    assert model.training
    assert all(len(one.ids) <= NEW and one.text == "" for one in said)
    # Nothing is kept, and all is answered.
    nothing = cache_of(model, ac.Store(tmp_path / "nothing", limit_gb=0))
    assert nothing.get_completions(PROMPTS[:2]) == said
    assert nothing.get_perplexity(PROMPTS[:2]).shape == (2, 3)


def test_the_store_tells_completions_from_what_the_model_is_given(folder: Path, tmp_path: Path) -> None:
    store = ac.Store(tmp_path)
    cache_of(folder, store).warmup(TEXTS)
    (model,) = store.info().models
    assert model.variant == "float32, with 6 tokens generated, do_sample False"
    assert model.stored_dtypes == ["float32"]
    assert model.num_prompts == len(TEXTS)
    ac.UnifiedCache(folder, store=store, layers=-1).warmup(TEXTS)
    info = store.discover(str(folder.resolve()), TEXTS[0])
    assert info is not None
    assert info.pooled == {"last_token": [3]}
    assert len(info.variants) == 2
    (space,) = [s for s in store.spaces() if s.identity.get("generate")]
    assert store.invalidate(space, TEXTS[:1]) == 1
    assert store.verify().ok


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({}, "generate has no max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_token": 3}, "generate has no 'max_new_token'.*Did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 3, "temperature": 0.5}, "temperature in generate changes nothing without do_sample=True"),
        ({"max_new_tokens": 3, "top_p": "much"}, "top_p is 'much' in generate: expected a number"),
        ({"max_new_tokens": 3, "do_sample": True, "seed": 1.5}, "seed is 1.5 in generate: expected an integer"),
        ({"max_new_tokens": 3, "do_sample": True, "seed": True}, "seed is True in generate: expected an integer"),
        ({"max_new_tokens": 3, "do_sample": True, "temperature": 0}, "temperature is 0 in .*a number above 0"),
        ({"max_new_tokens": 3, "do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 3, "do_sample": True, "top_p": 2}, r"top_p is 2 in .*1 \(all tokens\) at most"),
        ({"max_new_tokens": 3, "do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 3, "do_sample": "yes"}, "do_sample is 'yes' in generate: expected True or False"),
        ({"max_new_tokens": 3, "num_beams": 0}, "num_beams is 0 in generate: expected a positive integer"),
        ({"max_new_tokens": 3, "repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 9}, "min_new_tokens is 9 in generate, more than max_new_tokens=3"),
        ({"max_new_tokens": 3, "eos_token_id": [1, 9999]}, r"eos_token_id is \[1, 9999\] in .*\(0 to 258\)"),
        (3, "generate is 3: expected a dict"),
    ],
)
def test_bad_settings_fail_before_any_work(folder: Path, generate: Any, message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        ac.UnifiedCache(folder, generate=generate)


def test_what_cannot_be_continued_is_refused(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, generate={"max_new_tokens": 60}, store=tmp_path)
    with pytest.raises(errors.PromptError, match="of 9 tokens leaves no room for 60 more in the context"):
        cache.warmup([PROMPTS[2]])
    with pytest.raises(errors.OptionError, match="an encoder-decoder model does not do"):
        ac.UnifiedCache(zoo.model_of("t5"), sites="decoder.resid_post", generate={"max_new_tokens": 2}, store=tmp_path)
    bert = ac.UnifiedCache(zoo.model_of("bert"), generate={"max_new_tokens": 2}, store=tmp_path)
    with pytest.raises(errors.SiteUnavailableError, match="does not predict the token that follows"):
        bert.warmup([PROMPTS[2]])
    with pytest.raises(errors.OptionError, match="this cache generates nothing"):
        ac.UnifiedCache(folder, store=tmp_path).get_completions(TEXTS)
