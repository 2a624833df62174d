"""What one token stands for: its text, or the bytes of it that are no text by themselves."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# As vocabularies with byte fallback (those of sentencepiece) call a byte that is in none of their pieces.
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# No byte of a character of several is below 0x80, so that what belongs together stands together.
_ESCAPED = re.compile("[\udc80-\udcff]+")
_SPACE = "\u2581"


def piece_of(tokenizer: Any, token: int) -> str:
    """The text of one token id, its leading space included; its number where the tokenizer has none of that id.

    A byte that is no UTF-8 by itself is the lone surrogate that ``errors="surrogateescape"`` makes of it, so that the
    pieces of a prompt, joined, are its text; see `escaped`. `tokenizer` is of transformers, or a
    `tokenizers.Tokenizer`.
    """
    piece, text = _decoded(tokenizer, token)
    if piece is None:
        # The head has more rows than the tokenizer has tokens.
        return text or str(token)
    if "\ufffd" in text or not text:
        raw = _bytes(piece)
        if raw is not None:
            return raw.decode("utf-8", "surrogateescape")
        # Decoding drops the space in front of a first word, also where nothing follows it.
        return piece.replace(_SPACE, " ") if piece.startswith(_SPACE) else piece
    return f" {text}" if piece.startswith(_SPACE) and not text.startswith(" ") else text


def escaped(piece: str) -> str:
    r"""A piece, or several joined, with each byte that is no UTF-8 as ``\xab``."""
    return _ESCAPED.sub(
        lambda run: run[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), piece
    )


def quoted(piece: str) -> str:
    r"""The `repr` of a piece, in which a byte that is no UTF-8 is ``\xab`` too."""
    return re.sub(r"(\\\\)|\\udc([89a-f][0-9a-f])", lambda found: found[1] or f"\\x{found[2]}", repr(piece))


def _decoded(tokenizer: Any, token: int) -> tuple[str | None, str]:
    """How the vocabulary writes a token (None: it has none of that id), and what it decodes to by itself."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
    else:
        text, piece = tokenizer.decode([token], skip_special_tokens=False), tokenizer.id_to_token(token)
    return piece if isinstance(piece, str) else None, text


def _bytes(piece: str) -> bytes | None:
    """The bytes that a vocabulary writes as `piece`; None for a piece that is no spelling of bytes."""
    if found := _FALLBACK.fullmatch(piece):
        return bytes([int(found[1], 16)])
    spelled = _letters()
    if piece and all(letter in spelled for letter in piece):
        return bytes(spelled[letter] for letter in piece)
    # Vocabularies of bytes alone (ByT5) have the character of that number.
    return bytes([ord(piece)]) if len(piece) == 1 and ord(piece) < 256 else None


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies (that of GPT-2, and most since): a printable character of
    Latin-1 stands for its own number, the other bytes have those from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
