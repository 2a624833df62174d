"""Rows of prompts that lie elsewhere in memory of their own, copied while the rest is still on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actcache.store.checks import BlockChecks
from actcache.store.delivering import Deliveries
from actcache.store.keys import Ints
from actcache.store.lazy import once
from actcache.store.mapping import Segment
from actcache.store.placement import Placement
from actcache.store.places import Part
from actcache.store.receiving import Rows, Taker

T = TypeVar("T")


def copied_rows(placement: Placement, index: Ints | None, made: Callable[[list[npt.NDArray[Any]]], list[T]]) -> list[T]:
    """`Placement.all_rows` of the prompts `index` (None: all) at its only site: what is `made` of arrays ``[T, D]``.

    These belong to the caller. `made` gives for each of its arrays what shares the memory, in which the numbers may be
    still to come. Raises as `all_rows` does.
    """
    (site,) = placement.sites
    chosen = placement._require(index)

    @once
    def held() -> list[tuple[Part, Segment, Ints, Ints, Ints]]:
        """What lies where, which is looked for while it is on its way."""
        found = []
        for part, segment, members in placement._places.by_segment(chosen):
            prompts = part.prompt[chosen[members]]
            found.append((part, segment, members, segment.row_offset[prompts], segment.row_offset[prompts + 1]))
        return found

    rows: list[npt.NDArray[Any]] = [np.empty(0)] * len(chosen)
    answer: list[Any] = [None] * len(chosen)

    def deliveries() -> Deliveries:
        found: dict[BlockChecks, Taker] = {}
        for _, segment, members, starts, stops in held():
            tensors = segment.parts(site)
            # Rows with scales are put together of both; where there are too few, whoever reads them says so.
            if len(tensors) == 1 and starts.min() >= 0 and stops.max() <= segment.info.rows:
                found[segment.checks] = Rows(tensors[0], starts, stops, members, rows)
        answer[:] = made(rows)
        return found

    received = placement._bring(placement._wanted(chosen), deliveries)
    for part, segment, members, starts, stops in held():
        here = received.get(segment.checks)
        if here is not None and here.targets is not None:
            continue
        (read,) = placement._readers(part, segment, starts, stops, received)
        own = made([np.array(read(start, stop)) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)])
        for at, one in zip(members.tolist(), own, strict=True):
            answer[at] = one
    return answer
