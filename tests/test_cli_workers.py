"""`actcache warmup --engine`, and prompts out of Parquet and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator

import actcache as ac
from actcache.cli.prompts import read_described, read_prompts
from actcache.cli.results.schemas import schema
from actcache.errors import PromptError
from cli_helpers import Cli
from distributed_helpers import PROMPTS, bare_forwards, check_stored, make_model, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "gpt2")


def test_a_rank_does_its_share(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", PROMPTS[:20])
    pq.write_table(pa.table({"ids": PROMPTS[20:40]}), tmp_path / "in" / "b.parquet")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.delenv("RANK", raising=False)
    place = str(tmp_path / "s")
    line = ["warmup", str(model), str(tmp_path / "in"), "--engine", "rank", "--store", place, "--json"]
    status, out, err = cli(*line, "--unit-prompts", "7", "--layers", "0,1")
    assert status == 0, err
    said = json.loads(out)
    assert (said["total_prompts"], said["activations_extracted"]) == (40, 40)
    check_stored(place, bare_forwards(model, PROMPTS[:40]), PROMPTS[:40])


def test_failed_prompts_are_reported_behind_what_was_done(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    source = write(tmp_path / "p.jsonl", [[1, 2], [999], [3]])
    line = ["warmup", str(model), str(source), "--engine", "rank", "--store", str(tmp_path / "s")]
    status, out, err = cli(*line, "--failed-file", str(tmp_path / "failed.jsonl"))
    assert status == 1 and out.startswith("3 prompts: 0 were stored, 2 extracted")
    assert "1 prompt was not stored (prompt 1:" in err and "id 999" in err
    assert json.loads((tmp_path / "failed.jsonl").read_text())["prompt"] == 1
    status, out, err = cli(*line, "--json")
    said = json.loads(out)
    assert status == 1
    Draft202012Validator(schema("warmup", strict=True)).validate(said)
    assert (said["total_prompts"], said["activations_cached"], said["prompts_failed"]) == (3, 2, 1)
    ((place, reason),) = ((one["prompt"], one["reason"]) for one in said["failed"])
    assert place == 1 and reason.startswith(f"{source}, byte 7: PromptError: the prompt has the token id 999")


def test_labels_and_repetitions_reach_the_workers(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    given: list[object] = []
    warm = ac.UnifiedCache.warmup

    def noting(self: ac.UnifiedCache, *prompts: Any, max_retries: int | None = None, **more: Any) -> Any:
        given.append(max_retries)
        return warm(self, *prompts, max_retries=max_retries, **more)

    monkeypatch.setattr(ac.UnifiedCache, "warmup", noting)
    source = write(tmp_path / "p.jsonl", [{"prompt": ids, "y": f"label {i}"} for i, ids in enumerate(PROMPTS[:3])])
    line = ["warmup", str(model), str(source), "--engine", "rank", "--store", str(tmp_path / "s")]
    status, _, err = cli(*line, "--label-column", "y", "--max-retries", "2")
    assert status == 0, err
    cache = ac.UnifiedCache(model, store=tmp_path / "s")
    assert cache.get_labels(PROMPTS[:3]) == ["label 0", "label 1", "label 2"] and given == [2]


def test_misuse_is_told(cli: Cli, model: Path, tmp_path: Path) -> None:
    source = str(write(tmp_path / "p.jsonl"))
    for arguments, message in (
        (["--engine", "local"], "--engine local needs files"),
        (["-", "--engine", "local"], "--engine local needs files"),
        ([source, "--engine", "local", "--prompt", "x"], "--prompt is not for --engine local"),
        ([source, "--num-workers", "2"], "--num-workers belongs to --engine"),
        ([source, "--engine", "dask"], "'dask' is not one of"),
        ([source, "--engine", "local", "--device", "cuda"], "num_gpus_per_worker"),
    ):
        status, out, err = cli("warmup", str(model), *arguments)
        assert (status, out) == (2, "") and message in err, err


def test_a_list_in_json_is_its_items(tmp_path: Path) -> None:
    source = tmp_path / "p.json"
    chat = [{"role": "user", "content": "hello"}]
    source.write_text(json.dumps(["a\nb", [5, 9], chat, {"prompt": "c", "y": 1}], indent=1))
    assert read_prompts([str(source)], []) == ["a\nb", [5, 9], chat, "c"]
    source.write_text(json.dumps([{"text": "c", "y": 1}, {"text": "d", "y": "e"}]))
    assert read_described([str(source)], [], label_column="y")[:2] == (["c", "d"], [1, "e"])
    for text, message in (
        ('"a"\n"b"\n', "each line is a prompt of its own, say --format jsonl"),
        ('{"prompt": "a"}', "a list of prompts is expected"),
        ("[1, 2]", "item 0: a prompt is a string"),
    ):
        source.write_text(text)
        with pytest.raises(PromptError, match=message):
            read_prompts([str(source)], [])
    source.write_text('"a"\n"b"\n')
    assert read_prompts([str(source)], [], file_format="jsonl") == ["a", "b"]


def test_parquet_and_folders_are_read_without_an_engine_too(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "y": [0, 1]}), folder / "a.parquet")
    (folder / "b.txt").write_text("c\n\nd\n")
    assert read_prompts([str(folder / "a.parquet")], []) == ["a", "b"]
    assert read_prompts([str(folder)], ["first"]) == ["first", "a", "b", "c", "d"]
