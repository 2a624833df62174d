"""A warm-up in units: what is refused before anything is started, one process's share, and a worker's handling of
prompts that cannot be done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
import toy_backend
from actcache.distributed.inputs import find_inputs
from actcache.distributed.job import make_job
from actcache.distributed.processes import visible_gpus
from actcache.distributed.ranks import own_device, own_rank
from actcache.distributed.units import Units
from actcache.distributed.worker import Task, Worker
from actcache.errors import (
    MissingFileError,
    ModelChangedError,
    OptionError,
    PartialWarmupError,
    PromptError,
    StoreAccessError,
    TokenizerError,
)
from actcache.extract.backends.local import LocalSession
from actcache.testing.tiny import tiny_model
from distributed_helpers import OPTIONS, PROMPTS, check_stored, expected, folder, make_model, stored, write

__all__ = ["expected", "folder"]

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
RANKS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, *LOCAL_RANKS):
        monkeypatch.delenv(name, raising=False)


def test_ranks_share_the_units(folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "prompts.jsonl")
    totals = []
    for rank in range(3):
        monkeypatch.setenv(RANKS[0], str(rank))
        monkeypatch.setenv(RANKS[1], "3")
        stats = ac.warmup_distributed(source, folder, engine="rank", store=tmp_path / "s", unit_prompts=10, **OPTIONS)
        assert stats.activations_extracted == stats.total_prompts
        totals.append(stats.total_prompts)
        again = ac.warmup_distributed(source, folder, engine="rank", store=tmp_path / "s", unit_prompts=10, **OPTIONS)
        assert (again.total_prompts, again.activations_cached) == (totals[-1], totals[-1])
        assert stored(tmp_path / "s") == sum(totals)
    assert sum(totals) == 160 and min(totals) >= 40
    check_stored(tmp_path / "s", expected)


@pytest.mark.parametrize(
    ("environment", "size", "answer"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None, (1, 2)),
        ({"JOB_COMPLETION_INDEX": "4"}, 5, (4, 5)),
        ({"JOB_COMPLETION_INDEX": "4"}, None, "pass num_workers, or set JOB_COMPLETIONS"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, None, "RANK=8 is not below"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, None, "expected a number"),
        ({"RANK": "1", "WORLD_SIZE": "8"}, 4, "num_workers=4, and torchrun says"),
        ({}, 4, "none of RANK and WORLD_SIZE"),
    ],
)
def test_a_rank_is_what_its_launcher_says(
    environment: dict[str, str], size: int | None, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(answer, tuple):
        assert own_rank(size) == answer
        return
    with pytest.raises(OptionError, match=answer):
        own_rank(size)


@pytest.mark.parametrize("name", LOCAL_RANKS)
def test_ranks_of_one_machine_take_a_gpu_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("auto") == "auto"
    monkeypatch.setenv(name, "6")
    assert [own_device(device) for device in ("auto", "cuda", "cpu", "cuda:1")] == ["cuda:2", "cuda:2", "cpu", "cuda:1"]
    monkeypatch.setenv(name, "x")
    with pytest.raises(OptionError, match=f"{name}='x'"):
        own_device("auto")
    # Of one there is nothing to choose, and its launcher has seen to it.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device("auto") == "auto"


def test_a_rank_runs_where_its_number_says(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actcache.distributed import warmup

    given: list[Any] = []
    make = warmup.make_job

    def noting(model: Any, store: Any, options: Any, **more: Any) -> Any:
        given.append(options["device"])
        return make(model, store, {**options, "device": "cpu"}, **more)

    monkeypatch.setattr(warmup, "make_job", noting)
    monkeypatch.setattr(warmup, "own_device", lambda device: f"{device} of this rank")
    alone(write(tmp_path / "p.jsonl", PROMPTS[:3]), folder, tmp_path / "s", monkeypatch)
    assert given == ["auto of this rank"]


def alone(source: Path, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return ac.warmup_distributed(source, folder, engine="rank", store=store, **{**OPTIONS, **options})


BAD: list[tuple[Any, str]] = [
    ([], "PromptError: the line: the prompt is empty"),
    ([1, 999], "PromptError: the prompt has the token id 999"),
    ([1] * 65, "PromptError: the prompt has 65 tokens and the context of"),
    ([1, "x"], "PromptTypeError: the prompt mixes types"),
    ({"a": 1, "b": 2}, "PromptError: the line: which of a, b is the prompt"),
    (7, "PromptError: the line: a prompt is a string"),
]


def test_a_bad_prompt_takes_no_neighbour_with_it(
    folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = list(PROMPTS)
    places = [3, 4, 50, 77, 120, 165]
    for place, (bad, _) in zip(places, BAD, strict=True):
        prompts.insert(place, bad)
    source, failures = write(tmp_path / "prompts.jsonl", prompts), tmp_path / "failed.jsonl"
    for _ in range(2):
        with pytest.raises(PartialWarmupError, match=r"6 prompts were not stored .* and 3 more") as caught:
            alone(source, folder, tmp_path / "s", monkeypatch, unit_prompts=16, failed_file=failures)
        assert [i for i, _ in caught.value.failed] == places
        for (_, reason), (_, said) in zip(caught.value.failed, BAD, strict=True):
            assert said in reason and str(source) in reason
        assert [json.loads(line)["prompt"] for line in failures.read_text().splitlines()] == places
        assert caught.value.stats.total_prompts == 166  # type: ignore[attr-defined]
        check_stored(tmp_path / "s", expected)
    assert caught.value.stats.activations_cached == 160  # type: ignore[attr-defined]


def test_a_failing_batch_is_tried_prompt_by_prompt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LocalSession.run

    def faulty(self: Any, sequences: Any, *rest: Any) -> Any:
        if any(200 in list(sequence) for sequence in sequences):
            raise RuntimeError("odd values")
        return run(self, sequences, *rest)

    monkeypatch.setattr(LocalSession, "run", faulty)
    prompts = [*PROMPTS[:20], [200, 1], *PROMPTS[20:40]]
    with pytest.raises(PartialWarmupError) as caught:
        alone(write(tmp_path / "p.jsonl", prompts), folder, tmp_path / "s", monkeypatch, unit_prompts=41)
    ((place, reason),) = caught.value.failed
    assert place == 20 and reason.endswith("RuntimeError: odd values")
    stats = caught.value.stats
    assert (stats.total_prompts, stats.activations_extracted) == (41, 40)  # type: ignore[attr-defined]
    assert stored(tmp_path / "s") == 40


def test_rows_of_parquet_that_cannot_be_done_are_reported_alone(
    folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are null, too long, or unknown; and those of a row group whose bytes are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Any] = [*PROMPTS[:60], *PROMPTS[:20], *PROMPTS[60:]]
    for at, bad in ((5, None), (30, [1] * 65), (40, [999]), (50, [])):
        rows.insert(at, bad)
    source = tmp_path / "p.parquet"
    groups = [
        pa.table({"input_ids": pa.array(part, pa.list_(pa.int64()))}) for part in (rows[:64], rows[64:84], rows[84:])
    ]
    with pq.ParquetWriter(source, groups[0].schema, compression="zstd", use_dictionary=False) as file:
        for group in groups:
            file.write_table(group)
    column = pq.ParquetFile(source).metadata.row_group(1).column(0)
    data = bytearray(source.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 30] = bytes(30)
    source.write_bytes(data)
    with pytest.raises(PartialWarmupError, match="24 prompts were not stored") as caught:
        alone(source, folder, tmp_path / "s", monkeypatch, unit_prompts=16)
    reasons = dict(caught.value.failed)
    assert sorted(reasons) == [5, 30, 40, 50, *range(64, 84)]
    for at, said in (
        (5, "there is none (null)"),
        (30, "has 65 tokens"),
        (40, "id 999"),
        (50, "is empty"),
        (70, "row 70"),
    ):
        assert said in reasons[at] and str(source) in reasons[at]
    check_stored(tmp_path / "s", expected)


def test_too_many_failed_prompts_end_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "p.jsonl", [[], *PROMPTS] * 3 + [[999]] * 2000)
    with pytest.raises(PartialWarmupError, match=r"more than max_failed=0.05 of [56]\d\d: the run was ended") as caught:
        alone(source, folder, tmp_path / "s", monkeypatch, unit_prompts=50, max_failed=0.05)
    assert 51 <= len(caught.value.failed) <= 200
    assert stored(tmp_path / "s") == 160


def test_texts_parquet_and_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store's dtype is the workers', too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"The number {i} is" for i in range(30)]
    pq.write_table(pa.table({"text": texts, "y": range(30)}), tmp_path / "p.parquet")
    model = Path(ac.__file__).parent / "demo" / "model"
    ac.set_cache_dtype("float16")
    try:
        stats = alone(tmp_path / "p.parquet", model, None, monkeypatch, layers=[1])  # type: ignore[arg-type]
        assert stats.activations_extracted == 30
        found = ac.activations(model, texts, layers=[1])
        assert found.dtype.name == "float16"  # type: ignore[union-attr]
        assert stored(None) == 30
    finally:
        ac.set_cache_dtype(None)


def test_what_workers_cannot_be_given_is_refused_first(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl")
    live = tiny_model("gpt2", seed=1, n_layer=2)
    memory = ac.Store(ac.MemoryBackend(), index_dir=tmp_path / "index")
    for options, error, message in (
        ({"model": live}, OptionError, "GPT2LMHeadModel in this process.*save_pretrained"),
        ({"tokenizer": object()}, OptionError, "tokenizer is a object in this process"),
        ({"store": memory}, OptionError, "store is a MemoryBackend"),
        ({"store": ac.Store(tmp_path / "none", limit_gb=0)}, OptionError, "limit of the store is 0"),
        ({"engine": "dask"}, OptionError, "unknown engine 'dask': expected one of 'ray', 'local', 'rank'"),
        ({"layer": [1]}, OptionError, "unknown option 'layer' of UnifiedCache. Did you mean 'layers'"),
        ({"layers": [7]}, IndexError, "7"),
        ({"sites": ("resid_pst",)}, KeyError, "resid_post"),
        ({"pooling": lambda rows: rows[0]}, OptionError, "cannot be sent to other processes"),
        ({"source": tmp_path / "q.jsonl"}, MissingFileError, "Did you mean 'p.jsonl'"),
        ({"source": write(tmp_path / "empty.jsonl", [])}, PromptError, "empty"),
        ({"num_workers": 0}, OptionError, "num_workers is 0"),
        ({"num_gpus_per_worker": -1}, OptionError, "num_gpus_per_worker is -1"),
        ({"device": "cuda"}, OptionError, "workers have no GPU without num_gpus_per_worker=1"),
        ({"max_failed": 2}, OptionError, "max_failed is 2"),
        ({"address": "auto"}, OptionError, "engine is 'local'"),
        ({"file_format": "json"}, OptionError, "Did you mean 'jsonl'"),
        ({"failed_file": tmp_path / "no" / "such"}, OptionError, "failed_file"),
    ):
        given = {"source": source, "model": folder, "engine": "local", "store": tmp_path / "s", **OPTIONS, **options}
        with pytest.raises(error, match=message):
            ac.warmup_distributed(**given)
        assert not list((tmp_path / "s").rglob("*.safetensors"))


def test_a_worker_refuses_another_model_and_a_store_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "model")
    job = make_job(other, tmp_path / "s", OPTIONS)
    tiny_model("gpt2", seed=2, n_layer=2).save_pretrained(other)
    with pytest.raises(ModelChangedError, match="not the same on"):
        Worker(job)
    job = make_job(folder, tmp_path / "s", OPTIONS)
    (tmp_path / "s" / "v1").rmdir()
    (tmp_path / "s").rmdir()
    with pytest.raises(StoreAccessError, match=r"not on this machine.*s3://"):
        Worker(job)


def test_texts_without_a_tokenizer_concern_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError):
        alone(write(tmp_path / "p.jsonl", ["a", "b"]), folder, tmp_path / "s", monkeypatch)


@pytest.mark.parametrize("engine", ["rank", pytest.param("local", marks=pytest.mark.slow)])
def test_a_backend_that_a_package_offers_runs_in_workers(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed as any package is: by its metadata in a folder of the path, and nothing else."""
    about = tmp_path / "site" / "toy_backends-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backends\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[actcache.backends]\ninstalled-toy = toy_backend:Toy\n")
    options = {"backend": "installed-toy", "layers": [1], **OPTIONS}
    with pytest.raises(OptionError, match="unknown backend 'installed-toy'"):
        ac.warmup_distributed(write(tmp_path / "p.jsonl"), folder, engine="local", store=tmp_path / "s", **options)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    source = write(tmp_path / "p.jsonl", PROMPTS[:30])
    workers = {"num_workers": 2} if engine == "local" else {}
    stats = ac.warmup_distributed(source, folder, engine=engine, store=tmp_path / "s", **workers, **options)
    assert (stats.total_prompts, stats.activations_extracted) == (30, 30)
    cache = ac.UnifiedCache(folder, store=tmp_path / "s", **options)
    found = cache.get_activations(PROMPTS[:30])[0].tolist()
    assert found == [toy_backend.value("resid_post.1", prompt[-1]) for prompt in PROMPTS[:30]]
    assert not cache.model_loaded


def test_part_of_a_unit_after_another_worker_stored_some(folder: Path, tmp_path: Path) -> None:
    """What a worker has seen of the store before does not hide what one that died has stored since."""
    job = make_job(folder, tmp_path / "s", OPTIONS)
    (unit,) = Units(find_inputs(write(tmp_path / "p.jsonl", PROMPTS[:21])), prompts=100)
    first, second = Worker(job), Worker(job)
    assert second.run(Task(unit, first=5, step=21)).stats.activations_extracted == 1
    first.run(Task(unit, first=1, step=2))
    done = second.run(Task(unit, tries=1))
    assert (done.rows, done.prompts) == (21, 21)
    assert (done.stats.activations_cached, done.stats.activations_extracted) == (10, 11)
    parts = Task(unit).parts(21)
    assert [len(range(p.first, 21, p.step)) for p in parts] == [3] * 7
    assert sorted(i for p in parts for i in range(p.first, 21, p.step)) == list(range(21))
    assert Task(unit, first=20, step=7).parts(21) == []
    first.close()
    second.close()


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(3, 0) == ["", "", ""]
    assert visible_gpus(2, 2) == ["0,1", "2,3"]
    assert visible_gpus(6, 0.5) == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert visible_gpus(2, 1) == ["3", "5"]
    for size, gpus, message in ((5, 1, "5 workers of that need more than the 4"), (9, 0.5, "more"), (1, 1.5, "whole")):
        with pytest.raises(OptionError, match=message):
            visible_gpus(size, gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5,6,7"


def test_progress_is_told_in_units(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that this rank does: every second of eleven."""
    from contextlib import contextmanager

    from actcache.distributed import warmup

    told: list[Any] = []

    @contextmanager
    def noting(total: int | None, description: str, *, unit: str) -> Any:
        told.extend([total, unit])
        yield type("Bar", (), {"update": lambda self, n: told.append(n)})()

    monkeypatch.setattr(warmup, "progress", noting)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ids": PROMPTS[:33]}), tmp_path / "p.parquet")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ac.warmup_distributed(
        tmp_path / "p.parquet", folder, engine="rank", store=tmp_path / "s", unit_prompts=3, **OPTIONS
    )
    assert told == [6, "unit", 1, 1, 1, 1, 1, 1]
