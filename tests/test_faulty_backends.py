"""A store on a backend that goes wrong: what comes back is right, or an error that says so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import actcache as ac
from actcache.errors import ActCacheError
from actcache.store.store import Store
from actcache.testing import Fault, FaultyBackend

SPACE = ac.new_space("org/model", revision="r1")
SITES = [f"resid_post.{layer}" for layer in range(3)]
WIDTH = 64


def vector(number: int, site: str) -> torch.Tensor:
    """What a prompt has at a site: anyone can compute it again."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 * number + SITES.index(site)))


def write(store: Store, numbers: list[int]) -> None:
    rows = {site: [vector(n, site) for n in numbers] for site in SITES}
    store.write(SPACE, [f"prompt {n}" for n in numbers], rows, pooling="last_token")


def right(store: Store, numbers: list[int], site: str) -> bool:
    """Whether all are found; what is found is as it was written."""
    prompts = [f"prompt {n}" for n in numbers]
    found = store.read(SPACE, prompts, site, pooling="last_token")
    assert torch.equal(found, torch.stack([vector(n, site) for n in numbers]))
    return True


KINDS = ["error before", "error after", "short", "flipped", "missing", "stale"]


@pytest.mark.parametrize("kind", [*KINDS, "all"])
@pytest.mark.parametrize("seed", range(3))
def test_a_store_is_right_or_says_why_not(tmp_path: Path, kind: str, seed: int) -> None:
    chosen, place = random.Random(seed), ac.MemoryBackend()
    kinds = KINDS if kind == "all" else [kind]
    faults = [Fault(each, probability=0.25 / len(kinds) ** 0.7) for each in kinds]
    acknowledged: set[int] = set()
    backends = [FaultyBackend(place, faults, seed=seed + 100 * host) for host in range(2)]
    stores = [Store(backend, index_dir=tmp_path / f"host-{host}") for host, backend in enumerate(backends)]
    for turn in range(12):
        store = stores[turn % 2]
        numbers = list(range(10 * turn, 10 * turn + 10))
        try:
            write(store, numbers)
            store.close()
            acknowledged.update(numbers)
        except ActCacheError:
            pass
        asked = chosen.sample(sorted(acknowledged), min(len(acknowledged), 8))
        for reader in stores:
            try:
                if asked:
                    right(reader, asked, chosen.choice(SITES))
            except ActCacheError:
                pass
    assert acknowledged and any(backend.happened for backend in backends)
    for backend in backends:
        backend.faults.clear()
    for store in stores:
        store.refresh()
        store.close()
    fresh = Store(place, index_dir=tmp_path / "fresh")
    for site in SITES:
        assert right(fresh, sorted(acknowledged), site)
    assert fresh.verify().ok
