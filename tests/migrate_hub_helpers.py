"""Datasets that the Hub's real client migrates and upgrades, and whether the Hub has them as they should be."""

from __future__ import annotations

import time

import numpy as np

from hub_helpers import downloaded
from made_datasets import INDEX
from share_helpers import BLOCKS, has_right_digests

CODE = """
import actcache as ac
getattr(ac, f)(repo, **options)
"""
# 3 shards of last tokens, and some of others, at each of 3 layers.
SMALL = {"shard_max_bytes": 100}


def publish(hub, made):
    name = f"user/set{time.monotonic_ns()}"
    files = {p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()}
    hub.create(name, kind="dataset").commit(
        {**files, "mine.txt": b"keep me", "README.md": b"# Mine\n\n## Contents\n\nstale lines\n"}
    )
    return name


def do(client, repo, f="migrate_dataset", **options):
    return client.run(CODE, f=f, repo=repo, options=options)


def is_split(hub, repo, made, folder):
    """Whether the Hub has the dataset as it should be: all of its vectors, read with its format alone."""
    found = downloaded(hub, repo, folder)
    assert found.metadata["format_version"] == "2.0" and found.tensors["hidden_layers"]["last_token_shards"] == 3
    assert [row["text"] for row in found.index] == made.texts
    assert [row["label"] for row in found.index] == made.columns["label"]
    for text, wanted in zip(made.texts, made.vectors, strict=True):
        for i, layer in enumerate(made.layers):
            assert np.array_equal(found.tokens(text, layer=layer).numpy(), wanted[:, i])
            assert np.array_equal(found.row(text, layer=layer).numpy(), wanted[-1, i])
    kept = {"mine.txt", "README.md", INDEX, ".gitattributes", "tensors/logits_topk_000.safetensors", BLOCKS}
    of_layers = {path for path in found.files if "hidden_layer" in path}
    assert found.files - of_layers <= kept and has_right_digests(found)
    assert len(of_layers) == 3 * len(found.tensors["hidden_layers"]["shards"])
    assert (folder / "mine.txt").read_bytes() == b"keep me"
    logits = "tensors/logits_topk_000.safetensors"
    assert (folder / logits).read_bytes() == (made.folder / logits).read_bytes()
    return True


def is_as_before(hub, repo, made, head):
    """Whether nothing of the dataset has changed."""
    repository = hub.dataset(repo)
    assert repository.refs["main"] == head
    return all(
        repository.read(p.relative_to(made.folder).as_posix()) == p.read_bytes()
        for p in made.folder.rglob("*")
        if p.is_file()
    )


def left(client):
    """What lies in the client's staging folder."""
    return sorted(p.name for p in client.home.rglob("migrating/**/*") if p.is_file())
