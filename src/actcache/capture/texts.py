"""Which tokens of a text hold given characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from actcache.errors import LayerRangeError, OptionError, PromptError, TokenizerError

Where = str | int | tuple[int, int]


@overload
def text_positions(tokenizer: Any, text: str, where: Where) -> list[int]: ...


@overload
def text_positions(tokenizer: Any, text: Sequence[str], where: Where | Sequence[Where]) -> list[list[int]]: ...


def text_positions(tokenizer: Any, text: str | Sequence[str], where: Any) -> Any:
    """Positions of the tokens that hold any of the characters `where` of `text`, as ``positions=`` takes them.

        subject = ac.text_positions(tokenizer, prompts, ["Eiffel Tower", "Big Ben"])
        ac.run_with_cache(model, prompts, sites="resid_post", positions={"subject": subject, "last": -1})

    `where`: words that occur exactly once in the text, the number of a character, or a range ``(start, stop)`` of them
    (`stop` excluded, negative from the end). Whitespace that belongs to no token counts with the token behind it (the
    one before, at the end of the text). Tokens that stand for no characters, such as a BOS, are in no range. Of several
    texts a list for each is returned, and `where` may be a list with one for each.

    Raises `PromptError` for words that do not occur, or several times; `LayerRangeError` (an `IndexError`) for
    characters that the text does not have; `TokenizerError` for a tokenizer that does not tell characters;
    `OptionError` for a list of places that has not one for each text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for: use the fast tokenizer "
            "(AutoTokenizer, use_fast=True)."
        )
    if isinstance(text, str):
        return _positions(tokenizer, text, where, "the text")
    texts = list(text)
    each = list(where) if isinstance(where, list) else [where] * len(texts)
    if len(each) != len(texts):
        raise OptionError(f"where has {len(each)} places for {len(texts)} texts: expected one for each")
    return [
        _positions(tokenizer, one, place, f"text {i}") for i, (one, place) in enumerate(zip(texts, each, strict=True))
    ]


def _positions(tokenizer: Any, text: str, where: Any, name: str) -> list[int]:
    start, stop = _characters(text, where, name)
    offsets = tokenizer(text, truncation=False, return_offsets_mapping=True)["offset_mapping"]
    real = [(at, a, b) for at, (a, b) in enumerate(offsets) if b > a]
    found = [at for at, a, b in real if a < stop and b > start]
    if not found:
        behind = [at for at, a, _ in real if a >= stop][:1]
        found = behind or [at for at, _, _ in real][-1:]
    if not found:
        raise PromptError(f"{name} ({text!r:.60}) gives no tokens that stand for characters")
    return found


def _characters(text: str, where: Any, name: str) -> tuple[int, int]:
    if isinstance(where, str):
        count = text.count(where) if where else 0
        if count != 1:
            # Overlapping ones are told apart by nobody either.
            how = "does not occur in" if count == 0 else f"occurs {count} times in"
            raise PromptError(f"{where!r} {how} {name} ({text!r:.60}): give a range of characters (start, stop)")
        start = text.index(where)
        return start, start + len(where)
    size = len(text)
    if hasattr(where, "__index__") and not isinstance(where, bool):
        if not -size <= int(where) < size:
            raise LayerRangeError(f"character {where} is out of range: {name} has {size} characters")
        return int(where) % size, int(where) % size + 1
    if isinstance(where, tuple) and len(where) == 2 and all(hasattr(end, "__index__") for end in where):
        start, stop = (int(end) + size if end < 0 else int(end) for end in where)
        if not 0 <= start < stop <= size:
            raise LayerRangeError(f"characters {where!r} are out of range: {name} has {size} characters")
        return start, stop
    raise OptionError(f"where is {where!r}: expected words of the text, the number of a character, or (start, stop)")
