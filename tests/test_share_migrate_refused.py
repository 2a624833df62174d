"""Datasets that are neither migrated nor upgraded: nothing to do, or not what they say, and nothing changed."""

from __future__ import annotations

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError, DatasetNotFoundError, OptionError
from made_datasets import INDEX, VERSIONS, make
from migrate_helpers import INFO, contents, litter, same_values
from share_helpers import Published


class TestNothingToDo:
    @pytest.mark.parametrize("version", ["1.2 split", "2.0 split"])
    def test_split_already(self, tmp_path, version, caplog):
        made = make(tmp_path / "set", version)
        before = contents(made.folder)
        assert ac.migrate_dataset(made.folder) == str(made.folder)
        assert "shards of their own already" in caplog.text and ("upgrade" in caplog.text) is version.startswith("1")
        assert "nothing changes" in ac.migrate_dataset(made.folder, dry_run=True)
        assert contents(made.folder) == before

    @pytest.mark.parametrize("dry_run", [False, True])
    def test_of_one_that_lacks_the_digests_it_speaks_of(self, tmp_path, dry_run):
        made = make(tmp_path / "set", "1.2 full")
        ac.migrate_dataset(made.folder)
        (made.folder / "tensors/blocks.xxh3").unlink()
        before = contents(made.folder)
        for change in (ac.migrate_dataset, ac.upgrade_dataset_format):
            with pytest.raises(DatasetFormatError, match=r"has no tensors/blocks\.xxh3.*not all there"):
                change(made.folder, dry_run=dry_run)
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
        made.put(column, row, value)
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
