"""Prompts from options, files and standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest

from actcache.cli.prompts import read_described, read_prompts
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


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("text", "beside"), [("text,text,y\na,b,c\n", ["y"]), ("text,y,y\na,b,c\n", ["y"]), ("text,text\na,b\n", [])]
)
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, folder: bool, text: str, beside: list[str]) -> None:
    # A file alone had the last one, a file in a folder the first one.
    file = write(tmp_path, "a.csv", text)
    with pytest.raises(PromptError, match="2 columns are called"):
        read_described([str(tmp_path) if folder else file], [], metadata_columns=beside)
    assert read_prompts([write(tmp_path, "a.csv", "text,y,y\na,b,c\n")], []) == ["a"]


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
    prompts, found, others = read_described([write(tmp_path, name, text)], [], label_column="y")
    assert others is None
    assert prompts == ["a", "b", "c"]
    assert found is not None
    assert [(type(label), label) for label in found] == [(type(label), label) for label in labels]
    assert read_described([write(tmp_path, name, text)], [], column=None if "text" in text else "what")[1] is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"a"\n', "line 1: no object, so that it has no 'y'"),
        ("a.jsonl", '{"text": "a", "yy": 1}\n', "'y' is expected, and there is text, yy. Did you mean 'yy'"),
        ("a.csv", "text,z\na,1\n", "'y' is expected, and there is text, z"),
        ("a.csv", "text,y\na\n", "too short to have a 'y'"),
    ],
)
def test_a_label_that_is_missing_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_described([write(tmp_path, name, text)], [], label_column="y")
    with pytest.raises(click.UsageError, match=r"--label-column y.*no columns"):
        read_described([write(tmp_path, "a.txt", "a\n")], [], label_column="y")
    with pytest.raises(click.UsageError, match="--prompt TEXT has no label"):
        read_described([], ["a"], label_column="y")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        (
            "a.jsonl",
            '{"text": "a", "y": 1.0, "z": true}\n{"z": [1, 2], "y": 2, "text": "b"}\n',
            {"z": [True, [1, 2]], "y": [1.0, 2]},
        ),
        ("a.csv", "z,text,y\n1,a,0.5\n,b,x\n", {"z": [1, None], "y": ["0.5", "x"]}),
        ("a.tsv", "text\ty\tz\na\t1\t01\nb\t-1\t2\n", {"z": ["01", "2"], "y": [1, -1]}),
    ],
)
def test_other_columns_are_what_they_are_there(tmp_path: Path, name: str, text: str, wanted: dict[str, object]) -> None:
    file = write(tmp_path, name, text)
    found = read_described([file, file], [], label_column="z", metadata_columns=["z", "y", "z"])
    prompts, labels, others = found
    assert prompts == ["a", "b"] * 2 and others is not None and list(others) == ["z", "y"]
    assert repr(others) == repr({key: values * 2 for key, values in wanted.items()}) and labels == others["z"]  # type: ignore[operator]
    with pytest.raises(PromptError, match=r"'zz' is expected, and there is .*Did you mean 'z'"):
        read_described([file], [], metadata_columns=["zz"])
    with pytest.raises(click.UsageError, match=r"--metadata-column y.*no columns"):
        read_described([write(tmp_path, "a.txt", "a\n")], [], metadata_columns=["y"])
    with pytest.raises(click.UsageError, match="--prompt TEXT has no metadata"):
        read_described([file], ["a"], metadata_columns=["y"])


def test_standard_input_is_text_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_prompts(["-"], []) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "one"}\n'))
    assert read_prompts(["-"], [], file_format="jsonl") == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.jsonl", '"fine"\n{"prompt": oops}\n', None, r"a.jsonl, line 2: not JSON: Expecting value at column 12 of"),
        # Where the line ends is where it is cut off, and not the beginning of the next.
        ("a.jsonl", '{"prompt": "x"\n"fine"\n', None, r"line 1: not JSON: .* at column 15 of '\{\"prompt"),
        ("a.jsonl", "[" * 100_000 + "\n", None, r"line 1: not JSON that can be read"),
        ("a.jsonl", "3\n", None, r"line 1: a prompt is a string, .* not 3"),
        ("a.jsonl", '{"id": 1, "prompt": null}\n', None, r"line 1, field 'prompt': a prompt is a string, .* not null"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', None, r"line 2, field 'prompt': the prompt is empty \(''\)"),
        ("a.jsonl", '{"prompt": "x"}\n{}\n', None, r"line 2: 'prompt' is expected, and there is nothing"),
        ("a.jsonl", "{}\n", None, r"line 1: nothing is there that could be a prompt"),
        ("a.jsonl", "[]\n", None, r"line 1: the prompt is empty"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', None, r"which of question, answer .*\? Say so with column="),
        # One field for all lines: what a line without it has instead is no prompt.
        ("a.jsonl", '{"prompt": "x"}\n{"title": "y"}\n', None, r"line 2: 'prompt' is expected, and there is title"),
        ("a.jsonl", '{"id": "x"}\n{"text": "y", "id": "z"}\n', None, r"line 1: 'text' is expected, and there is id"),
        ("a.jsonl", '{"what": "x"}\n{"why": "y"}\n', None, r"which of what, why is the prompt\?"),
        ("a.json", '[{"prompt": "x"}, {"text": "y"}]', None, r"item 1: 'prompt' is expected, and there is text"),
        ("a.csv", "question,answer\nx,y\n", "qestion", r"'qestion' is expected, .* Did you mean 'question'"),
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
    for name in ("a.txt", "a.jsonl", "a.csv"):
        with pytest.raises(PromptError, match=rf"{name}, line 20002 \(byte 3 of it\) is not UTF-8"):
            # Further behind than what is read at once.
            read_prompts([write(tmp_path, name, '"x"\n' * 20_001 + "caf\u00e9\n", "latin-1")], [])


def test_no_prompts_at_all_is_wrong_usage() -> None:
    with pytest.raises(click.UsageError, match="--prompt"):
        read_prompts([], [])


def test_a_column_of_a_text_file_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="has no columns"):
        read_prompts([write(tmp_path, "a.txt", "x\n")], [], column="prompt")
