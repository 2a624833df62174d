"""Prompts in Parquet files: row groups are decoded a batch of rows at a time, one column of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from actcache.distributed.inputs import Input
from actcache.distributed.rows import Row, choose
from actcache.errors import MissingExtraError, PromptError

_BATCH = 1024


class ParquetRows:
    """The rows of one file. Asked for in rising order, each row group is decoded once.

    Raises `PromptError` for a file that is no Parquet, or has not the columns that are asked for.
    """

    def __init__(self, one: Input) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingExtraError("reading Parquet needs pyarrow: pip install 'actcache[hub]'") from None
        self._one = one
        self._stream = one.open()
        try:
            self._file = pq.ParquetFile(self._stream)
            metadata = self._file.metadata
            self.num_rows: int = metadata.num_rows
            names = list(self._file.schema_arrow.names)
            beside = [choose(names, name, one.path) for name in one.beside]
            self._columns = [choose([name for name in names if name not in beside], one.column, one.path), *beside]
        except Exception as error:
            self._stream.close()
            if isinstance(error, PromptError) or not self._is_damage(error):
                raise
            raise PromptError(f"{one.path} is not a Parquet file that can be read: {error}") from None
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group = -1
        self._first = 0
        self._values: list[Any] = []
        self._batches: Iterator[Any] = iter(())

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Rows `start` to `stop` of the file. Those that cannot be decoded say so, each for itself."""
        row = start
        while row < stop:
            try:
                self._seek(row)
            except Exception as error:
                if not self._is_damage(error):
                    raise
                self._group = -1
                reason = f"{type(error).__name__}: {error}"
                # What lies behind it in its row group cannot be found either.
                end = min(stop, self._starts[bisect_right(self._starts, row)])
                yield from (Row(f"row {k}", None, reason) for k in range(row, end))
                row = end
                continue
            values = self._values[row - self._first : stop - self._first]
            for k, (value, *others) in enumerate(values, row):
                if value is None:
                    yield Row(f"row {k}", None, "PromptError: there is none (null).")
                else:
                    yield Row.of(self._one, f"row {k}", value, dict(zip(self._columns[1:], others, strict=True)))
            row += len(values)

    def close(self) -> None:
        self._batches = iter(())
        self._file.close()
        self._stream.close()

    def _seek(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._first, self._values = self._starts[group], []
            self._batches = self._file.iter_batches(_BATCH, row_groups=[group], columns=self._columns)
            self._group = group
        while row >= self._first + len(self._values):
            batch = next(self._batches, None)
            if batch is None:
                raise EOFError(f"row group {group} has fewer rows than its footer says")
            self._first += len(self._values)
            self._values = list(zip(*(batch.column(name).to_pylist() for name in self._columns), strict=True))

    def _is_damage(self, error: Exception) -> bool:
        """Whether the bytes are at fault, and not the way to them."""
        import pyarrow as pa

        here = not self._one.path.startswith("hf://")
        return isinstance(error, pa.ArrowException | EOFError) or (here and isinstance(error, OSError | ValueError))
