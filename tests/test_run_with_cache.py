"""run_with_cache: any form of input, each prompt as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import actcache as ac
import zoo
from actcache.errors import PromptError, PromptTypeError, TokenizerError
from actcache.testing.tiny import BOS, EOS, FAMILIES, tiny_model, tiny_tokenizer

TEXTS = ["a", "The Eiffel Tower", "two words", "x" * 40]
# Their positions are encoded by the longest prompt of a batch.


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


# Where lengths change frequencies, one pass takes prompts of one length only.
@pytest.mark.parametrize("family", [name for name in FAMILIES if not zoo.FAMILIES[name].lengths])
def test_each_prompt_is_as_if_alone(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    sites = [name for name in zoo.expected_sites(family, model) if name.rpartition(".")[-1] in ("embed", "0", "logits")]
    output, cache = ac.run_with_cache(model, TEXTS, tokenizer=tokenizer, sites=sites)
    longest = 41
    assert output.logits.shape[:2] == (4, longest)
    assert torch.equal(cache["logits"], output.logits)
    for i, text in enumerate(TEXTS):
        ids = [BOS, *(tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize(text))]
        alone = zoo.reference(family, 0, tuple(ids))
        assert cache.attention_mask[i].sum() == len(ids)
        assert cache.input_ids[i, : len(ids)].tolist() == ids
        assert cache.tokens is not None
        assert tokenizer.convert_tokens_to_ids(cache.tokens[i]) == ids
        for site in sites:
            # float32 sums in another order: see the measured 1e-7 relative of the largest value.
            row = cache.rows(site)[i]
            assert zoo.relative_error(row.reshape(len(ids), -1), alone[site]) < 2e-6, site


def test_forms_of_input(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("hello")["input_ids"]
    forms = [
        "hello",
        ["hello"],
        ids,
        [ids],
        torch.tensor(ids),
        torch.tensor([ids]),
        {"input_ids": torch.tensor([ids])},
        tokenizer("hello", return_tensors="pt"),
    ]
    caches = [ac.run_with_cache(model, form, tokenizer=tokenizer, sites="resid_post")[1] for form in forms]
    for cache in caches:
        # Without a mask another kernel may run.
        torch.testing.assert_close(cache["resid_post.3"], caches[0]["resid_post.3"], rtol=1e-5, atol=1e-5)
        assert cache.tokens == [tokenizer.convert_ids_to_tokens(ids)]
        assert cache.input_ids.tolist() == [ids]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_dict_padded_by_its_tokenizer(side: str) -> None:
    for family in ("gpt2", "llama"):
        model, tokenizer = tiny_model(family), tiny_tokenizer()
        tokenizer.padding_side = side
        inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
        cache = ac.run_with_cache(model, inputs, tokenizer=tokenizer, sites="resid_post")[1]
        ours = ac.run_with_cache(model, TEXTS, tokenizer=tokenizer, sites="resid_post")[1]
        for one, other in zip(cache.rows("resid_post.3"), ours.rows("resid_post.3"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache.get_position(2, -1), ours.get_position(2, -1), rtol=1e-5, atol=1e-5)
        assert cache.tokens == ours.tokens


def test_a_prompt_that_holds_the_padding_id(model: Any) -> None:
    prompts = [[0, 5, 0, EOS], [7, 8, 9, 10, 11, 0]]
    cache = ac.run_with_cache(model, prompts, sites="resid_post")[1]
    assert cache.attention_mask.sum(1).tolist() == [4, 6]
    for i, ids in enumerate(prompts):
        alone = ac.run_with_cache(model, ids, sites="resid_post")[1]
        torch.testing.assert_close(cache.rows("resid_post.3")[i], alone["resid_post.3"][0], rtol=1e-5, atol=1e-5)


def test_modules_and_options(model: Any) -> None:
    _, cache = ac.run_with_cache(model, [5, 6, 7], ["transformer.h.0", "transformer.h.*.mlp"], include_inputs=True)
    assert len(cache) == 5
    assert cache["transformer.h.0"].input.shape == (1, 3, 32)
    assert cache.rows("transformer.h.0")[0].shape == (3, 32)
    output, cache = ac.run_with_cache(
        model, [[5, 6, 7], [8, 9]], sites=["resid_post"], layers="last", dtype="bfloat16", positions="last",
        stop_after_last=True, tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    assert output is None
    assert cache["resid_post.3"].shape == (2, 1, 32)
    assert cache["resid_post.3"].dtype == torch.bfloat16
    assert cache.input_ids.tolist() == [[7], [9]]
    assert cache.tokens is not None
    assert [len(row) for row in cache.tokens] == [1, 1]
    everything = ac.run_with_cache(model, [5, 6, 7])[1]
    assert len(everything) > 50


def test_the_pass_is_in_evaluation_mode_and_without_graph() -> None:
    model = tiny_model("gpt2")
    quiet = ac.run_with_cache(model, [5, 6, 7], sites="resid_post")[1]
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    output, cache = ac.run_with_cache(model, [5, 6, 7], sites="resid_post")
    assert cache == quiet
    assert [m.training for m in model.modules()] == modes
    assert not output.logits.requires_grad
    output, cache = ac.run_with_cache(model, [5, 6, 7], sites="resid_post", detach=False)
    assert cache["resid_post.1"].requires_grad
    with pytest.raises(ac.ActCacheError):
        ac.run_with_cache(model, [5, 6, 7], sites="resid_post", positions=3)
    assert [m.training for m in model.modules()] == modes


def test_the_tokenizer_is_found_by_the_models_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cache = ac.run_with_cache(model, "hi", sites="resid_post")[1]
    assert cache.tokens == [["<bos>", "h", "i"]]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], PromptError, "no prompt"),
        ([""], PromptError, "prompt 0 is empty"),
        (["a", ""], PromptError, "prompt 1 is empty"),
        ([[5], []], PromptError, "prompt 1 has no tokens"),
        ([[5] * 65], PromptError, "65 tokens, the model's context is 64"),
        ([[5, 259]], PromptError, "token id 259"),
        ([-1], PromptError, "token id -1"),
        ([["a"]], PromptTypeError, "lists of token ids"),
        (["a", 3], PromptTypeError, "prompt 1"),
        (3, PromptError, "no prompt"),
        (torch.zeros(1, 2, 3, dtype=torch.long), PromptTypeError, "integer tensor"),
        (torch.zeros(1, 2), PromptTypeError, "integer tensor"),
    ],
)
def test_bad_inputs(model: Any, tokenizer: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ac.run_with_cache(model, inputs, tokenizer=tokenizer, sites="resid_post")


def test_a_missing_tokenizer(model: Any) -> None:
    with pytest.raises(TokenizerError, match="pass tokenizer="):
        ac.run_with_cache(model, "hello", sites="resid_post")
