"""Datasets that mean harm or are broken: refused by name, and nothing read outside their folder."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError
from made_datasets import FULL, INDEX, make


def load_all(folder):
    """Everything that reads a dataset; the first error is raised."""
    ac.fetch_dataset_metadata(folder)
    ac.load_activation_dataset(folder)
    ac.load_activations(folder, return_labels=True)


def refused(made, match, *, read=load_all):
    with pytest.raises(DatasetFormatError, match=match) as caught:
        read(made.folder)
    assert str(made.folder) in str(caught.value) or INDEX in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("version", "column", "row", "value", "named"),
    [
        ("2.0 pooled", "shard_index", 3, -1, r"prompt 3 .* of shard -1"),
        ("2.0 pooled", "shard_index", 3, 3, r"prompt 3 .* of shard 3 .*3 shards"),
        ("2.0 pooled", "row_offset", 10, 3, r"prompt 10 has 1 rows at 3 of shard 2 .*3 rows"),
        ("2.0 pooled", "row_offset", 0, -1, r"prompt 0 has 1 rows at -1"),
        ("2.0 pooled", "row_offset", 0, 2**31 - 1, r"prompt 0"),
        ("2.0 split", "shard_index", 2, 5, r"prompt 2 .* of shard 5"),
        ("2.0 split", "token_shard_ids", 2, [9], "prompt|tokens"),
        ("1.1 full", "token_offset", 4, -1, r"prompt 4"),
        ("1.1 full", "token_offset", 4, 10**12, r"prompt 4"),
        ("1.1 full", "num_tokens", 4, 0, r"prompt 4 has 0 rows"),
        ("1.1 full", "num_tokens", 4, 10**9, r"prompt 4 has 1,000,000,000 rows"),
        ("1.2 full", "token_offset", 4, 0, r"prompt 4"),
        ("1.2 full", "shard_index", 4, 77, r"prompt 4 .* of shard 77"),
    ],
)
def test_places_outside_the_shards(tmp_path, version, column, row, value, named):
    made = make(tmp_path / "set", version)
    made.put(column, row, value)
    pooling = "mean" if "split" in version and "token" in column else "last_token"
    refused(made, named, read=lambda folder: ac.load_activations(folder, pooling=pooling))


@pytest.mark.parametrize("version", FULL)
def test_no_row_of_another_prompt_is_taken_for_one(tmp_path, version):
    """One token more than there are, at the end of a shard: the row behind is another prompt's, or none."""
    made = make(tmp_path / "set", version)
    made.columns["num_tokens"] = [*made.columns["num_tokens"].to_pylist()[:-1], 1000]
    made.write()
    if "split" in version:
        assert len(ac.load_activations(made.folder, pooling="mean")[0]) == 11, "the lists say where tokens are"
    else:
        refused(made, "prompt 10", read=lambda folder: ac.load_activations(folder, pooling="mean"))


@pytest.mark.parametrize(
    ("column", "values", "named"),
    [
        ("shard_index", [0.0] * 10 + [float("nan")], "expected whole numbers"),
        ("row_offset", ["0"] * 11, "expected whole numbers"),
        ("row_offset", [0] * 10 + [None], "no value for 1 prompts"),
        ("row_offset", [[0]] * 11, "expected whole numbers"),
        ("text", [1] * 11, "expected texts"),
        ("text", ["a"] * 10 + [None], "no value for 1 prompts"),
        ("label", [0.5] * 11, "expected whole numbers or texts"),
        ("label", [[1]] * 11, "expected whole numbers or texts"),
    ],
)
def test_columns_of_the_wrong_kind(tmp_path, column, values, named):
    made = make(tmp_path / "set")
    made.columns[column] = values
    made.write()
    prompts = ["a"] if column == "text" else None
    refused(made, named, read=lambda folder: ac.load_activations(folder, prompts=prompts, return_labels=True))


@pytest.mark.parametrize("column", ["shard_index", "row_offset", "text"])
def test_columns_that_are_not_there(tmp_path, column):
    made = make(tmp_path / "set")
    del made.columns[column]
    made.write()
    refused(made, f"no column '{column}'")


@pytest.mark.parametrize(
    ("count", "named"), [(10, "num_prompts is 10"), (12, "num_prompts is 12"), (10**12, "num_prompts")]
)
def test_a_wrong_number_of_prompts(tmp_path, count, named):
    made = make(tmp_path / "set")
    made.metadata["num_prompts"] = count
    made.write()
    refused(made, named)
    made.hidden["shards"][-1]["num_prompts"] += count - 11
    made.metadata["tensors"]["logits_topk"]["shards"][0]["num_prompts"] = count
    made.write()
    refused(made, r"num_prompts is [\d,]+, and it has 11 rows")


def test_ten_to_the_twelve_rows(tmp_path):
    made = make(tmp_path / "set", k=0)
    made.hidden["shards"] = [{"num_prompts": 11 - 10}, {"num_prompts": 10}, {"num_prompts": 0}]
    made.write()
    refused(made, "has 4 rows, and the dataset says 1")
    made = make(tmp_path / "full", "1.1 full", k=0)
    made.hidden["shards"][0]["num_tokens"] = 10**12
    made.write()
    refused(made, r"the dataset says 1,000,000,000,000", read=lambda f: ac.load_activations(f, pooling="mean"))
    refused(made, r"the dataset says 1,000,000,000,000", read=lambda f: ac.load_activations(f, pooling=None))
    refused(made, r"the dataset says 1,000,000,000,000", read=ac.load_activation_dataset)


def _header(folder: Path, name: str, header: dict, size: int) -> None:
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


SHARD = "tensors/hidden_layer002_shard001.safetensors"


@pytest.mark.parametrize(
    ("header", "size", "named"),
    [
        ({"hidden.layer_2": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}, 95, "file has|describes"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}, 97, "file has|describes"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [4, 6], "data_offsets": [-96, 0]}}, 96, "wrong offsets"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [4, 6], "data_offsets": [10**9, 10**9 + 96]}}, 96, "gap"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [4, 7], "data_offsets": [0, 112]}}, 112, "7 numbers, not 6"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [5, 6], "data_offsets": [0, 120]}}, 120, "has 5 rows"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [24], "data_offsets": [0, 96]}}, 96, "the shape"),
        ({"hidden.layer_2": {"dtype": "I32", "shape": [4, 6], "data_offsets": [0, 96]}}, 96, "expected floating"),
        ({"hidden.layer_2": {"dtype": "BOOL", "shape": [4, 6], "data_offsets": [0, 24]}}, 24, "expected floating"),
        ({"hidden.layer_2": {"dtype": "C64", "shape": [4, 6], "data_offsets": [0, 192]}}, 192, "unknown dtype"),
        ({"hidden.layer_3": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}, 96, "no tensor"),
        ({"hidden.layer_2": {"dtype": "F32", "shape": [10**12, 6], "data_offsets": [0, 24 * 10**12]}}, 96, "describes"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_the_dataset_says(tmp_path, header, size, named):
    made = make(tmp_path / "set", k=0)
    _header(made.folder, SHARD, header, size)
    refused(made, named, read=ac.load_activations)
    refused(made, named, read=ac.load_activation_dataset)
    some = [made.texts[5]]
    refused(made, named, read=lambda folder: ac.load_activations(folder, prompts=some))
    assert len(ac.load_activations(made.folder, layers=[0, 5])) == 2, "other layers are as good as before"


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 200, struct.pack("<Q", 1 << 40) + b"{}", b"PK\3\4" * 50])
def test_files_that_are_no_safetensors(tmp_path, data):
    made = make(tmp_path / "set", k=0)
    (made.folder / SHARD).write_bytes(data)
    refused(made, "hidden_layer002_shard001")


def test_a_shard_with_other_dtypes_than_the_others(tmp_path):
    made = make(tmp_path / "set", k=0)
    made.files[SHARD] = {"hidden.layer_2": made.files[SHARD]["hidden.layer_2"].astype(np.float16)}
    made.write()
    assert ac.load_activations(made.folder)[2].dtype == np.float32, "each is converted"
    refused(made, "float16", read=ac.load_activation_dataset)


@pytest.mark.parametrize("pooling", ["last_token", "mean", "max", None])
def test_nan_is_refused_and_found(tmp_path, pooling):
    made = make(tmp_path / "set", "1.0 full", k=0)
    tensors = made.files["tensors/hidden_layers_001.safetensors"]
    tensors["hidden.layer_5"] = tensors["hidden.layer_5"].copy()
    tensors["hidden.layer_5"][-1, 3] = np.nan
    made.write()
    row = len(tensors["hidden.layer_5"]) - 1
    named = rf"row {row} of hidden.layer_5 holds NaN"
    refused(made, named, read=lambda folder: ac.load_activations(folder, pooling=pooling))
    assert len(ac.load_activations(made.folder, pooling=pooling, layers=[0, 2])) == 2
    assert ac.load_activation_dataset(made.folder)[0]["hidden.layer_5"].isnan().sum() == 1


def test_nothing_outside_the_folder_is_read(tmp_path):
    """Absolute and climbing paths, links to files and folders, a pipe and a socket in the place of a file."""
    made = make(tmp_path / "set", k=0)
    good = (made.folder / SHARD).read_bytes()
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(good)
    for path in (str(outside), "../secret.safetensors", "tensors/../../secret.safetensors", "./x.safetensors"):
        made.hidden["shards"][1]["file"] = path
        made.write()
        refused(made, "lead out of the dataset|no path")
    del made.hidden["shards"][1]["file"]
    made.write()
    file = made.folder / SHARD
    for link in (outside, Path("../../secret.safetensors"), Path("/proc/self/environ")):
        file.unlink()
        file.symlink_to(link)
        refused(made, "is a link")
    file.unlink()
    os.mkfifo(file)
    done = threading.Thread(target=lambda: refused(made, "no ordinary file"), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive(), "a pipe is not waited for"
    file.unlink()
    file.mkdir()
    refused(made, "no ordinary file|cannot be read")
    file.rmdir()
    file.write_bytes(good)
    load_all(made.folder)
    (made.folder / "tensors").rename(tmp_path / "elsewhere")
    (made.folder / "tensors").symlink_to(tmp_path / "elsewhere")
    refused(made, "is a link")
    (made.folder / "tensors").unlink()
    (tmp_path / "elsewhere").rename(made.folder / "tensors")
    (made.folder / INDEX).rename(tmp_path / "index.parquet")
    (made.folder / INDEX).symlink_to(tmp_path / "index.parquet")
    refused(made, "is a link")


def test_a_link_that_looks_like_one_of_the_hub_client(tmp_path):
    """``../../blobs/<digest>``, where the digest is a link to somewhere else, or the folder is no snapshot."""
    made = make(tmp_path / "set", k=0)
    outside = tmp_path / "secret"
    outside.write_bytes((made.folder / SHARD).read_bytes())
    digest = "a" * 64
    for folder in (tmp_path / "hub" / "datasets--a--b" / "snapshots" / ("c" * 40), tmp_path / "plain" / "x" / "y"):
        folder.parent.mkdir(parents=True)
        (folder.parent.parent / "blobs").mkdir()
        (folder.parent.parent / "blobs" / digest).symlink_to(outside)
        made.folder.rename(folder)
        made.folder = folder
        (folder / SHARD).unlink()
        (folder / SHARD).symlink_to(f"../../../blobs/{digest}")
        refused(made, "is a link")


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1PAR1", b"x" * 4000, b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\x7fPAR1"]
)
def test_an_index_that_is_no_parquet_file(tmp_path, content):
    made = make(tmp_path / "set")
    (made.folder / INDEX).write_bytes(content)
    refused(made, "no Parquet file")


def test_damaged_indexes_are_refused_or_read(tmp_path):
    """A byte here and there: never another exception than ours, nor another number of rows."""
    made = make(tmp_path / "set", "2.0 split", labels=list(range(11)))
    path = made.folder / INDEX
    good = path.read_bytes()
    random = np.random.default_rng(0)
    seen = 0
    for _ in range(300):
        data = bytearray(good)
        for at in random.integers(4, len(good), random.integers(1, 4)):
            data[at] = random.integers(256)
        path.write_bytes(data)
        try:
            found, labels = ac.load_activations(made.folder, pooling="mean", return_labels=True)
            assert found[0].shape == (11, 6) and (labels is None or len(labels) == 11)
        except (ac.ActCacheError, UserWarning):
            # Also a file or a site that is called otherwise now.
            seen += 1
    assert seen > 50


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"format_version": NaN}']
)
def test_json_that_is_no_description(tmp_path, text):
    made = make(tmp_path / "set", "1.1 pooled")
    (made.folder / "lmprobe_info.json").write_bytes(text)
    refused(made, "metadata|format_version")


def test_many_tokens_that_share_rows(tmp_path):
    made = make(tmp_path / "set", "1.1 full", n=200, tokens_per_shard=10**9, k=0)
    made.columns["num_tokens"] = [50] * 200
    made.columns["token_offset"] = [0] * 200
    made.write()
    refused(made, r"have 10,000 tokens, and the shards of hidden_layers [\d,]+ rows",
            read=lambda folder: ac.load_activations(folder, pooling=None))  # fmt: skip
