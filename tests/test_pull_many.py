"""Datasets of many prompts are pulled in steps: what is stored is the same, and memory does not follow their number."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError
from actcache.share import fetching, pull
from actcache.share.index import Index
from actcache.share.source import open_source
from actcache.share.values import codes_in
from actcache.store import given, merging
from actcache.store.prompts import PromptTable, gather_ragged
from actcache.store.records import DERIVED, LABEL, METADATA, TOKENS, Records
from actcache.store.store import Store
from made_datasets import make
from share_helpers import INDEX, MODEL, fill_pooled, new_space, new_store, rows, text
from share_many_helpers import CHATS, IDS, N, filled

_CONSTANTS = {
    "actcache.share.different.AT_ONCE": 3, "actcache.share.index_prompts.AT_ONCE": 3,
    "actcache.share.prompts.AT_ONCE": 2,
    "actcache.share.pull._AT_ONCE": 5, "actcache.share.rows._AT_ONCE": 4, "actcache.store.prompts._GATHERED": 7,
    "actcache.store.keys.AT_ONCE": 4, "actcache.store.spill._SMALL": 0, "actcache.store.spill._FEW_BYTES": 0,
    "actcache.store.spill._AT_ONCE": 5, "actcache.store.merging._MOST_PROMPTS": 8,
}  # fmt: skip


@pytest.fixture
def few_at_once(monkeypatch):
    for name, value in _CONSTANTS.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def published(tmp_path):
    """A dataset with a prompt twice, of which two labels are said; chats, token ids, columns, some perplexities."""
    store, _ = filled(tmp_path, True)
    prompts = [*(text(i) for i in N), text(3), text(8), *CHATS, *IDS]
    numbers = [*N, 3, 8, *range(30, 41)]
    labels = [None if i == 5 else i % 4 for i in numbers]
    columns = {"half": [i / 2 for i in numbers], "who": ["é" * (i % 3) for i in numbers]}
    with store:
        ac.push_dataset(tmp_path / "set", MODEL, prompts, labels=labels, metadata=columns, store=store)
    path = tmp_path / "set" / INDEX
    index = pq.read_table(path)
    twice = [i for i, known in enumerate(index["text"].to_pylist()) if known == text(8)]
    said = index["label"].to_pylist()
    said[twice[1]] = 7
    at = index.column_names.index("label")
    pq.write_table(index.set_column(at, index.schema.field(at), pa.array(said, index.schema.field(at).type)), path)
    return tmp_path / "set"


def what_is_stored(store, folder, **options):
    """What a store has of a dataset, by prompt."""
    count = ac.pull_dataset(folder, store=store, **options)
    fetching._open.clear()
    (space,) = store.spaces()
    table = store.prompts(space)
    assert len(table) == count
    shown = [t if t is not None else table.tokens(i).tobytes() for i, t in enumerate(table.texts)]
    said = [given.read(store, space.space, kind, table) for kind in (LABEL, METADATA)]
    nll = store.locate(space.space, table=table, sites=["token_nll"], layout=TOKENS)
    perplexity = store.locate(space.space, table=table, sites=["perplexity"], layout=DERIVED)
    vectors = store.read(space, table, "resid_post.1")
    found = {}
    for i, prompt in enumerate(shown):
        rows = [bytes(p.all_rows([i])[0][0]) if p.found[i] else None for p in (nll, perplexity)]
        found[prompt] = table.tokens(i).tobytes(), said[0][i], said[1][i], *rows, vectors[i].numpy().tobytes()
    return found


def test_in_steps_as_at_once(tmp_path, published, request):
    with new_store(tmp_path / "a") as store:
        wanted = what_is_stored(store, published)
    assert len(wanted) == 23 + 5 + 6
    # Of the third prompt the two labels agree, of the eighth they do not.
    assert [wanted[text(i)][1] for i in (3, 5, 6, 8)] == [3, None, 2, None]
    assert wanted[text(6)][2]["half"] == 3.0 and wanted[text(6)][3] is not None and wanted[text(20)][3] is None
    request.getfixturevalue("few_at_once")
    for options in ({}, {"materialize": True}):
        with new_store(tmp_path / f"b{len(options)}") as store:
            assert what_is_stored(store, published, **options) == wanted
            # And nothing is stored again.
            assert what_is_stored(store, published, **options) == wanted
    some = [text(20), text(3), text(8), CHATS[2], IDS[4]]
    with new_store(tmp_path / "c") as store:
        found = what_is_stored(store, published, target_prompts=some)
    assert len(found) == len(some) and found.items() <= wanted.items()


@pytest.mark.usefixtures("few_at_once")
def test_what_is_loaded_in_steps(published):
    shown = ac.fetch_dataset_metadata(published)
    wanted = [*(text(i) for i in (*N, 3, 8)), *CHATS, *IDS]
    assert len(shown.prompts) == len(wanted) and all(prompt in shown.prompts for prompt in wanted)
    with pytest.raises(DatasetFormatError, match=r"'prompt 8 ééé' with two labels, (7|0) in row \d+ and (7|0) in row"):
        ac.load_activations(published, return_labels=True)
    some = [text(3), IDS[1], CHATS[1], text(3)]
    values, labels = ac.load_activations(published, prompts=some, return_labels=True)
    assert labels.tolist() == [3, 0, 3, 3] and np.array_equal(values[0][0], values[0][3])


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize(("column", "wrong"), [("token_ids", [[-1]]), ("text", [None]), ("label", [0.5])])
def test_nothing_is_stored_of_an_index_that_is_wrong_at_its_end(tmp_path, column, wrong):
    made = make(tmp_path / "set")
    right = {"token_ids": [[1]] * 10, "text": list("abcdefghij"), "label": [0.5] * 10}
    made.columns[column] = right[column] + wrong
    made.write()
    with new_store(tmp_path) as store:
        with pytest.raises(DatasetFormatError):
            ac.pull_dataset(made.folder, store=store)
        assert store.spaces() == []


def test_pieces_are_joined_in_steps(monkeypatch):
    rng = np.random.default_rng(0)
    offset = np.concatenate([[0], np.cumsum(rng.integers(0, 9, 50))])
    flat = rng.integers(0, 99, offset[-1])
    for most in (1, 10, 1000):
        monkeypatch.setattr("actcache.store.prompts._GATHERED", most)
        for index in (rng.integers(0, 50, 70), np.arange(50), np.arange(3, 9), np.zeros(0, np.int64), np.array([4, 4])):
            found, ends = gather_ragged(flat, offset, index)
            parts = [flat[offset[i] : offset[i + 1]] for i in index.tolist()]
            assert found.tolist() == [x for part in parts for x in part]
            assert np.diff(ends).tolist() == [len(part) for part in parts]


def test_merged_segments_have_so_many_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_MOST_PROMPTS", 10)
    with new_store(tmp_path) as store:
        space = new_space(store)
        for start in range(0, 28, 4):
            table = PromptTable.build([[n] for n in range(start, start + 4)])
            store.append(space, Records.pooled(table, "mean", {"x": np.full((4, 2), start, np.float32)}))
        store.compact()
        sizes = sorted(info.prompts for _, info in store._index(space).segments())
        assert sizes == [4, 8, 8, 8]
        assert len(store.prompts(space)) == 28


def test_texts_with_the_same_token_ids_in_different_steps(tmp_path, request):
    """As of a tokenizer that leaves out case: each text is found by itself, however the dataset was pulled."""
    titles, lower = ([f"{first}ext {i}" for i in range(12)] for first in "Tt")
    texts = [*titles, *lower]
    vectors = np.repeat(np.arange(12, dtype=np.float32), 4).reshape(12, 4)
    with new_store(tmp_path) as store:
        space = new_space(store)
        own = PromptTable.build([[i, 5] for i in range(12)] * 2, texts, text_context="uncased")
        values = {"resid_post.0": np.concatenate([vectors, vectors])}
        store.append(space, Records.pooled(own, "last_token", values))
        ac.push_dataset(tmp_path / "set", MODEL, texts, store=store)
    request.getfixturevalue("few_at_once")

    def found(store, prompts):
        (space,) = store.spaces()
        return store.read(space, prompts, "resid_post.0", pooling="last_token").numpy()

    with new_store(tmp_path / "whole") as store:
        assert ac.pull_dataset(tmp_path / "set", store=store) == 24
        (space,) = store.spaces()
        assert store.contains(space, texts, "resid_post.0", pooling="last_token").all()
        # What is here of the first is not here of the second, which has another text.
        assert np.array_equal(found(store, titles[:1]), vectors[:1])
        assert np.array_equal(found(store, lower[:1]), vectors[:1])
        assert np.array_equal(found(store, [lower[3], titles[3]]), vectors[[3, 3]])
    with new_store(tmp_path / "materialized") as store:
        ac.pull_dataset(tmp_path / "set", store=store, materialize=True)
        (tmp_path / "set").rename(tmp_path / "gone")
        assert np.array_equal(found(store, texts), np.concatenate([vectors, vectors]))
        (tmp_path / "gone").rename(tmp_path / "set")
    with new_store(tmp_path / "one by one") as store:
        for chosen in (titles[1], lower[1]):
            assert ac.pull_dataset(tmp_path / "set", store=store, target_prompts=[chosen]) == 1
        (space,) = store.spaces()
        assert store.contains(space, [titles[1], lower[1]], "resid_post.0", pooling="last_token").all()


def test_no_step_encodes_the_texts_of_the_steps_before(tmp_path):
    """Rows that are read out of the middle of a file come with the texts of all rows before them."""
    made = make(tmp_path / "set", n=60)
    made.columns["text"] = [None if i % 7 == 6 else f"text {i % 40}" for i in range(60)]
    made.write()
    index = Index(open_source(made.folder))
    known = []
    for batch in index.batches(["text"], most_rows=5):
        codes, texts = codes_in(index, "text", batch["text"])
        assert len(texts) <= 5 and len(set(texts)) == len(texts)
        known += [None if code < 0 else texts[code] for code in codes.tolist()]
    assert known == made.columns["text"]


def test_prompts_with_little_each_are_fetched_some_at_a_time(tmp_path, monkeypatch):
    """Else what is known of them would be in memory at once, however small their vectors are."""
    numbers, fetch, asked = range(300), pull.fetch, []
    monkeypatch.setattr(pull, "_STEP_BYTES", 50 * 8192)
    monkeypatch.setattr(pull, "fetch", lambda *a, **how: (asked.append(len(a[2])), fetch(*a, **how))[1])
    with new_store(tmp_path) as store:
        fill_pooled(store, new_space(store), numbers)
        ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
    with new_store(tmp_path / "other") as store:
        assert ac.pull_dataset(tmp_path / "set", store=store, materialize=True) == 300
        (space,) = store.spaces()
        found = store.read(space, [text(i) for i in numbers], "resid_post.1", pooling="last_token").numpy()
    assert sum(asked) == 300 and max(asked) <= 100
    assert np.array_equal(found, np.stack([rows(i, "resid_post.1")[-1] for i in numbers]))


_PULL = """
import sys
from pathlib import Path
import actcache as ac
from actcache.testing.memory import growth

def pull(data, target):
    with ac.Store(target / "store", index_dir=target / "index") as store:
        ac.pull_dataset(data, store=store)

warm, data, target = map(Path, sys.argv[1:])
pull(warm, target / "warm")
with growth(0.001) as found:
    pull(data, target / "whole")
print(found.most / 2**20)
"""


@pytest.mark.slow
def test_memory_of_a_pull_does_not_follow_the_prompts(tmp_path):
    def made(count):
        folder = tmp_path / f"made{count}"
        with Store(folder / "store", index_dir=folder / "index") as store:
            space = new_space(store)
            for start in range(0, count, 5000):
                numbers = range(start, min(start + 5000, count))
                texts = [f"prompt {n} of many" for n in numbers]
                own = PromptTable.build([[n, 5] for n in numbers], texts, text_context="a")
                rows = np.ones((len(numbers), 8), np.float32)
                store.append(space, Records.pooled(own, "last_token", {"resid_post.0": rows}))
            prompts = [f"prompt {n} of many" for n in range(count)]
            ac.push_dataset(folder / "set", MODEL, prompts, labels=[n % 3 for n in range(count)], store=store)
        return folder / "set"

    def peak(count):
        command = [sys.executable, "-c", _PULL, warm, made(count), tmp_path / str(count)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=os.environ)
        return float(ran.stdout.splitlines()[-1])

    warm = made(100)
    # 120 bytes each would be 12 MB; it took 700 of each.
    assert peak(120_000) - peak(20_000) < 12
