"""Prompts from the command line: options, files and standard input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from actcache.distributed.rows import WHOLE_NUMBER, choose, field_of
from actcache.errors import PromptError

# What `UnifiedCache` takes: text, token ids, or chat messages.
Prompt = str | list[int] | list[dict[str, Any]]
F = TypeVar("F", bound=Any)

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".json": "json"}


class _Place(click.Path):
    """A file or folder that is there, standard input, or a dataset of the Hub."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if str(value).startswith("hf://") else super().convert(value, param, ctx)


label_column_option = click.option(
    "--label-column", metavar="NAME", help="Column or field of FILES that holds the label of each prompt."
)


def prompt_arguments(command: F) -> F:
    """Add FILES, --prompt, --column and --format to a verb."""
    for decorate in (
        click.option(
            "--format",
            "file_format",
            type=click.Choice(["text", "jsonl", "csv", "tsv", "parquet"]),
            help="Format of FILES. [default: by suffix; text for others and for standard input]",
        ),
        click.option(
            "--column",
            metavar="NAME",
            help="Column or field that holds the prompt. [default: prompt, text, messages, input_ids, or the only one]",
        ),
        click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be repeated."),
        click.argument("files", nargs=-1, type=_Place(allow_dash=True, exists=True)),
    ):
        command = decorate(command)
    return command


def read_prompts(
    files: Iterable[str], texts: Iterable[str], *, column: str | None = None, file_format: str | None = None
) -> list[Prompt]:
    """All prompts of `texts`, then of `files` in order.

    Text files hold a prompt a line (empty lines are skipped). A line of JSONL is a string, an object with the prompt
    in `column`, a list of token ids, or a list of chat messages. CSV has a header line.
    """
    return read_labelled(files, texts, column=column, file_format=file_format)[0]


def read_labelled(
    files: Iterable[str],
    texts: Iterable[str],
    *,
    column: str | None = None,
    label_column: str | None = None,
    file_format: str | None = None,
) -> tuple[list[Prompt], list[Any] | None]:
    """As `read_prompts`, with the label of each prompt from `label_column` of its file; None without that.

    Labels of JSONL are what they are there. CSV knows no types: a file's are integers where all of them are, else text,
    and an empty field is none.
    """
    prompts: list[Prompt] = list(texts)
    if prompts and label_column is not None:
        raise click.UsageError("a prompt given as --prompt TEXT has no label: put it into a file.")
    labels: list[Any] = [None] * len(prompts)
    files = list(files)
    for name in files:
        for prompt, label in _read_file(name, column, label_column, file_format):
            prompts.append(prompt)
            labels.append(label)
    if not prompts and not files:
        raise click.UsageError("no prompts: name a file, give --prompt TEXT, or - for standard input.")
    if not prompts:
        raise PromptError(f"no prompts in {', '.join(files)}: the file is empty.")
    return prompts, None if label_column is None else labels


def read_prompt(text: str) -> Prompt:
    """One prompt: text, or what is JSON of a list of token ids or of chat messages as these."""
    if text.lstrip().startswith("["):
        try:
            given = json.loads(text)
        except ValueError:
            return text
        if isinstance(given, list) and given:
            same = all(type(i) is int for i in given) or all(isinstance(i, dict) for i in given)
            return given if same else text
    return text


def _read_file(
    name: str, column: str | None, label_column: str | None, file_format: str | None
) -> list[tuple[Prompt, Any]]:
    shown = "standard input" if name == "-" else name
    kind = file_format or _FORMATS.get(Path(name).suffix.lower(), "text")
    if name.startswith("hf://") or Path(name).is_dir() or (kind == "parquet" and name != "-"):
        return list(_read_units(name, column, label_column, file_format))
    try:
        if name == "-":
            return _parse(sys.stdin, kind, column, label_column, shown)
        # newline="" leaves line ends inside quoted CSV fields alone; utf-8-sig drops a byte order mark.
        with open(name, encoding="utf-8-sig", newline="" if kind in ("csv", "tsv") else None) as file:
            return _parse(file, kind, column, label_column, shown)
    except UnicodeDecodeError as error:
        raise PromptError(f"{shown} is not UTF-8 text (byte {error.start}): convert it first.") from error


def _read_units(
    name: str, column: str | None, label_column: str | None, file_format: str | None
) -> Iterator[tuple[Prompt, Any]]:
    """What is no single file of lines is read as a distributed run reads it."""
    from actcache.distributed.inputs import find_inputs
    from actcache.distributed.units import Reader, Units

    reader = Reader()
    for unit in Units(find_inputs(name, column=column, kind=file_format, label=label_column)):
        for row in reader.rows(unit):
            if row.reason:
                raise PromptError(f"{unit.input.path}, {row.at}: {row.reason.partition(': ')[2]}")
            yield row.prompt, row.label
    reader.close()


def _parse(
    file: IO[str], kind: str, column: str | None, label_column: str | None, shown: str
) -> list[tuple[Prompt, Any]]:
    """The prompts of a file, each with its label: None without `label_column`."""
    if kind == "jsonl":
        return list(_parse_jsonl(file, column, label_column, shown))
    if kind == "json":
        return list(_parse_json(file, column, label_column, shown))
    if kind in ("csv", "tsv"):
        return _typed(list(_parse_csv(file, column, label_column, shown, delimiter="\t" if kind == "tsv" else ",")))
    for option, name in (("--column", column), ("--label-column", label_column)):
        if name is not None:
            raise click.UsageError(f"{option} {name}: {shown} is read as text, which has no columns (see --format).")
    lines = (line.rstrip("\r\n") for line in file)
    return [(text, None) for text in lines if text.strip()]


def _typed(found: list[tuple[Prompt, Any]]) -> list[tuple[Prompt, Any]]:
    labels = [label or None for _, label in found]
    if all(label is None or WHOLE_NUMBER.fullmatch(label) for label in labels):
        labels = [None if label is None else int(label) for label in labels]
    return [(prompt, label) for (prompt, _), label in zip(found, labels, strict=True)]


def _parse_json(
    file: IO[str], column: str | None, label_column: str | None, shown: str
) -> Iterator[tuple[Prompt, Any]]:
    """A file whose whole content is one list of prompts."""
    try:
        values = json.load(file)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"{shown} is not JSON ({error}): where each line is a prompt of its own, say --format jsonl."
        ) from None
    if not isinstance(values, list):
        raise PromptError(f"{shown}: a list of prompts is expected, not {json.dumps(values)[:40]}.")
    placed = [(value, f"{shown}, item {number}") for number, value in enumerate(values)]
    yield from _of_values(placed, column, label_column, shown)


def _parse_jsonl(
    file: IO[str], column: str | None, label_column: str | None, shown: str
) -> Iterator[tuple[Prompt, Any]]:
    values = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            values.append((json.loads(line), f"{shown}, line {number}"))
        except ValueError as error:
            raise PromptError(f"{shown}, line {number}: not JSON ({error}).") from error
    yield from _of_values(values, column, label_column, shown)


def _of_values(
    values: list[tuple[Any, str]], column: str | None, label_column: str | None, shown: str
) -> Iterator[tuple[Prompt, Any]]:
    if column is None:
        column = field_of((value for value, _ in values), () if label_column is None else (label_column,), shown)
    for value, where in values:
        yield _of_json(value, column, label_column, where)


def _of_json(value: Any, column: str | None, label_column: str | None, where: str) -> tuple[Prompt, Any]:
    label = None
    if label_column is not None:
        if not isinstance(value, dict):
            raise PromptError(f"{where}: no object, so that it has no {label_column!r}.")
        label = value[choose(list(value), label_column, where)]
    if isinstance(value, dict):
        value = value[choose([n for n in value if n != label_column], column, where)]
    if not isinstance(value, (str, list)):
        raise PromptError(
            f"{where}: a prompt is a string, a list of token ids or a list of messages, not {json.dumps(value)[:40]}."
        )
    return value, label


def _parse_csv(
    file: IO[str], column: str | None, label_column: str | None, shown: str, *, delimiter: str
) -> Iterator[tuple[Prompt, Any]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, delimiter=delimiter)
    if rows.fieldnames is None:
        return
    names = list(rows.fieldnames)
    wanted = [choose([n for n in names if n != label_column], column, shown)]
    if label_column is not None:
        wanted.append(choose([n for n in names if n != column], label_column, shown))
    for row in rows:
        for name in wanted:
            if row[name] is None:
                raise PromptError(f"{shown}, line {rows.line_num}: the row is too short to have a {name!r}.")
        if row[wanted[0]].strip():
            yield row[wanted[0]], None if label_column is None else row[label_column]
