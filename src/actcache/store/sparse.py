"""Matrices that are mostly zero, such as features of autoencoders: of each prompt the numbers that are not zero.

docs/format.md is normative. In the layout "sparse" a matrix ``[tokens, n]`` is three columns, of which each row is one
of its numbers: its position, its index in there, its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.prompts import PromptTable
from actcache.store.prompts import offsets as joined
from actcache.store.records import SPARSE, Records
from actcache.store.statistics import is_float

_COLUMN = re.compile(r"(?P<name>.+)\.of(?P<size>[1-9][0-9]{0,9})\.(?P<part>position|index|value)")
_INT32 = np.dtype("<i4")
LARGEST = 2**31 - 1
"""How many columns such a matrix may have."""


@dataclass(frozen=True)
class SparseSite:
    """A matrix ``[tokens, size]``, or ``[prompts, size]`` of pooled vectors, that is stored by what is not zero."""

    name: str
    size: int

    @property
    def columns(self) -> tuple[str, str, str]:
        """The sites that hold position, index and value."""
        position, index, value = (f"{self.name}.of{self.size}.{part}" for part in ("position", "index", "value"))
        return position, index, value

    def records(
        self, prompts: PromptTable, lengths: Ints, position: npt.ArrayLike, index: npt.ArrayLike, value: Any
    ) -> Records:
        """What one write stores; `lengths` int64 ``[n]``: how many of the numbers each prompt has.

        Values stay of the dtype they come in, whatever the store's is: of few numbers none is lost.
        """
        data = {
            self.columns[0]: np.asarray(position, _INT32).reshape(-1, 1),
            self.columns[1]: np.asarray(index, _INT32).reshape(-1, 1),
            self.columns[2]: np.asarray(value).reshape(-1, 1),
        }
        return Records(prompts, SPARSE, joined(lengths), data, screened=True)


def sparse_name(name: str, pooling: str | None) -> str:
    """What the matrix `name` of vectors that were pooled is called, or of every token."""
    return f"{pooling}.{name}" if pooling else name


def sites_among(columns: Iterable[str]) -> list[SparseSite]:
    """The matrices of which columns are stored."""
    matches = filter(None, map(_COLUMN.fullmatch, columns))
    return sorted({SparseSite(m["name"], int(m["size"])) for m in matches}, key=lambda site: (site.name, site.size))


def problems(segment: Segment) -> Iterator[str]:
    """What is wrong with the columns of a segment of this layout whose blocks are as they were written, in words."""
    held = segment.info.sites
    known = {column for site in sites_among(held) for column in site.columns}
    for column in held:
        if column not in known:
            yield f"{column} is no column of a sparse matrix"
            continue
        dtype, width = segment.column(column)
        right = is_float(dtype) if column.endswith(".value") else dtype == _INT32
        right = right and segment.scales(column) is None
        if width != 1 or not right:
            yield f"{column}: {dtype} of width {width}, expected one number, I32 or (values) a floating one"
            return
    for site in sites_among(held):
        # Repair may have left some of the columns here, and others elsewhere.
        if set(site.columns) <= set(held):
            yield from _wrong_numbers(segment, site)


def _wrong_numbers(segment: Segment, site: SparseSite) -> Iterator[str]:
    position, index, value = (segment.values(column, 0, segment.info.rows)[:, 0] for column in site.columns)
    lengths = np.diff(segment.row_offset)
    tokens = np.repeat(segment.prompts.lengths, lengths)
    if ((position < 0) | (position >= tokens)).any():
        yield f"{site.columns[0]}: a position outside its prompt"
    if site.size > LARGEST or ((index < 0) | (index >= site.size)).any():
        yield f"{site.columns[1]}: an index outside of {site.size}"
    order = (position.astype(np.int64) << 32) + index
    first = np.zeros(len(order), bool)
    first[segment.row_offset[:-1][lengths > 0]] = True
    if (order[1:] <= order[:-1])[~first[1:]].any():
        yield f"{site.name}: numbers of a prompt are not ordered by position and index"
    if (value == 0).any():
        yield f"{site.columns[2]}: a zero, which is not to be stored"
