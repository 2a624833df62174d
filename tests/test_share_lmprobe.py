"""lmprobe reads what is pushed: every vector is the stored one, and so are labels and numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from share_helpers import (
    MODEL,
    fill_logits,
    fill_perplexity,
    fill_pooled,
    fill_tokens,
    length,
    new_space,
    new_store,
    rows,
    text,
)

pytestmark = pytest.mark.slow
N = range(20)
TEXTS = [text(i) for i in N]
HERE = Path(__file__).parent


def read(python, hub, folder, repo):
    """What lmprobe says of a dataset, and the arrays it reads."""
    (folder / "prompts.json").write_text(json.dumps(TEXTS), "utf-8")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
    variables |= {**hub.environment(folder / "hf"), "LMPROBE_CACHE_DIR": str(folder / "lmprobe")}
    ran = subprocess.run(
        [python, HERE / "peers" / "lmprobe_reads.py", repo, folder / "prompts.json", folder / "out.npz"],
        env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1]), np.load(folder / "out.npz")


@pytest.mark.parametrize("form", ["pooled", "full"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("limit", [100, 2**30])
def test_every_vector(lmprobe, hub, client, tmp_path, form, dtype, limit):
    store = new_store(tmp_path)
    space = new_space(store)
    sites = ("resid_post.0", "resid_post.1", "attn_out.1", "final_norm")
    if form == "full":
        fill_tokens(store, space, N, sites, dtype=dtype)
    else:
        fill_pooled(store, space, N, sites, dtype=dtype)
    fill_logits(store, space, N)
    fill_perplexity(store, space, N)
    repo = f"org/{form}-{dtype}-{limit}"
    code = "import actcache as ac\nac.push_dataset(repo, model, prompts, store=store, **options)"
    options = {"shard_max_bytes": limit, "labels": list(N), "metadata": [{"score": i / 4, "flag": True} for i in N]}
    options["shuffle"] = limit != 100
    client.run(code, repo=repo, model=MODEL, prompts=TEXTS, store=str(tmp_path / "store"), options=options)

    told, found = read(lmprobe, hub, tmp_path, repo)
    pinned = re.search(r"^LMPROBE \?= lmprobe==(\S+)", (HERE.parent / "Makefile").read_text(), re.MULTILINE)
    assert pinned and told["lmprobe"] == pinned[1]
    assert (told["model"], told["layers"], told["prompts"], told["version"]) == (MODEL, [0, 1], 20, "2.0")
    assert sorted(told["labels"]) == list(N)
    for layer in (0, 1):
        wanted = np.stack([rows(i, f"resid_post.{layer}")[-1].astype(dtype).astype(np.float32) for i in N])
        assert np.array_equal(found[f"asked.{layer}"], wanted)
        # All of them come in the order of the index, which the labels follow.
        assert np.array_equal(found[f"all.{layer}"], wanted[told["labels"]])
        tensor = found[f"tensor.hidden.layer_{layer}"]
        assert len(tensor) == (sum(map(length, N)) if form == "full" else len(N))
    assert found["tensor.logits_topk.values"].shape == (20, 3)
    if form == "full":
        assert told["raw_layers"] == [[0, 1]] * 20 and told["tokens"] == [length(i) for i in N]
    else:
        assert told["pooled"] == [{"last_token": [0, 1]}] * 20
