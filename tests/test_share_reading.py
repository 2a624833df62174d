"""Datasets read back: every version, pooling, layers and prompts, against what was written into them."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import actcache as ac
from actcache.errors import (
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


def make_many(folder, rows, columns):
    """A dataset of one layer of many prompts, all in one shard."""
    n = len(rows)
    made = make(folder, n=2, layers=(0,), dim=2, k=0)
    made.files = {"tensors/hidden_layer000_shard000.safetensors": {"hidden.layer_0": rows}}
    made.hidden["shards"], made.metadata["num_prompts"] = [{"num_prompts": n}], n
    made.columns = {**columns, "shard_index": np.zeros(n, np.int32), "row_offset": np.arange(n)}
    made.write()
    return made


def test_an_index_that_packs_well_is_no_bomb(tmp_path):
    n = 200_000
    columns = {"text": [str(i) for i in range(n)], "label": ["positive"] * n, "source": ["a"] * n}
    made = make_many(tmp_path / "set", np.ones((n, 2), np.float32), columns)
    for options in ({}, {"compression": "zstd"}, {"compression": "zstd", "use_dictionary": False}):
        table = pq.read_table(made.folder / INDEX)
        pq.write_table(table, made.folder / INDEX, **options)
        found, labels = ac.load_activations(made.folder, return_labels=True)
        assert found[0].shape == (n, 2) and labels[-1] == "positive"
        assert ac.fetch_dataset_metadata(made.folder).prompts[7] == "7"


def test_few_prompts_of_many_take_little_memory(tmp_path):
    n = 30_000
    rows = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)
    columns = {"text": [f"{i} of very many" for i in range(n)], "label": [i % 3 for i in range(n)]}
    made = make_many(tmp_path / "set", rows, columns)
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
