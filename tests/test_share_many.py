"""Many prompts: looked for, read and written some at a time, what comes out is the same."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import actcache as ac
from actcache.errors import NotCachedError, OptionError
from actcache.share.stored_prompts import StoredPrompts
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.spill import Spill
from actcache.store.store import Store
from share_helpers import MODEL, Published, fill_pooled, new_space, new_store, text
from share_many_helpers import CHATS, IDS, N, filled


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr("actcache.store.asking._AT_ONCE", 4)
    monkeypatch.setattr("actcache.share.stored_prompts._AT_ONCE", 3)
    monkeypatch.setattr("actcache.share.contents._AT_ONCE", 2)
    monkeypatch.setattr("actcache.share.index_file._ROWS", 5)
    monkeypatch.setattr("actcache.share.selection._AT_ONCE", 3)
    monkeypatch.setattr("actcache.share.shard_files._AT_ONCE", 7)
    monkeypatch.setattr("actcache.share.stored_rows._MOST_ROWS", 2)
    monkeypatch.setattr("actcache.store.keys.AT_ONCE", 4)
    monkeypatch.setattr("actcache.store.by_segment._AT_ONCE", 5)
    monkeypatch.setattr("actcache.store.reports._AT_ONCE", 6)
    monkeypatch.setattr("actcache.store.saved_keys.AT_ONCE", 4)
    for name in ("_SMALL", "_FEW_BYTES", "_AT_ONCE"):
        monkeypatch.setattr(f"actcache.store.spill.{name}", int(name == "_AT_ONCE") * 5)


def published(store, folder, prompts, **options):
    ac.push_dataset(folder / "set", MODEL, prompts, store=store, **options)
    found = Published(folder / "set")
    return found.table, {path: (found.folder / path).read_bytes() for path in found.ours["files"]}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_dataset_is_the_same(tmp_path, request, whole, given):
    store, _ = filled(tmp_path, whole)
    order = np.random.default_rng(1).permutation(23).tolist()
    prompts = [*(text(i) for i in order), text(3), text(3), *CHATS, "never seen", *IDS[:3]] if given else None
    with store:
        plain = published(store, tmp_path / "a", prompts, shard_max_bytes=100)
        request.getfixturevalue("few_at_once")
        found = published(store, tmp_path / "b", prompts, shard_max_bytes=100)
    # The order in which a group of rows is written is nobody's business.
    assert found[0].equals(plain[0]) and found[1] == plain[1]
    assert len(found[0]) == (23 + 2 + 5 + 3 if given else 23 + 5 + 6 + 1)


@pytest.mark.usefixtures("few_at_once")
def test_every_prompt_once(tmp_path):
    store, space = filled(tmp_path, True)
    with store:
        found = StoredPrompts(store.everything(space), Spill(None))
        texts = [*(text(i) for i in N), "other"]
        assert sorted(found[:], key=str) == sorted([*texts, *CHATS, *IDS], key=str)
        assert [found[i] for i in range(len(found))] == found[:] == list(found)
        assert found[2:7] == found[:][2:7] and found[-1] == found[:][-1]
        store.invalidate(space, [text(5), IDS[0]])
        assert len(StoredPrompts(store.everything(space), Spill(None))) == len(found) - 2


@pytest.mark.usefixtures("few_at_once")
def test_prompts_in_parts_are_found_where_they_are(tmp_path):
    store, space = filled(tmp_path, False)
    prompts = ["nothing", *(text(i) for i in (*N, 7, 7, 0)), *IDS, "never", *CHATS, text(2), "other"]
    with store:
        sites = ["resid_post.0", "resid_post.1"]
        located = store.locate_sites(space, prompts, sites, "last_token")
        assert len(located.placements) <= 4, "of each kind one, however many prompts there are"
        there = np.array([p not in ("nothing", "never") for p in prompts])
        assert (located.found == there[:, None]).all() and ((located.owner >= 0) == there).all()
        for i in np.flatnonzero(there).tolist():
            placement = located.placements[located.owner[i]]
            wanted = store.read(space, [prompts[i]], "resid_post.1", pooling="last_token")[0].numpy()
            row = placement.of_site("resid_post.1").take(index=[located.local[i]])[0, 0]
            assert np.array_equal(row, wanted), prompts[i]


def test_prompts_are_not_read_one_by_one(tmp_path, monkeypatch):
    store, read, asked = new_store(tmp_path), Placement.prompts, []
    fill_pooled(store, new_space(store), range(60))
    monkeypatch.setattr(Placement, "prompts", lambda self, index=None: (asked.append(0), read(self, index))[1])
    with store:
        ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
    assert 0 < len(asked) < 30


def test_a_space_whose_prompts_are_gone(tmp_path):
    store = new_store(tmp_path)
    space = new_space(store)
    fill_pooled(store, space, [1])
    store.invalidate(space, [text(1)])
    with store, pytest.raises(NotCachedError):
        ac.push_dataset(tmp_path / "set", MODEL, None, store=store)


@pytest.mark.usefixtures("few_at_once")
def test_two_values_for_one_prompt_are_found_far_apart(tmp_path):
    store, _ = filled(tmp_path, False)
    prompts, labels = [text(i) for i in (*N, 3)], [*map(str, N), "x"]
    with store, pytest.raises(OptionError, match=r"prompts 3 and 23 are the same, and .*'label' is not: '3' and 'x'"):
        ac.push_dataset(tmp_path / "set", MODEL, prompts, labels=labels, store=store)


_PUSH = """
import sys
import actcache as ac
from actcache.testing.memory import growth

warm, store, target, model = sys.argv[1:]
ac.push_dataset(f"{target}/warm", model, None, store=warm)
with growth(0.001) as found:
    ac.push_dataset(f"{target}/set", model, None, store=store, stream=True)
print(found.most / 2**20)
"""


@pytest.mark.slow
def test_memory_of_a_push_does_not_follow_the_prompts(tmp_path):
    """Neither what says where they are, nor their keys, nor their order."""

    def made(folder, count):
        with Store(folder / "store", index_dir=folder / "index") as store:
            space = new_space(store)
            for start in range(0, count, 5000):
                numbers = range(start, min(start + 5000, count))
                own = PromptTable.build([[n, 5] for n in numbers], [f"prompt {n}" for n in numbers], text_context="a")
                rows = np.ones((len(numbers), 8), np.float32)
                store.append(space, Records.pooled(own, "last_token", {"resid_post.0": rows}))
        return folder / "store"

    def peak(count):
        folder = tmp_path / str(count)
        command = [sys.executable, "-c", _PUSH, warm, made(folder, count), folder, MODEL]
        state = {"XDG_CACHE_HOME": str(folder / "state")}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=os.environ | state)
        return float(ran.stdout.splitlines()[-1])

    warm = made(tmp_path / "warm", 100)
    # 40 bytes each would be 4 MB.
    assert peak(120_000) - peak(20_000) < 6
