"""What the tests of the command line share; `conftest.cli` is the command."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from actcache.cli.app import run

Cli = Callable[..., tuple[int, str, str]]


def command(capsys: pytest.CaptureFixture[str], *before: str) -> Cli:
    """Runs the command in this process, with `before` in front of its arguments: exit status, standard output, standard
    error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        line: Sequence[str] = [*before, *arguments]
        status = run(line)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
