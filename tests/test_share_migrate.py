"""Datasets in folders migrated and upgraded: every bit of every vector, and all else as it was."""

from __future__ import annotations

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import DatasetFormatError, OptionError
from actcache.share import reindex, split
from actcache.share.folder import Folder
from actcache.share.index import Index as DatasetIndex
from lmprobe_datasets import FIXTURES
from made_datasets import FULL, INDEX, VERSIONS, make, pa, pq
from migrate_helpers import INFO, SMALL, contents, litter, read_plainly, same_values
from share_helpers import BLOCKS, Published, has_right_digests

UNSPLIT = tuple(version for version in FULL if "split" not in version)
OLD = tuple(version for version in VERSIONS if version.startswith("1."))
CAPTURED = tuple(
    f"dataset_v{name}"
    for name in (
        "1.0_fullseq",
        "1.0_pooled",
        "1.1_fullseq",
        "1.1_pooled",
        "1.2_fullseq",
        "1.2_fullseq_split",
        "2_pooled",
    )
)


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def small_pieces(request, monkeypatch):
    """Also in pieces of two rows, as prompts of gigabytes are."""
    if request.param:
        monkeypatch.setattr(split, "_CHUNK", 50)
        monkeypatch.setattr("actcache.share.reindex._TOKENS", 5)
        monkeypatch.setattr("actcache.share.reindex._ROWS", 3)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("version", "limit"), [*((version, SMALL) for version in UNSPLIT), ("1.0 full", 2**30)])
def test_migrated(tmp_path, version, limit):
    extra = {"tags": [["a", "ß"], [], None] * 3 + [["a"]] * 2, "half": [i / 2 for i in range(11)]}
    made = make(tmp_path / "set", version, labels=[*range(10), None], extra=extra)
    (made.folder / "notes").mkdir()
    (made.folder / "notes" / "mine.txt").write_text("keep me")
    before = pq.read_table(made.folder / INDEX)
    logits = ac.load_activation_dataset(made.folder, tensors=["logits_topk"])[0]
    assert ac.migrate_dataset(made.folder, shard_max_bytes=limit) == str(made.folder)
    assert same_values(made)
    found = read_plainly(made.folder, made)
    lasts = len(range(0, 11, max(1, limit // 24)))
    assert found.tensors["hidden_layers"]["last_token_shards"] == lasts
    for path in made.folder.glob("tensors/hidden*"):
        assert path.stat().st_size <= max(limit, 6 * 24) + 200, "no larger than asked for, unless one prompt is"
    assert INFO not in found.files and (made.folder / "notes" / "mine.txt").read_text() == "keep me"
    # Nothing of the old shards is left, and every file is one of the dataset.
    shards = range(len(found.tensors["hidden_layers"]["shards"]))
    wanted = {f"tensors/hidden_layer{n:03d}_shard{s:03d}.safetensors" for n in (0, 2, 5) for s in shards}
    wanted |= {"tensors/logits_topk_000.safetensors", BLOCKS, INDEX, "README.md", "notes/mine.txt"}
    assert found.files == wanted and litter(made.folder) == []
    assert has_right_digests(found)
    for name in ("text", "label", "tags", "half", "num_tokens"):
        assert found.table[name].to_pylist() == before[name].to_pylist()
        assert found.table.schema.field(name).type == before.schema.field(name).type
    after = ac.load_activation_dataset(made.folder, tensors=["logits_topk"])[0]
    assert all(torch.equal(after[key], logits[key]) for key in logits)
    where = [(row["shard_index_logits"], row["row_offset_logits"]) for row in found.index]
    assert where == [(0, i) for i in range(11)]


@pytest.mark.parametrize("version", OLD)
def test_upgraded(tmp_path, version):
    made = make(tmp_path / "set", version, labels=["a", None] * 5 + ["b"], dtype=np.float16)
    files = {path: data for path, data in contents(made.folder).items() if path.startswith("tensors/")}
    ac.upgrade_dataset_format(made.folder)
    assert same_values(made)
    found = read_plainly(made.folder, made)
    now = contents(made.folder)
    assert INFO not in now and {path: now[path] for path in files} == files and litter(made.folder) == []
    about = ac.fetch_dataset_metadata(made.folder)
    assert (about.format_version, about.model_name, about.labels) == ("2.0", "org/model", ["a", None] * 5 + ["b"])
    assert "shard_index_hidden" not in found.table.column_names
    assert found.tensors["hidden_layers"]["dtype"] == "float16", "older releases always said float32"


@pytest.mark.parametrize("version", ["1.0 full", "1.1 full", "1.2 full"])
def test_one_after_the_other(tmp_path, version):
    made = make(tmp_path / "set", version)
    ac.upgrade_dataset_format(made.folder)
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    assert same_values(made) and read_plainly(made.folder, made)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_bits_stay(tmp_path, dtype):
    made = make(tmp_path / "set", "1.1 full", k=0)
    for name, tensors in made.files.items():
        values = {key: array.astype(dtype) for key, array in tensors.items()}
        for array in values.values():
            array.flat[0], array.flat[-1] = np.nan, np.inf
        _write(made.folder / name, values)
    before, _ = ac.load_activation_dataset(made.folder)
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    found = Published(made.folder)
    for layer in made.layers:
        rows = torch.cat([found.tokens(row["text"], layer=layer) for row in found.index])
        # Prompts lay one after the other; NaN equals nothing.
        assert torch.equal(rows.view(torch.uint8), before[f"hidden.layer_{layer}"].view(torch.uint8))
    assert found.tensors["hidden_layers"]["dtype"] == np.dtype(dtype).name


def _write(path, tensors):
    codes = {"float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    header, data, at = {}, b"", 0
    for key, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[key] = {
            "dtype": codes[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(raw)],
        }
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_rows_in_any_order(tmp_path):
    """Prompts whose rows do not lie in the order of the index: each keeps its own."""
    made = make(tmp_path / "set", "1.1 full")
    order = np.random.default_rng(1).permutation(11)
    for name, values in made.columns.items():
        values = values.to_pylist() if isinstance(values, pa.Array) else list(values)
        made.columns[name] = [values[i] for i in order]
    made.texts, made.vectors = [made.texts[i] for i in order], [made.vectors[i] for i in order]
    made.write()
    assert same_values(made)
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    assert same_values(made) and read_plainly(made.folder, made)


def test_prompts_of_one_token_each(tmp_path):
    made = make(tmp_path / "set", "1.0 full", longest=1)
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    found = read_plainly(made.folder, made)
    assert len(found.tensors["hidden_layers"]["shards"]) == 3 and same_values(made)


def test_router_logits_stay(tmp_path):
    made = make(tmp_path / "set", "1.2 full")
    values = np.random.default_rng(0).standard_normal((11, 4)).astype("f4")
    made.files["tensors/router_logits_000.safetensors"] = {"router.layer_2": values}
    made.metadata["tensors"]["router_logits"] = {
        "type": "router", "layers": [2], "num_experts": 4, "dtype": "float32", "pooling": "last_token",
        "shards": [{"file": "tensors/router_logits_000.safetensors", "num_prompts": 11}],
    }  # fmt: skip
    made.write()
    for change in (ac.upgrade_dataset_format, ac.migrate_dataset):
        change(made.folder)
        found = ac.load_activations(made.folder, site="router_logits", prompts=made.texts[::-1])[2]
        assert np.array_equal(found, values[::-1]) and same_values(made)
    # Of the file that stayed no digest is known, and nobody may think that all is checked.
    assert ac.fetch_dataset_metadata(made.folder).checksums == "some"


@pytest.mark.parametrize("name", CAPTURED)
def test_what_lmprobe_has_written(tmp_path, name):
    if not FIXTURES.is_dir():
        pytest.skip("the captured datasets of lmprobe are not on this machine")
    for change in (ac.migrate_dataset, ac.upgrade_dataset_format):
        folder = tmp_path / change.__name__ / "set"
        shutil.copytree(FIXTURES / name, folder, copy_function=shutil.copyfile)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        before, poolings = ac.fetch_dataset_metadata(folder), ["last_token"] + ["mean", None] * ("full" in name)
        wanted = [ac.load_activations(folder, pooling=p, as_dict=False) for p in poolings]
        tensors = ac.load_activation_dataset(folder, tensors=["logits_topk"])[0]
        if "full" not in name and change is ac.migrate_dataset:
            with pytest.raises(OptionError, match="one vector per prompt"):
                change(folder)
            continue
        change(folder)
        after = ac.fetch_dataset_metadata(folder)
        assert (after.prompts, after.labels, after.metadata) == (before.prompts, before.labels, before.metadata)
        assert after.provenance == before.provenance and after.model_name == before.model_name
        for pooling, values in zip(poolings, wanted, strict=True):
            found = ac.load_activations(folder, pooling=pooling, as_dict=False)
            assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, values, strict=True))
        found = ac.load_activation_dataset(folder, tensors=["logits_topk"])[0]
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert "license: cc-by-4.0" in (folder / "README.md").read_text()


def test_columns_of_others_that_look_like_those_of_1_2(tmp_path):
    made = make(
        tmp_path / "set", "1.1 full", extra={"shard_index_hidden": list("abcdefghijk"), "row_offset_own": [7] * 11}
    )
    ac.upgrade_dataset_format(made.folder)
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    found = read_plainly(made.folder, made)
    assert [row["shard_index_hidden"] for row in found.index] == list("abcdefghijk")
    assert [row["row_offset_own"] for row in found.index] == [7] * 11


def test_a_row_that_no_column_can_hold_is_named(tmp_path):
    index = DatasetIndex(Folder(make(tmp_path / "set", "1.1 full").folder))
    for name, values in (("row_offset", np.full(11, 2**31)), ("token_shard_ids", (np.full(11, 2**30), np.zeros(3)))):
        with pytest.raises(DatasetFormatError, match=f"set: .*{name}' would need numbers"):
            reindex.rewrite(
                index,
                tmp_path / "new.parquet",
                lengths=np.ones(11, np.int64),
                names=[name],
                make=lambda start, stop, name=name, values=values: {name: values},
                drop=(),
                metadata={},
            )


@pytest.mark.parametrize("change", [ac.migrate_dataset, ac.upgrade_dataset_format])
def test_a_dry_run_changes_nothing_and_says_all(tmp_path, change):
    made = make(tmp_path / "set", "1.0 full")
    before = contents(made.folder)
    said = change(made.folder, dry_run=True)
    assert contents(made.folder) == before and litter(made.folder) == []
    change(made.folder)
    after = contents(made.folder)
    lines = [line.split() for line in said.splitlines()[1:-1]]
    assert {line[1] for line in lines if line[0] == "add"} == after.keys() - before.keys()
    assert {line[1] for line in lines if line[0] == "remove"} == before.keys() - after.keys()
    for what, path, *size in lines:
        assert what == "remove" or int(size[0].replace(",", "")) == len(after[path])
    fetched = 4 * sum(v.size for v in made.vectors) if change is ac.migrate_dataset else 0
    assert f"fetch {fetched:,} bytes" in said


class TestTheJson:
    def test_stays_where_it_is_still_right(self, tmp_path):
        made = make(tmp_path / "set", "1.1 pooled")
        before = (made.folder / INFO).read_bytes()
        ac.upgrade_dataset_format(made.folder, remove_json=False)
        assert (made.folder / INFO).read_bytes() == before and same_values(made)

    def test_says_what_is_so_now(self, tmp_path):
        made = make(tmp_path / "set", "1.0 full")
        ac.upgrade_dataset_format(made.folder, remove_json=False)
        told = json.loads((made.folder / INFO).read_text())
        assert told["format_version"] == "2.0" and told == Published(made.folder).metadata
