"""Datasets that change while they are pulled, or say what they should not: refused by name, little taken on trust."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError
from actcache.share import fetching
from actcache.share import pull as pull_module
from actcache.share.index import Index
from actcache.share.source import open_source
from actcache.store.records import PULLED
from made_datasets import INDEX, make, pq
from pull_helpers import pulled
from share_helpers import LAYERS, fill_tokens, new_space, new_store


@pytest.fixture
def store(tmp_path):
    yield (made := ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index"))
    made.close()
    fetching._open.clear()


def rewrite(made):
    """Other numbers in the same files, of the same sizes, of another time."""
    for tensors in made.files.values():
        tensors.update({key: values + values.dtype.type(1) for key, values in tensors.items()})
    made.write()
    for path in made.folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(10**18, 10**18))


# -- folders that change meanwhile -----------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0 pooled", "2.0 full local"])
def test_a_folder_that_changes_between_the_check_and_the_read(tmp_path, store, monkeypatch, version):
    made = make(tmp_path / "set", version)
    ac.pull_dataset(made.folder, store=store)
    space, real = pulled(store), fetching.Dataset.read

    def read(self, *args, **options):
        rewrite(made)
        yield from real(self, *args, **options)

    monkeypatch.setattr(fetching.Dataset, "read", read)
    pooling = "last_token" if "pooled" in version else None
    with pytest.raises(DatasetFormatError, match="was changed since it was pulled"):
        store.read(space, made.texts, "resid_post.0", pooling=pooling)
    store.flush()
    assert set(store.held(space)) <= {PULLED, "derived", "label", "metadata"}, "nothing of it was stored"


def test_perplexities_of_an_index_that_changes(tmp_path, store, monkeypatch):
    made = make(tmp_path / "set", extra={f"perplexity_{part}": [1.5] * 11 for part in ("mean", "min", "max")})
    ac.pull_dataset(made.folder, store=store)
    space, real = pulled(store), fetching.results_of
    store.evict(1 / 2**30)
    assert "derived" not in store.held(space) and PULLED in store.held(space)

    def results_of(*args):
        rewrite(made)
        return real(*args)

    monkeypatch.setattr(fetching, "results_of", results_of)
    with pytest.raises(DatasetFormatError, match="was changed since"):
        fetching.fetch(store, space, store.prompts(space), ["perplexity"], "derived")
    assert "derived" not in store.held(space)


def test_an_index_that_changes_while_it_is_pulled(tmp_path, store, monkeypatch):
    made = make(tmp_path / "set", labels=list(range(11)))

    def dataset(index):
        made.columns["label"] = list(range(11, 22))
        made.write()
        os.utime(made.folder / INDEX, ns=(10**18, 10**18))
        return fetching.Dataset(index)

    monkeypatch.setattr(pull_module, "Dataset", dataset)
    with pytest.raises(DatasetFormatError, match="was changed while it was read: pull it again"):
        ac.pull_dataset(made.folder, store=store)
    assert store.spaces() == []


# -- tensors that share a name ---------------------------------------------------------------------------


def with_tensor(made, name, layers, pooling, files, keys):
    """Another kind of tensors beside the hidden layers of `made`, twice and three times these."""
    told = copy.deepcopy(made.hidden)
    told |= {"layers": layers, "pooling": pooling, "file_pattern": files, "key_pattern": keys}
    made.metadata["tensors"][name] = told
    for number, layer in enumerate(layers or [None]):
        for shard in range(len(told["shards"])):
            path = f"tensors/hidden_layer000_shard{shard:03d}.safetensors"
            (rows,) = made.files[path].values()
            numbers = {"layer": layer or 0, "shard": shard}
            made.files[files.format(**numbers)] = {keys.format(**numbers): rows * (number + 2)}


def test_tensors_of_one_kind_that_were_pooled_in_other_ways(tmp_path, store):
    made = make(tmp_path / "set", k=0)
    with_tensor(made, "mlp_out", [0, 1], "last_token", "tensors/a{layer}_{shard}.safetensors", "a.{layer}")
    with_tensor(made, "mlp_out.5", [], "mean", "tensors/b_{shard}.safetensors", "b")
    made.write()
    ac.pull_dataset(made.folder, store=store)
    space, rows = pulled(store), np.stack(made.expected())[:, 0]
    wanted = {("mlp_out.0", "last_token"): 2, ("mlp_out.1", "last_token"): 3, ("mlp_out.5", "mean"): 2}
    for (site, pooling), times in wanted.items():
        assert np.array_equal(store.read(space, made.texts, site, pooling=pooling).numpy(), rows * times)
    assert not store.contains(space, made.texts, "mlp_out.0", pooling="mean").any()
    ac.pull_dataset(made.folder, store=store, overwrite=True, tensors="mlp_out")
    sites = {site.removeprefix(f"{PULLED}.") for site in store.held(pulled(store))[PULLED]}
    assert {"mlp_out.0", "mlp_out.1"} <= sites and "resid_post.0" not in sites


def test_two_tensors_that_are_one_site(tmp_path, store):
    made = make(tmp_path / "set", k=0)
    with_tensor(made, "resid_post", [7], "mean", "tensors/a{layer}_{shard}.safetensors", "a.{layer}")
    made.write()
    for read in (ac.fetch_dataset_metadata, lambda folder: ac.pull_dataset(folder, store=store)):
        with pytest.raises(DatasetFormatError, match="hidden_layers and resid_post are both the site 'resid_post'"):
            read(made.folder)


# -- promises --------------------------------------------------------------------------------------------


def test_more_files_than_a_dataset_has(tmp_path, store):
    made = make(tmp_path / "set", "2.0 full local", k=0)
    made.hidden["layers"] = list(range(600))
    made.hidden["shards"] += [{"num_prompts": 0, "num_tokens": 1}] * 600
    made.write()
    with pytest.raises(
        DatasetFormatError, match=r"hidden_layers has 60\d shards of 600 layers, more than 262,144 files"
    ):
        ac.pull_dataset(made.folder, store=store)
    made.metadata["tensors"] = {f"site{number}": {**made.hidden, "layers": list(range(20_000))} for number in range(4)}
    made.write()
    with pytest.raises(DatasetFormatError, match="more than 65,536 layers together"):
        ac.pull_dataset(made.folder, store=store)


def test_tokens_that_add_up_to_more_than_64_bits(tmp_path, store):
    made = make(tmp_path / "set", "1.1 full", k=0)
    made.columns["num_tokens"] = [2**61] * 11
    made.columns["token_offset"], made.columns["shard_index"] = [0] * 11, [0] * 11
    made.hidden["shards"] = [{**made.hidden["shards"][0], "num_prompts": 11, "num_tokens": 2**62}]
    made.write()
    for read in (
        lambda folder: ac.load_activations(folder, pooling=None),
        lambda folder: ac.pull_dataset(folder, store=store),
    ):
        with pytest.raises(DatasetFormatError, match=r"its prompts have [\d,]+ tokens, and the shards"):
            read(made.folder)
    made = make(tmp_path / "other", "1.1 full", k=0, tokens_per_shard=10)
    made.hidden["shards"][1]["num_tokens"] = made.hidden["shards"][2]["num_tokens"] = 2**62
    made.write()
    with pytest.raises(DatasetFormatError, match=r"rows, and the dataset says 4,611,686,018,427,387,904"):
        ac.load_activation_dataset(made.folder)


def test_a_width_of_ours_is_not_taken_on_trust(tmp_path, store):
    folder = pushed(tmp_path)
    table = pq.read_table(folder / INDEX)
    said = dict(table.schema.metadata)
    tensors = json.loads(said[b"lmprobe:tensors"])
    tensors["hidden_layers"]["dim"] = 1 << 26
    said[b"lmprobe:tensors"] = json.dumps(tensors).encode()
    pq.write_table(table.replace_schema_metadata(said), folder / INDEX)
    ac.pull_dataset(folder, store=store)
    space = pulled(store)
    table = store.prompts(space)
    tracemalloc.start()
    try:
        with pytest.raises(DatasetFormatError, match=r"has rows of \d+ numbers, not 67,108,864"):
            fetching.fetch(store, space, table, ["resid_post.0"], "tokens")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def pushed(tmp_path):
    """A dataset of ours of full sequences, with checksums."""
    source = new_store(tmp_path / "source")
    space = new_space(source)
    fill_tokens(source, space, range(9), LAYERS)
    ac.push_dataset(tmp_path / "set", "org/model", None, store=source, shard_max_bytes=400)
    source.close()
    return tmp_path / "set"


def test_what_a_file_holds_is_known_without_having_read_it(tmp_path):
    folder = pushed(tmp_path)
    dataset = fetching.Dataset(Index(open_source(folder)))
    group = dataset.index.description.tensors["hidden_layers"]
    lengths = np.asarray(pq.read_table(folder / INDEX)["num_tokens"])
    at, rest = 0, len(group.placed)
    for number, shard in enumerate(group.shards):
        path = group.file(number, group.layers[0])
        if number < rest:
            assert dataset.of_file(path).tolist() == list(range(at, at + shard.prompts))
            at += shard.prompts
    held = np.concatenate([dataset.of_file(group.file(n, group.layers[1])) for n in range(rest, len(group.shards))])
    assert held.tolist() == np.flatnonzero(lengths > 1).tolist()
    assert not len(dataset.of_file("tensors/none.safetensors"))
