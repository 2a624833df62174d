"""Inputs become fixed units: every prompt is in exactly one of them, whatever the file looks like."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.cli.prompts import read_prompts
from actcache.distributed.inputs import find_inputs
from actcache.distributed.rows import Row
from actcache.distributed.units import LEAST, WANTED, Reader, Units
from actcache.errors import MissingFileError, OptionError, PromptError
from actcache.testing.hub import LoopbackHub
from hub_client import Client

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


def rows_of(units: Units) -> list[Row]:
    reader = Reader()
    found = [row for unit in units for row in reader.rows(unit)]
    reader.close()
    return found


def prompts_of(path: Path | Sequence[Path], prompts: int | None = None, column: str | None = None) -> list[Any]:
    rows = rows_of(Units(find_inputs(path, column=column), prompts=prompts))
    assert not [row for row in rows if row.reason]
    return [row.prompt for row in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=40), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 9))
def test_every_line_is_in_one_unit(lines: list[str], end: str, closed: bool, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.txt"
        path.write_bytes((end.join(lines) + (end if closed else "")).encode())
        try:
            expected = read_prompts([str(path)], [])
        except PromptError:
            expected = []
        assert prompts_of(path, size) == expected
        dumped = Path(folder) / "prompts.jsonl"
        dumped.write_bytes(end.join(json.dumps({"text": line or "-"}) for line in lines).encode())
        assert prompts_of(dumped, size) == [line or "-" for line in lines]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=30), st.integers(1, 7))
def test_every_record_of_a_csv_is_in_one_unit(records: list[tuple[str, str]], size: int) -> None:
    """Line ends inside quotes included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.csv"
        made = io.StringIO()
        writer = csv.writer(made)
        writer.writerow(["y", "prompt"])
        writer.writerows(records)
        path.write_bytes(made.getvalue().encode())
        expected = [text for _, text in records if text.strip()]
        units = Units(find_inputs(path), prompts=size)
        rows = rows_of(units)
        assert [row.prompt for row in rows] == expected
        records_in = [sum(1 for _ in csv.reader(io.StringIO(part))) for part in parts_of(path, units)]
        assert records_in[:-1] == [size] * (len(records_in) - 1)


def parts_of(path: Path, units: Units) -> list[str]:
    data = path.read_bytes()
    return [data[unit.start : unit.stop].decode() for unit in units]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(1, 25), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_every_row_of_a_parquet_file_is_in_one_unit(count: int, group: int, size: int, seed: int) -> None:
    expected = [f"{seed} {i}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.parquet"
        pq.write_table(pa.table({"id": range(count), "text": expected}), path, row_group_size=group)
        units = Units(find_inputs(path), prompts=size)
        assert [row.prompt for row in rows_of(units)] == expected
        assert units.count() == len(list(units)) == -(-count // size)
        # In any order, by as many readers.
        readers = [Reader(), Reader()]
        found = {u.number: [r.prompt for r in readers[u.number % 2].rows(u)] for u in reversed(list(units))}
        for reader in readers:
            reader.close()
        assert [text for number in sorted(found) for text in found[number]] == expected


def test_units_are_the_same_each_time_and_change_with_what_they_are_of(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'"prompt {i}"\n' for i in range(500)))

    def ids(config: str = "model", **options: Any) -> list[str]:
        return [unit.id for unit in Units(find_inputs(path), config=config, **options)]

    first = ids()
    assert first == ids()
    assert len(set(first)) == len(first) >= WANTED / 2
    assert not set(first) & set(ids("another"))
    assert not set(first) & set(ids(prompts=3))
    # Of another file beside it they are independent, as long as they have the same size.
    beside = tmp_path / "beside.jsonl"
    beside.write_text('"more"\n')
    both = [u.id for u in Units(find_inputs([path, beside]), prompts=9, config="m")]
    assert both[:-1] == [u.id for u in Units(find_inputs(path), prompts=9, config="m")]
    path.write_text("".join(f'"prompt {i}!"\n' for i in range(500)))
    assert not set(first) & set(ids())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "txt"])
def test_a_small_input_is_several_units(tmp_path: Path, suffix: str) -> None:
    some = [f"prompt {i}" for i in range(40)]
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"prompt": some}), path)
    else:
        line = json.dumps if suffix == "jsonl" else str
        path.write_text("".join(f"{line(x)}\n" for x in (["prompt"] if suffix == "csv" else []) + some))
    units = list(Units(find_inputs(path)))
    assert 40 / LEAST - 1 <= len(units) <= 40 / LEAST + 1
    expected = ["prompt", *some] if suffix == "csv" and len(prompts_of(path)) == 41 else some
    assert prompts_of(path) == expected


def test_a_bad_row_is_a_row_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        b'"one"',
        b"{oops",
        b'{"other": "x", "more": 1}',
        b"3",
        b'"caf\xe9"',
        b"[1, 2, 3]",
        b"",
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows = rows_of(Units(find_inputs(path), prompts=2))
    assert [(row.prompt, row.reason.partition(":")[0]) for row in rows] == [
        ("one", ""), (None, "PromptError"), (None, "PromptError"), (None, "PromptError"), (None, "PromptError"),
        ([1, 2, 3], ""), ("last", ""),
    ]  # fmt: skip
    assert rows[1].at == "byte 6" and "not JSON" in rows[1].reason
    assert "not UTF-8" in rows[4].reason
    table = tmp_path / "prompts.csv"
    table.write_bytes(b"id,prompt\n1,a\n2\n3,caf\xe9\n\n4,\n5,e\n")
    rows = rows_of(Units(find_inputs(table), prompts=2))
    assert [(row.prompt, bool(row.reason)) for row in rows] == [
        ("a", False), (None, True), ("caf\udce9", False), ("e", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "label", "prompts"),
    [
        (['{"prompt": "a"}', '{"title": "b"}', '{"id": 7, "text": "c"}', '"d"'], None, ["a", None, None, "d"]),
        (['{"title": "a"}', '{"prompt": "b"}'], None, [None, "b"]),
        (['{"prompt": "a", "y": 1}', '{"note": "b", "y": 0}'], "y", ["a", None]),
        (['{"q": "a"}', '{"q": "b", "other": "c"}'], None, ["a", "b"]),
    ],
)  # fmt: skip
def test_one_field_holds_the_prompts_of_a_file(
    tmp_path: Path, lines: list[str], label: str | None, prompts: list[str | None]
) -> None:
    """In all of its units: what a line has elsewhere is no prompt, and it says so."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    for size in (1, 10):
        rows = [row for unit in Units(find_inputs(path, label=label), prompts=size) for row in Reader().rows(unit)]
        assert [row.prompt for row in rows] == prompts
        assert all(("is expected" in row.reason) == (row.prompt is None) for row in rows)


def test_fields_that_may_all_hold_the_prompts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"what": "x"}\n{"why": "y"}\n')
    with pytest.raises(PromptError, match=r"which of what, why is the prompt\?"):
        Units(find_inputs(path))


def test_rows_of_a_damaged_row_group_say_so_and_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    texts = [f"prompt number {i} of them all" for i in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset + column.total_compressed_size // 2
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    rows = rows_of(Units(find_inputs(path), prompts=30))
    assert [row.prompt for row in rows[:100] + rows[200:]] == texts[:100] + texts[200:]
    assert len(rows) == 300 and all(row.reason for row in rows[100:200])


def test_columns_of_parquet_hold_texts_ids_and_chats(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"text": ["a", None], "ids": [[1, 2], [3]], "chat": chats}), path)
    assert prompts_of(path, column="ids") == [[1, 2], [3]]
    assert prompts_of(path, column="chat") == chats
    assert [bool(row.reason) for row in rows_of(Units(find_inputs(path)))] == [False, True]


def test_folders_patterns_and_lists_are_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.txt", ".hidden.jsonl", "_notes.txt", "model.bin"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"{name}"\n' if "json" in name else f"{name}\n")
    names = [Path(one.path).name for one in find_inputs(tmp_path)]
    assert names == ["a.jsonl", "b.jsonl", "c.txt"]
    assert [Path(one.path).name for one in find_inputs(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert prompts_of([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]) == ["b.jsonl", "a.jsonl"]


def test_what_is_no_input_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('"a"\n')
    (tmp_path / "prompts.jsonl.gz").write_bytes(b"")
    (tmp_path / "prompts.json").write_text('{"text": "a"}\n')
    assert [one.kind for one in find_inputs(tmp_path / "prompts.json", kind="jsonl")] == ["jsonl"]
    (tmp_path / "wrong.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    (tmp_path / "wrong.parquet").write_bytes(b"PAR1 this is none")
    for source, error, message in (
        (tmp_path / "prompt.jsonl", MissingFileError, "Did you mean 'prompts.jsonl'"),
        (["The Eiffel Tower is in"], MissingFileError, "UnifiedCache.warmup"),
        ([[1, 2, 3]], OptionError, "holds a list.*UnifiedCache.warmup"),
        ([], OptionError, "names no file"),
        (tmp_path / "prompts.jsonl.gz", OptionError, "compressed"),
        (tmp_path / "prompts.json", OptionError, r"ends in \.json: say file_format='jsonl'"),
        ("s3://bucket/prompts.jsonl", OptionError, "hf://datasets"),
        ("hf://gpt2", OptionError, "hf://datasets/org/name"),
    ):
        with pytest.raises(error, match=message):
            find_inputs(source)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"which of question, answer is the prompt"):
        Units(find_inputs(tmp_path / "wrong.jsonl"))
    with pytest.raises(PromptError, match="Did you mean 'question'"):
        Units(find_inputs(tmp_path / "wrong.jsonl", column="qestion"))
    with pytest.raises(PromptError, match="not a Parquet file"):
        Units(find_inputs(tmp_path / "wrong.parquet"))
    with pytest.raises(OptionError, match="unit_prompts is 0"):
        Units(find_inputs(tmp_path / "prompts.jsonl"), prompts=0)


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a"\n"b"\n')
    units = Units(find_inputs(path))
    path.write_text('"a"\n"b"\n"c"\n')
    with pytest.raises(PromptError, match="has changed"):
        rows_of(units)


def test_units_are_found_without_holding_the_input(tmp_path: Path) -> None:
    """What is allocated while all of them are gone through does not grow with the file."""
    peaks = []
    for size in (6_000, 40_000):
        path = tmp_path / f"{size}.csv"
        path.write_text("prompt\n" + "".join(f"prompt {i} {'x' * 60}\n" for i in range(size)))
        lines = tmp_path / f"{size}.txt"
        lines.write_bytes(path.read_bytes())
        units = Units(find_inputs([path, lines]), prompts=8)
        tracemalloc.start()
        assert sum(1 for _ in units) >= size / 8
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000 < 3_000_000


HUB = """
from actcache.distributed.inputs import find_inputs
from actcache.distributed.units import Reader, Units
found = find_inputs(place)
units = list(Units(found, prompts=size))
reader = Reader()
rows = [row.prompt for unit in units for row in reader.rows(unit)]
"""


def test_datasets_of_the_hub_are_read_by_ranges_at_one_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    texts = [f"prompt {i}" for i in range(900)]
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    table = pa.table({"text": texts, "other": ["y" * 5000] * 900})
    pq.write_table(table, folder / "data/a.parquet", compression="none", row_group_size=300, use_dictionary=False)
    (folder / "more.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts[:50]))
    (folder / "README.md").write_text("a card")
    hub.create("org/prompts", kind="dataset").commit(folder)
    with Client(hub, tmp_path / "client") as client:
        before = len(hub.requests)
        client.run(HUB, place="hf://datasets/org/prompts", size=100)
        assert client.run("rows") == texts + texts[:50]
        # The other column, 4.5 MB, is not what is fetched.
        assert hub.sent(before) < 4_000_000 + 2 * (folder / "more.jsonl").stat().st_size
        ids = client.run("[unit.id for unit in units]")
        assert client.run("found[0].path").split("@")[1].count("/") == 2
        client.run(HUB, place="hf://datasets/org/prompts@main/data/*.parquet", size=100)
        assert client.run("rows") == texts
        assert client.run("[unit.id for unit in units]") == ids[:9]
        # Another commit that leaves the file alone leaves its units alone.
        (folder / "README.md").write_text("another card")
        hub.dataset("org/prompts").commit(folder)
        client.run(HUB, place="hf://datasets/org/prompts/data/a.parquet", size=100)
        assert client.run("[unit.id for unit in units]") == ids[:9]
        for place, error in (("hf://datasets/org/nothing", "DatasetNotFoundError"),
                             ("hf://datasets/org/prompts/none", "DatasetNotFoundError")):  # fmt: skip
            with pytest.raises(Exception, match=error):
                client.run(HUB, place=place, size=100)
