"""Prompts from the command line: options, files and standard input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from actcache.errors import PromptError, did_you_mean

# What `UnifiedCache` takes: text, token ids, or chat messages.
Prompt = str | list[int] | list[dict[str, Any]]
F = TypeVar("F", bound=Any)

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
_USUAL_COLUMNS = ("prompt", "text", "messages", "input_ids")


def prompt_arguments(command: F) -> F:
    """Add FILES, --prompt, --column and --format to a verb."""
    for decorate in (
        click.option(
            "--format",
            "file_format",
            type=click.Choice(["text", "jsonl", "csv", "tsv"]),
            help="Format of FILES. [default: by suffix; text for others and for standard input]",
        ),
        click.option(
            "--column",
            metavar="NAME",
            help="Column or field that holds the prompt. [default: prompt, text, messages, input_ids, or the only one]",
        ),
        click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be repeated."),
        click.argument("files", nargs=-1, type=click.Path(allow_dash=True, exists=True, dir_okay=False)),
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
    prompts: list[Prompt] = list(texts)
    files = list(files)
    for name in files:
        prompts += _read_file(name, column, file_format)
    if not prompts and not files:
        raise click.UsageError("no prompts: name a file, give --prompt TEXT, or - for standard input.")
    if not prompts:
        raise PromptError(f"no prompts in {', '.join(files)}: the file is empty.")
    return prompts


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


def _read_file(name: str, column: str | None, file_format: str | None) -> list[Prompt]:
    shown = "standard input" if name == "-" else name
    kind = file_format or _FORMATS.get(Path(name).suffix.lower(), "text")
    try:
        if name == "-":
            return list(_parse(sys.stdin, kind, column, shown))
        # newline="" leaves line ends inside quoted CSV fields alone; utf-8-sig drops a byte order mark.
        with open(name, encoding="utf-8-sig", newline="" if kind in ("csv", "tsv") else None) as file:
            return list(_parse(file, kind, column, shown))
    except UnicodeDecodeError as error:
        raise PromptError(f"{shown} is not UTF-8 text (byte {error.start}): convert it first.") from error


def _parse(file: IO[str], kind: str, column: str | None, shown: str) -> Iterator[Prompt]:
    if kind == "jsonl":
        yield from _parse_jsonl(file, column, shown)
    elif kind in ("csv", "tsv"):
        yield from _parse_csv(file, column, shown, delimiter="\t" if kind == "tsv" else ",")
    else:
        if column is not None:
            raise click.UsageError(f"--column {column}: {shown} is read as text, which has no columns (see --format).")
        for line in file:
            text = line.rstrip("\r\n")
            if text.strip():
                yield text


def _parse_jsonl(file: IO[str], column: str | None, shown: str) -> Iterator[Prompt]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{shown}, line {number}: not JSON ({error}).") from error
        if isinstance(value, dict):
            value = value[_choose(list(value), column, f"{shown}, line {number}")]
        if not isinstance(value, (str, list)):
            raise PromptError(
                f"{shown}, line {number}: a prompt is a string, a list of token ids or a list of messages, "
                f"not {json.dumps(value)[:40]}."
            )
        yield value


def _parse_csv(file: IO[str], column: str | None, shown: str, *, delimiter: str) -> Iterator[Prompt]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, delimiter=delimiter)
    if rows.fieldnames is None:
        return
    chosen = _choose(list(rows.fieldnames), column, shown)
    for row in rows:
        text = row[chosen]
        if text is None:
            raise PromptError(f"{shown}, line {rows.line_num}: the row is too short to have a {chosen!r}.")
        if text.strip():
            yield text


def _choose(names: list[str], column: str | None, where: str) -> str:
    if column is not None:
        if column in names:
            return column
        raise PromptError(f"{where}: no {column!r} among {', '.join(names)}.{did_you_mean(column, names)}")
    for name in _USUAL_COLUMNS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise PromptError(f"{where}: which of {', '.join(names)} is the prompt? Say so with --column.")
