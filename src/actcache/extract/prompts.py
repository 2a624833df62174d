"""Prompts in the three forms people have them: text, token ids, chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.capture.spans import needs_chats, positions_in_chats
from actcache.errors import PromptError, PromptTypeError
from actcache.model.chat import Messages, chat_ids
from actcache.store.prompts import CHAT, IDS, TEXT, PromptTable

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.model.source import ModelSource

Prompt = str | Sequence[int] | Messages


@dataclass
class PromptList:
    """Prompts as they were given, checked, and not yet tokenised.

    Attributes:
        kinds: `IDS`, `TEXT` or `CHAT` for each prompt.
        texts: the text, or the chat messages as canonical JSON; None for token ids.
        ids: int32 token ids where they are known.
    """

    kinds: npt.NDArray[np.uint8]
    texts: list[str | None]
    ids: list[npt.NDArray[np.int32] | None] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> PromptList:
        """The prompts at `indices`, in that order."""
        kinds = self.kinds[np.asarray(indices, np.intp)]
        return PromptList(kinds, [self.texts[i] for i in indices], [self.ids[i] for i in indices])

    @property
    def any_text(self) -> bool:
        """Whether a tokenizer is needed for any of them."""
        return bool((self.kinds != IDS).any())


def read_prompts(prompts: Prompt | Iterable[Prompt]) -> PromptList:
    """Check `prompts` and bring them into one form; a single string counts as a list of one.

    Raises:
        PromptError: no prompts, an empty prompt, ids that are not integers, text that is not valid Unicode.
        PromptTypeError: a prompt of another type. Both name the prompt's position in the list.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    # A set has an order of its own, and rows come in that of the prompts.
    if isinstance(prompts, (Mapping, set, frozenset)) or not isinstance(prompts, Iterable):
        raise PromptTypeError(f"prompts is a {type(prompts).__name__}: expected a list of strings, token ids or chats.")
    given: list[Any] = list(prompts)
    if not given:
        raise PromptError("the list of prompts is empty: expected at least one prompt.")
    if set(map(type, given)) == {str}:
        texts: list[str | None] = given
        if not all(given):
            raise _empty(given.index(""))
        _check_unicode(given)
        return PromptList(np.full(len(given), TEXT, np.uint8), texts, [None] * len(given))
    kinds = np.empty(len(given), np.uint8)
    texts, ids = [], []
    for i, prompt in enumerate(given):
        kind, text, tokens = _read_one(i, prompt)
        kinds[i] = kind
        texts.append(text)
        ids.append(tokens)
    _check_unicode([text or "" for text in texts])
    return PromptList(kinds, texts, ids)


def _check_unicode(texts: Sequence[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        for i, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PromptError(
                    f"prompt {i} is not valid Unicode text: {error.reason} at character {error.start}. "
                    "Decode it again, with errors='replace' if need be."
                ) from None


def _empty(i: int) -> PromptError:
    return PromptError(f"prompt {i} is empty: expected at least one character or token. Remove it from the list.")


def _read_one(i: int, prompt: Any) -> tuple[int, str | None, npt.NDArray[np.int32] | None]:
    if isinstance(prompt, str):
        if not prompt:
            raise _empty(i)
        return TEXT, str(prompt), None
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise PromptTypeError(
            f"prompt {i} is a {type(prompt).__name__} ({prompt!r:.60}): expected a string, a list of token ids, "
            "or a list of chat messages like {'role': 'user', 'content': '...'}."
        )
    if len(prompt) == 0:
        raise _empty(i)
    if all(isinstance(m, Mapping) for m in prompt):
        return CHAT, _canonical_chat(i, prompt), None
    if all(_is_id(t) for t in prompt):
        prompt = [int(t) for t in prompt]
        if min(prompt) < 0 or max(prompt) >= 2**31:
            raise PromptError(
                f"prompt {i} has the token id {min(prompt) if min(prompt) < 0 else max(prompt)}: ids start at 0."
            )
        return IDS, None, np.asarray(prompt, np.int32)
    raise PromptTypeError(f"prompt {i} mixes types ({prompt!r:.60}): expected only integers, or only chat messages.")


def _is_id(token: Any) -> bool:
    if isinstance(token, bool) or "bool" in str(getattr(token, "dtype", "")):
        return False
    # numpy integers and 0-d tensors count.
    return hasattr(token, "__index__") and getattr(token, "shape", ()) == ()


def _canonical_chat(i: int, messages: Messages) -> str:
    for message in messages:
        if "role" not in message:
            raise PromptError(f"prompt {i} has a chat message without a 'role': {dict(message)!r:.80}.")
    try:
        return json.dumps([dict(m) for m in messages], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise PromptError(f"prompt {i} has a chat message that is not plain text and JSON values: {error}.") from error


def text_context(source: ModelSource, *, add_special_tokens: bool) -> str:
    """What besides the text decides the token ids: the tokenizer and its options, as a digest."""
    from actcache.model.identity import digest_json

    return digest_json({"tokenizer": source.tokenizer_source().digest(), "add_special_tokens": add_special_tokens})


def tokenize(prompts: PromptList, indices: Sequence[int], source: ModelSource, *, add_special_tokens: bool) -> None:
    """Fill in `prompts.ids` at `indices`, exactly as the tokenizer gives them: no truncation, no padding.

    A chat prompt goes through the tokenizer's own chat template, whose tokens include the special ones.

    Raises:
        TokenizerError: no tokenizer, or no chat template.
        PromptError: a prompt that gives no tokens, or a chat that the template does not take.
    """
    texts = [i for i in indices if prompts.ids[i] is None and prompts.kinds[i] == TEXT]
    chats = [i for i in indices if prompts.ids[i] is None and prompts.kinds[i] == CHAT]
    if texts:
        tokenizer = source.tokenizer()
        encoded = tokenizer(
            [prompts.texts[i] for i in texts],
            add_special_tokens=add_special_tokens,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for i, ids in zip(texts, encoded, strict=True):
            prompts.ids[i] = np.asarray(ids, np.int32)
    for i in chats:
        prompts.ids[i] = np.asarray(chat_ids(source.tokenizer(), json.loads(prompts.texts[i] or "[]"), i), np.int32)
    for i in (*texts, *chats):
        tokens = prompts.ids[i]
        if tokens is None or len(tokens) == 0:
            raise PromptError(f"prompt {i} ({prompts.texts[i]!r:.60}) gives no tokens with this tokenizer. Remove it.")


def positions_of(positions: Any, prompts: PromptList, source: ModelSource, *, add_special_tokens: bool) -> Any:
    """`positions` in numbers, one list for each prompt, where what chats say decides them; tokenises what is not yet.

    Raises `PromptError` for a prompt that is no chat or has no such message, `TokenizerError`.
    """
    if not needs_chats(positions):
        return positions
    tokenize(prompts, range(len(prompts)), source, add_special_tokens=add_special_tokens)
    chats = [
        json.loads(text or "") if kind == CHAT else None
        for text, kind in zip(prompts.texts, prompts.kinds, strict=True)
    ]
    ids = [ids_of(prompts, i).tolist() for i in range(len(prompts))]
    return positions_in_chats(positions, chats, ids, source.tokenizer() if any(chats) else None)


def check_tokens(prompts: PromptList, indices: Sequence[int], source: ModelSource) -> None:
    """Refuse prompts the model cannot take: past its context, or with ids outside its vocabulary.

    Raises `PromptError` naming the first such prompt, its length and the limit, and how many there are.
    """
    limit, vocabulary = source.context_length, source.vocab_size
    lengths = {i: len(ids_of(prompts, i)) for i in indices}
    if limit is not None:
        long = [i for i, n in lengths.items() if n > limit]
        if long:
            more = f" ({len(long)} prompts are too long)" if len(long) > 1 else ""
            raise PromptError(
                f"prompt {long[0]} has {lengths[long[0]]} tokens and the context of {source.name!r} is {limit}{more}: "
                "shorten or split it; nothing is ever truncated."
            )
    if vocabulary is not None:
        for i in indices:
            largest = int(ids_of(prompts, i).max())
            if largest >= vocabulary:
                raise PromptError(
                    f"prompt {i} has the token id {largest}: {source.name!r} knows the ids 0 to {vocabulary - 1}."
                )


def ids_of(prompts: PromptList, i: int) -> npt.NDArray[np.int32]:
    """The token ids int32 ``[T]`` of prompt `i`, which must have been tokenised."""
    ids = prompts.ids[i]
    assert ids is not None, "tokenize() comes first"
    return ids


def prompt_table(prompts: PromptList, indices: Sequence[int], context: str) -> PromptTable:
    """The tokenised prompts at `indices` as the store takes them."""
    return PromptTable.build(
        [ids_of(prompts, i) for i in indices],
        [prompts.texts[i] for i in indices],
        kinds=prompts.kinds[np.asarray(indices, np.intp)],
        text_context=context,
    )
