"""Rows of prompts that lie elsewhere in memory of their own, copied while the rest is still on its way."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.checks import BlockChecks
from actcache.store.delivering import Deliveries
from actcache.store.keys import Ints
from actcache.store.placement import Placement
from actcache.store.receiving import Rows, Taker


def copied_rows(placement: Placement, index: Ints) -> list[npt.NDArray[Any]]:
    """`Placement.all_rows` of the prompts `index` at its only site, as arrays ``[T, D]`` that belong to the caller.

    Raises as that does.
    """
    (site,) = placement.sites
    chosen = placement._require(index)
    held = []
    for part, segment, members in placement._by_segment(chosen):
        prompts = part.prompt[chosen[members]]
        held.append((part, segment, members, segment.row_offset[prompts], segment.row_offset[prompts + 1]))
    rows: list[npt.NDArray[Any]] = [np.empty(0)] * len(chosen)

    def deliveries() -> Deliveries:
        found: dict[BlockChecks, Taker] = {}
        for _, segment, members, starts, stops in held:
            tensors = segment.parts(site)
            # Rows with scales are put together of both; where there are too few, whoever reads them says so.
            if len(tensors) == 1 and starts.min() >= 0 and stops.max() <= segment.info.rows:
                found[segment.checks] = Rows(tensors[0], starts, stops, members, rows)
        return found

    received = placement._bring(placement._wanted(chosen), deliveries)
    for part, segment, members, starts, stops in held:
        here = received.get(segment.checks)
        if here is not None and here.targets is not None:
            continue
        (read,) = placement._readers(part, segment, starts, stops, received)
        for at, start, stop in zip(members.tolist(), starts.tolist(), stops.tolist(), strict=True):
            rows[at] = np.array(read(start, stop))
    return rows
