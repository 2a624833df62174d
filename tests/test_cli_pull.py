"""`actcache pull`: the options are those of `pull_dataset`, and what comes of it is said."""

from __future__ import annotations

import inspect
import json

import click
import numpy as np

import actcache as ac
from actcache.cli.app import app
from made_datasets import make
from share_helpers import MODEL, fill_pooled, new_space, new_store, text


def test_every_parameter_is_an_option_of_its_name():
    command = app.get_command(click.Context(app), "pull")
    options = {name for p in command.params for name in p.opts if name.startswith("--")}
    parameters = {f"--{name.replace('_', '-')}" for name in inspect.signature(ac.pull_dataset).parameters}
    # An argument, a secret that has no business in the list of processes, and what a terminal decides.
    assert parameters - {"--repo-id", "--token", "--show-progress"} <= options


def test_what_comes_of_it(cli, tmp_path):
    made = make(tmp_path / "set")
    where = ["--store", str(tmp_path / "s")]
    status, out, err = cli("pull", str(made.folder), *where)
    assert status == 0 and out.startswith(f"org/model: 11 prompts registered, of {made.folder} at ")
    assert "only the model's name is known" in err
    status, out, err = cli(
        "pull", str(made.folder), *where, "--materialize", "--layers", "0,2", "--trust-names", "--json"
    )
    said = json.loads(out)
    assert (status, err, said["prompts"], said["model_space"], said["trusted"]) == (0, "", 11, None, True)
    status, out, _ = cli("info", *where, "--json")
    (model,) = json.loads(out)["models"]
    assert model["pulled"] == f"{made.folder}@{said['commit']}" and model["model_hash"] == said["space"]
    assert (model["num_prompts"], model["num_layers"], model["has_logits"]) == (11, 3, True)
    _, out, _ = cli("info", *where)
    assert "pulled from" in out
    _, out, _ = cli("list", "org/model", *where)
    assert out.count("prompt ") == 11
    status, out, err = cli("show", "org/model", made.texts[4], *where, "--json")
    shown = json.loads(out)
    assert status == 0, err
    assert [site["site"] for site in shown["sites"]] == ["resid_post.0", "resid_post.2"]
    assert shown["pulled"].startswith(str(made.folder)) and shown["space"] == said["space"]
    # The other layer was registered before, and its vectors were not fetched.
    assert shown["not_here"] == ["resid_post.5"]
    assert cli("clear", "org/model", "--yes", *where)[0] == 0
    assert json.loads(cli("info", *where, "--json")[1])["models"] == []


def test_some_prompts_of_a_file(cli, tmp_path):
    store = new_store(tmp_path)
    fill_pooled(store, new_space(store), range(20))
    ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"q": text(i)}) for i in (3, 7)))
    options = ["--target-prompts", str(tmp_path / "prompts.jsonl"), "--column", "q", "--tensors", "resid_post.1"]
    there = ac.Store(tmp_path / "there")
    status, out, err = cli("pull", str(tmp_path / "set"), *options, "--store", str(there.location), "--json")
    assert status == 0, err
    said = json.loads(out)
    assert said["prompts"] == 2 and said["model_space"] == store.spaces()[0].space
    assert there.contains(said["space"], [text(3), text(4)], "resid_post.1", pooling="last_token").tolist() == [
        True,
        False,
    ]
    assert not there.contains(said["space"], [text(3)], "resid_post.0", pooling="last_token").any()
    found = there.read(said["space"], [text(3)], "resid_post.1", pooling="last_token")
    space = store.spaces()[0].space
    assert np.array_equal(found.numpy(), store.read(space, [text(3)], "resid_post.1", pooling="last_token").numpy())


def test_what_goes_wrong_is_one_line(cli, tmp_path):
    made = make(tmp_path / "set")
    status, out, err = cli("pull", str(made.folder), "--layers", "7", "--store", str(tmp_path / "s"))
    assert (status, out) == (2, "") and err.count("\n") == 1 and "no layer 7: it has 0, 2, 5" in err
    assert cli("pull", str(made.folder), "--layers", "x", "--store", str(tmp_path / "s"))[0] == 2
    assert not (tmp_path / "s").exists()
