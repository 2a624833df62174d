"""Prompts in files of lines: ranges of bytes, each of which has the lines, or the records of CSV, that begin in it."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, cast

from actcache.distributed.inputs import Input
from actcache.distributed.rows import WHOLE_NUMBER, Row, choose, field_of, row_of_line
from actcache.errors import PromptError

_BOM = b"\xef\xbb\xbf"
_SAMPLE = 1 << 18
_LOOKED_AT = 1000


def rows_of_lines(one: Input, start: int, stop: int) -> Iterator[Row]:
    """The rows of a text or JSONL whose lines begin at bytes `start` to `stop`; empty lines are none."""
    with one.open() as raw, buffered(raw) as file:
        for at, line in _lines(file, start, stop):
            parts = [line] if one.kind == "jsonl" else line.rstrip(b"\r\n").split(b"\r")
            for part in parts:
                row = row_of_line(part, f"byte {at}", one)
                if row is not None:
                    yield row


def _lines(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    at = start
    if start:
        # A line begins here only where the one before it ends.
        file.seek(start - 1)
        at = start - 1 + len(file.readline())
    while at < stop:
        line = file.readline()
        if not line:
            return
        yield at, line.removeprefix(_BOM) if at == 0 else line
        at += len(line)


def mean_line(one: Input) -> float:
    """Bytes of a line that is not empty, on the average of those at the beginning of a file."""
    with one.open() as file:
        sample = file.read(_SAMPLE)
    whole = sample[: sample.rfind(b"\n") + 1] or sample
    return len(whole) / max(1, sum(bool(line.strip()) for line in whole.split(b"\n")))


def with_field(one: Input) -> Input:
    """A JSONL with the field that holds its prompts, where nobody has said which: see `field_of`."""
    values = []
    with one.open() as raw, buffered(raw) as file:
        for _, line in itertools.islice(_lines(file, 0, _SAMPLE), _LOOKED_AT):
            # What is none fails where it becomes a prompt.
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line))
    return replace(one, column=field_of(values, one.beside, one.path))


def check_lines(one: Input) -> None:
    """Raises `PromptError` where not one of the first lines of a file is a prompt."""
    first: Row | None = None
    for row in itertools.islice(rows_of_lines(one, 0, _SAMPLE), _LOOKED_AT):
        if not row.reason:
            return
        first = first or row
    if first is not None:
        raise PromptError(f"{one.path}, {first.at}: {first.reason.partition(': ')[2]}")


class CsvFile:
    """A CSV with a header line. Where its records begin is known only to who has read all before them.

    Raises `PromptError` for a header without the column, or for what is no CSV.
    """

    def __init__(self, one: Input) -> None:
        csv.field_size_limit(2**31 - 1)
        self._one = one
        self._delimiter = "\t" if one.kind == "tsv" else ","
        with one.open() as raw, buffered(raw) as file:
            records = self._records(file, 0, one.size)
            names, self._begin = next(records, ([], one.size))
            self._is_empty = not names
            self._at: dict[str, int] = {}
            if not self._is_empty:
                self._at = {name: names.index(choose(names, name, one.path)) for name in one.beside}
                self._prompt = names.index(choose([n for n in names if n not in self._at], one.column, one.path))

    def ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        """Ranges of bytes with so many records each, found by reading through the file."""
        if self._is_empty:
            return
        with self._one.open() as raw, buffered(raw) as file:
            start = end = self._begin
            count = 0
            for fields, end in self._records(file, start, self._one.size):
                count += bool(fields)
                if count == rows:
                    yield start, end
                    start, count = end, 0
            if count:
                yield start, end

    def numbers(self) -> tuple[str, ...]:
        """Which of the columns beside the prompt's hold whole numbers and nothing else, found by reading all."""
        left = {} if self._is_empty else dict(self._at)
        with self._one.open() as raw, buffered(raw) as file:
            for fields, _ in self._records(file, self._begin, self._one.size) if left else ():
                left = {
                    n: k
                    for n, k in left.items()
                    if k >= len(fields) or not fields[k] or WHOLE_NUMBER.fullmatch(fields[k])
                }
        return tuple(left)

    def _typed(self, name: str, field: str) -> str | int | None:
        if not field:
            return None
        return int(field) if name in self._one.numbers else field

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of the records between two bytes at which records begin; those without text are none."""
        with self._one.open() as raw, buffered(raw) as file:
            at = start
            for fields, end in self._records(file, start, stop):
                where, at = f"byte {at}", end
                if not fields:
                    continue
                if len(fields) <= max(self._prompt, *self._at.values(), 0):
                    yield Row(where, None, "PromptError: the row is too short to have all columns that are read.")
                elif fields[self._prompt].strip():
                    beside = {name: self._typed(name, fields[k]) for name, k in self._at.items()}
                    yield Row.of(self._one, where, fields[self._prompt], beside)

    def _records(self, file: BinaryIO, start: int, stop: int) -> Iterator[tuple[list[str], int]]:
        """Each record with the byte behind it."""
        behind = start

        def lines() -> Iterator[str]:
            nonlocal behind
            file.seek(start)
            while behind < stop and (line := file.readline()):
                text = line.removeprefix(_BOM) if behind == 0 else line
                behind += len(line)
                # What is no UTF-8 is found where it becomes a prompt, and spoils no other record.
                yield text.decode("utf-8", "surrogateescape")

        try:
            for fields in csv.reader(lines(), delimiter=self._delimiter):
                yield fields, behind
        except csv.Error as error:
            raise PromptError(f"{self._one.path}, near byte {behind}: {error}.") from None


def buffered(raw: BinaryIO) -> BinaryIO:
    """`raw` with a buffer in front of it, so that lines cost no call of their own."""
    return (
        raw
        if isinstance(raw, io.BufferedReader)
        else cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), 1 << 20))
    )
