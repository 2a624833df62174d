"""Runs every example that `--help` shows, as it stands, in the folder where it is started; prints what came of each as
JSON. There a model `gpt2` is a folder, org/name lies on a Hub of this process, and s3://bucket is the URL in argv."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import docs_hub

TEXTS = ["The sky is blue.", "Snow is white."]
# In this order each finds what it needs. {...} are steps in between.
ORDER = (
    "version", "config", "demo", "sites", "selftest", "plan", "warmup", "info", "list", "show", "lens", "stats",
    "{published}", "migrate", "upgrade", "{gone}", "push", "invalidate", "pull", "load", "dataset-info", "{copied}",
    "report", "import", "verify", "evict",
)  # fmt: skip


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def h16(text: str) -> str:
    """As lmprobe names its files."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare() -> None:
    """The model and the files that examples name."""
    import numpy as np
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    from actcache.demo import model_path
    from actcache.testing.tiny import tiny_model

    shutil.rmtree("gpt2", ignore_errors=True)
    tiny_model("gpt2", num_hidden_layers=12, vocab_size=7000).save_pretrained("gpt2")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained("gpt2")
    Path("prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    given = [*TEXTS, [464, 6766, 318]]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(prompt)}\n" for prompt in given))
    Path("prompts.csv").write_text(f"text,truth,topic\n{TEXTS[0]},1,sky\n{TEXTS[1]},0,snow\n")
    np.save("vectors.npy", np.ones((2, 32), np.float32))
    lmprobe = Path(".cache/lmprobe") / h16("m")
    lmprobe.mkdir(parents=True)
    (lmprobe / "_model_name.txt").write_text("m")
    for text in TEXTS:
        vectors = {"pooled_last_token_layer_0": np.ones((1, 4), np.float32)}
        save_file(vectors, lmprobe / f"{h16(text)}.safetensors")


def step(name: str, hub: docs_hub.LoopbackHub) -> None:
    from made_datasets import make

    if name == "{published}":
        made = make(Path("full"), "1.0 full", k=0).folder
        hub.create("org/name", kind="dataset").commit(made)
        make(Path("folder"), "1.1 pooled")
    elif name == "{gone}":
        shutil.rmtree("folder")
        del hub.repositories["datasets/org/name"]
    elif name == "{copied}":
        shutil.copytree("folder", "dataset")


def lines() -> list[str]:
    """All examples, and the steps in between. What deletes the only variant goes last."""
    from actcache.cli.examples import EXAMPLES

    found = [line for name in ORDER for line in EXAMPLES.get(name, (name,))]
    return found + sorted(EXAMPLES["clear"], key=lambda line: "--space" not in line)


def call(line: str, place: str) -> tuple[int, str, str]:
    from actcache.cli.app import run
    from actcache.store.default import store_at

    line = line.replace("s3://bucket", place).replace("~", os.environ["HOME"])
    if "--space" in line:
        line = line.replace(shlex.split(line)[4], store_at(None).spaces()[0].space[:8])
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = Terminal("y\n")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(shlex.split(line)[1:])
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    os.environ |= {
        "HOME": os.getcwd(),
        "XDG_CACHE_HOME": os.path.abspath("host"),
        "ACTCACHE_DIR": os.path.abspath("store"),
    }
    hub = docs_hub.serve()
    prepare()
    told = []
    for line in lines():
        if line.startswith("{"):
            step(line, hub)
        else:
            told.append((line, *call(line, sys.argv[1])))
    print(json.dumps(told))
