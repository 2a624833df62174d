"""Chats and the tokenizer's template: token ids of a chat, and which of its tokens are whose words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actcache.errors import PromptError, TokenizerError

Messages = Sequence[Mapping[str, Any]]


def is_chat(prompt: object) -> bool:
    """Whether `prompt` is a list of messages."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(m, Mapping) for m in prompt)


def chat_ids(tokenizer: Any, messages: Messages, i: int, *, answer: bool = False) -> list[int]:
    """Token ids of a chat, through the tokenizer's own template, whose text holds the special tokens already; with
    `answer` up to where the next message is to begin.

    Raises `TokenizerError` without a template, `PromptError` for a chat that the template does not take; both name
    prompt `i`.
    """
    _require_template(tokenizer, i)
    options = {"add_generation_prompt": True} if answer else {}
    return [int(t) for t in _apply(tokenizer, messages, i, tokenize=True, return_dict=True, **options)["input_ids"]]


def _require_template(tokenizer: Any, i: int) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerError(
            f"prompt {i} is a chat and the tokenizer has no chat template: pass text, or a tokenizer that has one."
        )


def _apply(tokenizer: Any, messages: Messages, i: int, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        # Templates are programs: they refuse roles and orders of messages in their own words.
        raise PromptError(
            f"prompt {i} is a chat that the tokenizer's template does not take ({type(error).__name__}: {error})."
        ) from error


def content_tokens(tokenizer: Any, messages: Messages, wanted: Sequence[int], ids: Sequence[int], i: int) -> list[int]:
    """Which tokens of a chat (token ids `ids`) hold what the `wanted` messages say, in order.

    The template itself tells where: rendered once more with a word that occurs nowhere in place of each content, it
    shows what it puts around them, and the real text must be just that with the contents in between (whitespace at
    their ends may have gone). A token belongs to a content when it holds any character of it.

    Raises `TokenizerError` for a tokenizer that does not tell which characters a token stands for, `PromptError`
    where the template changes, repeats or leaves out a wanted content; both name prompt `i`.
    """
    _require_template(tokenizer, i)
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, which is needed to find "
            "the tokens of a message: use the fast tokenizer (AutoTokenizer, use_fast=True)."
        )
    real = _apply(tokenizer, messages, i, tokenize=False)
    spans = _spans(tokenizer, messages, wanted, real, i)
    encoded = tokenizer(real, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != list(ids):
        raise PromptError(f"prompt {i}: the tokenizer's template gave other tokens before, so that none can be told.")
    chosen: dict[int, None] = {}
    for start, stop in spans:
        # A token of whitespace only may stand for no character, at the end of those it was made from.
        inside = [
            at
            for at, (a, b) in enumerate(encoded["offset_mapping"])
            if (a < stop and b > start) or (start < a == b <= stop)
        ]
        chosen.update(dict.fromkeys(range(inside[0], inside[-1] + 1) if inside else ()))
    return list(chosen)


def _spans(tokenizer: Any, messages: Messages, wanted: Sequence[int], real: str, i: int) -> list[tuple[int, int]]:
    """Where the contents of the `wanted` messages are in the rendered text."""
    salt = 0
    while (word := f"ACTCACHE{salt}x") in real:
        salt += 1
    texts: list[tuple[int, str]] = []
    marked = []
    for number, message in enumerate(messages):

        def mark(text: str, number: int = number) -> str:
            texts.append((number, text))
            return f"{word}{len(texts) - 1}x"

        marked.append(_with_content(message, mark))
    literal, *pieces = re.split(f"{word}(\\d+)x", _apply(tokenizer, marked, i, tokenize=False))
    order, literals = [int(number) for number in pieces[::2]], pieces[1::2]
    for number, (owner, _) in enumerate(texts):
        if owner in wanted and order.count(number) != 1:
            what = "changes or leaves out" if number not in order else "repeats"
            raise PromptError(
                f"prompt {i}: the tokenizer's template {what} what message {owner} ({messages[owner]['role']!r}) "
                "says, so that it has no tokens of its own: ask for another role, or with which= for other messages."
            )
    # Of each place that can be reached in the text, how: pairs of a content's number and its start, the last first.
    reached: dict[int, Any] = {len(literal): None} if real.startswith(literal) else {}
    for number, literal in zip(order, literals, strict=True):
        further: dict[int, Any] = {}
        for at, way in reached.items():
            for form in _forms(texts[number][1]):
                stop = at + len(form)
                if real.startswith(form, at) and real.startswith(literal, stop):
                    further.setdefault(stop + len(literal), (way, number, at, stop))
        reached = further
    if len(real) not in reached:
        raise PromptError(
            f"prompt {i}: the tokenizer's template changes what messages say (more than whitespace around it), or puts "
            "other text around them because of it, so that the tokens of a message cannot be told."
        )
    found: list[tuple[int, int]] = []
    way = reached[len(real)]
    while way is not None:
        way, number, start, stop = way
        if texts[number][0] in wanted and stop > start:
            found.append((start, stop))
    return found[::-1]


def _with_content(message: Mapping[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
    """`message` with every text of its content replaced; an empty one stays, since templates may ask for it."""
    content = message.get("content")
    if isinstance(content, str) and content:
        return {**message, "content": mark(content)}
    if isinstance(content, (list, tuple)):
        parts = [
            {**part, "text": mark(part["text"])} if isinstance(part, Mapping) and part.get("text") else part
            for part in content
        ]
        return {**message, "content": parts}
    return dict(message)


def _forms(text: str) -> list[str]:
    """What a template may make of a content by taking whitespace away, the content itself first."""
    ends = (None, "\n")
    cut = [strip(text, end) for end in ends for strip in (str.strip, str.lstrip, str.rstrip)]
    return list(dict.fromkeys([text, *cut]))
