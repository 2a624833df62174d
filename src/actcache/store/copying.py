"""Rows of segments on their way into another one: as they are stored, never rounded a second time."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from actcache.store.casting import CastError, Piece
from actcache.store.dtypes import is_scaled
from actcache.store.keys import Ints
from actcache.store.mapping import Segment
from actcache.store.statistics import Moments, as_float, is_float
from actcache.store.writing import Column

Source = tuple[Segment, npt.NDArray[np.bool_]]
"""A segment, and which of its prompts are kept."""


def copied(
    sources: Sequence[Source], sites: Sequence[str], told: Container[str] = (), measured: Container[str] = ()
) -> tuple[list[Column], Ints]:
    """The columns of a segment that holds the kept prompts of `sources` at `sites`, and its `block_offset`.

    What storing changed at sites that are `told` is left out: another part of the same segments keeps it; and so are
    the moments, too, of sites that are `measured`: whoever writes them knows both. The sources
    agree in signature. Rows that shared a scale go on sharing it, however many of them are left: codes and scales are
    copied, so that what is read is the same bit for bit after any number of merges.
    """
    first = sources[0][0]
    chosen = [column for column in first.info.columns if column[0] in sites]
    scaled = any(is_scaled(code) for _, code, _ in chosen)
    blocks = [_block_of_rows(source) for source in sources] if scaled else []
    sizes = [np.diff(_edges(of_rows)) for of_rows in blocks if len(of_rows)]
    offset = np.zeros(1 + sum(map(len, sizes)), np.int64)
    if sizes:
        np.cumsum(np.concatenate(sizes), out=offset[1:])
    every = (_plain(sources, c[0]) if c[0] in measured else _pieces(sources, c[0], c[0] in told) for c in chosen)
    return [Column(site, code, dim, pieces) for (site, code, dim), pieces in zip(chosen, every, strict=True)], offset


def _block_of_rows(source: Source) -> Ints:
    """For each kept row the number of its block; nothing where there are no scales."""
    segment, keep = source
    if len(segment.block_offset) == 1:
        return np.empty(0, np.int64)
    blocks = np.repeat(np.arange(len(segment.block_offset) - 1), np.diff(segment.block_offset))
    return blocks if keep.all() else blocks[np.repeat(keep, np.diff(segment.row_offset))]


def _edges(blocks: Ints) -> Ints:
    return np.concatenate([[0], np.flatnonzero(np.diff(blocks)) + 1, [len(blocks)]])


def _plain(sources: Sequence[Source], site: str) -> Iterator[Piece]:
    """All rows of sources of which every prompt is kept, and nothing that is known of them."""
    return (Piece(segment.matrix(site), segment.scales(site), None, CastError()) for segment, _ in sources)


def _pieces(sources: Sequence[Source], site: str, told: bool) -> Iterator[Piece]:
    for segment, keep in sources:
        matrix, scales, offset = segment.matrix(site), segment.scales(site), segment.row_offset
        error = CastError() if told else segment.error(site)
        if keep.all():
            yield Piece(matrix, scales, segment.moments(site), error)
            continue
        if scales is not None:
            scales = scales[np.unique(_block_of_rows((segment, keep)))]
        change = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]])))
        for start, stop in offset[change].reshape(-1, 2).tolist():
            moments = None
            if is_float(segment.column(site)[0]):
                moments = Moments.empty(matrix.shape[1])
                moments.update(as_float(segment.values(site, start, stop)))
            yield Piece(matrix[start:stop], scales, moments, error)
            scales, error = None, type(error)()
