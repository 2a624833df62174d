"""What goes into a segment and what is known of one: the words that reading and writing share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import FormatError, NewerFormatError
from actcache.store import container
from actcache.store.blocks import least_scales
from actcache.store.dtypes import code_for, is_scaled, matrix_dtype
from actcache.store.lazy import lazy
from actcache.store.prompts import PromptTable, offsets

VERSION = "1.0"
FORMAT = "actcache-segment"
BLOCK = 128 << 10
TOKENS = "tokens"
"""The layout with one row per token; every other layout has one row per prompt."""

SPARSE = "sparse"
"""The layout of matrices that are mostly zero: a row for each number that is not; see `actcache.store.sparse`."""
DERIVED = "derived"
"""The layout of results that are no vectors, one row per prompt."""
COMPLETION = "completion"
"""The layout of what a model said after a prompt."""
LABEL, METADATA = "label", "metadata"
"""The layouts, and the sites, of what people said of prompts."""
PULLED = "pulled"
"""The layout, and what the names of sites begin with, of where in a dataset the rows of pulled prompts are."""
RESULTS = frozenset({"perplexity", "token_nll", "logits", "completion", LABEL, METADATA, PULLED})
"""What the names of results begin with, before a dot; other sites hold activations."""

_INDEX_DTYPES = {
    "digest": "<u8", "row_offset": "<i8", "token_offset": "<i8", "text_offset": "<i8", "block_offset": "<i8",
    "checksum": "<u8", "moments": "<f8", "errors": "<f8", "prompt_key": "u1", "text_key": "u1", "token_ids": "<i4",
    "kind": "u1", "text": "u1",
}  # fmt: skip
INDEX_TENSORS = tuple(_INDEX_DTYPES)
JOURNAL = "pad.journal"
"""What is left, behind the data, of the records of the batches in which a segment grew."""
SCALE = ".scale"
"""What follows the name of a quantised matrix in the name of its scales."""
_LAYOUT = re.compile(r"\w[\w.:+-]*")


@dataclass
class Records:
    """What one write stores: prompts, and for each site the rows of all of them.

    `layout` is "tokens" (``row_offset == prompts.token_offset``), "sparse" (any number of rows for each prompt), or the
    name of a pooling (one row per prompt). `data`: site name -> ``[rows, D]`` of any dtype that safetensors knows.
    `storage`: the dtype floating values are stored in, None as they are; `screened`: it has been seen to that they fit.
    `not_before`: the least `created_ns` it is stored with, whatever the clock says.
    """

    prompts: PromptTable
    layout: str
    row_offset: npt.NDArray[np.int64]
    data: dict[str, npt.NDArray[Any]]
    storage: str | None = None
    screened: bool = False
    not_before: int = 0

    @classmethod
    def pooled(cls, prompts: PromptTable, layout: str, data: dict[str, npt.NDArray[Any]]) -> Records:
        """One row per prompt."""
        return cls(prompts, layout, np.arange(len(prompts) + 1, dtype=np.int64), data)

    @classmethod
    def tokens(cls, prompts: PromptTable, data: dict[str, npt.NDArray[Any]]) -> Records:
        """One row per token."""
        return cls(prompts, TOKENS, prompts.token_offset, data)

    # These are asked for several times on the way of a batch to the disk, and take as long as writing one of its sites.
    @lazy
    def nbytes(self) -> int:
        """Bytes of vectors, tokens and text."""
        p = self.prompts
        return sum(a.nbytes for a in self.data.values()) + p.token_ids.nbytes + p.text.nbytes + 72 * len(p)

    @lazy
    def signature(self) -> tuple[Any, ...]:
        """What records must share to go into one segment."""
        columns = tuple((n, self.code(n), a.shape[1:]) for n, a in self.data.items())
        return (self.layout, self.prompts.text_context, columns)

    @lazy
    def stored_bytes(self) -> int:
        """Bytes of the vectors as they are stored, without scales."""
        return sum(a.size * matrix_dtype(self.code(n)).itemsize for n, a in self.data.items())

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of its rows, at least: `blocks.least_scales`."""
        widths = sum(a.shape[1] for n, a in self.data.items() if is_scaled(self.code(n)))
        return int(4 * widths * least_scales(np.diff(self.row_offset))) if widths else 0

    @property
    def is_scaled(self) -> bool:
        """Whether any site is stored with scales."""
        return any(is_scaled(self.code(site)) for site in self.data)

    def code(self, site: str) -> str:
        """The code of the column in which `site` is stored."""
        return code_for(self.data[site].dtype, self.storage)

    def select(self, keep: npt.NDArray[np.bool_]) -> Records:
        """The prompts marked in `keep` bool ``[n]``."""
        rows = np.repeat(keep, np.diff(self.row_offset))
        prompts = self.prompts.select(keep)
        offset = row_offsets(self.layout, prompts, np.diff(self.row_offset)[keep])
        data = {site: matrix[rows] for site, matrix in self.data.items()}
        return replace(self, prompts=prompts, row_offset=offset, data=data)

    def check(self) -> None:
        """ValueError unless shapes, offsets and names fit together exactly."""
        n = len(self.prompts)
        if not is_layout(self.layout):
            raise ValueError(f"layout {self.layout!r} is not a name")
        lengths = np.diff(self.row_offset)
        fits = len(lengths) == n and not (lengths < 0).any() and self.row_offset[0] == 0
        if (
            not n
            or not self.data
            or not (fits and np.array_equal(self.row_offset, row_offsets(self.layout, self.prompts, lengths)))
        ):
            raise ValueError(f"records of layout {self.layout!r} need prompts, data, and a row offset that fits both")
        for site, rows in self.data.items():
            self.code(site)
            if "/" in site or not site or site.endswith(SCALE):
                raise ValueError(f"site {site!r} cannot be a name: it is empty, holds a slash, or ends in {SCALE!r}")
            if rows.ndim != 2 or len(rows) != int(self.row_offset[-1]):
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
    """(site, code of its dtype, D) in the order of the file; codes are those of `actcache.store.dtypes`."""
    prompts: int
    rows: int
    size: int
    created_ns: int
    text_context: str
    replaces: Mapping[str, tuple[str, ...]]
    """Segments merged into this one, each with the tombs that were applied."""
    prompt_key: npt.NDArray[np.uint8] = field(repr=False)
    text_key: npt.NDArray[np.uint8] = field(repr=False)

    @lazy
    def sites(self) -> tuple[str, ...]:
        return tuple(c[0] for c in self.columns)

    @property
    def data_bytes(self) -> int:
        """Bytes of the matrices, without scales."""
        return self.rows * sum(matrix_dtype(code).itemsize * width for _, code, width in self.columns)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Segments that share this may be merged."""
        return (self.layout, self.text_context, self.columns)


def check_version(version: str) -> None:
    """NewerFormatError for a major version of the format that only a later actcache reads, FormatError for none."""
    match = re.fullmatch(r"([0-9]{1,6})\.[0-9]{1,6}", version)
    ours = int(VERSION.split(".")[0])
    if match is None or int(match[1]) < ours:
        raise FormatError(f"format version {version!r}, expected one like {VERSION!r}")
    if int(match[1]) > ours:
        raise NewerFormatError(f"format version {version!r}, this actcache reads {VERSION}: install a newer actcache")


def check_index_tensors(tensors: Mapping[str, container.Tensor], names: Sequence[str]) -> None:
    """FormatError unless all these index tensors are there, of their dtypes and dimensions."""
    for name in names:
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != np.dtype(_INDEX_DTYPES[name]):
            raise FormatError(f"index tensor {name!r} is missing or has the wrong dtype")
        if len(tensor.shape) != (2 if name.endswith("_key") or name == "errors" else 1):
            raise FormatError(f"index tensor {name!r} has the wrong shape {tensor.shape}")


def read_replaces(text: str) -> dict[str, tuple[str, ...]]:
    """What ``replaces`` says: the segments merged into one, each with the tombs that were applied."""
    try:
        table = json.loads(text)
        return {str(k): tuple(str(x) for x in v) for k, v in table.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise FormatError("replaces is not a table of tombs per segment") from None


def flat_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def row_offsets(layout: str, prompts: PromptTable, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which rows of `layout` are whose, int64 ``[n + 1]``; `lengths`: how many each prompt has where it is sparse."""
    if layout == SPARSE:
        return offsets(lengths)
    return prompts.token_offset if layout == TOKENS else np.arange(len(prompts) + 1, dtype=np.int64)


def is_result(site: str) -> bool:
    """Whether a site holds what was computed from activations (logits may also have been asked for as a site)."""
    return site.split(".")[0] in RESULTS


def is_layout(name: str) -> bool:
    """Whether `name` can name a layout: "tokens", a pooling, a derived result."""
    return _LAYOUT.fullmatch(name) is not None
