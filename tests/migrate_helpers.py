"""What migrating and upgrading a dataset in a folder leaves of it."""

from __future__ import annotations

import os

import numpy as np

import actcache as ac
from actcache.share.migrate import Migration, Upgrade
from share_helpers import Published

SMALL = 100
POOLINGS = ("last_token", "first_token", "mean", "max", "min", None)
INFO = "lmprobe_info.json"
JOBS = {"migrate": (ac.migrate_dataset, Migration), "upgrade": (ac.upgrade_dataset_format, Upgrade)}


def contents(folder):
    """Every file below a folder, and where links lead."""
    return {
        p.relative_to(folder).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


def litter(folder):
    """What lies beside a folder."""
    return [p.name for p in folder.parent.iterdir() if p != folder]


def same_values(made):
    """Whether all vectors are read as they were put in, whatever is asked for."""
    for pooling in POOLINGS if made.version and made.hidden["storage"] == "full_sequence" else ("last_token",):
        found = ac.load_activations(made.folder, pooling=pooling, as_dict=False)
        for mine, wanted in zip(found, made.expected(pooling), strict=True):
            assert np.allclose(mine, wanted, rtol=1e-6) if pooling == "mean" else np.array_equal(mine, wanted), pooling
    some = [made.texts[i] for i in (7, 0, 10)]
    found = ac.load_activations(made.folder, prompts=some, layers=[5])[5]
    assert np.array_equal(found, np.stack([made.expected()[i][2] for i in (7, 0, 10)]))
    assert ac.fetch_dataset_metadata(made.folder).prompts == made.texts
    return True


def read_plainly(folder, made):
    """The same with nothing but the format: the places the index names, in the files the patterns name."""
    found = Published(folder)
    told = found.tensors["hidden_layers"]
    assert found.metadata["format_version"] == "2.0" and found.metadata["num_prompts"] == len(made.texts)
    for row, vectors in zip(found.index, made.vectors, strict=True):
        for i, layer in enumerate(made.layers):
            assert np.array_equal(found.row(row["text"], layer=layer).float().numpy(), vectors[-1, i].astype("f4"))
            if told["storage"] == "full_sequence":
                assert np.array_equal(
                    found.tokens(row["text"], layer=layer).float().numpy(), vectors[:, i].astype("f4")
                )
    return found
