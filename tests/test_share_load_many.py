"""Loading many prompts: looked at some at a time, what comes out is the same, and nothing of each is kept in memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import actcache as ac
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store
from share_helpers import MODEL, new_space, text
from share_many_helpers import N, filled


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_are_those_of_the_prompts_however_many_are_looked_at(tmp_path, monkeypatch, whole, shuffle):
    store, space = filled(tmp_path, whole)
    pooling = None if whole else "last_token"
    monkeypatch.setattr("actcache.share.shards._LOOKED_AT", 2)
    monkeypatch.setattr("actcache.share.rows._AT_ONCE", 3)
    monkeypatch.setattr("actcache.share.load._LARGE", 0)
    for name in ("_SMALL", "_FEW_BYTES"):
        monkeypatch.setattr(f"actcache.store.spill.{name}", 0)
    with store:
        for name, prompts in (("all", None), ("some", [text(i) for i in N])):
            ac.push_dataset(tmp_path / name, MODEL, prompts, store=store, shuffle=shuffle, shard_max_bytes=150)
        wanted = store.read(space, [text(i) for i in N], "resid_post.1", **({} if whole else {"pooling": "last_token"}))
    listed = ac.load_activation_dataset(tmp_path / "some")[0]["hidden.layer_1"].numpy()
    assert len(listed) == (sum(len(rows) for rows in wanted) if whole else len(wanted))
    for name in ("all", "some"):
        for order in (list(N), [*N[5:], 7, *N[:5]], [22, 0, 0, 3]):
            prompts = [text(i) for i in order]
            found = ac.load_activations(tmp_path / name, prompts=prompts, layers=[1], pooling=pooling)
            for i, rows in zip(order, found[1], strict=True):
                np.testing.assert_array_equal(rows, wanted[i].numpy())
    # In the order of the index, which is that of the files unless it was shuffled.
    texts = [row["text"] for row in _index(tmp_path / "some")]
    assert (texts == [text(i) for i in N]) is not shuffle
    found = ac.load_activations(tmp_path / "some", layers=[1], pooling=pooling)
    for prompt, rows in zip(texts, found[1], strict=True):
        np.testing.assert_array_equal(rows, wanted[[text(i) for i in N].index(prompt)].numpy())


def _index(folder):
    import pyarrow.parquet as pq

    return pq.read_table(folder / "index").to_pylist()


def test_who_has_no_home_can_load(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("could not determine the home directory")

    store, space = filled(tmp_path, False)
    with store:
        ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
        wanted = store.read(space, [text(3)], "resid_post.0", pooling="last_token")[0].numpy()
    monkeypatch.setattr("actcache.share.load.user_cache", none)
    monkeypatch.setattr("actcache.store.spill._SMALL", 0)
    found = ac.load_activations(tmp_path / "set", prompts=[text(3)], layers=0)
    np.testing.assert_array_equal(found[0][0], wanted)
    assert len(ac.load_activation_dataset(tmp_path / "set")[0]["hidden.layer_0"]) == 35


_LOAD = """
import sys
import actcache as ac
from actcache.testing.memory import growth

ac.load_activations(sys.argv[1], show_progress=False)
with growth(0.001) as found:
    given = ac.load_activations(sys.argv[2], show_progress=False)
print((found.most - given[0].nbytes) / 2**20)
"""


@pytest.mark.slow
def test_memory_of_a_load_does_not_follow_the_prompts(tmp_path):
    """Neither what says where their rows are, nor the order in which they come."""

    def peak(count):
        command = [sys.executable, "-c", _LOAD, made(100), made(count)]
        state = {"XDG_CACHE_HOME": str(tmp_path / "state")}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=os.environ | state)
        return float(ran.stdout.splitlines()[-1])

    def made(count):
        folder = tmp_path / str(count)
        if folder.exists():
            return folder / "set"
        with Store(folder / "store", index_dir=folder / "index") as store:
            space = new_space(store)
            for start in range(0, count, 5000):
                numbers = range(start, min(start + 5000, count))
                own = PromptTable.build([[n, 5] for n in numbers], [f"prompt {n}" for n in numbers], text_context="a")
                rows = np.ones((len(numbers), 8), np.float32)
                store.append(space, Records.pooled(own, "last_token", {"resid_post.0": rows}))
            ac.push_dataset(folder / "set", MODEL, None, store=store)
        return folder / "set"

    # 40 bytes each would be 8 MB.
    assert peak(220_000) - peak(20_000) < 6
