"""What goes into a segment and what is known of one: the words that reading and writing share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store import container
from actcache.store.prompts import PromptTable

VERSION = "1.0"
FORMAT = "actcache-segment"
BLOCK = 128 << 10
TOKENS = "tokens"
"""The layout with one row per token; every other layout has one row per prompt."""

INDEX_TENSORS = (
    "digest", "row_offset", "token_offset", "text_offset", "checksum", "moments",
    "prompt_key", "text_key", "token_ids", "kind", "text",
)  # fmt: skip
_LAYOUT = re.compile(r"\w[\w.:+-]*")


@dataclass
class Records:
    """What one write stores: prompts, and for each site the rows of all of them.

    `layout` is "tokens" (``row_offset == prompts.token_offset``) or the name of a pooling (one row per
    prompt). `data`: site name -> ``[rows, D]`` of any dtype that safetensors knows.
    """

    prompts: PromptTable
    layout: str
    row_offset: npt.NDArray[np.int64]
    data: dict[str, npt.NDArray[Any]]

    @classmethod
    def pooled(cls, prompts: PromptTable, layout: str, data: dict[str, npt.NDArray[Any]]) -> Records:
        """One row per prompt."""
        return cls(prompts, layout, np.arange(len(prompts) + 1, dtype=np.int64), data)

    @classmethod
    def tokens(cls, prompts: PromptTable, data: dict[str, npt.NDArray[Any]]) -> Records:
        """One row per token."""
        return cls(prompts, TOKENS, prompts.token_offset, data)

    @property
    def nbytes(self) -> int:
        """Bytes of vectors, tokens and text."""
        p = self.prompts
        return sum(a.nbytes for a in self.data.values()) + p.token_ids.nbytes + p.text.nbytes + 72 * len(p)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What records must share to go into one segment."""
        columns = tuple((n, container.code_of(a.dtype), a.shape[1:]) for n, a in self.data.items())
        return (self.layout, self.prompts.text_context, columns)

    def check(self) -> None:
        """ValueError unless shapes, offsets and names fit together exactly."""
        n = len(self.prompts)
        if not is_layout(self.layout):
            raise ValueError(f"layout {self.layout!r} is not a name")
        expected = self.prompts.token_offset if self.layout == TOKENS else np.arange(n + 1)
        if not n or not self.data or not np.array_equal(self.row_offset, expected):
            raise ValueError(f"records of layout {self.layout!r} need prompts, data, and a row offset that fits both")
        for site, rows in self.data.items():
            container.code_of(rows.dtype)
            if "/" in site or not site or rows.ndim != 2 or len(rows) != int(self.row_offset[-1]):
                raise ValueError(
                    f"site {site!r}: shape {rows.shape}, expected [{int(self.row_offset[-1])}, D] for {n} prompts"
                )


@dataclass(frozen=True, eq=False)
class SegmentInfo:
    """What a header and the index tensors say about one segment."""

    name: str
    space: str
    layout: str
    columns: tuple[tuple[str, str, int], ...]
    """(site, safetensors dtype, D) in the order of the file."""
    prompts: int
    rows: int
    size: int
    created_ns: int
    text_context: str
    replaces: Mapping[str, tuple[str, ...]]
    """Segments merged into this one, each with the tombs that were applied."""
    prompt_key: npt.NDArray[np.uint8] = field(repr=False)
    text_key: npt.NDArray[np.uint8] = field(repr=False)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(c[0] for c in self.columns)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Segments that share this may be merged."""
        return (self.layout, self.text_context, self.columns)


def flat_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def is_layout(name: str) -> bool:
    """Whether `name` can name a layout: "tokens", a pooling, a derived result."""
    return _LAYOUT.fullmatch(name) is not None
