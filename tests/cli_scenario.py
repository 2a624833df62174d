"""One day of the command line: every verb on small stores and datasets, in an order in which each has something to say.

`python tests/cli_scenario.py > tests/snapshots/output.txt` writes what is expected of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from actcache.cli.app import run
from actcache.demo import model_path

# {damage} is no verb: it breaks a byte of the store.
LINES = """
version
config
info
stats
verify
plan MODEL prompts.txt --raw --layers 0,-1
warmup MODEL prompts.txt --raw --layers 0,-1
warmup MODEL labelled.csv --label-column truth --pooling mean --perplexity
plan MODEL prompts.txt --raw --layers 0,-1
info
info MODEL
list MODEL
list MODEL --space zz
show MODEL 'Snow is white.'
show MODEL 'never stored'
stats MODEL
lens MODEL 'The Eiffel Tower is in the city of' --layers 0,-1 --token ' Paris' --top-k 2 --html lens.html
sites MODEL
selftest --max-tokens 12 --layers 0
demo --model-path
import vectors.npy --model org/other --prompts prompts.txt --site resid_post.3 --pooling mean --store other
list org/other --store other
push ./pushed MODEL prompts.txt --tensors hidden_layers --pooling tokens --no-shuffle
push ./pushed MODEL prompts.txt
dataset-info ./pushed
dataset-info ./absent
load ./pushed --out out.safetensors --layers 5
load ./pushed --out out.npz --pooling none --no-labels
load ./pushed --out out.npz --layers 3 --no-labels
pull ./pushed --store other --materialize
pull ./full --store other
pull ./absent --store other
migrate ./full --dry-run
migrate ./full
migrate ./full
upgrade ./old --dry-run
upgrade ./old
upgrade ./old
report --out store.html
report MODEL --out model.html --prompt 'Snow is white.'
report ./pushed --out dataset.html
report nothing --out nothing.html
damage
verify
verify --repair
verify
invalidate org/other --store other
invalidate org/other --store other --prompt 'Snow is white.'
invalidate org/other --store other --prompt 'Snow is white.'
evict
evict --limit-gb 0.0000001
clear org/other --store other
clear org/other --store other --yes
clear --yes
"""


def prepare(home: Path) -> None:
    """The files that the lines name."""
    from made_datasets import make

    (home / "prompts.txt").write_text("Snow is white.\nThe Eiffel Tower is in the city of\n")
    (home / "labelled.csv").write_text("text,truth\nSnow is white.,1\nSnow is black.,0\n")
    np.save(home / "vectors.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    make(home / "full", "1.0 full", k=0)
    make(home / "old", "1.1 pooled")


def damage(home: Path) -> None:
    """Break the rows of the largest segment, in its middle."""
    segment = max((home / "store").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 255]))


def play(home: Path, *added: str) -> Iterator[tuple[list[str], int, str, str]]:
    """Each line with `added` to it: its words, exit status, standard output and standard error."""
    prepare(home)
    before = os.getcwd()
    os.chdir(home)
    try:
        for line in LINES.strip().splitlines():
            if line == "damage":
                damage(home)
                continue
            words = shlex.split(line)
            arguments = [str(model_path()) if word == "MODEL" else word for word in words]
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), alone():
                status = run([*arguments, *added])
            yield words, status, out.getvalue(), err.getvalue()
    finally:
        os.chdir(before)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody to ask, and no warnings of a logger, which pytest shows in its own way."""
    with mock.patch("sys.stdin", io.StringIO()), mock.patch("logging.lastResort", logging.NullHandler()):
        yield


def environment(home: Path) -> dict[str, str]:
    # Wide, so that no line is folded where a path is longer.
    return {
        "ACTCACHE_DIR": str(home / "store"),
        "XDG_CACHE_HOME": str(home / "host"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "250",
    }


def without_chance(text: str, home: Path) -> str:
    """`text` without what another machine, day or version of a library would change, and without widths of columns."""
    for path, name in ((str(home), "HOME"), (str(model_path()), "MODEL")):
        text = text.replace(path, name)
    # transformers draws it where its user has not said otherwise, which the program does.
    lines = [line for line in re.split(r"[\r\n]", text) if not line.startswith("Loading weights")]
    text = "\n".join(re.sub(r"(?<=\S) {2,}", "  ", line).rstrip() for line in lines).strip("\n")
    for pattern, name in CHANCE.items():
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return text


PACKAGES = "actcache|torch|transformers|numpy|python|safetensors|huggingface_hub"
CHANCE = {
    rf"\b((?:{PACKAGES}) +)(\d+\.\d[\w.+]*|unknown)": r"\1VERSION",
    r"\b[0-9a-f]{32}\b": "NAME",
    r"\b[0-9a-f]{8,64}\b": "ID",
    r"\b[\d,.]+ (KB|MB|GB|B|bytes)\b": "SIZE",
    r"\b\d+ min \d+ s\b|\b[\d.]+ s\b|less than a second": "TIME",
    r"\b1 - \S+|\b\d\.?\d*e[-+]\d+\b|\d+\.\d+|\bexact\b": "x.x",
    # Where a selftest found the largest error.
    r"^( [a-z ]+  x\.x  )[a-z_]+(\.\d+)?  (?=\w+[ ,'])": r"\1",
    r"─+": "──",
}


def told(home: Path) -> str:
    """What all lines say."""
    parts = []
    for words, status, out, err in play(home):
        lines = [f"$ actcache {shlex.join(words)}"]
        lines += [without_chance(out, home)] if out.strip() else []
        lines += ["err| " + line for line in without_chance(err, home).splitlines()]
        parts.append("\n".join([*lines, f"[{status}]"]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        variables = {k: v for k, v in os.environ.items() if not k.startswith("ACTCACHE_") and k != "COLUMNS"}
        with mock.patch.dict(os.environ, {**variables, **environment(home)}, clear=True):
            sys.stdout.write(told(home))
