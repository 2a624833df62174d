"""tokens_of: which tokens of a chat a role says, found through whatever template the tokenizer has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache.errors import OptionError, PromptError, PromptTypeError, TokenizerError
from actcache.model.chat import chat_ids, content_tokens
from actcache.testing.tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}{% endgeneration %}\n"
    "{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "generation": MARKED}
CHAT = [
    {"role": "user", "content": "user says assistant"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Paris."},
    {"role": "assistant", "content": "Yes, Paris.\nReally"},
]


def tokenizer_of(template: str, **options: Any) -> Any:
    tokenizer = tiny_tokenizer(**options)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


def merging_tokenizer(template: str, *, trimmed: bool = False) -> Any:
    """Byte pairs learnt on the spot, so that tokens are of several characters and reach over ends of messages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if trimmed:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    texts = ["user says assistant Paris. Yes, Paris.\nReally über 東京   spaces >Paris" * 3, "Q: A: \n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>", "<bos>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", chat_template=TEMPLATES.get(template, template)
    )


def find(tokenizer: Any, chat: Any, wanted: list[int]) -> list[int]:
    return content_tokens(tokenizer, chat, wanted, chat_ids(tokenizer, chat, 0), 0)


def text_of(tokenizer: Any, chat: Any, at: list[int]) -> str:
    ids = chat_ids(tokenizer, chat, 0)
    return str(tokenizer.decode([ids[p] for p in at]))


def by_hand(tokenizer: Any, chat: Any, ends: list[tuple[str, str]]) -> list[int]:
    """Where each text between two others is, for a tokenizer of one token per character."""
    text, start, found = tokenizer.apply_chat_template(chat, tokenize=False), 0, []
    if text.startswith("<bos>"):
        # One token.
        text = "^" + text[len("<bos>") :]
    assert len(text) == len(chat_ids(tokenizer, chat, 0))
    for before, content in ends:
        start = text.index(before + content, start) + len(before)
        found += range(start, start + len(content))
        start += len(content)
    return found


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("chatml", "<|im_start|>assistant\n"),
        ("llama", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "<start_of_turn>model\n"),
        ("generation", "A: "),
    ],
)
def test_the_content_of_a_role(template: str, before: str) -> None:
    tokenizer = tokenizer_of(template)
    first, second = (before, "Paris."), (before, "Yes, Paris.\nReally")
    assert find(tokenizer, CHAT, [1, 3]) == by_hand(tokenizer, CHAT, [first, second])
    assert find(tokenizer, CHAT, [3]) == by_hand(tokenizer, CHAT, [second])
    # What a user says is not taken for what the assistant says, although it is the same.
    assert find(tokenizer, CHAT, [1]) == by_hand(tokenizer, CHAT, [first])
    assert text_of(tokenizer, CHAT, find(tokenizer, CHAT, [2])) == "Paris."
    assert find(tokenizer, CHAT, [2])[0] > find(tokenizer, CHAT, [1])[-1]


def test_as_the_marks_of_a_template_say() -> None:
    tokenizer = merging_tokenizer("generation")
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [at for at, here in enumerate(encoded["assistant_masks"]) if here]
    assert marked
    assert find(tokenizer, CHAT, [1, 3]) == marked


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    "template", ["chatml", "{% for m in messages %}{{ m['role'] }}>{{ m['content'] }}<{% endfor %}"]
)
def test_tokens_of_several_characters(template: str, trimmed: bool) -> None:
    tokenizer = merging_tokenizer(template, trimmed=trimmed)
    contents = ["Paris.", "  Paris  ", "über 東京", "Yes, Paris.\nReally", " ", "\n\n", "a"]
    chat = [{"role": "user", "content": "x"}, *({"role": "assistant", "content": text} for text in contents)]
    for number, content in enumerate(contents, 1):
        at = find(tokenizer, chat, [number])
        assert at == list(range(at[0], at[-1] + 1))
        said = text_of(tokenizer, chat, at)
        # At its ends a token may hold characters of the template too; one fewer would not hold the content.
        assert content in said
        assert content not in text_of(tokenizer, chat, at[1:])
        assert content not in text_of(tokenizer, chat, at[:-1])


def test_whitespace_that_the_template_takes_away() -> None:
    chat = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "\n  Paris. \n"}]
    for template in ("llama", "gemma"):
        tokenizer = tokenizer_of(template)
        assert text_of(tokenizer, chat, find(tokenizer, chat, [1])) == "Paris."
    assert text_of(tokenizer_of("chatml"), chat, find(tokenizer_of("chatml"), chat, [1])) == "\n  Paris. \n"
    tokenizer = tokenizer_of("{% for m in messages %}[{{ m['content'].lstrip('\n') }}]{% endfor %}")
    assert text_of(tokenizer, chat, find(tokenizer, chat, [1])) == "  Paris. \n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("[{{ m['content'] | upper }}]", r"changes or leaves out what message 3 \('assistant'\)"),
        ("[{{ m['content'].split('\n')[0] }}]", "changes what messages say"),
        ("[{{ m['content'] | replace('a', 'b') }}]", "changes what messages say"),
        ("{{ m['content'] }}{% if 'Re' in m['content'] %}!{% endif %}", ".* puts other text around them"),
        ("{% if not loop.last %}[{{ m['content'] }}]{% endif %}", "changes or leaves out what message 3"),
        ("[{{ m['content'] }}{{ m['content'] }}]", "repeats what message 3"),
    ],
)
def test_templates_that_change_what_is_said(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=f"prompt 0: the tokenizer's template {message}"):
        find(tokenizer_of("{% for m in messages %}" + template + "{% endfor %}"), CHAT, [3])


def test_what_others_say_may_be_left_out_or_repeated() -> None:
    tokenizer = tokenizer_of("{{ messages[-1]['content'] }}|{{ messages[0]['content'] }}|{{ messages[0]['content'] }}")
    assert text_of(tokenizer, CHAT, find(tokenizer, CHAT, [3])) == CHAT[3]["content"]


def test_content_in_parts_and_without_text() -> None:
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
        "{% elif m['content'] %}{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}[image]{% endif %}"
        "{% endfor %}{% else %}(call){% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "ok"},
    ]
    tokenizer = tokenizer_of(template)
    assert text_of(tokenizer, chat, find(tokenizer, chat, [0])) == "onetwo"
    assert text_of(tokenizer, chat, find(tokenizer, chat, [1, 2])) == "ok"
    assert find(tokenizer, chat, [1]) == []


def test_a_tokenizer_without_offsets() -> None:
    class Slow:
        is_fast = False
        chat_template = CHATML

    with pytest.raises(TokenizerError, match="Slow does not tell which characters"):
        content_tokens(Slow(), CHAT, [1], [1], 0)


def test_a_template_that_reads_the_clock() -> None:
    tokenizer = tokenizer_of("chatml")
    ids = chat_ids(tokenizer, CHAT, 0)
    with pytest.raises(PromptError, match="prompt 2: the tokenizer's template gave other tokens before"):
        content_tokens(tokenizer, CHAT, [1], [*ids, 5], 2)


def alone(model: Any, ids: list[int]) -> Tensor:
    found: list[Any] = []
    handle = model.transformer.h[1].register_forward_hook(lambda _m, _a, output: found.append(output))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return (found[0] if isinstance(found[0], Tensor) else found[0][0])[0]


SHORT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "four"},
]
OTHER = [{"role": "user", "content": "Say something"}, {"role": "assistant", "content": "Paris"}]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2", n_positions=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of("llama")


def expected_rows(model: Any, tokenizer: Any) -> list[Tensor]:
    rows = []
    for chat, contents in ((SHORT, ["4", "four"]), (OTHER, ["Paris"])):
        ends = [("assistant<|end_header_id|>\n\n", content) for content in contents]
        rows.append(alone(model, chat_ids(tokenizer, chat, 0))[by_hand(tokenizer, chat, ends)])
    return rows


class TestInOnePass:
    def test_chats(self, model: Any, tokenizer: Any) -> None:
        output, cache = ac.run_with_cache(model, [SHORT, OTHER], tokenizer=tokenizer, sites="resid_post.1")
        assert cache.tokens is not None
        assert "".join(cache.tokens[1]).endswith("Paris<|eot_id|>")
        assert [ids[real].tolist() for ids, real in zip(cache.input_ids, cache.attention_mask, strict=True)] == [
            chat_ids(tokenizer, SHORT, 0), chat_ids(tokenizer, OTHER, 0),
        ]  # fmt: skip
        one = ac.run_with_cache(model, OTHER, tokenizer=tokenizer, sites="resid_post.1")[1]
        torch.testing.assert_close(one["resid_post.1"][0], cache.rows("resid_post.1")[1], rtol=1e-5, atol=1e-5)
        assert output.logits.shape[0] == 2

    def test_positions(self, model: Any, tokenizer: Any) -> None:
        asked = ac.tokens_of("assistant")
        cache = ac.run_with_cache(model, [SHORT, OTHER], tokenizer=tokenizer, sites="resid_post.1", positions=asked)[1]
        expected = expected_rows(model, tokenizer)
        for row, other in zip(cache.rows("resid_post.1"), expected, strict=True):
            torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-5)
        assert cache.tokens == [["4", "f", "o", "u", "r"], ["P", "a", "r", "i", "s"]]
        named = {"answer": asked, "end": [ac.tokens_of("assistant", "last"), "last"], "q": ac.tokens_of("user", 0)}
        cache = ac.run_with_cache(model, [SHORT, OTHER], tokenizer=tokenizer, sites="resid_post.1", positions=named)[1]
        torch.testing.assert_close(cache.at("answer").rows("resid_post.1")[0], expected[0], rtol=1e-5, atol=1e-5)
        ids = [cache.at("end").input_ids[i][cache.at("end").attention_mask[i]].tolist() for i in (0, 1)]
        assert ["".join(tokenizer.convert_ids_to_tokens(row)) for row in ids] == ["four>", "Paris>"]
        questions = cache.at("q")
        assert questions.attention_mask.sum(1).tolist() == [4, 13]

    def test_in_batches(self, model: Any, tokenizer: Any) -> None:
        expected = expected_rows(model, tokenizer)
        options: dict[str, Any] = {
            "sites": "resid_post.1",
            "positions": ac.tokens_of("assistant"),
            "tokenizer": tokenizer,
        }
        for batches in ([[SHORT, OTHER]], [[SHORT], [OTHER]], [SHORT, OTHER]):
            cache = ac.extract_batches(model, batches, **options)
            for row, other in zip(cache.rows("resid_post.1"), expected, strict=True):
                torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-5)
        mean = ac.extract_batches(model, [[SHORT, OTHER]], reduce="mean", **options)["resid_post.1"]
        assert zoo.relative_error(mean, torch.stack([row.mean(0) for row in expected]).mean(0)) < 2e-6


class TestExtraction:
    def test_without_a_store(self, model: Any, tokenizer: Any) -> None:
        expected = expected_rows(model, tokenizer)
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "sites": "resid_post.1",
            "positions": ac.tokens_of("assistant"),
        }
        found = ac.ActivationExtractor(model, **options).extract([SHORT, OTHER])["resid_post.1"]
        for row, other in zip(found, expected, strict=True):
            torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-5)
        pooled = ac.ActivationExtractor(model, pooling="mean", **options).extract([SHORT, OTHER])["resid_post.1"]
        for row, other in zip(pooled, expected, strict=True):
            torch.testing.assert_close(row, other.mean(0), rtol=1e-5, atol=1e-5)
        with pytest.raises(PromptError, match="prompt 1 is not a chat"):
            ac.ActivationExtractor(model, **options).extract([SHORT, "text"])
        with pytest.raises(OptionError, match="choose positions when reading"):
            ac.CachedExtractor(ac.ActivationExtractor(model, **options))

    def test_from_a_store(self, model: Any, tokenizer: Any, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        expected = expected_rows(model, tokenizer)
        asked = ac.tokens_of("assistant")
        for loaded in (True, False):
            cache = ac.UnifiedCache(str(folder), layers=[1], cache_pooled=False, store=tmp_path / "store")
            values, mask = cache.get_activations([SHORT, OTHER], positions=asked)
            assert cache.model_loaded is loaded
            assert mask.sum(1).tolist() == [5, 5]
            for row, real, other in zip(values, mask, expected, strict=True):
                torch.testing.assert_close(row[real], other, rtol=1e-5, atol=1e-5)
        # Of the prompts that are stored, those of other positions.
        values, mask = cache.get_activations([OTHER, SHORT], positions=[ac.tokens_of("assistant", "last"), 0])
        assert mask.sum(1).tolist() == [6, 5]
        torch.testing.assert_close(values[0, :5], expected[1], rtol=1e-5, atol=1e-5)
        with pytest.raises(PromptError, match="prompt 0 is not a chat"):
            cache.get_activations(["text"], positions=asked)
        with pytest.raises(PromptError, match="prompt 0 is not a chat"):
            cache.get_activations([[5, 6]], positions=asked)


@pytest.mark.parametrize(
    ("inputs", "positions", "error", "message"),
    [
        (["text"], ac.tokens_of("user"), PromptError, "prompt 0 is not a chat"),
        ([[5, 6]], ac.tokens_of("user"), PromptError, "prompt 0 is not a chat.*'content'"),
        ({"input_ids": torch.ones(1, 2).long()}, ac.tokens_of("user"), PromptError, "not a chat"),
        ([OTHER, "text"], "all", PromptTypeError, "prompt 1 is 'text': expected .*chats only"),
        ([SHORT, [OTHER]], "all", PromptTypeError, "prompt 1"),
        ([[{"content": "x"}]], "all", PromptError, "prompt 0 has a chat message without a 'role'"),
        (
            [OTHER],
            ac.tokens_of("system"),
            PromptError,
            "prompt 0 has no message of the role 'system': its roles are 'user'",
        ),
        ([SHORT, OTHER], ac.tokens_of("assistant", 1), PromptError, r"prompt 1 has no message number 1 \(1 there\)"),
        ([OTHER], ac.tokens_of("assistant", -2), PromptError, "no message number -2"),
        ([[{"role": "user", "content": ""}]], ac.tokens_of("user"), PromptError, "prompt 0: .* 'user' are empty"),
    ],
)
def test_prompts_without_such_tokens(
    model: Any, tokenizer: Any, inputs: Any, positions: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ac.run_with_cache(model, inputs, tokenizer=tokenizer, sites="resid_post.1", positions=positions)


def test_where_no_chat_is_known(model: Any) -> None:
    for call in (
        lambda: ac.capture(model, sites="resid_post", positions=ac.tokens_of("user")),
        lambda: ac.capture(model, sites="resid_post", positions={"a": [0, ac.tokens_of("user")]}),
        lambda: ac.ablate("attn_out.0", positions=ac.tokens_of("user")),
    ):
        with pytest.raises(OptionError, match=r"tokens_of\('user'\) cannot be used here"):
            call()
    with pytest.raises(OptionError, match="role is ''"):
        ac.tokens_of("")
    with pytest.raises(OptionError, match=r"unknown which 'lats'.*'last'"):
        ac.tokens_of("user", "lats")
    with pytest.raises(TokenizerError, match="prompt 0 is a chat and the tokenizer has no chat template"):
        ac.run_with_cache(model, OTHER, tokenizer=tiny_tokenizer(), sites="resid_post")
