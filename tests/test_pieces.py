"""What single tokens are shown as: text where they are text, else their bytes, however a vocabulary writes these."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from actcache.model.pieces import escaped, piece_of, quoted

TEXT = "Caf\u00e9 \u00abl\u2019\u00c9t\u00e9\u00bb \u65e5\u672c \U0001f600!\n\tx \\ '"


def byte_level() -> Tokenizer:
    """As GPT-2's: all bytes, two whole words, and merges that end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    cut = ["\u00e6\u0139", "\u0120\u00e6"]
    vocabulary = {letter: i for i, letter in enumerate([*letters, "Ca", "\u0120l", *cut])}
    merges = [("C", "a"), ("\u0120", "l"), ("\u00e6", "\u0139"), ("\u0120", "\u00e6")]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<\uff5cbegin\u2581of\uff5c>"])
    return made


def byte_fallback() -> Tokenizer:
    """As Llama 2's, made by sentencepiece: pieces with a mark for the space, and names of bytes for all else."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"Cafltx!'\u00c9", "\u2581", "\u2581l", "Ca"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "l"), ("C", "a")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens(["<s>"])
    return made


MADE = {"byte level": byte_level, "byte fallback": byte_fallback}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_pieces_of_a_text_are_its_bytes(name: str, wrapped: bool) -> None:
    made = MADE[name]()
    ids = made.encode(TEXT, add_special_tokens=False).ids
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=made) if wrapped else made
    pieces = [piece_of(tokenizer, i) for i in ids]
    front = " " if name == "byte fallback" else ""
    assert "".join(pieces).encode("utf-8", "surrogateescape") == f"{front}{TEXT}".encode()
    assert escaped("".join(pieces)) == front + TEXT
    # More than one token: what each is by itself is what the test is about.
    assert any("\udc80" <= letter <= "\udcff" for piece in pieces for letter in piece)
    assert not any(mark in piece for piece in pieces for mark in ("\ufffd", "\u2581", "\u0120", "<0x"))


@pytest.mark.parametrize(
    ("name", "spelled", "shown"),
    [
        ("byte level", "\u00ab", r"\xab"),
        ("byte level", "\u0120l", " l"),
        # The three bytes of a character are text by itself only together; a space before some of them stays one.
        ("byte level", "\u0120\u00e6", r" \xe6"),
        ("byte level", "\u00e6\u0139", r"\xe6\x97"),
        ("byte level", "\u010a", "\n"),
        ("byte level", "\u0100", "\0"),
        ("byte level", "<\uff5cbegin\u2581of\uff5c>", "<\uff5cbegin\u2581of\uff5c>"),
        ("byte fallback", "<0xAB>", r"\xab"),
        ("byte fallback", "<0x0A>", "\n"),
        ("byte fallback", "<0x41>", "A"),
        ("byte fallback", "\u00c9", "\u00c9"),
        ("byte fallback", "\u2581l", " l"),
        ("byte fallback", "\u2581", " "),
        ("byte fallback", "<s>", "<s>"),
    ],
)
def test_one_token(name: str, spelled: str, shown: str) -> None:
    made = MADE[name]()
    token = made.token_to_id(spelled)
    assert token is not None
    for tokenizer in (made, PreTrainedTokenizerFast(tokenizer_object=made)):
        assert escaped(piece_of(tokenizer, token)) == shown


def test_a_vocabulary_of_bytes() -> None:
    tokenizer = ByT5Tokenizer()
    ids = tokenizer("\u00e9\u00ab\u0080 a").input_ids[:-1]
    assert "".join(map(escaped, (piece_of(tokenizer, i) for i in ids))) == r"\xc3\xa9\xc2\xab\xc2\x80 a"


def test_a_number_that_is_no_token() -> None:
    assert piece_of(byte_level(), 5000) == "5000"
    assert piece_of(PreTrainedTokenizerFast(tokenizer_object=byte_level()), 5000) == "5000"


def test_quotes_tell_bytes_from_text_that_looks_like_them() -> None:
    assert quoted("\udcab") == r"'\xab'"
    assert quoted(r"\xab") == r"'\\xab'"
    assert quoted(r"\udcab") == r"'\\udcab'"
    assert quoted("\\\udcab\u00ab\n") == r"'\\\xab" + "\u00ab" + r"\n'"
