"""What `--help` says, of every verb: its text changes only on purpose, and its examples can be typed."""

from __future__ import annotations

import difflib
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from actcache.cli.app import VERBS, app
from actcache.cli.examples import EXAMPLES
from cli_helpers import Cli

SNAPSHOT = Path(__file__).parent / "snapshots" / "help.txt"


def text_of(verb: str, cli: Cli) -> str:
    arguments = [verb, "--help"] if verb else ["--help"]
    status, out, error = cli(*arguments)
    assert (status, error) == (0, "")
    return f"$ actcache {' '.join(arguments)}\n{out}"


def test_help_is_what_was_agreed(cli: Cli) -> None:
    now = "\n".join(text_of(verb, cli) for verb in ["", *VERBS])
    known = SNAPSHOT.read_text(encoding="utf-8")
    changes = list(difflib.unified_diff(known.splitlines(), now.splitlines(), "agreed", "now", lineterm="", n=0))
    assert not changes, "\n".join([*changes, "On purpose: python tests/help_text.py > tests/snapshots/help.txt"])


def test_every_verb_has_examples() -> None:
    assert list(EXAMPLES) == list(VERBS)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_an_example_can_be_typed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verb, options and values are known; files that it names are there."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "prompts.csv", "prompts.jsonl", "vectors.npy"):
        Path(name).touch()
    Path(".cache/lmprobe").mkdir(parents=True)
    program, verb, *arguments = shlex.split(line.replace("~", str(tmp_path)))
    assert program == "actcache"
    assert line in EXAMPLES[verb]
    command = import_module(f"actcache.cli.{verb}").command
    with click.Context(app) as parent:
        context = command.make_context(verb, list(arguments), parent=parent)
    assert context.args == []


def test_examples_are_at_the_end_line_by_line(cli: Cli) -> None:
    _, out, _ = cli("load", "--help")
    assert out.rstrip().splitlines()[-2:] == ["    " + line for line in EXAMPLES["load"]]
