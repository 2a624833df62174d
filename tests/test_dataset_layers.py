"""Which layers of a dataset are meant, and what is said of what it has, and has not."""

from __future__ import annotations

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetLayerError, NotCachedError, OptionError
from made_datasets import make
from share_helpers import MODEL, fill_perplexity, fill_pooled, new_space, new_store, text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("layers") / "set")


def readers(made, tmp_path):
    return [
        lambda layers: ac.load_activations(made.folder, layers=layers),
        lambda layers: ac.load_activation_dataset(made.folder, layers=layers)[0],
        lambda layers: ac.pull_dataset(made.folder, layers=layers, store=tmp_path / "store"),
    ]


def test_all_are_all(made, tmp_path):
    every, stored, _ = readers(made, tmp_path)
    assert list(every("all")) == list(every(None)) == [0, 2, 5]
    assert all(np.array_equal(a, b) for a, b in zip(every("all").values(), every(None).values(), strict=True))
    assert list(stored("all")) == list(stored(None))
    assert ac.pull_dataset(made.folder, layers="all", store=tmp_path / "store") == 11
    found = ac.Store(tmp_path / "store")
    space = found.spaces()[0]
    assert all(found.contains(space, [made.texts[0]], f"resid_post.{n}", pooling="last_token")[0] for n in (0, 2, 5))


@pytest.mark.parametrize("which", range(3))
def test_what_is_no_layer_is_said(made, tmp_path, which):
    read = readers(made, tmp_path)[which]
    # Layer 5 is the last that is there, of a model of which nobody says how deep it is.
    for layers in (-1, [0, -1], np.int64(-1)):
        with pytest.raises(DatasetLayerError, match=r"layer -1 counts from the end of the model.* it has 0, 2, 5"):
            read(layers)
    with pytest.raises(DatasetLayerError, match=r"has no layer 3.*it has 0, 2, 5"):
        read([0, 3])
    for wrong in ("last", [], ["a"], [True]):
        with pytest.raises(OptionError, match="'all'"):
            read(wrong)


def test_a_layer_that_is_not_stored_is_named_as_one(tmp_path):
    store = new_store(tmp_path)
    fill_pooled(store, new_space(store), range(3))
    with pytest.raises(OptionError, match=r"'resid_post.9' is not stored .*: of resid_post it has 0-1\.$"):
        ac.push_dataset(tmp_path / "set", MODEL, None, store=store, tensors=["resid_post.9"])
    with pytest.raises(OptionError, match="Stored: hidden_layers"):
        ac.push_dataset(tmp_path / "set", MODEL, None, store=store, tensors=["attn_out.1"])


def test_the_command_says_what_is_where(cli, tmp_path):
    store = new_store(tmp_path)
    fill_pooled(store, new_space(store), range(3))
    ac.push_dataset(tmp_path / "set", MODEL, [text(i) for i in range(3)], store=store, labels=[1, None, 0])
    assert "labels   0, 1 (1 of 3 prompts have none)" in cli("dataset-info", str(tmp_path / "set"))[1]
    assert "perplexity" not in cli("dataset-info", str(tmp_path / "set"))[1]
    where = ["--store", str(tmp_path / "there")]
    assert cli("pull", str(tmp_path / "set"), "--layers", "1", *where)[0] == 0
    out = cli("show", MODEL, text(1), *where)[1]
    assert f"fetched from {tmp_path / 'set'}@" in out and "resid_post.1" in out and "resid_post.0" not in out
    with ac.Store(tmp_path / "there") as there:
        there.read(there.spaces()[0], [text(1)], "resid_post.1", pooling="last_token")
    assert "fetched from" not in cli("show", MODEL, text(1), *where)[1]
    status, _, err = cli("show", str(tmp_path), text(1), *where)
    assert status == 1 and f"`actcache show {MODEL} PROMPT`" in err
    with pytest.raises(NotCachedError) as raised, ac.Store(tmp_path / "there") as there:
        ac.push_dataset(tmp_path / "more", tmp_path, None, store=there)
    assert "ask for it by that name" in str(raised.value)


@pytest.mark.parametrize("there", [False, True])
def test_perplexity_is_told(cli, tmp_path, there):
    store = new_store(tmp_path)
    space = new_space(store)
    fill_pooled(store, space, range(3))
    if there:
        fill_perplexity(store, space, range(3))
    ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
    assert ac.fetch_dataset_metadata(tmp_path / "set").has_perplexity == there
    assert ("mean, min, max" in cli("dataset-info", str(tmp_path / "set"))[1]) == there
