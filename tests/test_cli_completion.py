"""Tab in bash, zsh and fish: verbs, options and values that are known, in shells that really run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actcache.store.store import Store
from share_helpers import fill_pooled, new_space

# What completes a line in a shell that nobody types into: its words, the last of which is not finished.
SHELLS = {
    "bash": """
source /dev/stdin <<< "$(_ACTCACHE_COMPLETE=bash_source actcache)"
compopt() { :; }
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_actcache_completion actcache
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "zsh": """
compdef() { :; }
compadd() { print -rl -- "${(@P)@[-1]}"; }
_describe() { print -rl -- "${(@P)3}"; }
eval "$(_ACTCACHE_COMPLETE=zsh_source actcache)"
words=("$@"); CURRENT=$#
_actcache_completion
""",
    "fish": """
_ACTCACHE_COMPLETE=fish_source actcache | source
complete --do-complete "$argv"
""",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command and a store with two models."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    command = home / "bin" / "actcache"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m actcache "$@"\n')
    command.chmod(0o755)
    store = Store(home / "store", index_dir=home / "index")
    for name in ("org/first", "org/second"):
        fill_pooled(store, new_space(store, name=name, weights=name), range(2))
    store.close()
    broken = home / "store" / "v1" / ("0" * 32)
    broken.mkdir()
    (broken / "space.json").write_text('{"label": [')
    return home


def environment(home: Path) -> dict[str, str]:
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "ACTCACHE_DIR": str(home / "store"), "HOME": str(home)}


def offered(shell: str, home: Path, *words: str) -> list[str]:
    """What the shell offers for a line."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine")
    script = home / f"complete.{shell}"
    script.write_text(SHELLS[shell])
    quiet = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    ran = subprocess.run(
        [program, *quiet, str(script), "actcache", *words],
        env=environment(home), cwd=home, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.stderr == ""
    # Descriptions stand behind what is offered.
    between = {"bash": "\0", "zsh": ":", "fish": "\t"}[shell]
    return sorted(line.split(between)[0] for line in ran.stdout.splitlines() if line)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_verbs_options_and_values(shell: str, home: Path) -> None:
    assert offered(shell, home, "s") == ["selftest", "show", "sites", "stats"]
    assert offered(shell, home, "list", "org/") == ["org/first", "org/second"]
    assert offered(shell, home, "warmup", "m", "--max-b") == ["--max-batch-tokens"]


def answers(home: Path, *words: str, **variables: str) -> list[str]:
    """What the command answers to bash, as "type,value"."""
    asked = {"COMP_WORDS": " ".join(["actcache", *words]), "COMP_CWORD": str(len(words))}
    ran = subprocess.run(
        [sys.executable, "-m", "actcache"],
        env={**environment(home), **asked, "_ACTCACHE_COMPLETE": "bash_complete", **variables},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert ran.stderr == ""
    return ran.stdout.splitlines()


def test_values_that_can_be_known(home: Path, tmp_path: Path) -> None:
    assert answers(home, "warmup", "m", "--sites", "resid_post,resid_p") == ["plain,resid_post,resid_pre"]
    assert answers(home, "warmup", "m", "--pooling", "m") == ["plain,mean", "plain,max", "plain,min"]
    assert answers(home, "warmup", "m", "--layers", "") == ["plain,all", "plain,last", "plain,middle"]
    assert answers(home, "load", "./d", "--layers", "") == ["plain,all"]
    spaces = {s.model_name: s.space for s in Store(home / "store", index_dir=home / "index").spaces()}
    assert answers(home, "show", "org/second", "p", "--space", spaces["org/second"][:3]) == [
        f"plain,{spaces['org/second']}"
    ]
    # Nothing that is stored: a folder is a model as well.
    assert answers(home, "warmup", "./mod") == ["file,./mod"]
    assert answers(home, "list", "--store", str(tmp_path / "none"), "org") == ["file,org"]
    # A bucket is not asked, nor is anything said of a store that cannot be.
    assert answers(home, "list", "org", ACTCACHE_DIR="", ACTCACHE_BACKEND="s3://b/c") == ["file,org"]
    assert answers(home, "list", "org", ACTCACHE_DIR="", ACTCACHE_BACKEND="s4://b/c") == ["file,org"]


def test_an_answer_needs_nothing_heavy(home: Path) -> None:
    """A person waits for it."""
    code = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    code += "; from actcache.cli.app import run; run([])"
    for words in ("actcache list org", "actcache warmup m --sites re", "actcache "):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_ACTCACHE_COMPLETE": "bash_complete"}
        ran = subprocess.run(
            [sys.executable, "-c", code], env={**environment(home), **asked}, capture_output=True, text=True, check=True
        )
        assert ran.stdout
        assert not {"numpy", "torch", "transformers", "rich", "obstore"} & set(ran.stderr.split())
