"""Rows that come from elsewhere straight to where they are wanted, while the rest is still on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.checks import BlockChecks
from actcache.store.gather import Piece
from actcache.store.receiving import Taker, Targets

Deliveries = Mapping[BlockChecks, Taker]


def deliveries(names: Sequence[str], pieces: Sequence[Piece], out: npt.NDArray[Any]) -> Deliveries:
    """Where in `out`, ``[n, 1, D]``, the bytes of objects that lie elsewhere go as they are.

    Nothing of an object of which some has to be put together in another way.
    """
    if out.shape[1] != 1 or not out.flags.c_contiguous or not out.size:
        return {}
    found: dict[BlockChecks, tuple[list[int], list[npt.NDArray[np.uint8]]]] = {}
    width = out.shape[2] * out.itemsize
    flat = out.reshape(-1).view(np.uint8)
    others = set()
    for piece in pieces:
        if piece.segment.source is None:
            continue
        tensors = piece.segment.parts(names[piece.columns[0]]) if _is_within(piece) and piece.straight else ()
        if len(tensors) != 1 or tensors[0].dtype != out.dtype or tensors[0].shape[1] != out.shape[2]:
            others.add(piece.segment.checks)
            continue
        start, place = tensors[0].start + int(piece.rows[0]) * width, int(piece.at[0]) * width
        size = len(piece.rows) * width
        starts, outs = found.setdefault(piece.segment.checks, ([], []))
        starts.append(start)
        outs.append(flat[place : place + size])
    return {checks: Targets(*targets) for checks, targets in found.items() if checks not in others}


def _is_within(piece: Piece) -> bool:
    """Whether the segment has all the rows; where it has not, whoever gathers them says so."""
    low, high = (piece.rows[0], piece.rows[-1]) if piece.straight else (piece.rows.min(), piece.rows.max())
    return int(low) >= 0 and int(high) < piece.segment.info.rows
