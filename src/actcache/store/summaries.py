"""Numbers of what is stored at each site: how many rows, how large they are, what storing them changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actcache.store.casting import CastError
from actcache.store.dtypes import FLOATING, name_of
from actcache.store.index import SpaceIndex
from actcache.store.records import PULLED
from actcache.store.reports import counted, statistics
from actcache.store.site_names import site_order

_NO_VECTORS = ("perplexity", "token_nll")


@dataclass(frozen=True)
class StoredAs:
    """What storing the rows of a site in one dtype changed, measured against the values that were given.

    Attributes:
        dtype: "float16", "int8", ...; as in `set_cache_dtype`.
        rows: how many rows were measured, those included that are gone by now.
        error_max: largest absolute error.
        error_relative: relative L2 error of all values together.
        cosine, cosine_min: mean and smallest cosine of a row with what is stored of it.
    """

    dtype: str
    rows: int
    error_max: float
    error_relative: float
    cosine: float
    cosine_min: float


@dataclass(frozen=True)
class SiteSummary:
    """What a space holds at one site in one layout.

    Attributes:
        layout: "tokens", or the pooling.
        rows: rows of live prompts, each prompt once: tokens, or prompts where they are pooled.
        width: numbers in a row.
        mean_norm: mean length of a row; None for integers, and for results whose rows are no vectors (perplexity).
        mean: length of the mean row; None as `mean_norm`.
        std: spread of a value, over all dimensions; None as `mean_norm`.
        size_bytes: bytes on disk, scales included.
        stored: one entry for each dtype in which rows are stored; empty for integers.
    """

    layout: str
    site: str
    rows: int
    width: int
    mean_norm: float | None
    mean: float | None
    std: float | None
    size_bytes: int
    stored: list[StoredAs]


def summarise(index: SpaceIndex) -> list[SiteSummary]:
    """A summary of every site of a space, layouts and sites in their order; reads no vectors of untouched segments."""
    index.refresh()
    errors: dict[tuple[str, str], dict[str, CastError]] = {}
    sizes: dict[tuple[str, str], int] = {}
    widths: dict[tuple[str, str], int] = {}
    for _, info, segment in index.open_all(lambda n, info: not index.is_remnant(n) and info.layout != PULLED):
        for site, code, width in info.columns:
            key = info.layout, site
            errors.setdefault(key, {}).setdefault(name_of(code), CastError()).add(segment.error(site))
            sizes[key] = sizes.get(key, 0) + sum(t.nbytes for t in segment.parts(site))
            widths[key] = width
    return [_summary(index, key, sizes[key], widths[key], errors[key]) for key in sorted(errors, key=_order)]


def _order(key: tuple[str, str]) -> tuple[str, str]:
    return key[0], site_order(key[1])


def _summary(
    index: SpaceIndex, key: tuple[str, str], size: int, width: int, errors: dict[str, CastError]
) -> SiteSummary:
    layout, site = key
    stored = [StoredAs(name, e.rows, e.max, e.relative, e.cosine, e.cosine_min) for name, e in sorted(errors.items())]
    floating = any(name in FLOATING for name in errors)
    if not floating or site in _NO_VECTORS:
        rows = sum(int(np.diff(segment.row_offset)[counts].sum()) for segment, counts in counted(index, site, layout))
        return SiteSummary(layout, site, rows, width, None, None, None, size, stored if floating else [])
    moments = statistics(index, site, layout)
    with np.errstate(all="ignore"):
        mean = float(np.linalg.norm(moments.mean))
        std = float(np.sqrt(moments.variance.mean())) if width else 0.0
    return SiteSummary(layout, site, moments.count, width, moments.mean_norm, mean, std, size, stored)
