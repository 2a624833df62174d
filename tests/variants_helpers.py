"""Spaces of variants of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import actcache as ac
from actcache.demo import model_path
from actcache.store.spaces import SpaceInfo
from actcache.store.store import Store

MODEL = str(model_path())
PROMPT = "The Eiffel Tower is in the city of"


def space(number: int, model: str = "org/m", **identity: Any) -> SpaceInfo:
    base = {"identity": 1, "weights": "files:aaaaaaaaaaaaaaaa", "dtype": "float32", "attn_implementation": "sdpa"}
    base |= {"quantization": None, "edits": []}
    whole = {**base, **identity}
    label = {"model_name": model, "revision": identity.get("revision", "r" * 40), "dtype": whole["dtype"]}
    return SpaceInfo(f"{number:08x}{0:024x}", whole, label, created_ns=number)


def two_variants(folder: Path) -> tuple[Store, dict[str, SpaceInfo]]:
    """One prompt in a float32 and a bfloat16 variant of other revisions, with other sites; the second is newer."""
    store = Store(folder, index_dir=folder / "index")
    spaces = {}
    for dtype, sites in (("float32", ["resid_post.10", "resid_post.9"]), ("bfloat16", ["mlp_out.3"])):
        one = ac.new_space("org/m", dtype=dtype, revision=f"{dtype}-revision")
        for texts in ([PROMPT], [f"{dtype} {i}" for i in range(len(sites))]):
            store.write(one, texts, {site: [np.ones((4, 8), np.float32)] * len(texts) for site in sites})
        spaces[dtype] = one
    return store, spaces
