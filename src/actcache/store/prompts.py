"""Prompts packed in arrays, and the keys they are found by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.store.lazy import lazy

IDS, TEXT, CHAT = 0, 1, 2
"""Kinds of prompt: token ids only, text, and chat messages as canonical JSON."""
_GATHERED = 1 << 18

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


def token_keys(flat: npt.NDArray[np.int32], offset: Ints) -> Bytes:
    """uint8 ``[n, 16]``: the key of each prompt's token ids ``flat[offset[i]:offset[i + 1]]``."""
    data = np.ascontiguousarray(flat, dtype="<i4").tobytes()
    ends = (np.asarray(offset, dtype=np.int64) * 4).tolist()
    digest = xxhash.xxh3_128_digest
    return _pack([digest(b"t" + data[a:b]) for a, b in pairwise(ends)])


def needs_text(flat: npt.NDArray[np.int32], offset: Ints, kind: Bytes) -> Ints:
    """Which prompts are texts that have fewer than four stand-ins in place of their token ids. Each is 31 bits of the
    text's digest, so that two texts could have the same ones."""
    lengths = np.diff(offset)
    few = np.flatnonzero((lengths > 0) & (lengths < 4) & (kind != IDS))
    return few[flat[offset[few]] < 0]


def stand_in_key(ids: bytes, kind: int, text: bytes) -> bytes:
    """The key of such a prompt: of its stand-ins (little-endian), its kind and its text."""
    return bytes(xxhash.xxh3_128_digest(b"s" + ids + bytes([kind]) + text))


def text_keys(texts: Sequence[str], kinds: Sequence[int] | npt.NDArray[Any] | int, context: str) -> Bytes:
    """uint8 ``[n, 16]``: the key of each text under `context` (tokenizer and its options) and its kind.

    Chat prompts come as canonical JSON with kind 2, so that no text can pass for a conversation.
    """
    return text_digests(encode_texts(texts), kinds, context)


def text_digests(data: Sequence[bytes], kinds: Sequence[int] | npt.NDArray[Any] | int, context: str) -> Bytes:
    """`text_keys` of texts that are encoded already."""
    digest = xxhash.xxh3_128_digest
    prefixes = _prefixes(context)
    if isinstance(kinds, int):
        return _pack(list(map(digest, map(prefixes[kinds].__add__, data))))
    each = np.broadcast_to(np.asarray(kinds), (len(data),))
    return _pack([digest(prefixes[k] + t) for k, t in zip(each.tolist(), data, strict=True)])


def text_digest(data: bytes, kind: int, context: str) -> bytes:
    """The key of one encoded text, as `text_keys` gives it."""
    return bytes(xxhash.xxh3_128_digest(_prefixes(context)[kind] + data))


@lru_cache(maxsize=64)
def _prefixes(context: str) -> tuple[bytes, ...]:
    salt = xxhash.xxh3_128_digest(context.encode("utf-8", "surrogatepass"))
    return tuple(salt + bytes([kind]) for kind in (IDS, TEXT, CHAT))


def encode_texts(texts: Sequence[str]) -> list[bytes]:
    """UTF-8 of each text; lone surrogates are legal in str and must not make a prompt unkeyable."""
    try:
        return list(map(str.encode, texts))
    except UnicodeEncodeError:
        return [t.encode("utf-8", "surrogatepass") for t in texts]


def _pack(digests: list[bytes]) -> Bytes:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)


@dataclass(frozen=True, eq=False)
class PromptTable:
    """`n` prompts: their token ids and, where given, the text they came from.

    `token_ids` int32 ``[total]`` with `token_offset` int64 ``[n + 1]``; `kind` uint8 ``[n]`` (0 ids only,
    1 text, 2 chat as canonical JSON); `text` uint8 UTF-8 bytes with `text_offset` int64 ``[n + 1]``;
    `text_context` names the tokenizer and the options under which text became these ids ("" without text).
    """

    token_ids: npt.NDArray[np.int32]
    token_offset: Ints
    kind: Bytes
    text: Bytes
    text_offset: Ints
    text_context: str = ""
    _token_key: Bytes | None = field(default=None, repr=False)
    _text_key: Bytes | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        token_ids: Sequence[Sequence[int] | npt.NDArray[Any]],
        texts: Sequence[str | None] | None = None,
        kinds: Sequence[int] | npt.NDArray[Any] | None = None,
        text_context: str = "",
    ) -> PromptTable:
        """Pack prompts. `kinds` defaults to text where a text is given and to ids elsewhere."""
        n = len(token_ids)
        parts = [np.asarray(ids, dtype=np.int32).reshape(-1) for ids in token_ids]
        token_offset = offsets([len(p) for p in parts])
        flat = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if texts is None:
            texts = [None] * n
        if len(texts) != n:
            raise ValueError(f"{len(texts)} texts for {n} prompts")
        data = encode_texts(["" if t is None else t for t in texts])
        kind = np.array([IDS if t is None else TEXT for t in texts] if kinds is None else kinds, dtype=np.uint8)
        if len(kind) != n or (n and int(kind.max()) > CHAT):
            raise ValueError("kinds: one of 0 (ids), 1 (text), 2 (chat) for each prompt")
        return cls(
            flat, token_offset, kind, np.frombuffer(b"".join(data), np.uint8), offsets([len(d) for d in data]),
            text_context if kind.any() else "",
        )  # fmt: skip

    @classmethod
    def concatenate(
        cls, tables: Sequence[PromptTable], *, mixed: bool = False, empty: Callable[..., npt.NDArray[Any]] = np.empty
    ) -> PromptTable:
        """The prompts of all `tables`, in order; tables with text must agree in `text_context`.

        With `mixed` they need not: the result has the keys of its parts and an empty context. `empty` makes its arrays.
        """
        if len(tables) == 1:
            return tables[0]
        if not tables:
            return cls.build([])
        contexts = {t.text_context for t in tables if t.text_context} or {""}
        if len(contexts) > 1 and mixed:
            contexts = {""}
        if len(contexts) > 1:
            raise ValueError(f"prompts of different text contexts cannot be joined: {sorted(contexts)}")

        def joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
            made = empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
            return np.concatenate(parts, out=made)

        return cls(
            joined([t.token_ids for t in tables]),
            _join_offsets([t.token_offset for t in tables]),
            joined([t.kind for t in tables]),
            joined([t.text for t in tables]),
            _join_offsets([t.text_offset for t in tables]),
            contexts.pop(),
            joined([t.token_key for t in tables]),
            joined([t.text_key for t in tables]),
        )

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def lengths(self) -> Ints:
        """Number of tokens of each prompt."""
        return np.diff(self.token_offset)

    @lazy
    def token_key(self) -> Bytes:
        """uint8 ``[n, 16]``. Of few stand-ins for unknown token ids the text counts, too."""
        if self._token_key is not None:
            return self._token_key
        keys = token_keys(self.token_ids, self.token_offset)
        some = needs_text(self.token_ids, self.token_offset, self.kind).tolist()
        if some:
            keys = keys.copy()
        for i in some:
            ids, text = self.tokens(i).astype("<i4").tobytes(), self.text[self.text_offset[i] : self.text_offset[i + 1]]
            keys[i] = np.frombuffer(stand_in_key(ids, int(self.kind[i]), text.tobytes()), np.uint8)
        return keys

    @lazy
    def text_key(self) -> Bytes:
        """uint8 ``[n, 16]``; zeros for prompts given as ids."""
        if self._text_key is not None:
            return self._text_key
        keys = np.zeros((len(self), 16), np.uint8)
        some = np.flatnonzero(self.kind)
        if len(some):
            data, ends = self.text.tobytes(), self.text_offset.tolist()
            given = [data[ends[i] : ends[i + 1]] for i in some.tolist()]
            keys[some] = text_digests(given, self.kind[some], self.text_context)
        return keys

    @property
    def texts(self) -> list[str | None]:
        """The text of each prompt, as `text_of` gives it."""
        data, ends = self.text.tobytes(), self.text_offset.tolist()
        given = self.kind != IDS
        return [
            data[a:b].decode("utf-8", "surrogatepass") if has else None
            for has, (a, b) in zip(given.tolist(), pairwise(ends), strict=True)
        ]

    @property
    def ids(self) -> list[npt.NDArray[np.int32] | None]:
        """The token ids of each prompt, int32 ``[T]``; None where they are not known (no tokenizer was at hand)."""
        ends = self.token_offset.tolist()
        found = [self.token_ids[a:b] for a, b in pairwise(ends)]
        return [None if len(ids) and ids[0] < 0 else ids for ids in found]

    def tokens(self, i: int) -> npt.NDArray[np.int32]:
        """Token ids of prompt `i`, int32 ``[T]``."""
        i = range(len(self))[i]
        return self.token_ids[self.token_offset[i] : self.token_offset[i + 1]]

    def text_of(self, i: int) -> str | None:
        """The text of prompt `i` (canonical JSON for chat); None when it came as ids."""
        i = range(len(self))[i]
        if self.kind[i] == IDS:
            return None
        return self.text[self.text_offset[i] : self.text_offset[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def by_ids(self, which: npt.NDArray[np.bool_] | None = None) -> PromptTable:
        """The same prompts, those of the mask `which` (default: all) by their token ids alone; texts are left where the
        keys need them."""
        keep = np.zeros(len(self), bool) if which is None else ~which
        keep[needs_text(self.token_ids, self.token_offset, self.kind)] = True
        kind = np.where(keep, self.kind, np.uint8(IDS))
        text, _ = gather_ragged(self.text, self.text_offset, np.flatnonzero(keep))
        return PromptTable(
            self.token_ids, self.token_offset, kind, text, offsets(np.where(keep, np.diff(self.text_offset), 0)),
            self.text_context if kind.any() else "", self.token_key, self.text_key * keep[:, None],
        )  # fmt: skip

    def select(self, indices: npt.ArrayLike) -> PromptTable:
        """The prompts at `indices` (integers or a boolean mask), in that order."""
        index = np.asarray(indices)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64).reshape(-1)
        index = np.arange(len(self), dtype=np.int64)[index]
        tokens, token_offset = gather_ragged(self.token_ids, self.token_offset, index)
        text, text_offset = gather_ragged(self.text, self.text_offset, index)
        kind = self.kind[index]
        return PromptTable(
            tokens, token_offset, kind, text, text_offset, self.text_context if kind.any() else "",
            self.token_key[index], self.text_key[index],
        )  # fmt: skip


def gather_ragged(flat: npt.NDArray[Any], offset: Ints, index: Ints) -> tuple[npt.NDArray[Any], Ints]:
    """The pieces ``flat[offset[i]:offset[i + 1]]`` for `i` in `index`, joined, and their new offsets."""
    starts = offset[index]
    lengths = offset[index + 1] - starts
    ends = offsets(lengths)
    if len(index) and (starts[1:] == starts[:-1] + lengths[:-1]).all():
        # They lie one after the other.
        return flat[starts[0] : starts[0] + ends[-1]].copy(), ends
    found = np.empty(int(ends[-1]), flat.dtype)
    # Where each number comes from takes many times the room of a text.
    bounds = np.searchsorted(ends, np.arange(0, len(found), _GATHERED), side="right") - 1
    for a, b in pairwise([*np.unique(bounds).tolist(), len(index)]):
        take = np.arange(ends[a], ends[b]) + np.repeat(starts[a:b] - ends[a:b], lengths[a:b])
        np.take(flat, take, out=found[ends[a] : ends[b]])
    return found, ends


def offsets(lengths: Sequence[int] | Ints) -> Ints:
    """Where pieces of these lengths begin and end when they lie one after the other, int64 ``[n + 1]``."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def _join_offsets(parts: Sequence[Ints]) -> Ints:
    return offsets(np.concatenate([np.diff(p) for p in parts]))


def canonical_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Chat messages as the one JSON text they are keyed by."""
    return json.dumps([dict(m) for m in messages], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
