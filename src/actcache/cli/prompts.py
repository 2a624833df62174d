"""Prompts from the command line: options, files and standard input."""

from __future__ import annotations

import csv
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import click

from actcache.distributed.rows import WHOLE_NUMBER, choose, field_of, json_of, prompt_in
from actcache.errors import PromptError

# What `UnifiedCache` takes: text, token ids, or chat messages.
Prompt = str | list[int] | list[dict[str, Any]]
F = TypeVar("F", bound=Any)

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".json": "json"}


class _Place(click.Path):
    """A file or folder that is there, standard input, or a dataset of the Hub."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if str(value).startswith("hf://") else super().convert(value, param, ctx)


_PROMPTS = (
    click.argument("files", nargs=-1, type=_Place(allow_dash=True, exists=True)),
    click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be repeated."),
    click.option(
        "--column",
        metavar="NAME",
        help="Column or field that holds the prompt. [default: prompt, text, messages, input_ids, or the only one]",
    ),
    click.option(
        "--format",
        "file_format",
        type=click.Choice(["text", "jsonl", "csv", "tsv", "parquet"]),
        help="Format of FILES. [default: by suffix; text for others and for standard input]",
    ),
)
_BESIDE = (
    click.option(
        "--label-column", metavar="NAME", help="Column or field of FILES that holds the label of each prompt."
    ),
    click.option(
        "--metadata-column",
        "metadata_columns",
        multiple=True,
        metavar="NAME",
        help="Column or field of FILES that is stored or published beside each prompt; may be repeated.",
    ),
)


@dataclass(frozen=True)
class _Columns:
    """Which columns or fields of a file hold what; `prompt` None for the usual one."""

    prompt: str | None
    label: str | None = None
    metadata: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """Those beside the prompt's, each once."""
        return tuple(dict.fromkeys([*([] if self.label is None else [self.label]), *self.metadata]))

    @property
    def named(self) -> list[tuple[str, str]]:
        """What was named, with its option."""
        given = [("--column", self.prompt), ("--label-column", self.label)]
        given += [("--metadata-column", name) for name in self.metadata]
        return [(option, name) for option, name in given if name is not None]


Found = tuple[Prompt, dict[str, Any]]
"""A prompt, and what its row has in the columns beside it."""


Described = tuple[list[Prompt], list[Any] | None, dict[str, list[Any]] | None]
"""Prompts, with the label of each, and what is in other columns, by name; None where no column is named."""


@dataclass(frozen=True)
class Given:
    """What FILES and the options beside it were given."""

    files: tuple[str, ...]
    texts: tuple[str, ...]
    column: str | None
    file_format: str | None
    label_column: str | None = None
    metadata_columns: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether any prompts were named."""
        return bool(self.files or self.texts)

    def described(self) -> Described:
        """The prompts, and what stands beside each: see `read_described`."""
        return read_described(**vars(self))

    def read(self) -> list[Prompt]:
        """The prompts alone."""
        return self.described()[0]


def prompt_arguments(command: F, *beside: Callable[[Any], Any]) -> F:
    """Add FILES, --prompt, --column and --format to a verb, which gets all of it as `given`, a `Given`."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        given = Given(**{field.name: options.pop(field.name) for field in fields(Given) if field.name in options})
        return command(*arguments, given=given, **options)

    made: Any = wrapped
    for option in reversed((*_PROMPTS, *beside)):
        made = option(made)
    return cast(F, made)


def described_prompt_arguments(command: F) -> F:
    """As `prompt_arguments`, with --label-column and --metadata-column."""
    return prompt_arguments(command, *_BESIDE)


def read_prompts(
    files: Iterable[str], texts: Iterable[str], *, column: str | None = None, file_format: str | None = None
) -> list[Prompt]:
    """All prompts of `texts`, then of `files` in order.

    Text files hold a prompt a line (empty lines are skipped). A line of JSONL is a string, an object with the prompt
    in `column`, a list of token ids, or a list of chat messages. CSV has a header line.
    """
    return read_described(files, texts, column=column, file_format=file_format)[0]


def read_described(
    files: Iterable[str],
    texts: Iterable[str],
    *,
    column: str | None = None,
    label_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    file_format: str | None = None,
) -> Described:
    """As `read_prompts`, with the label of each prompt and what is in `metadata_columns`, by name; None where no column
    is named.

    Values of JSONL and Parquet are what they are there. CSV knows no types: those of a column are integers where all of
    a file are, else text, and an empty field is none.
    """
    wanted = _Columns(column, label_column, tuple(dict.fromkeys(metadata_columns)))
    found: list[Found] = [(text, dict.fromkeys(wanted.beside)) for text in texts]
    if found and wanted.beside:
        what = "label" if label_column is not None else "metadata"
        raise click.UsageError(f"a prompt given as --prompt TEXT has no {what}: put it into a file.")
    files = list(files)
    for name in files:
        found += _read_file(name, wanted, file_format)
    if not found and not files:
        raise click.UsageError("no prompts: name a file, give --prompt TEXT, or - for standard input.")
    if not found:
        raise PromptError(f"no prompts in {', '.join(files)}: the file is empty.")
    columns = {name: [values[name] for _, values in found] for name in wanted.beside}
    return (
        [prompt for prompt, _ in found],
        None if label_column is None else columns[label_column],
        {name: columns[name] for name in wanted.metadata} or None,
    )


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


def _read_file(name: str, wanted: _Columns, file_format: str | None) -> list[Found]:
    shown = "standard input" if name == "-" else name
    kind = file_format or _FORMATS.get(Path(name).suffix.lower(), "text")
    if name.startswith("hf://") or Path(name).is_dir() or (kind == "parquet" and name != "-"):
        return list(_read_units(name, wanted, file_format))
    try:
        if name == "-":
            return _parse(sys.stdin, kind, wanted, shown)
        # newline="" leaves line ends inside quoted CSV fields alone; utf-8-sig drops a byte order mark.
        with open(name, encoding="utf-8-sig", newline="" if kind in ("csv", "tsv") else None) as file:
            return _parse(file, kind, wanted, shown)
    except UnicodeDecodeError:
        raise PromptError(f"{shown}{_line_that_is_none(name)} is not UTF-8 text: convert it first.") from None


def _line_that_is_none(name: str) -> str:
    """Which line of a file is no UTF-8, to stand behind its name; of standard input nobody knows any more."""
    if name == "-":
        return ""
    with open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number} (byte {error.start} of it)"
    return ""


def _read_units(name: str, wanted: _Columns, file_format: str | None) -> Iterator[Found]:
    """What is no single file of lines is read as a distributed run reads it."""
    from actcache.distributed.inputs import find_inputs
    from actcache.distributed.units import Reader, Units

    reader = Reader()
    inputs = find_inputs(name, column=wanted.prompt, kind=file_format, label=wanted.label, metadata=wanted.metadata)
    for unit in Units(inputs):
        for row in reader.rows(unit):
            if row.reason:
                raise PromptError(f"{unit.input.path}, {row.at}: {row.reason.partition(': ')[2]}")
            values = dict(row.metadata or {})
            if wanted.label is not None:
                values[wanted.label] = row.label
            yield row.prompt, values
    reader.close()


def _parse(file: IO[str], kind: str, wanted: _Columns, shown: str) -> list[Found]:
    """The prompts of a file, each with what stands beside it."""
    if kind == "jsonl":
        return list(_parse_jsonl(file, wanted, shown))
    if kind == "json":
        return list(_parse_json(file, wanted, shown))
    if kind in ("csv", "tsv"):
        return _typed(list(_parse_csv(file, wanted, shown, delimiter="\t" if kind == "tsv" else ",")), wanted)
    for option, name in wanted.named:
        raise click.UsageError(f"{option} {name}: {shown} is read as text, which has no columns (see --format).")
    lines = (line.rstrip("\r\n") for line in file)
    return [(text, {}) for text in lines if text.strip()]


def _typed(found: list[Found], wanted: _Columns) -> list[Found]:
    for name in wanted.beside:
        values = [beside[name] or None for _, beside in found]
        whole = all(value is None or WHOLE_NUMBER.fullmatch(value) for value in values)
        for (_, beside), value in zip(found, values, strict=True):
            beside[name] = int(value) if whole and value is not None else value
    return found


def _parse_json(file: IO[str], wanted: _Columns, shown: str) -> Iterator[Found]:
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
    yield from _of_values(placed, wanted, shown)


def _parse_jsonl(file: IO[str], wanted: _Columns, shown: str) -> Iterator[Found]:
    values = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{shown}, line {number}"
        values.append((json_of(line, where), where))
    yield from _of_values(values, wanted, shown)


def _of_values(values: list[tuple[Any, str]], wanted: _Columns, shown: str) -> Iterator[Found]:
    column = wanted.prompt
    if column is None:
        column = field_of((value for value, _ in values), wanted.beside, shown)
    for value, where in values:
        yield prompt_in(value, column, wanted.beside, where)


def _parse_csv(file: IO[str], wanted: _Columns, shown: str, *, delimiter: str) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, delimiter=delimiter)
    if rows.fieldnames is None:
        return
    names = list(rows.fieldnames)
    prompt = choose([name for name in names if name not in wanted.beside], wanted.prompt, shown)
    beside = [choose([other for other in names if other != wanted.prompt], name, shown) for name in wanted.beside]
    for row in rows:
        for name in (prompt, *beside):
            if row[name] is None:
                raise PromptError(f"{shown}, line {rows.line_num}: the row is too short to have a {name!r}.")
        if row[prompt].strip():
            yield row[prompt], {name: row[name] for name in beside}
