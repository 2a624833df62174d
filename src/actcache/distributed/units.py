"""Units of work: fixed parts of the input, the same whoever asks, however many workers there are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from actcache.distributed.inputs import Input
from actcache.distributed.lines import CsvFile, check_lines, mean_line, rows_of_lines, with_field
from actcache.distributed.parquet import ParquetRows
from actcache.distributed.rows import Row
from actcache.errors import OptionError

LEAST, MOST, WANTED = 8, 1024, 64
"""How many prompts a unit has at least and at most, and how many units an input becomes while they have so many."""
_FOOTERS = 64


@dataclass(frozen=True)
class Unit:
    """One part of one file.

    Attributes:
        number: its place among all units.
        start, stop: rows of Parquet; else the bytes at which its lines begin.
        id: a digest of the file's identity, the range, and what is extracted.
    """

    number: int
    input: Input
    start: int
    stop: int
    id: str


class Units:
    """The units of `inputs`, which are found while they are asked for.

    Args:
        prompts: how many prompts a unit has, about; None: between `LEAST` and `MOST`, so that there are `WANTED`.
        config: what is extracted, as text.

    Raises:
        OptionError, PromptError: no such number; the first file holds no prompts that can be read.
    """

    def __init__(self, inputs: Sequence[Input], *, prompts: int | None = None, config: str = "") -> None:
        if prompts is not None and (isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 1):
            raise OptionError(f"unit_prompts is {prompts!r}: expected how many prompts a unit of work has, at least 1.")
        self.inputs = inputs
        self._config = config
        self._understood: dict[str, Input] = {}
        each = self._bytes_of_a_prompt(self._as_read(inputs[0]))
        estimate = sum(one.size for one in inputs) / each
        self.prompts = prompts or min(MOST, max(LEAST, math.ceil(estimate / WANTED)))

    def __iter__(self) -> Iterator[Unit]:
        number = 0
        for given in self.inputs:
            one = self._as_read(given)
            for start, stop in self._ranges(one):
                yield Unit(number, one, start, stop, self._id(one, start, stop))
                number += 1

    def count(self) -> int | None:
        """How many there are, where that is known without reading the input."""
        if any(one.kind in ("csv", "tsv") for one in self.inputs) or len(self.inputs) > _FOOTERS:
            return None
        return sum(1 for one in self.inputs for _ in self._ranges(one))

    def _as_read(self, one: Input) -> Input:
        """With what must be the same in all of a file's units, and what one of them has of it may not tell."""
        typed = one.kind in ("csv", "tsv") and one.beside
        if not typed and (one.kind != "jsonl" or one.column is not None):
            return one
        if one.path not in self._understood:
            self._understood[one.path] = replace(one, numbers=CsvFile(one).numbers()) if typed else with_field(one)
        return self._understood[one.path]

    def _id(self, one: Input, start: int, stop: int) -> str:
        said = json.dumps([one.identity, one.kind, one.column, start, stop, self._config], ensure_ascii=True)
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def _ranges(self, one: Input) -> Iterator[tuple[int, int]]:
        if one.kind == "parquet":
            file = ParquetRows(one)
            file.close()
            step, end = self.prompts, file.num_rows
        elif one.kind in ("csv", "tsv"):
            yield from CsvFile(one).ranges(self.prompts)
            return
        else:
            # Of this very file, so that its units do not depend on those beside it.
            step, end = max(1, round(mean_line(one) * self.prompts)), one.size
        for start in range(0, end, step):
            yield start, min(start + step, end)

    def _bytes_of_a_prompt(self, one: Input) -> float:
        if one.kind == "parquet":
            file = ParquetRows(one)
            file.close()
            return one.size / max(1, file.num_rows)
        if one.kind in ("csv", "tsv"):
            CsvFile(one)
        else:
            check_lines(one)
        return max(1.0, mean_line(one))


class Reader:
    """Reads units, of one file after the other."""

    def __init__(self) -> None:
        self._input: Input | None = None
        self._file: ParquetRows | CsvFile | None = None

    def rows(self, unit: Unit) -> list[Row]:
        """The prompts of a unit, in order."""
        one = unit.input
        if one.kind in ("text", "jsonl"):
            return list(rows_of_lines(one, unit.start, unit.stop))
        if self._input != one or self._file is None:
            self.close()
            self._file = ParquetRows(one) if one.kind == "parquet" else CsvFile(one)
            self._input = one
        return list(self._file.rows(unit.start, unit.stop))

    def close(self) -> None:
        if isinstance(self._file, ParquetRows):
            self._file.close()
        self._input = self._file = None
