"""`actcache selftest`: a table a person can read, JSON with all of it, and an exit status."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.extract.answer import Lookup
from actcache.selftest.report import Cell, Check
from actcache.testing.tiny import tiny_model
from cli_helpers import Cli, command


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The selftest, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    return command(capsys, "selftest")


def saved(folder: Path, family: str, **overrides: Any) -> str:
    path = folder / family
    tiny_model(family, **overrides).save_pretrained(path)
    return str(path)


def table(out: str, first: str) -> list[list[str]]:
    """The table whose header begins with `first`: header and rows as words."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[: len(first.split())] == first.split())
    rows = [lines[start].split()]
    for line in lines[start + 2 :]:
        if not line.strip():
            break
        rows.append(line.split())
    return rows


def test_without_a_model_it_tests_the_shipped_one(cli: Cli) -> None:
    status, out, err = cli()
    assert status == 0, err
    header, *rows = table(out, "block")
    assert header == ["block", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    assert [row[0] for row in rows] == [str(layer) for layer in range(6)]
    assert all(re.fullmatch(r"exact|\d\.\de-\d\d", value) for row in rows for value in row[1:])
    checks = {row[0] for row in table(out, "check")}
    assert {"identities", "hidden", "alone", "padded", "left", "right", "store", "pooled"} <= checks
    assert "embed exact" in out
    assert "mixer_out: not applicable." in out
    assert "batching: prompts of any length together." in out
    assert "\nRight: what is captured, extracted and stored is what the model computes" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_every_field_of_the_report(cli: Cli) -> None:
    status, out, err = cli("--layers", "0,-1", "--seed", "5", "--max-tokens", "12", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found) == {field.name for field in dataclasses.fields(ac.SelftestReport)}
    assert found["ok"] is True
    assert found["seed"] == 5
    assert max(found["prompt_lengths"]) <= 12
    for item, kind in ((found["cells"][0], Cell), (found["checks"][0], Check)):
        assert set(item) == {field.name for field in dataclasses.fields(kind)}
    assert {c["site"] for c in found["cells"] if c["site"].startswith("mlp_out")} == {"mlp_out.0", "mlp_out.5"}


def test_what_is_wrong_is_named_and_is_the_exit_status(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Lookup.rows

    def doubled(self: Lookup) -> list[list[Any]]:
        return [[rows * 2 for rows in prompt] for prompt in whole(self)]

    monkeypatch.setattr(Lookup, "rows", doubled)
    status, out, _ = cli("--layers", "last")
    assert status == 1
    assert re.search(r"store .*WRONG", out)
    assert "WRONG" in table(out, "block")[1]
    assert re.search(r"\nWrong: \w+\S* \(stored, then read by a new\s+reader: what\s+is", out)
    status, out, _ = cli("--layers", "last", "--json")
    assert status == 1
    assert json.loads(out)["ok"] is False


def test_many_blocks_are_gathered(cli: Cli, tmp_path: Path) -> None:
    status, out, _ = cli(saved(tmp_path, "llama", num_hidden_layers=40), "--max-tokens", "6")
    assert status == 0
    rows = table(out, "block")[1:]
    assert [row[0] for row in rows][:2] == ["0-2", "3-5"]
    assert rows[-1][0] == "39"
    assert len(rows) == 14


def test_both_stacks_have_a_table(cli: Cli, tmp_path: Path) -> None:
    status, out, err = cli(saved(tmp_path, "t5"), "--max-tokens", "6")
    assert status == 0, err
    assert table(out, "encoder")[0] == ["encoder", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    assert re.search(r"^ *cross_ *\n decoder .* attn_out +attn_out ", out, re.MULTILINE)
    assert len(table(out, "decoder")[1]) == 7
    assert "not reached: relative_attention_max_distance of 32 tokens (--max-tokens" in out
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))


def test_wrong_usage_and_a_missing_model(cli: Cli, tmp_path: Path) -> None:
    assert cli("--max-tokens", "1")[0] == 2
    assert cli("--layers", "nine")[0] == 2
    status, _, err = cli(str(tmp_path / "absent"))
    assert status == 1
    assert "absent" in err
    assert cli("--layers", "9")[0] == 2
