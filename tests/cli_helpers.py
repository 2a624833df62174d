"""What the tests of the command line share; `conftest.cli` is the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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


# Sends itself a signal at the n-th call of a function, so that it comes at the same place on every machine. Behind an @
# is what the first argument of the calls that count has in it.
STOPPED = """
import importlib, os, signal, sys
where, number, which, *sys.argv[1:] = sys.argv[1:]
where, _, about = where.partition("@")
module, _, path = where.partition(":")
*parents, name = path.split(".")
owner = importlib.import_module(module)
for parent in parents:
    owner = getattr(owner, parent)
inner, calls = getattr(owner, name), []
def counted(*arguments, **options):
    if not about or about in str(arguments[0]):
        calls.append(name)
        if len(calls) == int(number):
            os.kill(os.getpid(), int(which))
    return inner(*arguments, **options)
setattr(owner, name, counted)
from actcache.cli.app import main
main()
"""


def variables(home: Path) -> dict[str, str]:
    """The environment of processes whose default store is `home`/store."""
    return {
        **os.environ,
        "ACTCACHE_DIR": str(home / "store"),
        "XDG_CACHE_HOME": str(home / "host"),
        "TMPDIR": str(home),
    }


def actcache(home: Path, *arguments: str, before: tuple[str, ...] = ("-m", "actcache")) -> tuple[int, str, str]:
    """A process of the command in `home`: exit status, standard output, standard error."""
    ran = subprocess.run(
        [sys.executable, *before, *arguments],
        env=variables(home), cwd=home, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def stopped(home: Path, where: str, number: int, which: signal.Signals, *arguments: str) -> tuple[int, str, str]:
    """As `actcache`, with a signal at the n-th call of the function `where`, such as os:replace."""
    return actcache(home, *arguments, before=("-c", STOPPED, where, str(number), str(int(which))))
