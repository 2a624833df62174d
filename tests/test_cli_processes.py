"""The command as a process: with pipes that end, on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from actcache.demo import model_path
from cli_helpers import actcache, variables
from share_helpers import fill_tokens, fill_two_spaces, new_space, new_store

MODEL = str(model_path())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a store."""
    fill_two_spaces(tmp_path)
    return tmp_path


def shell(home: Path, command: str) -> tuple[int, str, str]:
    program = f'actcache() {{ "{sys.executable}" -m actcache "$@"; }}\n'
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}{command}"],
        env=variables(home), cwd=home, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def test_a_reader_that_goes_away_and_outputs_that_are_closed(home: Path) -> None:
    # More than a pipe holds.
    store = new_store(home)
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


def waits(pid: int) -> bool:
    """Whether a process sleeps, and does not compute."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


# Opens the terminal as its own, so that what is typed there can interrupt it.
AT_TERMINAL = 'exec "$@" < "$TERMINAL"'


def on_terminal(
    home: Path,
    *arguments: str,
    out: Path | None = None,
    err: Path | None = None,
    typed: tuple[str, bytes] | None = None,
    **added: str,
) -> tuple[int, str]:
    """Exit status, and what a terminal of 100 columns is sent; `out` and `err` are files that get one of the streams.
    `typed`: once the first has been shown, the second is typed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    terminal = os.ttyname(theirs)
    chosen = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")
    environment = {k: v for k, v in variables(home).items() if k not in chosen}
    environment |= {"TERM": "xterm-256color", "TERMINAL": terminal}
    redirected = f"> {out or terminal} 2> {err or terminal}"
    process = subprocess.Popen(
        ["sh", "-c", f"{AT_TERMINAL} {redirected}", "sh", sys.executable, "-m", "actcache", *arguments],
        env=environment | added, cwd=home, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    said, patience = b"", time.monotonic() + 120
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.05)[0]:
                said += os.read(ours, 1 << 16)
            assert time.monotonic() < patience, said
            # A signal that comes while readline makes itself ready is noticed at the next key.
            if typed is not None and typed[0].encode() in said and waits(process.pid):
                os.write(ours, typed[1])
                typed = None
        return process.wait(60), said.decode()
    finally:
        process.kill()
        process.wait(60)
        os.close(theirs)
        os.close(ours)


COLOUR = re.compile(r"\x1b\[[\d;]*m")
STYLES = re.compile(r"\x1b\[(?:[0-9]|2[0-9])?(?:;(?:[0-9]|2[0-9]))*m")
"""Bold and the like, which are no colours."""


def test_colours_are_for_terminals(home: Path) -> None:
    status, coloured = on_terminal(home, "stats", "org/model")
    assert status == 0 and COLOUR.search(coloured) and "resid_post.0" in coloured
    assert max(map(len, COLOUR.sub("", coloured).splitlines())) <= 100
    for more in ({"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        assert "\x1b" not in STYLES.sub("", on_terminal(home, "stats", "org/model", **more)[1])
    assert "\x1b" not in on_terminal(home, "stats", "org/model", TERM="dumb")[1]
    assert "\x1b" not in on_terminal(home, "stats", "org/model", TERM="dumb", FORCE_COLOR="1")[1]
    assert "\x1b" not in on_terminal(home, "stats", "org/model", "--json")[1]
    # Errors have none either.
    assert "\x1b" not in on_terminal(home, "stats", "org/absent")[1]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
def test_what_is_no_terminal_gets_no_colours(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    status, out, err = actcache(home, "stats", "org/model")
    assert (status, err) == (0, "") and "resid_post.0" in out and "\x1b" not in out
    # Also where standard error is one.
    assert on_terminal(home, "stats", "org/model", out=home / "file") == (0, "")
    written = (home / "file").read_text()
    assert "resid_post.0" in written and "\x1b" not in written


@pytest.mark.slow
def test_bars_are_for_terminals_and_on_standard_error(home: Path) -> None:
    (home / "prompts.txt").write_text("Snow is white.\nThe sky is blue.\n")
    arguments = ["warmup", MODEL, "prompts.txt", "--layers", "0"]
    out, err = home / "out", home / "err"
    status, said = on_terminal(home, *arguments, out=out)
    assert status == 0 and "extracting" in said and "%|" in said
    assert out.read_text().startswith("2 prompts: 0 were stored, 2 extracted") and out.read_text().count("\n") == 2
    status, said = on_terminal(home, *arguments, "--sites", "attn_out", err=err)
    assert (status, err.read_text()) == (0, "")
    assert said.startswith("2 prompts: 0 were stored, 2 extracted") and said.count("\n") == 2 and "%|" not in said


@pytest.mark.parametrize(("key", "left"), [(b"n\n", 3), (b"\x03", 3), (b"\x04", 3), (b"y\n", 1)])
def test_clear_asks_on_a_terminal_and_nothing_but_yes_deletes(home: Path, key: bytes, left: int) -> None:
    """\x03 is Ctrl-C as a terminal sends it, \x04 the end of what is typed."""
    status, said = on_terminal(home, "clear", "org/model", typed=("[y/N]", key))
    lines = said.replace("\r", "").splitlines()
    if left == 3:
        gone = "What has gone has gone, all else is as it was: the same command goes on from there."
        why = "nothing was deleted." if key == b"n\n" else f"stopped. {gone}"
        assert (status, lines[-1]) == (1, f"actcache: {why}")
    else:
        assert (status, lines[-1]) == (0, "40 prompts deleted.")
    assert len(list((home / "store").rglob("*.safetensors"))) == left


def test_a_stop_during_an_import_has_the_status_of_any_other(tmp_path: Path) -> None:
    """`python -m` ends by the signal once a Ctrl-C passed through source text that something executes."""
    program = """
import os, signal
from actcache.cli import app
def imports(stopped):
    try:
        exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    except KeyboardInterrupt:
        return 1
app.run = imports
app.main()
"""
    (tmp_path / "stopped.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "-m", "stopped"], cwd=tmp_path, env=variables(tmp_path), timeout=60, check=False
    )
    assert ran.returncode == 1
