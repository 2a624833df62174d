"""What is not pulled: datasets that are not what they say, arguments that cannot be, more than has room."""

from __future__ import annotations

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError, DatasetLayerError, NotCachedError, OptionError
from actcache.share import fetching
from made_datasets import INDEX, make
from pull_helpers import pulled


@pytest.fixture
def store(tmp_path):
    with ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index") as store:
        yield store
    fetching._open.clear()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"tensors": ["hidden_layer"]}, OptionError, "no tensors 'hidden_layer'.*mean 'hidden_layers'"),
        ({"tensors": []}, OptionError, "tensors is empty"),
        ({"layers": [1]}, DatasetLayerError, "no layer 1: it has 0, 2, 5"),
        ({"layers": ["1"]}, OptionError, "layers holds '1'"),
        ({"layers": []}, OptionError, "layers is empty"),
        ({"target_prompts": ["prompt 3: grosse"]}, NotCachedError, "no prompt.*mean"),
        ({"num_workers": -1}, OptionError, "num_workers is -1"),
        ({"num_workers": True}, OptionError, "num_workers is True"),
        ({"revision": "main"}, OptionError, "no meaning for the folder"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, store, options, error, named):
    made = make(tmp_path / "set")
    with pytest.raises(error, match=named):
        ac.pull_dataset(made.folder, store=store, **options)
    assert not store.root.exists() or not store.spaces()


def test_a_store_that_keeps_nothing(tmp_path):
    made = make(tmp_path / "set")
    with ac.Store(tmp_path / "none", limit_gb=0) as store, pytest.raises(OptionError, match="limit of the store is 0"):
        ac.pull_dataset(made.folder, store=store)
    assert not (tmp_path / "none").exists()


def refused(made, store, named, **options):
    with pytest.raises(DatasetFormatError, match=named):
        ac.pull_dataset(made.folder, store=store, **options)
    assert not store.root.exists() or store.spaces() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t["hidden_layers"].update(pooling="label"), "pooled with 'label', which is no pooling"),
        (lambda t: t["hidden_layers"].update(pooling="tokens"), "pooled with 'tokens'"),
        (lambda t: t["hidden_layers"].update(pooling="../x"), "pooled with '../x'"),
        (lambda t: t["hidden_layers"].update(pooling="pulled"), "pooled with 'pulled'"),
        (lambda t: t["logits_topk"].update(pooling="metadata"), "logits_topk is pooled with"),
        (lambda t: t["logits_topk"].pop("k"), "how many logits"),
        (lambda t: t.update(label=dict(t["hidden_layers"])), "cannot be called 'label'"),
        (lambda t: t.update(pulled=dict(t["hidden_layers"])), "cannot be called 'pulled'"),
        (lambda t: t.update(perplexity=dict(t["hidden_layers"])), "cannot be called 'perplexity'"),
        (lambda t: t.update(resid_post=dict(t["hidden_layers"])), "both the site 'resid_post'"),
        (lambda t: t.update({"x.scale": dict(t["hidden_layers"])}), "cannot be called 'x.scale'"),
    ],
)
def test_names_that_mean_something_else_here(tmp_path, store, change, named):
    made = make(tmp_path / "set")
    change(made.metadata["tensors"])
    made.write()
    refused(made, store, named)


def test_places_outside_the_shards_are_refused_before_anything_is_stored(tmp_path, store):
    made = make(tmp_path / "set")
    made.columns["shard_index"] = [-1, *made.columns["shard_index"].to_pylist()[1:]]
    made.write()
    refused(made, store, "prompt 0 .*shard -1")


@pytest.mark.parametrize(
    ("column", "values", "named"),
    [
        ("token_ids", [[-1]] * 11, "no token id"),
        ("token_ids", [[2**40]] * 11, "no token id"),
        ("token_ids", [["a"]] * 11, "expected lists of whole numbers"),
        ("token_ids", [[1, None]] * 11, "no value for some tokens"),
        ("token_perplexity", [[1]] * 11, "expected lists of numbers"),
    ],
)
def test_columns_of_the_wrong_kind(tmp_path, store, column, values, named):
    made = make(tmp_path / "set", extra={column: values})
    if "perplexity" in column:
        made.columns |= {f"perplexity_{name}": [1.0] * 11 for name in ("mean", "min", "max")}
        made.write()
    refused(made, store, named)


def test_ids_that_do_not_fit_the_rows(tmp_path, store):
    made = make(tmp_path / "set", "2.0 split", extra={"token_ids": [[1, 2]] * 11})
    refused(made, store, "token ids and .* rows of vectors")


def test_nan_is_not_stored(tmp_path, store):
    made = make(tmp_path / "set")
    name = "tensors/hidden_layer002_shard001.safetensors"
    made.files[name]["hidden.layer_2"] = made.files[name]["hidden.layer_2"] * np.float32("nan")
    made.write()
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    with pytest.raises(DatasetFormatError, match=f"{name}.*NaN"):
        store.read(space, made.texts, "resid_post.2", pooling="last_token")
    assert store.read(space, made.texts, "resid_post.0", pooling="last_token").shape == (11, 6)
    assert store.read(space, made.texts[:4], "resid_post.2", pooling="last_token").shape == (4, 6)


def test_a_label_that_recurs_is_no_bomb(tmp_path, store, monkeypatch):
    monkeypatch.setattr("actcache.share.index_prompts._LEAST_ROOM", 1 << 20)
    made = make(tmp_path / "set", labels=["x" * (1 << 20)] * 11, k=0)
    assert (made.folder / INDEX).stat().st_size < 100_000
    refused(made, store, "more room than so many bytes can hold")
    monkeypatch.undo()
    assert ac.pull_dataset(made.folder, store=store) == 11


def test_many_layers_of_many_prompts_are_chosen_from(tmp_path, store, monkeypatch):
    made = make(tmp_path / "set")
    monkeypatch.setattr("actcache.share.pull._MOST_BYTES", 4 * 11 * 4)
    with pytest.raises(OptionError, match=r"promises 5 tensors of 11 prompts.*layers="):
        ac.pull_dataset(made.folder, store=store)
    assert not store.root.exists()
    assert ac.pull_dataset(made.folder, store=store, layers=[0, 2], tensors="hidden_layers") == 11


def test_tokens_that_no_file_holds(tmp_path, store, monkeypatch):
    monkeypatch.setattr("actcache.share.pull._MANY_TOKENS", 20)
    made = make(tmp_path / "set", "1.1 full", k=0)
    assert ac.pull_dataset(made.folder, store=store) == 11
    store.clear()
    lengths = made.columns["num_tokens"].to_pylist()
    made.columns["num_tokens"] = [*lengths[:-1], 10**9]
    made.hidden["shards"][-1]["num_tokens"] += 10**9 - lengths[-1]
    made.write()
    refused(made, store, "the dataset says 1,000,000,")


def test_logits_that_are_no_tokens(tmp_path, store):
    made = make(tmp_path / "set")
    made.files["tensors/logits_topk_000.safetensors"]["logits_topk.indices"][5, 0] = -7
    made.write()
    ac.pull_dataset(made.folder, store=store)
    with pytest.raises(DatasetFormatError, match="no token"):
        store.read(pulled(store), made.texts, "logits.top3.indices", pooling="last_token")
