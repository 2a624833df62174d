"""Prompts from options, files and standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest

from actcache.cli.prompts import read_prompts
from actcache.errors import PromptError


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_options_come_before_files(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "second\n\nthird\n")
    assert read_prompts([file], ["first"]) == ["first", "second", "third"]


def test_text_keeps_spaces_and_unusual_line_separators(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "  two spaces\r\nform\x0cfeed\u2028separator\n   \nlast")
    assert read_prompts([file], []) == ["  two spaces", "form\x0cfeed\u2028separator", "last"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    assert read_prompts([write(tmp_path, "a.txt", "one\n", "utf-8-sig")], []) == ["one"]


def test_jsonl_holds_strings_objects_ids_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi\nthere"}]
    values = ["text", {"id": 1, "text": "in a field"}, [5, 6, 7], chat, {"messages": chat, "label": 0}]
    file = write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(v) for v in values))
    assert read_prompts([file], []) == ["text", "in a field", [5, 6, 7], chat, chat]


def test_csv_with_line_ends_inside_a_field(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", 'label,prompt\n1,"two\nlines, one prompt"\n0,plain\n')
    assert read_prompts([file], []) == ["two\nlines, one prompt", "plain"]


def test_the_column_can_be_named_or_is_the_only_one(tmp_path: Path) -> None:
    file = write(tmp_path, "a.tsv", "q\ta\nwhy\tbecause\n")
    assert read_prompts([file], [], column="q") == ["why"]
    assert read_prompts([write(tmp_path, "b.csv", "q\nwhy\n")], []) == ["why"]


def test_standard_input_is_text_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_prompts(["-"], []) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "one"}\n'))
    assert read_prompts(["-"], [], file_format="jsonl") == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.jsonl", '"fine"\n{"prompt": oops}\n', None, r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", "3\n", None, r"line 1: a prompt is a string, .* not 3"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', None, r"which of question, answer is the prompt\?.*--column"),
        ("a.csv", "question,answer\nx,y\n", "qestion", r"no 'qestion' among question, answer. Did you mean 'question'"),
        ("a.csv", "label,prompt\n1\n", None, r"line 2: the row is too short"),
        ("a.txt", "\n  \n", None, r"no prompts in .*a.txt: the file is empty"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, name: str, text: str, column: str | None, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompts([write(tmp_path, name, text)], [], column=column)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="not UTF-8"):
        read_prompts([write(tmp_path, "a.txt", "caf\u00e9\n", "latin-1")], [])


def test_no_prompts_at_all_is_wrong_usage() -> None:
    with pytest.raises(click.UsageError, match="--prompt"):
        read_prompts([], [])


def test_a_column_of_a_text_file_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="has no columns"):
        read_prompts([write(tmp_path, "a.txt", "x\n")], [], column="prompt")
