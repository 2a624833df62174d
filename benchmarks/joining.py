"""What joining the caches of many batches costs over one torch.cat of the same tensors.

    python benchmarks/joining.py [--rounds 31] [--json]

500 batches of 12 layers x [8, 1, 768] float32, one thread. Every candidate ends with all values read. The second table
doubles the number of batches: the time per batch may grow by the interval of noise, not with their number.

Both are measured twice, where the C library is glibc: with memory that the process has, and with memory that the system
has to give it first, page by page, which takes longer than to fill it. Without this it is chance which of them a run
meets: of eight runs of one candidate in a row, some were given no page and some 40,000.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import actcache as ac
from _measure import Row, compare, in_rounds, print_table

LAYERS = 12
BATCHES = 500
BOUND = 3.0
# Twice the batches may cost twice the time and this much more.
GROWTH = 2.6


# Of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def glibc() -> ctypes.CDLL | None:
    """The C library, when it is one whose memory can be held and given back."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def memories() -> dict[str, Callable[[str], object] | None]:
    """What to do before each timing, by what it gives."""
    library = glibc()
    if library is None:
        return {"memory as it comes": None}
    # Free memory stays with the process until it is given back.
    library.mallopt(_TRIM_THRESHOLD, -1)
    library.mallopt(_MMAP_MAX, 0)
    return {"memory the process has": None, "memory new to the process": lambda name: library.malloc_trim(0)}


def batches(count: int) -> list[ac.ActivationCache]:
    generator = torch.Generator().manual_seed(0)
    return [
        ac.ActivationCache({f"resid_post.{i}": torch.randn(8, 1, 768, generator=generator) for i in range(LAYERS)})
        for _ in range(count)
    ]


def by_cat(caches: list[ac.ActivationCache]) -> ac.ActivationCache:
    joined = ac.ActivationCache()
    for cache in caches:
        joined.cat(cache)
    return read(joined)


def deferred(caches: list[ac.ActivationCache]) -> ac.ActivationCache:
    joined = ac.ActivationCache()
    with joined.deferred_mode():
        for cache in caches:
            joined.cat(cache)
            # Reading inside the block costs no join.
            len(joined)
    return read(joined)


def concatenated(caches: list[ac.ActivationCache]) -> ac.ActivationCache:
    return read(ac.ActivationCache.concatenate(caches))


def read(cache: ac.ActivationCache) -> ac.ActivationCache:
    for value in cache.values():
        value.data_ptr()
    return cache


def tensors_only(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in parts]


WAYS: dict[str, Callable[[list[ac.ActivationCache]], ac.ActivationCache]] = {
    "cat, one by one": by_cat,
    "deferred": deferred,
    "concatenate": concatenated,
}


def against_one_cat(rounds: int, before: Callable[[str], object] | None) -> list[Row]:
    caches = batches(BATCHES)
    parts = [[cache[f"resid_post.{i}"] for cache in caches] for i in range(LAYERS)]
    for way in WAYS.values():
        assert all(torch.equal(way(caches)[f"resid_post.{i}"], torch.cat(parts[i])) for i in range(LAYERS))
    return compare(
        lambda: tensors_only(parts),
        {name: lambda way=way: way(caches) for name, way in WAYS.items()},  # type: ignore[misc]
        rounds,
        reference_name="one torch.cat",
        before=before,
    )


def twice_as_many(rounds: int, before: Callable[[str], object] | None) -> list[Row]:
    rows = []
    for name, way in WAYS.items():
        half, whole = batches(BATCHES // 2), batches(BATCHES)
        rows += compare(
            lambda way=way, half=half: way(half),  # type: ignore[misc]
            {f"{name}: {BATCHES} against {BATCHES // 2}": lambda way=way, whole=whole: way(whole)},  # type: ignore[misc]
            rounds,
            reference_name=f"{name}: {BATCHES // 2}",
            before=before,
        )[1:]
    return rows


def main() -> int:
    options = in_rounds(__doc__).parse_args()
    torch.set_num_threads(1)

    measured = {
        name: (against_one_cat(options.rounds, before), twice_as_many(options.rounds, before))
        for name, before in memories().items()
    }
    if options.json:
        found = {
            name: {"cost": [row.as_dict() for row in cost], "growth": [row.as_dict() for row in growth]}
            for name, (cost, growth) in measured.items()
        }
        print(json.dumps(found, indent=2))
        return 0
    nbytes = BATCHES * LAYERS * 8 * 768 * 4
    held = []
    for name, (cost, growth) in measured.items():
        title = f"{BATCHES} batches, {LAYERS} x [8, 1, 768], {name}"
        held += [
            print_table(title, cost, bounds=dict.fromkeys(WAYS, BOUND), nbytes=nbytes),
            print_table(f"twice as many batches, {name}", growth, bounds={row.name: GROWTH for row in growth}),
        ]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
