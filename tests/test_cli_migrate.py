"""`actcache migrate` and `actcache upgrade`: what they say, and that they do it."""

from __future__ import annotations

import inspect
import json

import click
import numpy as np
import pytest

import actcache as ac
from actcache.cli.app import app
from made_datasets import INDEX, make


@pytest.mark.parametrize(
    ("verb", "function"), [("migrate", ac.migrate_dataset), ("upgrade", ac.upgrade_dataset_format)]
)
def test_every_parameter_is_an_option_of_its_name(verb, function):
    command = app.get_command(click.Context(app), verb)
    options = {name for p in command.params for name in p.opts if name.startswith("--")}
    parameters = {f"--{name.replace('_', '-')}" for name in inspect.signature(function).parameters}
    assert parameters - {"--repo-id", "--token"} <= options


def test_migrate(cli, tmp_path):
    made = make(tmp_path / "set", "1.0 full")
    status, out, err = cli("migrate", str(made.folder), "--dry-run", "--shard-max-bytes", "100")
    assert status == 0 and f"replace  {INDEX}" in out and "remove   lmprobe_info.json" in out, err
    assert (made.folder / "lmprobe_info.json").exists()
    dry = json.loads(cli("migrate", str(made.folder), "--dry-run", "--json", "--shard-max-bytes", "100")[1])
    status, out, err = cli("migrate", str(made.folder), "--json", "--shard-max-bytes", "100")
    assert status == 0 and not err
    found = json.loads(out)
    assert (found["dry_run"], found["changed"], found["dataset"]) == (False, True, str(made.folder))
    assert {**found, "dry_run": True} == dry
    assert found["added"] == {path: (made.folder / path).stat().st_size for path in found["added"]}
    assert np.array_equal(ac.load_activations(made.folder)[2], np.stack(made.expected())[:, 1])
    status, out, _ = cli("migrate", str(made.folder))
    assert status == 0 and "shards of their own already" in out
    assert json.loads(cli("migrate", str(made.folder), "--json")[1])["changed"] is False


def test_upgrade(cli, tmp_path):
    made = make(tmp_path / "set", "1.1 pooled")
    status, out, err = cli("upgrade", str(made.folder), "--no-remove-json")
    assert status == 0 and "from format 1.1 to 2.0" in out and len(out.splitlines()) == 1, err
    assert (made.folder / "lmprobe_info.json").exists()
    assert ac.fetch_dataset_metadata(made.folder).format_version == "2.0"
    status, out, _ = cli("upgrade", str(made.folder), "--dry-run")
    assert status == 0 and "of format 2.0 already" in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["migrate", "./absent"], 1, "no folder of a dataset"),
        (["migrate", "{pooled}"], 2, "one vector per prompt"),
        (["migrate", "{pooled}", "--private"], 2, "private"),
        (["migrate", "{pooled}", "--shard-max-bytes", "0"], 2, "shard-max-bytes"),
        (["upgrade", "a b"], 2, "is neither a repository"),
        (["upgrade", "org/a b"], 2, "no repository of the Hub"),
    ],
)
def test_what_cannot_be_is_one_line(cli, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    made = make(tmp_path / "set", "1.1 pooled")
    found, out, err = cli(*(argument.format(pooled=made.folder) for argument in arguments))
    assert found == status and message in err and len(err.splitlines()) == 1 and not out
