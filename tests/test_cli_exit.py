"""The exit status of every verb: 0 done, 1 failed, 2 wrong usage; what goes wrong is one line that is not on standard
output."""

from __future__ import annotations

import errno
import io
import shlex
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.cli.app import VERBS
from actcache.demo import model_path
from cli_helpers import Cli
from cli_scenario import damage
from made_datasets import make
from share_helpers import fill_tokens, new_space, new_store, text

MODEL = str(model_path())
# Verb -> a good run, a value (or a want of one) that cannot be, and a failure.
RUNS = {
    "demo": ("--model-path", "more", "FULL --model-path"),
    "warmup": ("MODEL --prompt Snow --layers 0", "MODEL --prompt Snow --batch-size 0", "./absent --prompt Snow"),
    "plan": ("MODEL --prompt Snow", "MODEL --prompt Snow --layers first", "./absent --prompt Snow"),
    "info": ("", "org/model more", "org/absent"),
    "list": ("org/model", "", "org/absent"),
    "show": ("org/model TEXT", "org/model", "org/model never"),
    "lens": ("MODEL Snow --layers 0", "MODEL Snow --html absent/page.html", "./absent Snow"),
    "stats": ("org/model", "org/model more", "org/absent"),
    "import": (
        "vectors.npy --model org/new --prompts prompts.txt --site resid_post.1 --pooling mean",
        "vectors.npy --model org/new --prompts prompts.txt --site resid_pots.1 --pooling mean",
        "broken.npy --model org/new --prompts prompts.txt --site resid_post.1 --pooling mean",
    ),
    "push": ("./pushed org/model", "./pushed org/model --shard-max-bytes 0", "./pushed org/absent"),
    "pull": ("./set --store other", "./set --store other --layers last", "./absent --store other"),
    "load": ("./set --out x.npz --no-labels", "./set --out x.txt", "./absent --out x.npz"),
    "migrate": ("./set", "./set --shard-max-bytes 0", "./absent"),
    "upgrade": ("./old", "", "./absent"),
    "dataset-info": ("./set", "", "./absent"),
    "report": ("--out page.html", "--out absent/page.html", "org/absent --prompt Snow --out page.html"),
    "sites": ("MODEL", "", "./absent"),
    "selftest": ("--max-tokens 4 --layers 0", "--max-tokens 1", "./absent"),
    "verify": ("", "more", "DAMAGED"),
    "evict": ("--limit-gb 1", "--limit-gb much", "FULL --limit-gb 1"),
    "invalidate": ("org/other --all-prompts", "org/other", "org/absent --all-prompts"),
    "clear": ("org/other --yes", "org/other --all-variants --space 0 --yes", "org/absent --yes"),
    "config": ("", "more", "FULL"),
    "version": ("", "more", "FULL"),
}


class Full(io.StringIO):
    """A file on a disk that is full."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store and with files that verbs take, where the command runs."""
    store = new_store(tmp_path)
    fill_tokens(store, new_space(store), range(4))
    fill_tokens(store, new_space(store, weights="def", name="org/other"), range(2))
    store.close()
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    np.save(tmp_path / "vectors.npy", np.ones((2, 3), np.float32))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    monkeypatch.setenv("ACTCACHE_DIR", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(cli: Cli, verb: str, line: str) -> tuple[int, str, str]:
    named = {"MODEL": MODEL, "TEXT": text(0)}
    return cli(verb, *(named.get(word, word) for word in shlex.split(line)))


def test_every_verb_is_tried() -> None:
    assert RUNS.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", RUNS)
def test_what_is_done_is_0(home: Path, cli: Cli, verb: str) -> None:
    if verb in ("pull", "load", "migrate", "upgrade", "dataset-info"):
        make(home / "set", "1.0 full", k=0)
        make(home / "old", "1.1 pooled")
    status, out, err = call(cli, verb, RUNS[verb][0])
    assert (status, "actcache: " in err) == (0, False) and out, err


@pytest.mark.parametrize("verb", RUNS)
def test_what_cannot_be_is_2(home: Path, cli: Cli, verb: str) -> None:
    before = sorted(home.rglob("*"))
    good, wrong, _ = RUNS[verb]
    for line in (wrong, f"{good} --jsno"):
        status, out, err = call(cli, verb, line)
        assert (status, out) == (2, ""), line
        assert err.startswith("actcache: ") and err.count("\n") == 1, err
    assert "--jsno" in err and f"`actcache {verb} --help`" in err
    assert sorted(home.rglob("*")) == before, "before anything is done"


@pytest.mark.parametrize("verb", RUNS)
def test_what_fails_is_1(home: Path, cli: Cli, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = RUNS[verb][2]
    if line == "DAMAGED":
        damage(home)
        status, out, _ = call(cli, verb, "")
        assert status == 1 and "DAMAGED" in out
        return
    if line.startswith("FULL"):
        monkeypatch.setattr("sys.stdout", Full())
    status, out, err = call(cli, verb, line.removeprefix("FULL"))
    assert (status, out) == (1, "")
    assert err.startswith("actcache: ") and err.count("\n") == 1, err


# What only the model or the store can tell.
CANNOT_BE = {
    "warmup MODEL --prompt Snow --layers 99": "layer 99 is out of range: the model has 6 layers",
    "warmup MODEL --prompt Snow --sites typo": "unknown site 'typo'",
    "warmup MODEL --prompt Snow --sites cross_attn_out": "its blocks have no cross-attention",
    "warmup MODEL --prompt Snow --pooling typo": "unknown pooling 'typo'",
    "plan MODEL --prompt Snow --layers=-7": "layer -7 is out of range",
    "lens MODEL Snow --layers 99": "layer 99 is out of range",
    "lens MODEL Snow --position 99": "position 99 is out of range: prompt 0 has 3",
    "lens MODEL Snow --token Snowball.Snowball": "must be one",
    "lens MODEL Snow --translators absent": "'absent' does not exist",
    "load ./set --layers 99 --out x.npz": "99",
    "pull ./set --layers 99": "99",
    "push ./pushed org/both": "stored in 2 variants",
    "show org/model TEXT --store FILE": "is a file",
}


@pytest.mark.parametrize("line", CANNOT_BE)
def test_what_the_model_or_the_store_tells_to_be_wrong_is_2(home: Path, cli: Cli, line: str) -> None:
    if "./set" in line:
        make(home / "set", "1.0 full", k=0)
    if "org/both" in line:
        with ac.Store(home / "store") as store:
            for weights in ("one", "two"):
                fill_tokens(store, new_space(store, weights=weights, name="org/both"), range(2))
    verb, _, rest = line.partition(" ")
    status, out, err = call(cli, verb, rest.replace("FILE", str(home / "prompts.txt")))
    assert (status, out) == (2, ""), err
    said = err.splitlines()[-1]
    assert CANNOT_BE[line] in said and said.startswith("actcache: ")


READING = {
    "info": "", "list": "org/model", "show": "org/model TEXT", "stats": "", "report": "--out page.html", "verify": "",
    "evict": "--limit-gb 1", "clear": "--yes", "invalidate": "org/model --all-prompts",
    "push": "./pushed org/model",
}  # fmt: skip


@pytest.mark.parametrize("verb", READING)
def test_a_store_that_is_not_there_is_neither_empty_nor_intact(home: Path, cli: Cli, verb: str) -> None:
    """As where its name is misspelled, which verbs that only read tell."""
    before = sorted(home.rglob("*"))
    status, out, err = call(cli, verb, f"{READING[verb]} --store absent")
    assert (status, out) == (2, "") and "--store absent: there is no such folder" in err
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("verb", ["info", "stats", "verify", "evict"])
def test_a_default_store_in_which_nothing_was_stored_yet_is_empty(
    home: Path, cli: Cli, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTCACHE_DIR", str(home / "new"))
    status, _, err = call(cli, verb, READING[verb])
    assert (status, err) == (0, "")
