"""The command line on a store in a bucket says and does what it does on a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actcache.demo import model_path
from cli_helpers import Cli

MODEL = str(model_path())
PROMPTS = ["Snow is white.", "The sky is blue.", "The Eiffel Tower is in the city of"]
GIVEN = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
OF_THE_PLACE = {
    "cache_dir", "store", "oldest_mtime", "newest_mtime", "elapsed_seconds", "tokens_per_second", "seconds",
    "bytes_free", "total_size_bytes", "size_bytes", "bytes_written",
}  # fmt: skip


def only_what_is_stored(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: only_what_is_stored(v) for k, v in value.items() if k not in OF_THE_PLACE}
    return [only_what_is_stored(v) for v in value] if isinstance(value, list) else value


def said(cli: Cli, *arguments: str) -> Any:
    status, out, err = cli(*arguments, "--json")
    assert status == 0, (arguments, err)
    return only_what_is_stored(json.loads(out))


def test_every_verb_says_what_it_says_of_a_folder(cli: Cli, anywhere: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    for verb in (
        ("plan", MODEL, *GIVEN), ("warmup", MODEL, *GIVEN[:4]), ("warmup", MODEL, *GIVEN, "--perplexity"),
        ("plan", MODEL, *GIVEN), ("info",), ("info", MODEL), ("list", MODEL), ("show", MODEL, PROMPTS[0]),
        ("stats", MODEL), ("verify",), ("verify", "--repair"), ("evict", "--limit-gb", "1"), ("info",),
        ("invalidate", MODEL, "--prompt", PROMPTS[0]), ("info",), ("list", MODEL), ("verify",),
        ("invalidate", MODEL, "--prompt", PROMPTS[0]), ("plan", MODEL, *GIVEN),
        ("clear", MODEL, "--yes"), ("info",), ("clear", "--yes"),
    ):  # fmt: skip
        there, here = (said(cli, *verb, "--store", store) for store in (anywhere, folder))
        assert there == here, verb
    assert said(cli, "warmup", MODEL, *GIVEN[:2], "--store", anywhere)["activations_extracted"] == 1
    assert said(cli, "evict", "--limit-gb", "0", "--store", anywhere)
    assert said(cli, "info", "--store", anywhere)["models"] == []


def test_the_text_for_people_names_the_place(cli: Cli, anywhere: str) -> None:
    assert cli("warmup", MODEL, *GIVEN, "--store", anywhere)[0] == 0
    for verb in (("info",), ("config",)):
        status, out, err = cli(*verb, "--store", anywhere)
        assert status == 0, err
        assert anywhere in out, verb
    status, out, _ = cli("list", MODEL, "--store", anywhere)
    assert status == 0
    assert all(prompt in out for prompt in PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "variable"])
def test_two_machines_have_one_store(cli: Cli, anywhere: str, tmp_path: Path, by: str) -> None:
    """One warms up, another one, which shares no folder with it, finds all of that there."""
    there = ("--store", anywhere) if by == "option" else ()
    assert said(cli, "warmup", MODEL, *GIVEN, "--store", anywhere)["activations_extracted"] == 3
    done = subprocess.run(
        [sys.executable, "-m", "actcache", "warmup", MODEL, *GIVEN, "--prompt", "a", *there, "--json"],
        env={
            **os.environ, "XDG_CACHE_HOME": str(tmp_path / "two"), "PYTHONPATH": os.pathsep.join(sys.path),
            **({"ACTCACHE_BACKEND": anywhere} if by == "variable" else {}),
        },
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    again = json.loads(done.stdout)
    assert (again["activations_cached"], again["activations_extracted"]) == (3, 1)
    assert said(cli, "info", "--store", anywhere)["models"][0]["num_prompts"] == 4


@pytest.mark.parametrize("verb", ["info", "verify", "warmup"])
def test_a_bucket_that_is_not_there_is_one_line(cli: Cli, anywhere: str, verb: str) -> None:
    arguments = (MODEL, *GIVEN) if verb == "warmup" else ()
    status, out, err = cli(verb, *arguments, "--store", "s3://no-such-bucket-as-this/x")
    assert status == 1
    assert "no-such-bucket-as-this" in err
    assert len(err.strip().splitlines()) == 1, err
    assert not out


def test_a_scheme_that_nobody_knows(cli: Cli) -> None:
    status, _, err = cli("info", "--store", "s4://bucket/x")
    assert status != 0
    assert "s3" in err
