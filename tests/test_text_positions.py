"""text_positions: the tokens that hold given characters of a text."""

from __future__ import annotations

from typing import Any

import pytest

import actcache as ac
from actcache.errors import LayerRangeError, OptionError, PromptError, TokenizerError
from actcache.testing.tiny import tiny_model, tiny_tokenizer


def word_tokenizer(*, spaces: bool) -> Any:
    """Words as tokens behind a BOS; `spaces` belong to the word behind them, or to none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<unk>", "def", "add", " add", "(", ")", " ", "Big", " Ben", "is", " is"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    before = pre_tokenizers.Split(" ", "merged_with_next") if spaces else pre_tokenizers.WhitespaceSplit()
    made.pre_tokenizer = before
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


@pytest.mark.parametrize("spaces", [True, False])
def test_a_character_and_a_range(spaces: bool) -> None:
    tokenizer = word_tokenizer(spaces=spaces)
    # 0 <bos>, 1 def, 2 add
    assert ac.text_positions(tokenizer, "def add", 4) == [2]
    assert ac.text_positions(tokenizer, "def add", 0) == [1]
    assert ac.text_positions(tokenizer, "def add", -1) == [2]
    # What belongs to no token counts with the one behind it; with the last at the end.
    assert ac.text_positions(tokenizer, "def add", 3) == [2]
    if not spaces:
        assert ac.text_positions(tokenizer, "def add  ", 8) == [2]
    # Whatever holds one of the characters.
    assert ac.text_positions(tokenizer, "def add def", (2, 5)) == [1, 2]
    assert ac.text_positions(tokenizer, "def add def", (-2, 11)) == [3]
    assert ac.text_positions(tokenizer, "def add def", (0, 11)) == [1, 2, 3]
    assert ac.text_positions(tokenizer, "def add", "add") == [2]


def test_every_text_has_its_own() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["über Paris.", "In Rome we"]
    found = ac.text_positions(tokenizer, texts, ["Paris", "Rome"])
    # A token per byte, and a BOS.
    assert found == [[7, 8, 9, 10, 11], [4, 5, 6, 7]]
    assert ac.text_positions(tokenizer, texts, (0, 1)) == [[1, 2], [1]]
    named = {"city": found, "last": -1}
    cache = ac.run_with_cache(
        tiny_model("gpt2"), texts, tokenizer=tokenizer, sites="resid_post", layers=0, positions=named
    )[1]
    city = cache.at("city")
    words = [
        "".join(tokenizer.convert_ids_to_tokens(ids[real].tolist()))
        for ids, real in zip(city.input_ids, city.attention_mask, strict=True)
    ]
    assert words == ["Paris", "Rome"]


def test_what_is_not_there() -> None:
    tokenizer = tiny_tokenizer()
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        ("a b", "c", PromptError, "'c' does not occur in the text"),
        (["a", "b"], "b", PromptError, "'b' does not occur in text 0"),
        ("a b a", "a", PromptError, "'a' occurs 2 times in the text .*range of characters"),
        ("ab", "", PromptError, "does not occur"),
        ("ab", 2, LayerRangeError, "character 2 is out of range: the text has 2 characters"),
        ("ab", (1, 3), LayerRangeError, r"characters \(1, 3\)"),
        ("ab", (1, 1), LayerRangeError, r"characters \(1, 1\)"),
        ("ab", None, OptionError, "where is None"),
        (["a", "b"], ["a"], OptionError, "1 places for 2 texts"),
        ("", 0, LayerRangeError, "0 characters"),
    ]
    for text, where, error, message in wrong:
        with pytest.raises(error, match=message):
            ac.text_positions(tokenizer, text, where)
    with pytest.raises(PromptError, match="no tokens that stand for characters"):
        ac.text_positions(word_tokenizer(spaces=False), "  ", 0)

    class Slow:
        is_fast = False

    with pytest.raises(TokenizerError, match="Slow does not tell"):
        ac.text_positions(Slow(), "a", 0)
