"""Rows of prompts that lie elsewhere in memory of their own, copied while the rest is still on its way."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.store.delivering import Deliveries
from actcache.store.keys import Ints
from actcache.store.placement import Placement
from actcache.store.receiving import Targets


def copied_rows(placement: Placement, index: Ints) -> list[npt.NDArray[Any]]:
    """`Placement.all_rows` of the prompts `index` at its only site, as arrays ``[T, D]`` that belong to the caller.

    Raises as that does.
    """
    (site,) = placement.sites
    chosen = placement._require(index)
    held = []
    for part, segment, members in placement._by_segment(chosen):
        prompts = part.prompt[chosen[members]]
        held.append((part, segment, members.tolist(), segment.row_offset[prompts], segment.row_offset[prompts + 1]))
    raw: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(chosen)

    def deliveries() -> Deliveries:
        found = {}
        for _, segment, members, starts, stops in held:
            tensors = segment.parts(site)
            # Rows with scales are put together of both; where there are too few, whoever reads them says so.
            if len(tensors) == 1 and starts.min() >= 0 and stops.max() <= segment.info.rows:
                width = tensors[0].shape[1] * tensors[0].dtype.itemsize
                for at, size in zip(members, ((stops - starts) * width).tolist(), strict=True):
                    raw[at] = np.empty(size, np.uint8)
                outs = [raw[at] for at in members]
                found[segment.checks] = Targets((tensors[0].start + starts * width).tolist(), outs)
        return found

    received = placement._bring(placement._wanted(chosen), deliveries)
    rows: list[npt.NDArray[Any]] = [np.empty(0)] * len(chosen)
    for part, segment, members, starts, stops in held:
        here = received.get(segment.checks)
        if here is not None and here.targets is not None:
            tensor = segment.parts(site)[0]
            for at in members:
                rows[at] = raw[at].view(tensor.dtype).reshape(-1, tensor.shape[1])
            continue
        (read,) = placement._readers(part, segment, starts, stops, received)
        for at, start, stop in zip(members, starts.tolist(), stops.tolist(), strict=True):
            rows[at] = np.array(read(start, stop))
    return rows
