"""Prompts from options, files and standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest

from actcache.cli.prompts import read_labelled, read_prompts
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
    values = ["text", {"id": 1, "text": "in a field"}, [5, 6, 7], chat, {"text": chat, "label": 0}]
    file = write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(v) for v in values))
    assert read_prompts([file], []) == ["text", "in a field", [5, 6, 7], chat, chat]


def test_csv_with_line_ends_inside_a_field(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", 'label,prompt\n1,"two\nlines, one prompt"\n0,plain\n')
    assert read_prompts([file], []) == ["two\nlines, one prompt", "plain"]


def test_the_column_can_be_named_or_is_the_only_one(tmp_path: Path) -> None:
    file = write(tmp_path, "a.tsv", "q\ta\nwhy\tbecause\n")
    assert read_prompts([file], [], column="q") == ["why"]
    assert read_prompts([write(tmp_path, "b.csv", "q\nwhy\n")], []) == ["why"]


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("a.jsonl", '{"text": "a", "y": 1.0}\n{"text": "b", "y": "1"}\n{"y": null, "text": "c"}\n', [1.0, "1", None]),
        ("a.csv", "y,text\n1,a\n-2,b\n,c\n", [1, -2, None]),
        ("a.csv", "y,text\n1,a\n007,b\n,c\n", ["1", "007", None]),
        ("a.tsv", "text\ty\na\tpos\nb\tneg\nc\t1\n", ["pos", "neg", "1"]),
        # What is left beside the label is the prompt.
        ("a.csv", "what,y\na,0\nb,1\nc,10\n", [0, 1, 10]),
    ],
)
def test_labels_are_in_a_column_of_their_own(tmp_path: Path, name: str, text: str, labels: list[object]) -> None:
    prompts, found = read_labelled([write(tmp_path, name, text)], [], label_column="y")
    assert prompts == ["a", "b", "c"]
    assert found is not None
    assert [(type(label), label) for label in found] == [(type(label), label) for label in labels]
    assert read_labelled([write(tmp_path, name, text)], [], column=None if "text" in text else "what")[1] is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"a"\n', "line 1: no object, so that it has no 'y'"),
        ("a.jsonl", '{"text": "a", "yy": 1}\n', "no 'y' among text, yy. Did you mean 'yy'"),
        ("a.csv", "text,z\na,1\n", "no 'y' among text, z"),
        ("a.csv", "text,y\na\n", "too short to have a 'y'"),
    ],
)
def test_a_label_that_is_missing_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_labelled([write(tmp_path, name, text)], [], label_column="y")
    with pytest.raises(click.UsageError, match=r"--label-column y.*no columns"):
        read_labelled([write(tmp_path, "a.txt", "a\n")], [], label_column="y")
    with pytest.raises(click.UsageError, match="--prompt TEXT has no label"):
        read_labelled([], ["a"], label_column="y")


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
        # One field for all lines: what a line without it has instead is no prompt.
        ("a.jsonl", '{"prompt": "x"}\n{"title": "y"}\n', None, r"line 2: no 'prompt' among title"),
        ("a.jsonl", '{"id": "x"}\n{"text": "y", "id": "z"}\n', None, r"line 1: no 'text' among id"),
        ("a.jsonl", '{"what": "x"}\n{"why": "y"}\n', None, r"which of what, why is the prompt\?"),
        ("a.json", '[{"prompt": "x"}, {"text": "y"}]', None, r"item 1: no 'prompt' among text"),
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
