"""Datasets in folders migrated and upgraded: every bit of every vector, and all else as it was; or nothing changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import DatasetAccessError, DatasetFormatError, DatasetNotFoundError, DiskFullError, OptionError
from actcache.share import exchange, folder_change, reindex, split
from actcache.share.folder import Folder
from actcache.share.index import Index as DatasetIndex
from actcache.share.migrate import Migration
from actcache.share.recard import updated
from lmprobe_datasets import FIXTURES
from made_datasets import FULL, INDEX, VERSIONS, make, pa, pq
from share_helpers import BLOCKS, Published, has_right_digests

SMALL = 100
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
POOLINGS = ("last_token", "first_token", "mean", "max", "min", None)
INFO = "lmprobe_info.json"


def contents(folder):
    """Every file below a folder, and where links lead."""
    return {
        p.relative_to(folder).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


def litter(folder):
    return [p.name for p in folder.parent.iterdir() if p != folder]


def same_values(made):
    """Whether all vectors are read as they were put in, whatever is asked for."""
    for pooling in POOLINGS if made.version and made.hidden["storage"] == "full_sequence" else ("last_token",):
        found = ac.load_activations(made.folder, pooling=pooling, as_dict=False)
        for mine, wanted in zip(found, made.expected(pooling), strict=True):
            assert np.allclose(mine, wanted, rtol=1e-6) if pooling == "mean" else np.array_equal(mine, wanted), pooling
    some = [made.texts[i] for i in (7, 0, 10)]
    found = ac.load_activations(made.folder, prompts=some, layers=[5])[5]
    assert np.array_equal(found, np.stack([made.expected()[i][2] for i in (7, 0, 10)]))
    assert ac.fetch_dataset_metadata(made.folder).prompts == made.texts
    return True


def read_plainly(folder, made):
    """The same with nothing but the format: the places the index names, in the files the patterns name."""
    found = Published(folder)
    told = found.tensors["hidden_layers"]
    assert found.metadata["format_version"] == "2.0" and found.metadata["num_prompts"] == len(made.texts)
    for row, vectors in zip(found.index, made.vectors, strict=True):
        for i, layer in enumerate(made.layers):
            assert np.array_equal(found.row(row["text"], layer=layer).float().numpy(), vectors[-1, i].astype("f4"))
            if told["storage"] == "full_sequence":
                assert np.array_equal(
                    found.tokens(row["text"], layer=layer).float().numpy(), vectors[:, i].astype("f4")
                )
    return found


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


class TestNothingToDo:
    @pytest.mark.parametrize("version", ["1.2 split", "2.0 split"])
    def test_split_already(self, tmp_path, version, caplog):
        made = make(tmp_path / "set", version)
        before = contents(made.folder)
        assert ac.migrate_dataset(made.folder) == str(made.folder)
        assert "shards of their own already" in caplog.text and ("upgrade" in caplog.text) is version.startswith("1")
        assert "nothing changes" in ac.migrate_dataset(made.folder, dry_run=True)
        assert contents(made.folder) == before

    @pytest.mark.parametrize("version", [v for v in VERSIONS if v.startswith("2")])
    def test_of_2_0_already(self, tmp_path, version, caplog):
        made = make(tmp_path / "set", version)
        (made.folder / INFO).write_text("{}")
        before = contents(made.folder)
        assert ac.upgrade_dataset_format(made.folder) == str(made.folder)
        assert "of format 2.0 already" in caplog.text and contents(made.folder) == before

    def test_of_what_is_pooled(self, tmp_path):
        made = make(tmp_path / "set", "1.1 pooled")
        before = contents(made.folder)
        with pytest.raises(OptionError, match=r"one vector per prompt.*upgrade_dataset_format"):
            ac.migrate_dataset(made.folder)
        assert contents(made.folder) == before

    def test_where_nothing_is(self, tmp_path):
        for change in (ac.migrate_dataset, ac.upgrade_dataset_format):
            with pytest.raises(DatasetNotFoundError):
                change(tmp_path / "absent")
        with pytest.raises(OptionError, match="private"):
            ac.migrate_dataset(tmp_path, private=True)


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


class TestHostile:
    """Refused by name, with every byte as it was."""

    def refused(self, made, match, kind=DatasetFormatError, changes=(ac.migrate_dataset, ac.upgrade_dataset_format)):
        before = contents(made.folder)
        for change in changes:
            for dry_run in (True, False):
                with pytest.raises(kind, match=match):
                    change(made.folder, dry_run=dry_run)
        assert contents(made.folder) == before and litter(made.folder) == []

    @pytest.mark.parametrize(
        ("version", "column", "row", "value", "named"),
        [
            ("1.1 full", "shard_index", 3, -1, "prompt 3 .* of shard -1"),
            ("1.2 full", "shard_index", 3, 77, "prompt 3 .* of shard 77"),
            ("1.1 full", "token_offset", 4, -1, "prompt 4"),
            ("1.0 full", "token_offset", 4, 10**12, "prompt 4"),
            ("1.1 full", "num_tokens", 4, 0, "prompt 4 has 0 rows"),
            ("1.1 full", "num_tokens", 4, 10**9, "prompt 4 has 1,000,000,000 rows"),
            ("1.2 full", "row_offset_logits", 4, 11, "prompt 4 .* of logits_topk"),
            ("1.2 full", "text", 4, None, "no value for 1 prompts"),
        ],
    )
    def test_places_outside_the_shards(self, tmp_path, version, column, row, value, named):
        made = make(tmp_path / "set", version)
        values = made.columns[column]
        values = values.to_pylist() if isinstance(values, pa.Array) else list(values)
        values[row] = value
        made.columns[column] = values
        made.write()
        self.refused(made, named)

    @pytest.mark.parametrize("column", ["text", "num_tokens", "token_offset", "shard_index"])
    def test_columns_that_are_not_there(self, tmp_path, column):
        made = make(tmp_path / "set", "1.1 full")
        del made.columns[column]
        made.write()
        self.refused(made, f"no column '{column}'")

    def test_files_that_are_not_what_the_dataset_says(self, tmp_path):
        made = make(tmp_path / "set", "1.1 full")
        path = made.folder / "tensors/hidden_layer002_shard001.safetensors"
        good = path.read_bytes()
        for data, named in (
            (b"", "hidden_layer002_shard001"),
            (good[:-4], "file has|describes"),
            (b"\xff" * 200, "header"),
        ):
            path.write_bytes(data)
            self.refused(made, named)
        path.unlink()
        self.refused(made, "no file tensors/hidden_layer002_shard001", DatasetNotFoundError)
        path.symlink_to(tmp_path / "outside")
        self.refused(made, "is a link")

    def test_layers_of_several_dtypes_in_one_file_to_be(self, tmp_path):
        made = make(tmp_path / "set", "1.1 full")
        name = "tensors/hidden_layer002_shard001.safetensors"
        made.files[name] = {key: array.astype(np.float16) for key, array in made.files[name].items()}
        made.write()
        self.refused(made, "holds float16, and .* float32", changes=[ac.migrate_dataset])

    def test_a_file_that_two_tensors_share(self, tmp_path):
        made = make(tmp_path / "set", "1.1 full")
        name = "tensors/hidden_layer000_shard000.safetensors"
        made.files[name]["router.layer_2"] = np.ones((11, 4), "f4")
        made.metadata["tensors"]["router_logits"] = {
            "type": "router", "layers": [2], "pooling": "last_token", "shards": [{"file": name, "num_prompts": 11}],
        }  # fmt: skip
        made.write()
        self.refused(made, "of router_logits is also a file of hidden layers", changes=[ac.migrate_dataset])

    def test_metadata_of_half_characters(self, tmp_path):
        made = make(tmp_path / "set", "1.1 pooled")
        made.metadata["tensors"]["logits_topk"]["dtype"] = "half \ud800"
        made.metadata["note"] = "\udfff"
        made.write()
        ac.upgrade_dataset_format(made.folder)
        assert same_values(made) and Published(made.folder).metadata["note"] == "\udfff"
        made = make(tmp_path / "other" / "set", "1.1 pooled")
        made.metadata["\ud800"] = 1
        made.write()
        self.refused(made, "its metadata has a key", changes=[ac.upgrade_dataset_format])

    def test_a_ton_of_text_from_little(self, tmp_path, monkeypatch):
        monkeypatch.setattr("actcache.share.reindex._MOST_TEXT", 1 << 20)
        made = make(tmp_path / "set", "1.1 full", extra={"note": ["x" * (1 << 18)] * 11})
        self.refused(made, "texts recur so often")

    def test_a_repository_of_other_things(self, tmp_path):
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "README.md").write_text("# hello")
        with pytest.raises(DatasetNotFoundError, match="no dataset of activations"):
            ac.migrate_dataset(tmp_path / "set")

    def test_a_cache_of_the_hub_client_stays(self, tmp_path):
        made = make(tmp_path / "set", "1.1 full")
        snapshot = tmp_path / "datasets--a--b" / "snapshots" / ("c" * 40)
        snapshot.parent.mkdir(parents=True)
        (snapshot.parent.parent / "blobs").mkdir()
        made.folder.rename(snapshot)
        for number, path in enumerate(sorted(snapshot.rglob("*.safetensors"))):
            path.rename(snapshot.parent.parent / "blobs" / f"{number:064x}")
            path.symlink_to(f"../../../blobs/{number:064x}")
        index = snapshot.parent.parent / "blobs" / ("f" * 64)
        (snapshot / INDEX).rename(index)
        (snapshot / INDEX).symlink_to(f"../../../blobs/{index.name}")
        before = contents(snapshot)
        for change in (ac.migrate_dataset, ac.upgrade_dataset_format):
            with pytest.raises(OptionError, match="cache of the Hub's client"):
                change(snapshot)
        assert contents(snapshot) == before


def test_no_file_becomes_whole_of_what_was_not_read(tmp_path):
    """Where one file fails the others are stopped, in the middle of their rows."""
    made = make(tmp_path / "set", "1.1 full")
    with Migration(made.folder).planned() as plan:
        change = plan.change
        change.source.stop.set()
        for file in change.files:
            with pytest.raises(DatasetAccessError, match="stopped"), (tmp_path / "file").open("wb") as out:
                file.write(out)


class TestTheFolder:
    def test_what_is_others_stays(self, tmp_path):
        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "empty").mkdir()
        (made.folder / "deep" / "er").mkdir(parents=True)
        (made.folder / "deep" / "er" / "data").write_bytes(b"1")
        (made.folder / "link").symlink_to("deep/er")
        (made.folder / "deep").chmod(0o750)
        (made.folder / "tensors" / "own.safetensors").write_bytes(b"mine")
        ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
        assert same_values(made)
        assert (made.folder / "empty").is_dir() and os.readlink(made.folder / "link") == "deep/er"
        assert (made.folder / "link" / "data").read_bytes() == b"1"
        assert (made.folder / "deep").stat().st_mode & 0o777 == 0o750
        assert (made.folder / "tensors" / "own.safetensors").read_bytes() == b"mine"

    def test_named_by_a_link(self, tmp_path):
        made = make(tmp_path / "elsewhere" / "set", "1.0 full")
        (tmp_path / "link").symlink_to(made.folder)
        assert ac.migrate_dataset(tmp_path / "link") == str(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and same_values(made) and litter(made.folder) == []

    def test_changed_meanwhile(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")
        link = folder_change._link_others

        def meanwhile(*args):
            (made.folder / "new").write_text("x")
            link(*args)

        monkeypatch.setattr(folder_change, "_link_others", meanwhile)
        with pytest.raises(DatasetAccessError, match="somebody has changed"):
            ac.migrate_dataset(made.folder)
        assert (made.folder / INFO).exists() and (made.folder / "new").exists() and same_values(made)
        monkeypatch.undo()
        ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
        assert read_plainly(made.folder, made) and (made.folder / "new").exists() and litter(made.folder) == []

    def test_no_room(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")
        before = contents(made.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(DiskFullError, match="are free"):
            ac.migrate_dataset(made.folder)
        assert contents(made.folder) == before

    def test_without_links_and_without_exchange(self, tmp_path, monkeypatch):
        def no_link(*args, **options):
            raise OSError(errno.EPERM, "no links here")

        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "mine.txt").write_text("keep me")
        monkeypatch.setattr(folder_change.os, "link", no_link)
        monkeypatch.setattr(exchange, "_AT_CWD", {})
        ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
        assert same_values(made) and read_plainly(made.folder, made)
        assert (made.folder / "mine.txt").read_text() == "keep me" and litter(made.folder) == []


_KILLED = """
import os, signal, sys
import actcache as ac
from actcache.share import folder_change
target, function, after = sys.argv[1:]
whole = getattr(folder_change, function) if hasattr(folder_change, function) else None
def end(*args):
    if after == "after":
        whole(*args)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(folder_change, function, end)
ac.migrate_dataset(target, shard_max_bytes=100)
"""


@pytest.mark.parametrize(
    ("function", "after", "old"),
    [
        pytest.param("_link_others", "before", True, marks=pytest.mark.slow),
        pytest.param("change_places", "before", True, marks=pytest.mark.slow),
        ("change_places", "after", False),
    ],
)
def test_a_kill_leaves_the_old_one_or_the_new_one(tmp_path, function, after, old):
    made = make(tmp_path / "set", "1.0 full")
    (made.folder / "mine.txt").write_text("keep me")
    before = contents(made.folder)
    ran = subprocess.run([sys.executable, "-c", _KILLED, str(made.folder), function, after], check=False, timeout=60)
    assert ran.returncode == -9
    assert (contents(made.folder) == before) is old and same_values(made)
    # What a crash did to files that were made already is seen.
    for path in (tmp_path / ".set.migrating").rglob("hidden_layer002_shard004.safetensors"):
        if old:
            path.write_bytes(bytes(path.stat().st_size))
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    assert same_values(made) and read_plainly(made.folder, made)
    assert (made.folder / "mine.txt").read_text() == "keep me" and litter(made.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("f", ["migrate_dataset", "upgrade_dataset_format"])
def test_a_kill_at_any_time(tmp_path, f):
    """Killed after ever more of what it asks the system for: never anything but the old dataset or the new one."""
    code = (
        "import os, signal, sys, actcache as ac\n"
        "ac.migrate_dataset\n"
        "left = int(sys.argv[2])\n"
        "def watch(event, args):\n"
        "    global left\n"
        "    if event in ('open', 'os.rename', 'os.link', 'os.remove', 'os.rmdir', 'os.mkdir', 'shutil.copyfile'):\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import actcache.share.folder_change, actcache.share.hub_change, pyarrow.parquet, pyarrow.compute, ml_dtypes\n"
        "sys.addaudithook(watch)\n"
        f"ac.{f}(sys.argv[1])\n"
    )
    done, at = False, 1
    while not done:
        made = make(tmp_path / f"{at}" / "set", "1.0 full")
        (made.folder / "mine.txt").write_text("keep me")
        ran = subprocess.run([sys.executable, "-c", code, str(made.folder), str(at)], check=False, timeout=60)
        assert ran.returncode in (0, -9)
        done = ran.returncode == 0
        assert same_values(made) and (made.folder / "mine.txt").read_text() == "keep me", at
        getattr(ac, f)(made.folder)
        assert same_values(made) and (made.folder / "mine.txt").read_text() == "keep me", at
        assert read_plainly(made.folder, made) and litter(made.folder) == [], at
        at += 7


@pytest.mark.parametrize("name", [".README.md.new", "index/.train-00000-of-00001.parquet.new"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    made = make(tmp_path / "set", "1.2 full")
    (made.folder / "README.md").write_text("a card\n")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (made.folder / name).symlink_to(outside)
    ac.upgrade_dataset_format(made.folder)
    assert outside.read_text() == "mine" and not outside.is_symlink()
    assert not (made.folder / "README.md").is_symlink() and not (made.folder / INDEX).is_symlink()
    assert same_values(made)


def test_a_folder_that_is_a_link_is_not_written_into(tmp_path):
    made = make(tmp_path / "set", "1.2 full")
    shutil.move(made.folder / "index", tmp_path / "elsewhere")
    (made.folder / "index").symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    with pytest.raises(ac.ActCacheError, match="is a link"):
        ac.upgrade_dataset_format(made.folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before


class TestTheCard:
    def card(self, text):
        described = {
            "hidden_layers": {"layers": [0, 1], "dim": 4, "storage": "pooled", "pooling": "mean", "shards": []}
        }
        return updated(
            text, repo_id="a/b", model="m", described=described, columns=["text"], count=3, note="upgraded"
        )  # fmt: skip

    def test_what_people_wrote_stays(self):
        text = (
            "---\nlicense: mit\nlanguage: [de]\n---\n# Title\n\nWhy we made this.\n\n## Contents\n\nstale\n\n"
            "## Load with lmprobe\n\n```sh\n## Contents of a comment\nstale\n```\n\n"
            "## Citation\n\n```\n## Contents\nkept\n```\n\n## Provenance\n\n- by us\n"
        )  # fmt: skip
        made = self.card(text)
        assert made.startswith("---\nlicense: mit\nlanguage: [de]\nconfigs:\n") and "stale" not in made
        assert "Why we made this." in made and "```\n## Contents\nkept\n```" in made
        assert made.index("## Contents\n\n| tensors") < made.index("## Load with actcache") < made.index("## Citation")
        assert made.endswith("## Provenance\n\n- by us\n- upgraded\n")
        assert self.card(made).count("## Contents\n\n|") == 1 and self.card(made).count("configs:") == 1

    @pytest.mark.parametrize("text", [None, "", "plain words", "---\nno end of it", "## Provenance\n- x"])
    def test_cards_of_any_kind(self, text):
        made = self.card(text)
        assert made.startswith("---\nconfigs:") and "| hidden_layers | resid_post | 0 to 1 |" in made
        assert "- upgraded\n" in made and (text or "").strip("- \n") in made

    def test_one_that_is_no_text_stays_as_it_is(self, tmp_path):
        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "README.md").write_bytes(b"\xff\xfe\x00")
        ac.migrate_dataset(made.folder)
        assert (made.folder / "README.md").read_bytes() == b"\xff\xfe\x00" and same_values(made)
