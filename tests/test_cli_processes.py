"""The command as a process: stopped by signals in the middle of its work, with pipes that end, on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actcache.store.store import Store
from share_helpers import fill_tokens, new_space

# Sends itself a signal at the n-th call of a function, so that it comes at the same place on every machine.
STOPPED = """
import importlib, os, sys
where, number, which, *sys.argv[1:] = sys.argv[1:]
module, _, path = where.partition(":")
*parents, name = path.split(".")
owner = importlib.import_module(module)
for parent in parents:
    owner = getattr(owner, parent)
inner, calls = getattr(owner, name), []
def counted(*arguments, **options):
    calls.append(name)
    if len(calls) == int(number):
        os.kill(os.getpid(), int(which))
    return inner(*arguments, **options)
setattr(owner, name, counted)
from actcache.cli.app import main
main()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a store of three segments in two spaces."""
    store = Store(tmp_path / "store", index_dir=tmp_path / "index")
    first, second = new_space(store), new_space(store, weights="def", name="org/other")
    fill_tokens(store, first, range(20))
    fill_tokens(store, first, range(20, 40))
    fill_tokens(store, second, range(5))
    store.close()
    return tmp_path


def variables(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ACTCACHE_DIR": str(home / "store"),
        "XDG_CACHE_HOME": str(home / "host"),
        "TMPDIR": str(home),
    }


def actcache(home: Path, *arguments: str, before: tuple[str, ...] = ("-m", "actcache")) -> tuple[int, str, str]:
    ran = subprocess.run(
        [sys.executable, *before, *arguments],
        env=variables(home), cwd=home, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def stopped(home: Path, where: str, number: int, which: signal.Signals, *arguments: str) -> tuple[int, str, str]:
    return actcache(home, *arguments, before=("-c", STOPPED, where, str(number), str(int(which))))


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_verb_that_is_stopped_says_how_to_go_on(home: Path, which: signal.Signals) -> None:
    status, out, err = stopped(home, "actcache.store.store:Store.verify", 1, which, "verify")
    assert (status, out) == (1, "")
    # click ends the line that a terminal has begun with ^C.
    assert err.strip() == "actcache: stopped. The store is as good as before: the same command begins anew."
    assert actcache(home, "verify")[0] == 0


def shell(home: Path, command: str) -> tuple[int, str, str]:
    program = f'actcache() {{ "{sys.executable}" -m actcache "$@"; }}\n'
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}{command}"],
        env=variables(home), cwd=home, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def test_a_reader_that_goes_away_and_outputs_that_are_closed(home: Path) -> None:
    # More than a pipe holds.
    store = Store(home / "store", index_dir=home / "index")
    fill_tokens(store, new_space(store), range(100, 6000))
    store.close()
    _, out, err = shell(home, "actcache list org/model | head -n 1")
    assert out.count("\n") == 1 and err == ""
    assert shell(home, "actcache info >&-") == (0, "", "")
    assert shell(home, "actcache info --json >&- 2>&-") == (0, "", "")
    assert shell(home, "actcache list absent >&- 2>&-") == (1, "", "")
    status, out, _ = shell(home, "actcache verify <&- 2>&-")
    assert status == 0 and "intact" in out
    assert shell(home, "actcache info > /dev/full")[0] == 1
    assert "No space left" in shell(home, "actcache info > /dev/full")[2]


def on_terminal(home: Path, *arguments: str, **added: str) -> str:
    """What a terminal of 100 columns is sent."""
    ours, theirs = pty.openpty()
    environment = variables(home) | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"} | added
    process = subprocess.Popen(
        [sys.executable, "-m", "actcache", *arguments],
        env=environment, cwd=home, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while select.select([ours], [], [], 120)[0]:
            try:
                said += os.read(ours, 1 << 16)
            except OSError:
                break
    finally:
        process.kill()
        process.wait(60)
        os.close(ours)
    return said.decode()


COLOUR = re.compile(r"\x1b\[[\d;]*m")


def test_colours_are_for_terminals(home: Path) -> None:
    coloured = on_terminal(home, "stats", "org/model")
    assert COLOUR.search(coloured) and "resid_post.0" in coloured
    plain = on_terminal(home, "stats", "org/model", NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3[0-7][\d;]*m", plain)
    assert "\x1b" not in on_terminal(home, "stats", "org/model", TERM="dumb")
    assert not COLOUR.search(actcache(home, "stats", "org/model")[1])
    assert "\x1b" not in on_terminal(home, "stats", "org/model", "--json")
    assert max(map(len, COLOUR.sub("", coloured).splitlines())) <= 100
