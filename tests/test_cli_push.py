"""`actcache push`: the options are those of `push_dataset`, and what goes wrong is one line."""

from __future__ import annotations

import inspect
import json

import click
import numpy as np
import pytest

import actcache as ac
from actcache.cli.app import app
from actcache.errors import OptionError
from share_helpers import MODEL, Published, fill_pooled, fill_tokens, new_space, new_store, rows, text

N = range(20)


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path)
    fill_pooled(store, new_space(store), N)
    return store


@pytest.fixture
def where(store):
    return ["--store", str(store.location)]


def test_every_parameter_is_an_option_of_its_name():
    command = app.get_command(click.Context(app), "push")
    options = {name for p in command.params for name in p.opts if name.startswith("--")}
    parameters = {f"--{name.replace('_', '-')}" for name in inspect.signature(ac.push_dataset).parameters}
    # What is an argument, comes out of files, or has no business in the list of processes.
    elsewhere = {"--repo-id", "--model-name", "--prompts", "--labels", "--metadata", "--token"}
    assert parameters - elsewhere <= options


def test_pushes_all_that_is_stored(cli, where, tmp_path):
    status, out, err = cli("push", f"{tmp_path}/set", MODEL, *where)
    assert (status, out) == (0, f"{tmp_path}/set\n"), err
    found = Published(tmp_path / "set")
    assert np.array_equal(found.row(text(3)).numpy(), rows(3, "resid_post.0")[-1]) and len(found.index) == 20


def test_prompts_and_labels_of_a_file(cli, where, tmp_path):
    lines = [json.dumps({"prompt": text(i), "topic": f"t{i}", "n": i, "score": i / 2, "tags": [i]}) for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    options = ["--label-column", "topic", "--tensors", "resid_post.1", "--no-shuffle", "--license", "mit", "--json"]
    options += [part for name in ("n", "score", "tags") for part in ("--metadata-column", name)]
    status, out, err = cli("push", f"{tmp_path}/set", MODEL, str(tmp_path / "prompts.jsonl"), *options, *where)
    assert status == 0, err
    assert json.loads(out) == {"dataset": f"{tmp_path}/set"}
    found = Published(tmp_path / "set")
    assert [(row["text"], row["label"]) for row in found.index] == [(text(i), f"t{i}") for i in range(3)]
    assert found.tensors["hidden_layers"]["layers"] == [1]
    assert [found.table[name].to_pylist() for name in ("n", "score", "tags")] == [
        [0, 1, 2],
        [0, 0.5, 1],
        [[0], [1], [2]],
    ]
    assert [str(found.table.schema.field(name).type) for name in ("n", "score")] == ["int64", "double"]
    assert "license: mit" in (tmp_path / "set" / "README.md").read_text()


def test_one_of_several_variants(cli, store, where, tmp_path):
    other = new_space(store, weights="def")
    fill_tokens(store, other, N, seed=2)
    status, _, err = cli("push", f"{tmp_path}/set", MODEL, *where)
    assert status == 2 and "stored in 2 variants" in err and other in err and len(err.splitlines()) == 1
    status, _, err = cli("push", f"{tmp_path}/set", MODEL, "--space", other[:8], *where)
    assert status == 0, err
    assert np.array_equal(Published(tmp_path / "set").tokens(text(4)).numpy(), rows(4, "resid_post.0", seed=2))


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--tensors", "attn_ou"], 2, "not stored"),
        (["--pooling", "mean"], 2, "nothing is stored with pooling='mean'"),
        (["--shard-max-bytes", "0"], 2, "shard-max-bytes"),
        (["--label-column", "x"], 2, "needs FILES"),
        (["--metadata-column", "x"], 2, "needs FILES"),
        (["--prompt", "never seen"], 1, "Warm them up"),
        (["--prompt", "never seen", "--prompt", text(1), "--no-skip-missing"], 1, "1 of 2 prompts"),
    ],
)
def test_what_cannot_be_is_one_line(cli, where, tmp_path, options, status, message):
    found, out, err = cli("push", f"{tmp_path}/set", MODEL, *options, *where)
    assert found == status and message in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "set").exists()


def test_a_column_that_cannot_be_is_named_by_its_option(cli, where, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text(i), "n": [1, "a"][i]}) for i in range(2)))
    status, _, err = cli("push", f"{tmp_path}/set", MODEL, f"{tmp_path}/p.jsonl", "--metadata-column", "n", *where)
    assert status == 2 and "metadata['n'] has values of several types (int, str)" in err
    status, _, err = cli("push", f"{tmp_path}/set", MODEL, f"{tmp_path}/p.jsonl", "--metadata-column", "m", *where)
    assert status == 1 and "'m' is expected, and there is prompt, n" in err and not (tmp_path / "set").exists()


def test_a_space_is_named_by_what_lists_it(store, tmp_path):
    (space,) = store.spaces()
    assert ac.push_dataset(tmp_path / "set", MODEL, [text(3)], space=space, store=store) == str(tmp_path / "set")
    with pytest.raises(OptionError, match="space is 3: expected the id of a variant, or its SpaceInfo"):
        ac.push_dataset(tmp_path / "other", MODEL, [text(3)], space=3, store=store)


def test_nothing_is_overwritten(cli, where, tmp_path):
    assert cli("push", f"{tmp_path}/set", MODEL, *where)[0] == 0
    status, _, err = cli("push", f"{tmp_path}/set", MODEL, *where)
    assert status == 1 and "pass --exist-ok to replace" in err and "exist_ok" not in err
    assert cli("push", f"{tmp_path}/set", MODEL, "--exist-ok", "--prompt", text(1), *where)[0] == 0
    assert len(Published(tmp_path / "set").index) == 1


def test_the_hub_needs_a_token(cli, where, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    status, _, err = cli("push", "org/set", MODEL, *where)
    assert status == 1 and "hf auth login" in err
