"""`actcache load` and `actcache dataset-info`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from cli_helpers import Cli
from made_datasets import make


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_load_writes_what_the_function_returns(cli: Cli, tmp_path, suffix):
    made = make(tmp_path / "set", "2.0 split", labels=["x", "ü"] * 5 + ["x"])
    out = tmp_path / f"out.{suffix}"
    status, printed, error = cli(
        "load", str(made.folder), "--out", str(out), "--layers", "5,0", "--pooling", "max", "--json"
    )
    assert status == 0, error
    assert json.loads(printed)["tensors"] == {"layer_5": [11, 6], "layer_0": [11, 6]}
    wanted = np.stack(made.expected("max"))
    if suffix == "npz":
        found = np.load(out, allow_pickle=False)
        assert found["prompts"].tolist() == made.texts and found["labels"].tolist() == made.columns["label"]
        assert np.array_equal(found["layer_5"], wanted[:, 2]) and np.array_equal(found["layer_0"], wanted[:, 0])
    else:
        with safe_open(out, "np") as file:
            said = file.metadata()
            assert json.loads(said["prompts"]) == made.texts and json.loads(said["labels"]) == made.columns["label"]
            assert (said["model"], said["pooling"], said["site"]) == ("org/model", "max", "resid_post")
            assert np.array_equal(file.get_tensor("layer_5"), wanted[:, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "set"]), "nothing else is left"


def test_texts_that_no_array_of_texts_can_hold(cli: Cli, tmp_path):
    made = make(tmp_path / "set", labels=["a\0", *["b"] * 10])
    made.columns["text"][4] = "ends in zeros\0\0"
    made.write()
    status, _, error = cli("load", str(made.folder), "--out", str(tmp_path / "a.npz"), "--no-labels")
    assert status == 2 and "prompt 4, 'ends in zeros" in error and "ends in a NUL character" in error
    assert not (tmp_path / "a.npz").exists()
    made.columns["text"][4] = "ends in none"
    made.write()
    status, _, error = cli("load", str(made.folder), "--out", str(tmp_path / "a.npz"))
    assert status == 2 and f"prompt 0, {made.columns['text'][0]!r}, has the label 'a" in error
    assert "ends in a NUL character" in error and "--no-labels" in error
    made.columns["text"][4] = "ends in zeros\0\0"
    made.write()
    assert cli("load", str(made.folder), "--out", str(tmp_path / "a.safetensors"))[0] == 0
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert json.loads(file.metadata()["prompts"]) == made.columns["text"]
        assert json.loads(file.metadata()["labels"]) == made.columns["label"]


def test_load_takes_prompts_in_the_order_of_a_file(cli: Cli, tmp_path):
    made = make(tmp_path / "set", "1.1 full")
    (tmp_path / "p.txt").write_text(f"{made.texts[7]}\n{made.texts[0]}\n")
    out = tmp_path / "out.npz"
    status, _, error = cli(
        "load", str(made.folder), "--out", str(out), "--prompts", str(tmp_path / "p.txt"), "--pooling", "none"
    )
    assert status == 0, error
    found = np.load(out)
    at = found["row_offset"]
    assert at.tolist() == [0, len(made.vectors[7]), len(made.vectors[7]) + 1]
    for layer, i in ((0, 0), (2, 1), (5, 2)):
        assert np.array_equal(found[f"layer_{layer}"], np.concatenate([made.vectors[7][:, i], made.vectors[0][:, i]]))
    assert "labels" not in found


def test_labels_that_are_missing_or_contradict_each_other(cli: Cli, tmp_path):
    made = make(tmp_path / "set", labels=[1, None, *[0] * 9])
    status, _, error = cli("load", str(made.folder), "--out", str(tmp_path / "a.npz"))
    assert status == 2 and f"prompt 1, {made.texts[1]!r}, has no label, which only a .safetensors file" in error
    assert "--no-labels" in error
    # Also where labels are known only with the prompts that are asked for.
    (tmp_path / "p.txt").write_text(f"{made.texts[2]}\n{made.texts[1]}\n")
    asked = ["--prompts", str(tmp_path / "p.txt")]
    status, _, error = cli("load", str(made.folder), "--out", str(tmp_path / "a.npz"), *asked)
    assert status == 2 and f"prompt 1, {made.texts[1]!r}, has no label" in error
    assert cli("load", str(made.folder), "--out", str(tmp_path / "a.npz"), "--no-labels")[0] == 0
    assert cli("load", str(made.folder), "--out", str(tmp_path / "a.safetensors"))[0] == 0
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert json.loads(file.metadata()["labels"]) == [1, None, *[0] * 9]
    made.columns["text"][1] = made.columns["text"][0]
    made.write()
    status, _, error = cli("load", str(made.folder), "--out", str(tmp_path / "b.safetensors"))
    assert status == 1 and "two labels" in error
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--out", "x.txt"], 2, ".safetensors or .npz"),
        (["--out", "absent/x.npz"], 2, "no folder"),
        (["--out", "x.npz", "--layers", "first"], 2, "neither all nor numbers"),
        (["--out", "x.npz", "--layers", "9"], 2, "has no layer 9"),
        (["--out", "x.npz", "--pooling", "mean"], 2, "pooled with 'last_token'"),
        (["--out", "x.npz", "--pooling", "meen"], 2, "Did you mean 'mean'"),
        (["--out", "x.npz", "--site", "attn"], 2, "no site 'attn'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(cli: Cli, tmp_path, monkeypatch, arguments, status, named):
    made = make(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    found, _, error = cli("load", str(made.folder), *arguments)
    assert found == status and named in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.npz"))


def test_dataset_info_tells_what_there_is(cli: Cli, tmp_path):
    made = make(tmp_path / "set", "2.0 split", labels=["b", "a"] * 5 + ["a"], extra={"rank": list(range(11))})
    status, printed, error = cli("dataset-info", str(made.folder))
    assert status == 0, error
    for part in ("format 2.0", "org/model", "prompts  11", "labels   a, b", "columns  rank", "0, 2, 5", "every token"):
        assert part in printed
    found = json.loads(cli("dataset-info", str(made.folder), "--json")[1])
    assert found["tensors"] == made.metadata["tensors"]
    assert (found["num_prompts"], found["available_layers"], found["labels"]) == (11, [0, 2, 5], ["a", "b"])
    assert (found["perplexity"], found["prompts_without_label"], found["checksums"]) == (False, 0, None)
    assert "checked  nothing" in printed
    assert cli("dataset-info", str(tmp_path / "absent"))[0] == 1


def test_what_a_stranger_wrote_does_not_reach_the_terminal_as_it_is(cli: Cli, tmp_path):
    made = make(tmp_path / "set", labels=["\x1b[2J[bold]x"] * 11)
    made.metadata["model"] = {"name": "evil\x1b]0;title\x07\nprompts  99"}
    made.write()
    printed = cli("dataset-info", str(made.folder))[1]
    assert "\x1b" not in printed and "\x07" not in printed and "\nprompts  99" not in printed
    assert "[bold]x" in printed
