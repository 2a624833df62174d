"""Prompts that are looked for: their keys, and what a hit must equal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from actcache.store.keys import Ints, Mask
from actcache.store.lazy import lazy
from actcache.store.mapping import Segment
from actcache.store.prompts import PromptTable, encode_texts, text_digest, text_digests

Kinds = Sequence[int] | npt.NDArray[np.uint8] | int


class Query:
    """Prompts to look for: their keys, and the bytes that a hit must equal.

    `kind`: "token", or "text" with the kinds of the texts and the context they are read under.
    """

    def __init__(self, kind: str, kinds: Kinds = 0, context: str = "") -> None:
        self.kind = kind
        self.context = context
        self._kinds = kinds
        self._table: PromptTable | None = None

    @classmethod
    def by_text(cls, texts: Sequence[str], kinds: Kinds, context: str) -> Query:
        query = cls("text", kinds, context)
        query.content = encode_texts(texts)
        return query

    @classmethod
    def by_tokens(cls, table: PromptTable) -> Query:
        query = cls("token")
        query._table = table
        return query

    def __len__(self) -> int:
        return len(self.content) if self._table is None else len(self._table)

    @lazy
    def content(self) -> list[bytes]:
        assert self._table is not None
        data = np.ascontiguousarray(self._table.token_ids, "<i4").tobytes()
        ends = (self._table.token_offset * 4).tolist()
        return [data[a:b] for a, b in pairwise(ends)]

    @lazy
    def keys(self) -> npt.NDArray[np.uint8]:
        if self._table is not None:
            return self._table.token_key
        return text_digests(self.content, self.kinds, self.context)

    @lazy
    def kinds(self) -> npt.NDArray[np.uint8] | int:
        """The kind of each text, or of all."""
        if isinstance(self._kinds, int):
            return self._kinds
        kinds = np.broadcast_to(np.asarray(self._kinds, np.uint8), (len(self),))
        return int(kinds[0]) if len(kinds) and (kinds == kinds[0]).all() else kinds

    def key_of_one(self) -> bytes:
        """The key of the only prompt."""
        if self._table is not None:
            return self._table.token_key.tobytes()
        return text_digest(self.content[0], self.kind_of_one(), self.context)

    def kind_of_one(self) -> int:
        """The kind of the only text."""
        return self._kinds if isinstance(self._kinds, int) else int(self._kinds[0])

    def matches(self, segment: Segment, members: Ints, prompts: Ints) -> Mask | None:
        """Which of the queries `members` (going up) are exactly what `segment` holds as `prompts`; None for all."""
        if self.kind == "token":
            return segment.contents["token"].equal(prompts, self.content, members)
        if segment.prompts.text_context != self.context:
            return np.zeros(len(members), bool)
        same = segment.contents["text"].equal(prompts, self.content, members)
        kinds = self.kinds
        if isinstance(kinds, int) and kinds == segment.kind_of_all:
            return same
        alike: Mask = segment.prompts.kind[prompts] == (kinds if isinstance(kinds, int) else kinds[members])
        return alike if same is None else same & alike

    def matches_one(self, segment: Segment, prompt: int) -> bool:
        """Whether the only query is exactly what `segment` holds as `prompt`."""
        if segment.contents[self.kind].of(prompt) != self.content[0]:
            return False
        return self.kind == "token" or (
            segment.prompts.text_context == self.context and segment.prompts.kind[prompt] == self.kind_of_one()
        )
