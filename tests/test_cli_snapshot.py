"""What the verbs print for people: it changes only on purpose."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

import cli_scenario

SNAPSHOT = Path(__file__).parent / "snapshots" / "output.txt"


def test_output_is_what_was_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path.resolve()
    for name, value in cli_scenario.environment(home).items():
        monkeypatch.setenv(name, value)
    known, now = SNAPSHOT.read_text(encoding="utf-8"), cli_scenario.told(home)
    changes = list(difflib.unified_diff(known.splitlines(), now.splitlines(), "agreed", "now", lineterm="", n=1))
    assert not changes, "\n".join([*changes, "On purpose: python tests/cli_scenario.py > tests/snapshots/output.txt"])


def test_what_is_left_out_is_chance_alone(tmp_path: Path) -> None:
    text = f"  {tmp_path}/a  1.5 MB   3 prompts, 2.25 s, 0a1b2c3d4e5f, 1 - 2e-07 of 7 at 0.25\n"
    assert cli_scenario.without_chance(text, tmp_path) == "  HOME/a  SIZE  3 prompts, TIME, ID, x.x of 7 at x.x"
