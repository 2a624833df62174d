"""What a warm-up would do, before it does it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.errors import DiskFullError
from actcache.model.host_memo import host_memo
from actcache.store.records import TOKENS
from actcache.wording import size

if TYPE_CHECKING:
    from actcache.extract.extractor import ActivationExtractor
    from actcache.extract.request import Request
    from actcache.model.source import ModelSource
    from actcache.store.store import Store


@dataclass(frozen=True)
class Plan:
    """What is cached, what is missing and what that will cost.

    Attributes:
        cached: prompts of the request that are stored already.
        missing: different prompts that must go through the model.
        tokens: tokens of the missing prompts.
        bytes_to_write: bytes of activations they will add to the store, with the scales of int8 and float8_e4m3 (which
            outlier rows may make more than can be foreseen).
        bytes_free: bytes free on the disk of the store; None where it is not on one of this host's.
        seconds: estimated time; from earlier runs of this model on this host, else from its size, and 0 where it runs
            elsewhere, of which nothing is known before.
        batching: why prompts of different lengths do not run together; empty where they do.
        bytes_limit: the size that the store keeps to; None where it has no limit.
    """

    cached: int
    missing: int
    tokens: int
    bytes_to_write: int
    bytes_free: int | None
    seconds: float
    batching: str = ""
    bytes_limit: int | None = None

    @property
    def over_limit(self) -> bool:
        """Whether `bytes_to_write` alone is more than the store's limit: a part is evicted when it has been written.

        What lies in a file beside activations is not counted.
        """
        return self.bytes_limit is not None and self.bytes_to_write > self.bytes_limit

    def require_room(self, place: Path | None) -> None:
        """Raise `DiskFullError` when `bytes_to_write` is more than is free."""
        if self.bytes_free is not None and self.bytes_to_write > self.bytes_free:
            raise DiskFullError(
                f"the activations need {size(self.bytes_to_write)} and {str(place)!r} has "
                f"{size(self.bytes_free)} free: make room, choose fewer layers or pooling, or another store."
            )


def plan_of(extractor: ActivationExtractor, store: Store, request: Request, layout: str, *, limit: int | None) -> Plan:
    """What filling `request` would cost, in a store that keeps to `limit` bytes."""
    import numpy as np

    from actcache.store.blocks import least_scales
    from actcache.store.dtypes import SCALED_DTYPES

    source = extractor.source
    tokens = nbytes = 0
    depth = share_of_blocks(source, extractor.sites)
    storage = store.dtype.value or source.dtype
    itemsize = {"float64": 8, "float32": 4, "int8": 1, "float8_e4m3": 1}.get(storage, 2)
    for (names, asked), members in request.missing.items():
        lengths = np.array([_tokens_of(request, i) for i in members], np.int64)
        count, width = int(lengths.sum()), sum(_widths(source, names))
        tokens += count
        rows = lengths if layout == TOKENS else np.ones_like(lengths)
        nbytes += int(rows.sum()) * itemsize * width
        nbytes += int(4 * width * least_scales(rows)) if storage in SCALED_DTYPES else 0
        nbytes += asked.nbytes(len(members), count, source.vocab_size or 0)
        depth = 1.0 if asked else depth
    seconds = 0.0
    if tokens:
        seconds = estimate_seconds(source, request.space, extractor.backend().device, tokens, depth=depth)
    policy = source.batch_policy()
    return Plan(
        cached=request.cached,
        missing=request.to_compute,
        tokens=tokens,
        bytes_to_write=nbytes,
        bytes_free=bytes_free(store.disk),
        bytes_limit=limit,
        seconds=seconds,
        batching="" if policy.lengths == "any" else policy.why,
    )


def _tokens_of(request: Request, i: int) -> int:
    ids = request.prompts.ids[i]
    assert ids is not None
    return len(ids)


def _widths(source: ModelSource, names: Iterable[str]) -> list[int]:
    from actcache.extract.inventory import width_of
    from actcache.model.sites import Site

    return [width_of(source, Site.parse(name)) for name in names]


def bytes_free(place: Path | None) -> int | None:
    """Free bytes of the disk that holds `place`, which need not exist yet; None for None."""
    if place is None:
        return None
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def remember_speed(space: str, device: str, tokens: int, seconds: float) -> None:
    """Note the measured speed of a run, for later estimates on this host."""
    if tokens >= 1_000 and seconds > 0:
        host_memo().put("tokens_per_second", f"{space}\0{device}", f"{tokens / seconds:.6g}")


def estimate_seconds(source: ModelSource, space: str, device: str, tokens: int, *, depth: float) -> float:
    """Seconds that `tokens` will take: by an earlier run's speed, else by 2 operations per weight and token.

    `depth` is the fraction of the blocks that runs.
    """
    known = host_memo().get("tokens_per_second", f"{space}\0{device}")
    if known is not None:
        return tokens / float(known)
    if device == "remote":
        return 0.0
    # Half of a matrix product's peak is what a whole forward pass reaches, roughly.
    return 2.0 * (source.weight_bytes / 4) * depth * tokens / (0.5 * _operations_per_second(device))


def _operations_per_second(device: str) -> float:
    import torch

    a = torch.ones(512, 512, device=device)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        b = a @ a
    float(b[0, 0])
    return 4 * 2 * 512.0**3 / max(1e-9, time.perf_counter() - start)


def share_of_blocks(source: ModelSource, sites: Iterable[str]) -> float:
    """The fraction of the blocks that runs for `sites`: those before the deepest, an encoder's before its decoder's."""
    from actcache.model.sites import Site

    before, start = {}, 0
    for stack in source.stacks:
        before[stack] = start
        start += source.depth(stack)
    deepest = 0
    for site in map(Site.parse, sites):
        if site.name == "logits":
            return 1.0
        blocks = source.depth(site.stack) if site.name == "final_norm" else (site.layer or 0) + 1
        deepest = max(deepest, before[site.stack] + blocks)
    return deepest / start
