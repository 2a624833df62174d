"""Datasets read back: every version, pooling, layers and prompts, against what was written into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import actcache as ac
from actcache.errors import (
    DatasetFormatError,
    DatasetLayerError,
    DatasetNotFoundError,
    MissingExtraError,
    NotCachedError,
    OptionError,
    PromptError,
    PromptTypeError,
    ValueOverflowError,
)
from actcache.share import shards
from made_datasets import FULL, INDEX, VERSIONS, make, pa, pq

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "lmprobe"
POOLINGS = ("last_token", "first_token", "mean", "max", "min")


@pytest.fixture(params=[False, True], ids=["whole files", "ranges"])
def small_reads(request, monkeypatch):
    """Also with files read in ranges and in pieces of a few rows, as large ones are."""
    if request.param:
        monkeypatch.setattr(shards, "_AT_ONCE", 0)
        monkeypatch.setattr(shards, "_RANGE", 48)
        monkeypatch.setattr(shards, "PIECE", 24)
        monkeypatch.setattr("actcache.share.load._BATCH_BYTES", 100)
        monkeypatch.setattr("actcache.share.folder.Folder.gap", 0)
        monkeypatch.setattr("actcache.share.index._BATCH_NUMBERS", 2)


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_back_what_was_put_in(tmp_path, version):
    made = make(tmp_path / "set", version)
    wanted = np.stack(made.expected())
    found = ac.load_activations(made.folder)
    assert list(found) == [0, 2, 5]
    for i, layer in enumerate(found):
        assert found[layer].dtype == np.float32
        assert np.array_equal(found[layer], wanted[:, i])
    stacked = ac.load_activations(str(made.folder), as_dict=False)
    assert stacked.shape == (11, 3, 6)
    assert np.array_equal(stacked, wanted)


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


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("version", FULL)
@pytest.mark.parametrize("pooling", [*POOLINGS, None])
def test_full_sequences_are_pooled_as_asked(tmp_path, version, pooling):
    made = make(tmp_path / "set", version)
    order = [7, 0, 3, 7, 10]
    found = ac.load_activations(
        made.folder, prompts=[made.texts[i] for i in order], layers=[5, 0], pooling=pooling, as_dict=False
    )
    wanted = [made.expected(pooling)[i][..., [2, 0], :] for i in order]
    assert len(found) == len(order)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == np.float32
        assert np.allclose(mine, theirs, rtol=1e-6, atol=1e-6) if pooling == "mean" else np.array_equal(mine, theirs)
    by_layer = ac.load_activations(made.folder, prompts=[made.texts[i] for i in order], layers=[5, 0], pooling=pooling)
    assert list(by_layer) == [5, 0]
    for i, prompt in enumerate(found):
        assert np.array_equal(by_layer[0][i], prompt[..., 1, :])


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_asked_for_twice_are_those(tmp_path, version):
    """Also where as many rows are wanted as lie between the first and the last of them."""
    made = make(tmp_path / "set", version)
    wanted = np.stack(made.expected())
    for order in ([0, 0, 2], [1, 1, 1], [2, 0, 0], [4, 6, 4, 4], [3, 3, 4, 6, 6], [10, 9, 10, 8, 8]):
        found = ac.load_activations(made.folder, prompts=[made.texts[i] for i in order], as_dict=False)
        assert np.array_equal(found, wanted[order]), order
    order = np.random.default_rng(8).integers(0, 11, 200)
    found = ac.load_activations(made.folder, prompts=[made.texts[i] for i in order], layers=[2])
    assert np.array_equal(found[2], wanted[order, 1])


def test_a_function_pools(tmp_path):
    made = make(tmp_path / "set", "2.0 split")
    found = ac.load_activations(made.folder, pooling=lambda rows: np.median(rows, axis=0), layers=2)
    wanted = np.stack([np.median(vector[:, 1], axis=0) for vector in made.vectors])
    assert np.allclose(found[2], wanted)
    with pytest.raises(OptionError, match=r"expected \[6\]"):
        ac.load_activations(made.folder, pooling=lambda rows: rows)


@pytest.mark.parametrize("pooling", ["first_token", "mean", "max", "min", None, np.mean])
def test_a_pooling_that_cannot_be_had_is_refused_by_name(tmp_path, pooling):
    made = make(tmp_path / "set")
    with pytest.raises(OptionError, match=r"pooled with 'last_token'.*choose 'last_token'"):
        ac.load_activations(made.folder, pooling=pooling)
    made.hidden["pooling"] = "mean"
    made.write()
    assert ac.load_activations(made.folder, pooling="mean")[0].shape == (11, 6)
    with pytest.raises(OptionError, match="pooled with 'mean'"):
        ac.load_activations(made.folder)


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no folder of a dataset"):
        ac.load_activations(tmp_path)
    with pytest.raises(DatasetNotFoundError, match="no folder of a dataset"):
        ac.load_activations(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        ac.load_activations("./absent")
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(DatasetNotFoundError, match="no dataset of activations"):
        ac.load_activations(tmp_path)


def test_poolings_of_other_names(tmp_path):
    made = make(tmp_path / "set")
    for wrong in ("last_tokn", 3, ["mean"]):
        with pytest.raises(OptionError, match="unknown pooling"):
            ac.load_activations(made.folder, pooling=wrong)
    with pytest.raises(OptionError, match="Did you mean 'last_token'"):
        ac.load_activations(made.folder, pooling="last_tokn")
    made.hidden["pooling"] = "attention_weighted"
    made.write()
    assert ac.load_activations(made.folder, pooling="attention_weighted")[0].shape == (11, 6)
    with pytest.raises(OptionError, match="pooled with 'attention_weighted'"):
        ac.load_activations(made.folder)


def test_an_index_that_packs_well_is_no_bomb(tmp_path):
    n = 200_000
    made = make(tmp_path / "set", n=2, layers=(0,), dim=2, k=0)
    made.files = {"tensors/hidden_layer000_shard000.safetensors": {"hidden.layer_0": np.ones((n, 2), np.float32)}}
    made.hidden["shards"], made.metadata["num_prompts"] = [{"num_prompts": n}], n
    made.columns = {"text": [str(i) for i in range(n)], "label": ["positive"] * n, "source": ["a"] * n}
    made.columns |= {"shard_index": np.zeros(n, np.int32), "row_offset": np.arange(n)}
    made.write()
    for options in ({}, {"compression": "zstd"}, {"compression": "zstd", "use_dictionary": False}):
        table = pq.read_table(made.folder / INDEX)
        pq.write_table(table, made.folder / INDEX, **options)
        found, labels = ac.load_activations(made.folder, return_labels=True)
        assert found[0].shape == (n, 2) and labels[-1] == "positive"
        assert ac.fetch_dataset_metadata(made.folder).prompts[7] == "7"


def test_few_prompts_of_many_take_little_memory(tmp_path):
    n = 30_000
    made = make(tmp_path / "set", n=2, layers=(0,), dim=2, k=0)
    rows = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)
    made.files = {"tensors/hidden_layer000_shard000.safetensors": {"hidden.layer_0": rows}}
    made.hidden["shards"], made.metadata["num_prompts"] = [{"num_prompts": n}], n
    made.columns = {"text": [f"{i} of very many" for i in range(n)], "label": [i % 3 for i in range(n)]}
    made.columns |= {"shard_index": np.zeros(n, np.int32), "row_offset": np.arange(n)}
    made.write()
    prompts = [made.columns["text"][i] for i in (n - 1, 5, 5)]
    ac.load_activations(made.folder, prompts=prompts)
    tracemalloc.start()
    try:
        found = ac.load_activations(made.folder, prompts=prompts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found[0], rows[[n - 1, 5, 5]])
    # Numbers that say where each prompt is; a text of Python's own takes as much again.
    assert peak < 100 * n
    labels = ac.load_activations(made.folder, prompts=prompts, return_labels=True)[1]
    assert labels.tolist() == [(n - 1) % 3, 2, 2]


def test_layers_and_prompts_that_are_not_there_are_named(tmp_path):
    made = make(tmp_path / "set")
    with pytest.raises(DatasetLayerError, match=r"no layer 7 of resid_post: it has 0, 2, 5"):
        ac.load_activations(made.folder, layers=[0, 7])
    with pytest.raises(ValueError, match="layer -1 counts from the end"):
        ac.load_activations(made.folder, layers=-1)
    for wrong in ([], [0, 0], ["0"], [True], 1.5):
        with pytest.raises(OptionError):
            ac.load_activations(made.folder, layers=wrong)
    with pytest.raises(NotCachedError, match=r"no prompt 'prompt 3: grösse', nor 1 more of the 3.*Did you mean"):
        ac.load_activations(made.folder, prompts=["prompt 3: grösse", made.texts[1], "other"])
    with pytest.raises(PromptError):
        ac.load_activations(made.folder, prompts=[])
    with pytest.raises(PromptTypeError):
        ac.load_activations(made.folder, prompts=[3])
    with pytest.raises(NotCachedError):
        ac.load_activations(made.folder, prompts=["\ud800"])
    with pytest.raises(OptionError, match="no site 'attn_out': it has resid_post"):
        ac.load_activations(made.folder, site="attn_out")
    with pytest.raises(OptionError, match="revision"):
        ac.load_activations(made.folder, revision="main")


def test_one_prompt_may_be_given_as_it_is(tmp_path):
    made = make(tmp_path / "set")
    assert np.array_equal(ac.load_activations(made.folder, prompts=made.texts[4])[0], made.expected()[4][None, 0])


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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_become_float32(tmp_path, dtype):
    made = make(tmp_path / "set", dtype=np.float32 if dtype == ml_dtypes.bfloat16 else dtype, k=0)
    if dtype == ml_dtypes.bfloat16:
        for name, tensors in made.files.items():
            saved = {key: torch.from_numpy(value.copy()).bfloat16() for key, value in tensors.items()}
            safetensors.torch.save_file(saved, made.folder / name)
    found = ac.load_activations(made.folder, as_dict=False)
    wanted = np.stack([vector[-1] for vector in made.vectors]).astype(dtype).astype(np.float32)
    assert found.dtype == np.float32 and np.array_equal(found, wanted)
    tensors, _ = ac.load_activation_dataset(made.folder, layers=[0])
    assert str(tensors["hidden.layer_0"].dtype) == f"torch.{np.dtype(dtype).name}"


def test_what_float32_cannot_hold_is_refused(tmp_path):
    made = make(tmp_path / "set", dtype=np.float64)
    made.files["tensors/hidden_layer002_shard001.safetensors"]["hidden.layer_2"][1, 1] = 1e300
    made.write()
    with pytest.raises(ValueOverflowError, match="load_activation_dataset"):
        ac.load_activations(made.folder)
    assert ac.load_activation_dataset(made.folder)[0]["hidden.layer_2"].max() == 1e300


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("version", VERSIONS)
def test_tensors_as_they_are_stored(tmp_path, version):
    perplexities = {f"perplexity_{name}": [float(i) + n for i in range(11)] for n, name in enumerate(("mean", "min"))}
    perplexities["perplexity_max"] = [None, *[7.5] * 10]
    made = make(tmp_path / "set", version, extra=perplexities)
    tensors, info = ac.load_activation_dataset(made.folder)
    assert info == made.metadata
    assert list(tensors) == [
        *(f"hidden.layer_{layer}" for layer in (0, 2, 5)), "logits_topk.indices", "logits_topk.values", "perplexity",
    ]  # fmt: skip
    files = sorted((made.folder / "tensors").glob("*.safetensors"))
    for key, value in tensors.items():
        if key == "perplexity":
            continue
        parts = []
        for file in files:
            with safe_open(file, "pt") as opened:
                parts += [opened.get_tensor(key)] if key in opened.keys() else []  # noqa: SIM118
        whole = torch.cat(parts)
        assert value.dtype == whole.dtype and torch.equal(value, whole), key
    assert tensors["perplexity"].shape == (11, 3) and tensors["perplexity"][2].tolist() == [2, 3, 7.5]
    assert torch.isnan(tensors["perplexity"][0, 2])
    some, _ = ac.load_activation_dataset(made.folder, tensors="hidden_layers", layers=[5])
    assert list(some) == ["hidden.layer_5"] and torch.equal(some["hidden.layer_5"], tensors["hidden.layer_5"])
    with pytest.raises(OptionError, match="Did you mean 'logits_topk'"):
        ac.load_activation_dataset(made.folder, tensors=["logits_top"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dataset_without_prompts(tmp_path, version):
    made = make(tmp_path / "set", version, k=0)
    made.metadata["num_prompts"] = 0
    made.hidden["shards"] = []
    made.hidden.pop("last_token_shards", None)
    kinds = {"text": pa.string(), "token_shard_ids": pa.list_(pa.int64()), "token_shard_offsets": pa.list_(pa.int64())}
    made.columns = {name: pa.array([], kinds.get(name, pa.int32())) for name in made.columns}
    made.write()
    found = ac.load_activations(made.folder)
    assert {layer: rows.shape for layer, rows in found.items()} == {0: (0, 6), 2: (0, 6), 5: (0, 6)}
    assert ac.load_activations(made.folder, return_labels=True)[1] is None
    if "pooled" not in version:
        assert ac.load_activations(made.folder, pooling=None, as_dict=False) == []
        assert ac.load_activations(made.folder, pooling="mean", as_dict=False).shape == (0, 3, 6)
    assert ac.load_activation_dataset(made.folder)[0]["hidden.layer_2"].shape == (0, 6)
    assert ac.fetch_dataset_metadata(made.folder).prompts == []


def test_progress_is_shown_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    made = make(tmp_path / "set")
    ac.load_activations(made.folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ac.load_activations(made.folder, show_progress=False)
    assert capsys.readouterr().err == ""
    ac.load_activations(made.folder)
    assert "/33" in capsys.readouterr().err, "rows of three layers"


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


def test_a_snapshot_of_the_hub_client_is_a_folder(tmp_path):
    """There files are links to blobs beside the snapshot; any other link is refused (see test_share_hostile)."""
    made = make(tmp_path / "set", "2.0 split")
    repository = tmp_path / "hub" / "datasets--org--set"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in made.folder.rglob("*") if p.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        link = snapshot / file.relative_to(made.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert np.array_equal(ac.load_activations(snapshot, as_dict=False), np.stack(made.expected()))


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    made = make(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for function in (ac.load_activations, ac.load_activation_dataset, ac.fetch_dataset_metadata):
        with pytest.raises(MissingExtraError, match=r"pip install 'actcache\[hub\]'"):
            function(made.folder)


def test_importing_the_functions_imports_no_pyarrow():
    code = "import actcache as ac, sys; ac.load_activations; ac.fetch_dataset_metadata; print('pyarrow' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# Datasets that eight releases of lmprobe have written.

needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the datasets of lmprobe's releases are not here")
WRITTEN = sorted(path.name for path in FIXTURES.glob("dataset_*"))


def _plain_read(folder: Path) -> dict[str, np.ndarray]:
    """Each prompt's rows ``[T, L, D]`` by the published recipe, a prompt and a layer at a time."""
    table = pq.read_table(folder / INDEX)
    said = {k.decode(): json.loads(v) for k, v in (table.schema.metadata or {}).items() if k.startswith(b"lmprobe:")}
    info = json.loads((folder / "lmprobe_info.json").read_text()) if not said else {}
    hidden = said["lmprobe:tensors"]["hidden_layers"] if said else info["tensors"]["hidden_layers"]
    found = {}
    for row in table.to_pylist():
        if row.get("token_shard_ids") is not None:
            places = list(zip(row["token_shard_ids"], row["token_shard_offsets"], strict=True))
        elif hidden["storage"] == "pooled":
            places = [(row["shard_index"], row["row_offset"])]
        else:
            start = row["token_offset"]
            if info["format_version"] == "1.2":
                start -= sum(shard["num_tokens"] for shard in hidden["shards"][: row["shard_index"]])
            places = [(row["shard_index"], start + t) for t in range(row["num_tokens"])]
        rows = []
        for shard, at in places:
            layers = []
            for layer in hidden["layers"]:
                name = hidden["shards"][shard].get(
                    "file", f"tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors"
                )
                with safe_open(folder / name, "np") as file:
                    layers.append(file.get_slice(f"hidden.layer_{layer}")[at])
            rows.append(layers)
        found[row["text"]] = np.array(rows)
    return found


@needs_fixtures
@pytest.mark.parametrize("name", WRITTEN)
def test_what_releases_of_lmprobe_wrote(name):
    given = json.loads((FIXTURES / "prompts.json").read_text())
    expected = np.load(FIXTURES / "expected.npz")
    prompts, folder = given["prompts"], FIXTURES / name
    plain = _plain_read(folder)
    found, labels = ac.load_activations(folder, prompts=prompts, as_dict=False, return_labels=True)
    assert labels.tolist() == given["labels"]
    assert np.array_equal(found, np.stack([plain[prompt][-1] for prompt in prompts]))
    # They computed these prompts in other batches than those of expected.npz, which moves the last bits.
    assert np.allclose(found, expected["pooled_last_token"], rtol=2e-6, atol=2e-8)
    metadata = ac.fetch_dataset_metadata(folder)
    assert metadata.prompts == list(plain) and metadata.num_prompts == 12
    assert np.array_equal(ac.load_activations(folder, as_dict=False), np.stack([rows[-1] for rows in plain.values()]))
    for i, prompt in enumerate(metadata.prompts):
        assert metadata.metadata["score"][i] == given["metadata"][prompts.index(prompt)]["score"]
    if "fullseq" in name:
        whole = ac.load_activations(folder, prompts=prompts, pooling=None, as_dict=False)
        for i, rows in enumerate(whole):
            assert np.array_equal(rows, plain[prompts[i]])
            assert np.allclose(rows.swapaxes(0, 1), expected[f"hidden_{i}"], rtol=2e-6, atol=2e-8)
        for pooling in ("mean", "first_token"):
            pooled = ac.load_activations(folder, prompts=prompts, pooling=pooling, as_dict=False)
            assert np.allclose(pooled, expected[f"pooled_{pooling}"], rtol=1e-5, atol=5e-8), pooling
    else:
        with pytest.raises(OptionError, match="pooled with 'last_token'"):
            ac.load_activations(folder, pooling="mean")


@needs_fixtures
@pytest.mark.parametrize("name", WRITTEN)
def test_logits_and_perplexity_of_releases_of_lmprobe(name):
    prompts = json.loads((FIXTURES / "prompts.json").read_text())["prompts"]
    expected = np.load(FIXTURES / "expected.npz")
    tensors, info = ac.load_activation_dataset(FIXTURES / name)
    order = [prompts.index(prompt) for prompt in ac.fetch_dataset_metadata(FIXTURES / name).prompts]
    assert np.array_equal(tensors["logits_topk.indices"].numpy(), expected["topk_indices"][order])
    assert np.allclose(tensors["logits_topk.values"].numpy(), expected["topk_values"][order], rtol=2e-6, atol=1e-7)
    assert ("perplexity" in tensors) == (info["format_version"] in ("1.2", "2.0"))
    if "perplexity" in tensors:
        assert np.allclose(tensors["perplexity"].numpy(), expected["perplexity"][order], rtol=2e-6)
