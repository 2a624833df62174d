"""Pushes to the Hub by its real client, and what of them has arrived there."""

from __future__ import annotations

import numpy as np

from hub_helpers import downloaded
from share_helpers import MODEL, TEXTS, N, fill_pooled, has_right_digests, new_space, new_store, rows, text

PUSH = "import actcache as ac\nac.push_dataset(repo, model, prompts, store=store, **options)"
# 7 shards of 3 prompts at each of 2 layers.
SMALL = {"shard_max_bytes": 100}
FILES = 14


def filled(folder, seed):
    """A folder with a store of vectors of that seed."""
    store = new_store(folder)
    fill_pooled(store, new_space(store), N, seed=seed)
    return folder


def push(client, home, repo, prompts=TEXTS, model=MODEL, **options):
    return client.run(PUSH, repo=repo, model=model, prompts=prompts, store=str(home / "store"), options=options)


def published(hub, repo, folder):
    """The dataset as it is on the Hub."""
    found = downloaded(hub, repo, folder)
    assert found.ours["files"].keys() == {p for p in found.files if p.endswith(".safetensors")}
    assert has_right_digests(found)
    return found


def holds(found, seed, numbers=N):
    for i in numbers:
        for layer in (0, 1):
            wanted = rows(i, f"resid_post.{layer}", seed=seed)[-1]
            assert np.array_equal(found.row(text(i), layer=layer).numpy(), wanted), (i, layer)
    return True


def staged(home):
    return sorted(p.name for p in (home / "store" / "pushing").rglob("*.safetensors"))
