"""What the metadata of a dataset may say, and what a dataset may be called."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from actcache.errors import DatasetFormatError, NewerFormatError, OptionError
from actcache.share.format import describe, expand
from actcache.share.location import folder_exists, local_folder

HIDDEN = {
    "type": "hidden",
    "layers": [0, 3],
    "dim": 8,
    "dtype": "float32",
    "layout": "per_layer",
    "file_pattern": "tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors",
    "key_pattern": "hidden.layer_{layer}",
    "storage": "pooled",
    "pooling": "mean",
    "shards": [{"num_prompts": 2}, {"num_prompts": 1}],
}
METADATA = {
    "format_version": "2.0",
    "model": {"name": "org/model", "revision": "abc"},
    "num_prompts": 3,
    "tensors": {"hidden_layers": HIDDEN},
}


def changed(*path, to):
    metadata = copy.deepcopy(METADATA)
    inner = metadata
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return metadata


def test_a_description_says_where_every_tensor_is():
    found = describe(METADATA, "here")
    assert (found.version, found.model_name, found.revision, found.num_prompts) == ("2.0", "org/model", "abc", 3)
    group = found.tensors["hidden_layers"]
    assert (group.site, group.layers, group.dim, group.pooling) == ("resid_post", (0, 3), 8, "mean")
    assert [shard.rows for shard in group.shards] == [2, 1]
    assert group.file(1, 3) == "tensors/hidden_layer003_shard001.safetensors"
    assert group.key(3) == "hidden.layer_3"


def test_older_versions_leave_out_patterns():
    given = {key: value for key, value in HIDDEN.items() if not key.endswith("_pattern")}
    group = describe(changed("tensors", "hidden_layers", to=given), "here").tensors["hidden_layers"]
    assert group.file(0, 3) == "tensors/hidden_layer003_shard000.safetensors"
    together = {**given, "shards": [{"file": "tensors/a.safetensors", "num_prompts": 3}]}
    del together["layout"]
    group = describe(changed("tensors", "hidden_layers", to=together), "here").tensors["hidden_layers"]
    assert group.file(0, 3) == group.file(0, 0) == "tensors/a.safetensors"
    assert group.key(3) == "hidden.layer_3"


def test_the_oldest_called_tensors_by_another_name():
    metadata = {key: value for key, value in METADATA.items() if key != "tensors"}
    assert list(describe({**metadata, "tensor_types": METADATA["tensors"]}, "here").tensors) == ["hidden_layers"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("num_prompts",), 4, "num_prompts"),
        (("num_prompts",), -1, "num_prompts"),
        (("num_prompts",), True, "num_prompts"),
        (("num_prompts",), 10**30, "num_prompts"),
        (("format_version",), "banana", "format_version"),
        (("format_version",), 2.0, "format_version"),
        (("format_version",), "0.9", "format_version"),
        (("tensors",), [], "tensors"),
        (("tensors",), {}, "tensors"),
        (("tensors",), {"../hidden": HIDDEN}, "description of a tensor"),
        (("tensors", "hidden_layers"), 3, "description of a tensor"),
        (("tensors", "hidden_layers", "layers"), [0, 0], "layers"),
        (("tensors", "hidden_layers", "layers"), [-1], "a layer"),
        (("tensors", "hidden_layers", "layers"), ["0"], "a layer"),
        (("tensors", "hidden_layers", "layers"), {"0": 1}, "layers"),
        (("tensors", "hidden_layers", "dim"), 10**12, "width"),
        (("tensors", "hidden_layers", "pooling"), None, "pooling"),
        (("tensors", "hidden_layers", "last_token_shards"), 1, "last_token_shards"),
        (("tensors", "hidden_layers", "shards"), {"0": 1}, "shards"),
        (("tensors", "hidden_layers", "shards"), [None], "shard 0"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 1.5}, "shard 0"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 10**12}, "hold 1,000,000,000,001 prompts"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": "/etc/passwd"}, "safetensors"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": "/etc/x.safetensors"}, "lead out"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": "a/../../x.safetensors"}, "lead out"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": "a//x.safetensors"}, "lead out"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": "..\\x.safetensors"}, "lead out"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": ".git/x.safetensors"}, "lead out"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": "a\0.safetensors"}, "lead out"),
        (("tensors", "hidden_layers", "shards", 0), {"num_prompts": 2, "file": ["a"]}, "safetensors"),
        (("tensors", "hidden_layers", "file_pattern"), "../{layer}_{shard}.safetensors", "lead out"),
        (("tensors", "hidden_layers", "file_pattern"), "/{layer}_{shard}.safetensors", "lead out"),
        (("tensors", "hidden_layers", "file_pattern"), "{layer}.safetensors", "same file"),
        (("tensors", "hidden_layers", "file_pattern"), "{shard.__class__}.safetensors", "no pattern"),
        (("tensors", "hidden_layers", "file_pattern"), "{shard:>1000000000}.safetensors", "no pattern"),
        (("tensors", "hidden_layers", "file_pattern"), "{shard!r}_{0}.safetensors", "no pattern"),
        (("tensors", "hidden_layers", "file_pattern"), "{shard:03d}{.safetensors", "no pattern"),
        (("tensors", "hidden_layers", "file_pattern"), 7, "no pattern"),
        (("tensors", "hidden_layers", "key_pattern"), "{other}", "no pattern"),
        (("tensors", "hidden_layers", "key_pattern"), "hidden", "names no layer.* 2 layers"),
        (("tensors", "hidden_layers", "key_pattern"), "{shard}{layer}", "nothing but digits between"),
        (("tensors", "hidden_layers", "file_pattern"), "{layer}{shard}.safetensors", "nothing but digits between"),
        (("tensors", "hidden_layers", "file_pattern"), "{layer:02d}0{shard}.safetensors", "nothing but digits between"),
    ],
)
def test_what_metadata_may_not_say_is_refused_by_name(path, value, named):
    with pytest.raises(DatasetFormatError, match=named) as caught:
        describe(changed(*path, to=value), "org/set")
    assert "org/set" in str(caught.value)


def test_a_newer_format_is_refused_and_a_newer_revision_of_it_read():
    with pytest.raises(NewerFormatError, match=r"format 3\.0"):
        describe(changed("format_version", to="3.0"), "here")
    with pytest.warns(UserWarning, match=r"2\.1"):
        assert describe(changed("format_version", to="2.1"), "here").version == "2.1"


def test_only_numbers_are_filled_into_a_pattern():
    assert expand("a{layer:03d}-{shard}-{layer}", 7, 12) == "a007-12-7"
    assert expand("{shard:02d}", 0, 1234) == "1234"


def test_folders_and_repositories_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_folder("org/name") is None, "the Hub, whatever lies here"
    assert local_folder(Path("org/name")) == tmp_path / "org" / "name"
    assert local_folder("./org") == local_folder("~/org") == local_folder(f"file://{tmp_path}/org") == tmp_path / "org"
    assert local_folder("file:///a%20b") == Path("/a b")
    for wrong in ("", "a/b/c", "org/../x", "org name", "https://huggingface.co/datasets/a/b", "file://host/a", 3, None):
        with pytest.raises(OptionError):
            local_folder(wrong)
    with pytest.raises(OptionError, match=r"\./a/b/c"):
        local_folder("a/b/c")
    with pytest.raises(OptionError) as caught:
        local_folder("name")
    assert str(caught.value) == '\'name\' is neither a repository ("org/name") nor a folder ("./name").'


def test_an_empty_folder_is_none(tmp_path):
    assert not folder_exists(tmp_path)
    assert not folder_exists(tmp_path / "absent")
    (tmp_path / "a").touch()
    assert folder_exists(tmp_path)
