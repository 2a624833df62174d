"""Errors of the command line: one line with the remedy, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actcache.cli.app import _as_options, run
from actcache.demo import model_path

MODEL = str(model_path())
PROMPT = ("--prompt", "Snow is white.")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["warmpu"], 2, "no verb 'warmpu'. Did you mean 'warmup'?"),
        (["warmup"], 2, "Missing argument 'MODEL'"),
        (["warmup", MODEL], 2, "no prompts: name a file"),
        (["warmup", MODEL, "no-such-file.txt"], 2, "'no-such-file.txt' does not exist"),
        (["warmup", MODEL, *PROMPT, "--layers", "first"], 2, "'first' is none of all, last, middle"),
        (["warmup", MODEL, *PROMPT, "--batch-size", "0"], 2, "--batch-size"),
        (["warmup", MODEL, *PROMPT, "--pooling", "last"], 2, "'last_token'"),
        (["warmup", MODEL, *PROMPT, "--dtype", "float31"], 2, "'float32'"),
        (["warmup", MODEL, *PROMPT, "--device", "gpu"], 2, "'cuda'"),
        (["warmup", MODEL, *PROMPT, "--store", "s4://bucket/x"], 2, "expected s3://, gs:// or az://"),
        (["warmup", MODEL, *PROMPT, "--layers", "99"], 2, "layer 99"),
        (["warmup", MODEL, *PROMPT, "--sites", "resid_pots"], 2, "Did you mean 'resid_post'"),
        (["warmup", "./no/such/model", *PROMPT], 1, "does not exist"),
        (["warmup", MODEL, "--prompt", "word " * 5000], 1, "tokens and the context of"),
        (["warmup", MODEL, "--prompt", ""], 1, "prompt 0 is empty"),
        (["list", MODEL], 1, "nothing is stored for"),
        (["show", "gpt2", "Snow"], 1, "nothing is stored for 'gpt2'"),
        (["info", "--jsno"], 2, "--jsno"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_its_status(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert run(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("actcache: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_model_folder_without_config_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["plan", str(tmp_path), *PROMPT]) == 1
    assert f"no config.json in '{tmp_path}'" in capsys.readouterr().err


def test_a_file_where_the_store_should_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("mine")
    assert run(["warmup", MODEL, *PROMPT, "--store", str(place)]) == 2
    captured = capsys.readouterr()
    assert str(place) in captured.err
    assert captured.err.count("\n") == 1
    assert place.read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert run(["warmup", MODEL, *PROMPT, "--store", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_bad_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTCACHE_BACKEND", "s4://bucket/x")
    assert run(["info"]) == 2
    assert "ACTCACHE_BACKEND: unknown kind of store s4://" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "list", MODEL], ["list", MODEL, "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "actcache", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "NotCachedError" in done.stderr


def test_an_unexpected_error_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr("actcache.store.default.store_at", broken)
    assert run(["info"]) == 1
    assert capsys.readouterr().err == "actcache: RuntimeError: the disk is on fire (--debug shows where)\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps([1 + i % 400, 1 + i // 400]) + "\n" for i in range(3000)))
    actcache = f"{sys.executable} -m actcache"
    command = f"{actcache} warmup {MODEL} {prompts} --layers 0 && {actcache} list {MODEL} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].split() == ["2", "'<|eos|><|eos|>'", "[1,", "1]"]
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "said", "shown"),
    [
        ("push", "leave them out with skip_missing=True.", "leave them out with --skip-missing."),
        ("push", "shuffle=False, or share one with tensors=.", "--no-shuffle, or share one with --tensors."),
        ("push", "Or pass labels= here.", "Or pass --label-column here."),
        (
            "pull",
            "Choose some with layers=, tensors= or target_prompts=",
            "Choose some with --layers, --tensors or --target-prompts",
        ),
        ("lens", "gated: pass token= of that account", "gated: set HF_TOKEN of that account"),
        (
            "dataset-info",
            "check what token= may read, or pass token=.",
            "check what HF_TOKEN may read, or set HF_TOKEN.",
        ),
        # What the verb has not, values, and what only looks so.
        ("list", "tensors= pooling='mean' a==b x=1", "tensors= pooling='mean' a==b x=1"),
    ],
)
def test_errors_call_options_by_the_names_that_they_have_here(verb: str, said: str, shown: str) -> None:
    assert _as_options(said, verb).startswith(shown)
