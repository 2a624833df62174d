"""What a dataset says beside its vectors: labels, columns, logits and other sites, metadata."""

from __future__ import annotations

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError
from made_datasets import INDEX, make, pa, pq


def test_an_index_in_several_row_groups(tmp_path):
    """As those of many prompts are, with lists of texts among its columns."""
    tags = [[f"tag {i % 3}"] * (i % 4) if i % 5 else None for i in range(11)]
    made = make(tmp_path / "set", "2.0 split", labels=["a", "b", None] * 3 + ["a", "a"], extra={"tags": tags})
    table = pq.read_table(made.folder / INDEX)
    pq.write_table(table, made.folder / INDEX, row_group_size=2)
    about = ac.fetch_dataset_metadata(made.folder)
    assert about.metadata == {"tags": tags} and about.prompts == made.texts
    assert about.labels == ["a", "b", None] * 3 + ["a", "a"]
    found = ac.load_activations(made.folder, pooling="max", as_dict=False)
    assert np.array_equal(found, np.stack(made.expected("max")))


@pytest.mark.parametrize(
    ("labels", "wanted", "kind"),
    [
        ([1, 0] * 5 + [1], [1, 0] * 5 + [1], "i"),
        (["a", "bc"] * 5 + ["a"], ["a", "bc"] * 5 + ["a"], "U"),
        ([1, None] + [0] * 9, [1, None] + [0] * 9, "O"),
        (["1", None] + ["x"] * 9, ["1", None] + ["x"] * 9, "O"),
        (["a\0", "b"] * 5 + ["a"], ["a\0", "b"] * 5 + ["a"], "O"),
        ([2**62, -1] * 5 + [0], [2**62, -1] * 5 + [0], "i"),
        (pa.array([2**64 - 1, 1] * 5 + [0], pa.uint64()), [2**64 - 1, 1] * 5 + [0], "O"),
        ([None] * 11, None, ""),
        (None, None, ""),
    ],
)
def test_labels_keep_their_types(tmp_path, labels, wanted, kind):
    made = make(tmp_path / "set", labels=labels)
    found, given = ac.load_activations(made.folder, return_labels=True)
    assert len(found) == 3
    if wanted is None:
        assert given is None
    else:
        assert given.dtype.kind == kind and given.tolist() == wanted
        assert [type(label) for label in given.tolist()] == [type(label) for label in wanted]
        some = ac.load_activations(made.folder, prompts=[made.texts[10], made.texts[1]], return_labels=True)[1]
        assert some is None or some.tolist() == [wanted[10], wanted[1]]


def test_the_same_prompt_twice(tmp_path):
    made = make(tmp_path / "set", labels=[0, 1] * 5 + [0])
    made.columns["text"][3] = made.columns["text"][1]
    made.write()
    found, labels = ac.load_activations(made.folder, prompts=[made.texts[1]], return_labels=True)
    assert labels.tolist() == [1] and np.array_equal(found[0][0], made.expected()[1][0]), "the first of both"
    made.columns["text"][2] = made.columns["text"][1]
    made.write()
    assert ac.load_activations(made.folder)[0].shape == (11, 6)
    for prompts in (None, [made.texts[1]]):
        with pytest.raises(DatasetFormatError, match=r"two labels, 1 in row 1 and 0 in row 2"):
            ac.load_activations(made.folder, prompts=prompts, return_labels=True)
    assert ac.load_activations(made.folder, prompts=[made.texts[4]], return_labels=True)[1].tolist() == [0]


def test_router_logits_and_other_sites(tmp_path):
    made = make(tmp_path / "set")
    random = np.random.default_rng(3)
    router = random.standard_normal((11, 4)).astype(np.float32)
    other = random.standard_normal((11, 9)).astype(np.float32)
    made.metadata["tensors"] |= {
        "router_logits": {
            "type": "router", "layers": [5], "num_experts": 4, "dtype": "float32", "pooling": "last_token",
            "file_pattern": "tensors/router_logits_{shard:03d}.safetensors", "row_bytes": 16,
            "shards": [
                {"file": "tensors/router_logits_000.safetensors", "num_prompts": 8},
                {"file": "tensors/router_logits_001.safetensors", "num_prompts": 3},
            ],
        },
        "attn_out": {
            "type": "hidden", "layers": [2], "dim": 9, "pooling": "last_token", "storage": "pooled",
            "file_pattern": "tensors/attn_out_layer{layer:03d}_shard{shard:03d}.safetensors",
            "key_pattern": "attn_out.layer_{layer}", "shards": [{"num_prompts": 11}],
        },
    }  # fmt: skip
    made.files |= {
        "tensors/router_logits_000.safetensors": {"router.layer_5": router[:8]},
        "tensors/router_logits_001.safetensors": {"router.layer_5": router[8:]},
        "tensors/attn_out_layer002_shard000.safetensors": {"attn_out.layer_2": other},
    }
    made.columns |= {"shard_index_attn_out": [0] * 11, "row_offset_attn_out": list(range(11))}
    made.write()
    tensors, _ = ac.load_activation_dataset(made.folder, tensors=["router_logits", "attn_out"])
    assert np.array_equal(tensors["router.layer_5"].numpy(), router)
    assert np.array_equal(tensors["attn_out.layer_2"].numpy(), other)
    routed = ac.load_activations(made.folder, site="router_logits", prompts=[made.texts[9], made.texts[2]])
    assert np.array_equal(routed[5], router[[9, 2]]), "in the order of the index, whatever its columns say of others"
    found = ac.load_activations(made.folder, site="attn_out", prompts=[made.texts[9], made.texts[2]])
    assert list(found) == [2] and np.array_equal(found[2], other[[9, 2]])


def test_metadata_says_what_there_is(tmp_path):
    extra = {
        "rank": pa.array(range(11), pa.int32()),
        "score": [0.25, None, *[1.0] * 9],
        "flag": [True, False] * 5 + [None],
        "tags": [["a"], []] * 5 + [None],
        "perplexity_mean": [1.0] * 11,
    }
    made = make(tmp_path / "set", "2.0 split", labels=["x", None] + ["y"] * 9, extra=extra)
    made.metadata["provenance"] = {"lmprobe_version": "0.10.3"}
    made.write()
    found = ac.fetch_dataset_metadata(made.folder)
    assert (found.model_name, found.revision, found.format_version) == ("org/model", None, "2.0")
    assert found.available_layers == [0, 2, 5] and found.num_prompts == 11
    assert found.prompts == made.texts and found.labels == made.columns["label"]
    assert found.tensor_descriptors == made.metadata["tensors"]
    assert list(found.metadata) == ["rank", "score", "flag", "tags"]
    assert found.metadata["score"] == extra["score"] and type(found.metadata["score"][2]) is float
    assert found.metadata["flag"] == extra["flag"] and found.metadata["tags"] == extra["tags"]
    assert found.metadata["rank"] == list(range(11))
    assert found.provenance == {"lmprobe_version": "0.10.3"}
    assert (found.dataset, found.commit) == (str(made.folder), None)
    assert "prompt 3" not in repr(found)


def test_metadata_of_an_older_version_comes_from_its_json(tmp_path):
    made = make(tmp_path / "set", "1.1 full")
    found = ac.fetch_dataset_metadata(made.folder)
    assert (found.format_version, found.num_prompts, found.labels) == ("1.1", 11, None)
    for file in (made.folder / "tensors").iterdir():
        file.unlink()
    assert ac.fetch_dataset_metadata(made.folder) == found, "no tensor is looked at"
