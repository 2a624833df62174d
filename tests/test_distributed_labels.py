"""Labels, metadata and repetitions of a warm-up on workers: columns of the input, stored with their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actcache as ac
from actcache.distributed.inputs import find_inputs
from actcache.distributed.units import Reader, Units
from actcache.errors import OptionError, PartialWarmupError, PromptError
from actcache.extract import attempts
from actcache.extract.backends.local import LocalSession
from actcache.testing.hub import LoopbackHub
from distributed_helpers import OPTIONS, PROMPTS, folder, set_fault, stored, write
from hub_client import Client

__all__ = ["folder"]

SOME = PROMPTS[:24]


def alone(source: Path, folder: Path, store: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return ac.warmup_distributed(source, folder, engine="rank", store=store, **{**OPTIONS, **options})


def cache_of(folder: Path, store: Any) -> ac.UnifiedCache:
    return ac.UnifiedCache(folder, store=store, **OPTIONS)


def labelled(i: int) -> dict[str, Any]:
    return {"ids": SOME[i], "y": [True, None, "no", 2.5][i % 4], "group": i // 4, "tags": ["a", i]}


COLUMNS: dict[str, Any] = {"column": "ids", "label_column": "y", "metadata_columns": ["group", "tags"]}


def check_said(folder: Path, store: Any) -> None:
    cache = cache_of(folder, store)
    rows = [labelled(i) for i in range(len(SOME))]
    found = cache.get_labels(SOME)
    assert found == [row["y"] for row in rows]
    assert [type(label) for label in found] == [type(row["y"]) for row in rows]
    assert cache.get_metadata(SOME) == [{"group": row["group"], "tags": row["tags"]} for row in rows]


def test_labels_and_metadata_of_jsonl_lie_with_their_prompts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "p.jsonl", [labelled(i) for i in range(len(SOME))])
    # Also those of prompts that are stored before.
    alone(write(tmp_path / "before.jsonl", SOME[:10]), folder, tmp_path / "s", monkeypatch)
    stats = alone(source, folder, tmp_path / "s", monkeypatch, unit_prompts=5, **COLUMNS)
    assert (stats.total_prompts, stats.activations_cached) == (24, 10)
    check_said(folder, tmp_path / "s")
    # Without columns nothing is said, and what was said stays.
    alone(source, folder, tmp_path / "s", monkeypatch, column="ids")
    check_said(folder, tmp_path / "s")
    source = write(tmp_path / "q.jsonl", [{"ids": SOME[0], "y": None}, {"ids": SOME[2], "y": 7}])
    alone(source, folder, tmp_path / "s", monkeypatch, column="ids", label_column="y")
    assert cache_of(folder, tmp_path / "s").get_labels(SOME[:5]) == [None, None, 7, 2.5, True]


def test_labels_of_parquet_keep_their_types(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"more": ["x"] * 24, "y": [i if i % 3 else None for i in range(24)], "ids": SOME, "at": range(24)})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=7)
    alone(
        tmp_path / "p.parquet", folder, tmp_path / "s", monkeypatch,
        column="ids", label_column="y", metadata_columns=["at", "y"], unit_prompts=5,
    )  # fmt: skip
    cache = cache_of(folder, tmp_path / "s")
    labels = [i if i % 3 else None for i in range(24)]
    assert cache.get_labels(SOME) == labels
    assert cache.get_metadata(SOME) == [{"at": i, "y": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        (["1", "-20", "", "0"], [1, -20, None, 0]),
        # By what the whole file holds, and not a unit of it.
        (["1", "2", "007", ""], ["1", "2", "007", None]),
        (["a", "1", "", '"x,\ny"'], ["a", "1", None, "x,\ny"]),
    ],
)
def test_labels_of_csv_are_numbers_where_all_are(tmp_path: Path, fields: list[str], labels: list[Any]) -> None:
    path = tmp_path / "p.csv"
    path.write_text("y,prompt\n" + "".join(f"{field},text {i}\n" for i, field in enumerate(fields)))
    reader = Reader()
    units = Units(find_inputs(path, label="y"), prompts=1)
    rows = [row for unit in units for row in reader.rows(unit)]
    assert [(row.prompt, row.label) for row in rows] == [(f"text {i}", label) for i, label in enumerate(labels)]
    assert [type(row.label) for row in rows] == [type(label) for label in labels]


def test_rows_whose_label_cannot_be_kept_are_reported_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [{"ids": prompt, "y": i % 2} for i, prompt in enumerate(SOME)]
    rows[3] = {"ids": SOME[3]}
    rows[5] = SOME[5]
    rows[8]["y"] = {"a": 1}
    # The same prompt, of another label; and of an equal one that is another kind of thing.
    rows.insert(12, {"ids": SOME[10], "y": 1})
    rows.insert(13, {"ids": SOME[11], "y": True})
    rows.insert(14, {"ids": SOME[10], "y": 0})
    failed = tmp_path / "failed.jsonl"
    with pytest.raises(PartialWarmupError, match="5 prompts were not stored") as caught:
        alone(
            write(tmp_path / "p.jsonl", rows), folder, tmp_path / "s", monkeypatch,
            column="ids", label_column="y", unit_prompts=100, failed_file=failed,
        )  # fmt: skip
    assert [place for place, _ in caught.value.failed] == [3, 5, 8, 12, 13]
    for (_, reason), said in zip(
        caught.value.failed,
        (
            "'y' is expected, and there is ids",
            "no object, so that it has no 'y'",
            "the label is {'a': 1}",
            "is that of byte",
            "is that of",
        ),
        strict=True,
    ):
        assert "PromptError" in reason and said in reason
    assert len(failed.read_text().splitlines()) == 5
    cache = cache_of(folder, tmp_path / "s")
    left = [i for i in range(24) if i not in (3, 5, 8)]
    assert stored(tmp_path / "s") == 21
    assert cache.get_labels([SOME[i] for i in left]) == [i % 2 for i in left]


def test_columns_that_are_not_there_are_refused_first(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [labelled(i) for i in range(4)])
    (tmp_path / "p.txt").write_text("a\nb\n")
    pq.write_table(pa.table({"text": ["a"], "truth": [1]}), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("text,truth\na,1\n")
    for options, error, message in (
        ({"label_column": "z"}, PromptError, "'z' is expected, and there is ids, y, group, tags"),
        ({"metadata_columns": ["grup"]}, PromptError, "Did you mean 'group'"),
        ({"metadata_columns": "group"}, OptionError, "expected a list of names"),
        ({"source": tmp_path / "p.txt", "label_column": "y", "column": None}, OptionError, "y: .* has no columns"),
        ({"source": tmp_path / "p.parquet", "label_column": "trut", "column": None}, PromptError, "mean 'truth'"),
        ({"source": tmp_path / "p.csv", "label_column": "trut", "column": None}, PromptError, "mean 'truth'"),
        ({"labels": [1, 2]}, OptionError, "workers read files: name the column with label_column="),
        ({"metadata": {"a": [1]}}, OptionError, "name the column with metadata_columns="),
        ({"max_retries": -1}, OptionError, "max_retries is -1"),
    ):
        given = {
            "source": source,
            "model": folder,
            "engine": "local",
            "store": tmp_path / "s",
            "column": "ids",
            **OPTIONS,
        }
        with pytest.raises(error, match=message):
            ac.warmup_distributed(**{**given, **options})
        assert not list((tmp_path / "s").rglob("*.safetensors"))


def test_a_failing_batch_is_tried_as_often_as_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tries = LocalSession.run, 0

    def faulty(self: Any, *given: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise RuntimeError("a driver's error")
        return run(self, *given)

    pauses: list[float] = []
    monkeypatch.setattr(attempts, "pause", pauses.append)
    monkeypatch.setattr(LocalSession, "run", faulty)
    source = write(tmp_path / "p.jsonl", SOME[:4])
    stats = alone(source, folder, tmp_path / "s", monkeypatch, max_retries=2, batch_size=8)
    assert (stats.activations_extracted, tries, len(pauses)) == (4, 3, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray_at_a_time")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray.*")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_store_labels_and_try_again(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one, of which that with the token fails each time, and is tried once more, two seconds later."""
    if engine == "ray":
        ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    set_fault(monkeypatch, failing=201, count=str(tmp_path / "count"))
    rows = [*(labelled(i) for i in range(len(SOME))), {**labelled(0), "ids": [201]}]
    source = write(tmp_path / "p.jsonl", rows)
    share = {"num_cpus_per_worker": 0.5} if engine == "ray" else {}
    try:
        with pytest.raises(PartialWarmupError, match="this batch fails") as caught:
            ac.warmup_distributed(
                source, folder, engine=engine, num_workers=2, store=tmp_path / "s", unit_prompts=8, batch_size=1,
                max_retries=1, **COLUMNS, **share, **OPTIONS,
            )  # fmt: skip
    finally:
        if engine == "ray":
            ray.shutdown()
    assert [place for place, _ in caught.value.failed] == [24]
    # Among the others of its unit, and alone.
    assert len((tmp_path / "count").read_text().split()) == 4
    check_said(folder, tmp_path / "s")


HUB = """
from actcache.distributed.inputs import find_inputs
from actcache.distributed.units import Reader, Units
reader = Reader()
found = Units(find_inputs("hf://datasets/org/prompts/p.parquet", label="y", metadata=["n"]), prompts=7)
rows = [(row.prompt, row.label, row.metadata) for unit in found for row in reader.rows(unit)]
"""


def test_labels_of_datasets_of_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table = pa.table({"n": range(20), "text": [f"prompt {i}" for i in range(20)], "y": [i % 2 for i in range(20)]})
    pq.write_table(table, tmp_path / "set" / "p.parquet")
    hub.create("org/prompts", kind="dataset").commit(tmp_path / "set")
    with Client(hub, tmp_path / "client") as client:
        client.run(HUB)
        assert client.run("rows") == [[f"prompt {i}", i % 2, {"n": i}] for i in range(20)]


def test_the_command_line_takes_labels_of_any_file(tmp_path: Path) -> None:
    from actcache.cli.prompts import read_described

    pq.write_table(pa.table({"y": ["a", None], "text": ["one", "two"]}), tmp_path / "p.parquet")
    assert read_described([str(tmp_path / "p.parquet")], [], label_column="y") == (["one", "two"], ["a", None], None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("text,y\none,1\ntwo,2\n")
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"text": "three", "y": "x"}) + "\n")
    found = read_described([str(tmp_path / "in")], [], label_column="y", metadata_columns=["y"])
    assert found == (["one", "two", "three"], [1, 2, "x"], {"y": [1, 2, "x"]})
