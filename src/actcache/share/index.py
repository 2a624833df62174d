"""The index of a dataset: its metadata, and the columns that are asked for, which alone are transferred.

It is a stranger's file. Before pyarrow decodes a column, the footer of the file must promise no more than so many
bytes could hold; long texts that recur stay one value each. What was transferred is kept packed, and need not be in
memory: it is decoded a few rows at a time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import ActCacheError, DatasetFormatError, DatasetNotFoundError, MissingExtraError
from actcache.share import seal
from actcache.share.blocks import BLOCK, DamagedFileError
from actcache.share.checksums import Checksums
from actcache.share.format import INDEX, INFO, PREFIX, describe
from actcache.share.ours import PREFIX as OURS
from actcache.share.ours import SEALED
from actcache.share.pages import read_pages
from actcache.share.seal import BrokenSealError, Seal
from actcache.share.source import NoFileError, Source
from actcache.store.files import log
from actcache.store.spill import Spill

if TYPE_CHECKING:
    import pyarrow as pa

MAX_JSON = 16 << 20
"""Bytes of metadata. A description of 100,000 shards takes about 4 MB."""

_FIRST, _TAIL = 1 << 18, 1 << 19
_MAX_FOOTER = 64 << 20
_NUMBERS_PER_BYTE = 8
"""Most numbers that one byte of an index can stand for: each row and each token has a place of its own to name."""
_MAX_RATIO = 100
"""Most bytes that one byte of a column can become: texts that follow a template compress well."""
_FEW_BYTES = 32
"""Bytes of a value that may recur, such as a short label, packed to next to nothing."""
_SOME = 1 << 16
_BATCH_NUMBERS = 1 << 20


@lru_cache(maxsize=1024)
def _tell_of_another_writer(name: str) -> None:
    """Once a process, however often the index of the dataset `name` is read."""
    log.warning("%s of %s was written anew since it was pushed, and has no digests of its own", INDEX, name)


class Index:
    """The index of a dataset, opened: what it says of the whole dataset, and its columns.

    Attributes:
        description: what the dataset holds.
        num_rows: its prompts.
        columns: the names of the columns.
        ours: what the dataset says under keys of this library, see `actcache.share.ours`; empty where it says nothing.
        checksums: what it says of its files.
        nbytes: the size of the file.
        spill: where what there is of each prompt may lie.
    """

    def __init__(self, source: Source, spill: Spill | None = None) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtraError("reading a dataset needs pyarrow: pip install 'actcache[hub]'") from error
        self.source = source
        self.spill = Spill(None) if spill is None else spill
        try:
            self._bytes = _Bytes(source, INDEX, self.spill)
        except NoFileError:
            raise DatasetNotFoundError(f"{source.name} has no {INDEX}: it is no dataset of activations.") from None
        self._check_footer()
        self._parquet = self._decoded(lambda: pq.ParquetFile(self._bytes, pre_buffer=False))
        self.num_rows: int = self._parquet.metadata.num_rows
        schema = self._decoded(lambda: self._parquet.schema_arrow)
        self.columns: list[str] = schema.names
        if len(set(self.columns)) != len(self.columns):
            raise self.wrong("two columns have the same name")
        self.nbytes = self._bytes.size
        self.description = describe(self._metadata(schema.metadata or {}), source.name)
        if self.description.num_prompts != self.num_rows:
            raise self.wrong(f"num_prompts is {self.description.num_prompts:,}, and it has {self.num_rows:,} rows")
        self.ours = self._ours(schema.metadata or {})
        if SEALED in self.ours and not self._bytes.sealed:
            _tell_of_another_writer(source.name)
        self.checksums = Checksums(source, self.ours.get("files"), self.ours.get("blocks"))
        self._types = {name: schema.field(name).type for name in self.columns}

    def read(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Whole columns; texts as dictionaries, so that a text that recurs is in memory once."""
        import pyarrow.parquet as pq

        self._check(names)
        texts = self._texts(names)
        self._fetch(names)
        file = self._decoded(lambda: pq.ParquetFile(self._bytes, pre_buffer=False, read_dictionary=texts))
        table = self._decoded(lambda: _whole(file, list(names)))
        if table.num_rows != self.num_rows:
            raise self.wrong(f"it promises {self.num_rows:,} rows and has {table.num_rows:,}")
        return {name: table[name] for name in names}

    def batches(self, names: Sequence[str], *, most_rows: int | None = None) -> Iterator[dict[str, pa.Array]]:
        """Columns, some rows at a time; texts as dictionaries."""
        import pyarrow.parquet as pq

        self._check(names)
        self._fetch(names)
        most = max((count for name in names for _, count, _ in self._chunks(name)), default=0)
        rows = max(1, min(self.num_rows, _BATCH_NUMBERS * max(1, self.num_rows) // max(1, most)))
        rows = rows if most_rows is None else min(rows, most_rows)
        texts = self._texts(names)
        file = self._decoded(lambda: pq.ParquetFile(self._bytes, pre_buffer=False, read_dictionary=texts))
        came = 0
        for group in range(file.num_row_groups):
            found = self._decoded(partial(_some, file, list(names), group, rows))
            while (batch := self._decoded(partial(next, found, None))) is not None:
                came += batch.num_rows
                if came > self.num_rows:
                    break
                yield {name: batch.column(name) for name in names}
        if came != self.num_rows:
            raise self.wrong(f"it promises {self.num_rows:,} rows and has {came:,}")

    def kind(self, name: str) -> pa.DataType:
        """The type of a column; `DatasetFormatError` when there is none of that name."""
        if name not in self._types:
            raise self.wrong(f"it has no column {name!r}")
        return self._types[name]

    def _check_footer(self) -> None:
        size = self._bytes.size
        end = bytes(self._bytes.at(size - 8, 8)) if size >= 12 else b""
        length = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or length > min(_MAX_FOOTER, size - 12):
            raise self.wrong(f"{size:,} bytes that are no Parquet file")
        footer = size - 8 - length
        self._bytes.prefetch([(max(0, footer - seal.TAIL), size)])
        self._bytes.find_seal(footer)

    def _metadata(self, schema: dict[bytes, bytes]) -> Any:
        prefix = PREFIX.encode()
        found = {key: value for key, value in schema.items() if key.startswith(prefix)}
        if found:
            return {key[len(prefix) :].decode("utf-8", "replace"): self._json(value) for key, value in found.items()}
        try:
            with self.source.open(INFO, 0, MAX_JSON) as stream:
                if stream.size > MAX_JSON:
                    raise DatasetFormatError(
                        f"{self.source.name}: {INFO} has {stream.size:,} bytes, and {MAX_JSON:,} are read."
                    )
                return self._json(stream.read(stream.size))
        except DatasetNotFoundError:
            raise self.wrong(f"neither its schema nor {INFO} describes a dataset of activations") from None

    def _ours(self, schema: dict[bytes, bytes]) -> dict[str, Any]:
        prefix = OURS.encode()
        found = {key: value for key, value in schema.items() if key.startswith(prefix)}
        return {key[len(prefix) :].decode("utf-8", "replace"): self._json(value) for key, value in found.items()}

    def _json(self, text: bytes) -> Any:
        if len(text) > MAX_JSON:
            raise self.wrong(f"a value of its metadata has {len(text):,} bytes, more than {MAX_JSON:,}")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetFormatError(f"{self.source.name}: its metadata is no JSON: {type(error).__name__}.") from None

    def _check(self, names: Sequence[str]) -> None:
        """Refuse columns that would become more than so many bytes can hold."""
        most, metadata = _SOME + _NUMBERS_PER_BYTE * self._bytes.size, self._parquet.metadata
        rows = sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        if max(rows, self.num_rows) > most or rows != self.num_rows:
            raise self.wrong(f"{self._bytes.size:,} bytes cannot hold the {self.num_rows:,} rows that it promises")
        for name in names:
            self.kind(name)
            chunks = list(self._chunks(name))
            if sum(count for _, count, _ in chunks) > most:
                raise self.wrong(f"{self._bytes.size:,} bytes cannot hold what it promises of column {name!r}")
            for (start, stop), count, unpacked in chunks:
                if unpacked > _SOME * 16 + _MAX_RATIO * (stop - start) + _FEW_BYTES * count:
                    raise self.wrong(f"column {name!r} would unpack from {stop - start:,} bytes to {unpacked:,}")

    def _chunks(self, name: str) -> Iterator[tuple[tuple[int, int], int, int]]:
        """Of each part of a column: where its bytes are, its number of values, its size when unpacked."""
        metadata, leaves = self._parquet.metadata, self._leaves(name)
        for group in range(metadata.num_row_groups):
            for number in leaves:
                chunk = metadata.row_group(group).column(number)
                if chunk.num_values == 0:
                    # Nothing is read of it, and where it begins is not said.
                    continue
                start = chunk.data_page_offset
                if chunk.dictionary_page_offset is not None:
                    start = min(start, chunk.dictionary_page_offset)
                stop = start + chunk.total_compressed_size
                if not 0 <= start <= stop <= self._bytes.size or chunk.num_values < 0:
                    raise self.wrong(f"column {name!r} lies outside the file")
                yield (start, stop), chunk.num_values, chunk.total_uncompressed_size

    def _leaves(self, name: str) -> list[int]:
        """The numbers of a column in the file: lists have a path below their name."""
        schema, count = self._parquet.metadata.schema, self._parquet.metadata.num_columns
        return [number for number in range(count) if f"{schema.column(number).path}.".startswith(f"{name}.")]

    def _texts(self, names: Sequence[str]) -> list[str]:
        """The parts of columns that are texts."""
        leaves = [self._parquet.metadata.schema.column(i) for name in names for i in self._leaves(name)]
        return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]

    def _fetch(self, names: Sequence[str]) -> None:
        """Bring columns into memory, packed; refuse pages that say other than the footer."""
        chunks = [(name, *chunk) for name in names for chunk in self._chunks(name)]
        self._bytes.prefetch([place for _, place, _, _ in chunks])
        for name, (start, stop), count, unpacked in chunks:
            try:
                pages = read_pages(memoryview(self._bytes.at(start, stop - start)))
            except DatasetFormatError as error:
                raise self.wrong(f"column {name!r}: {error}") from None
            if pages.values != count or pages.largest > max(unpacked, stop - start):
                raise self.wrong(f"column {name!r} has pages that say other than its footer")

    def _decoded(self, work: Any) -> Any:
        import pyarrow as pa

        try:
            return work()
        except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
            if isinstance(error, ActCacheError):
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise self.wrong(f"it cannot be read: {reason}") from None

    def wrong(self, what: str) -> DatasetFormatError:
        """The error for an index of which `what` holds."""
        return DatasetFormatError(f"{INDEX} of {self.source.name}: {what}.")


def _whole(file: Any, names: list[str]) -> pa.Table:
    """Columns of all row groups: read at once, lists of texts cannot be had as dictionaries from several."""
    import pyarrow as pa

    groups = [file.read_row_group(n, columns=names, use_threads=False) for n in range(file.num_row_groups)]
    return pa.concat_tables(groups) if groups else file.read(columns=names, use_threads=False)


def _some(file: Any, names: list[str], group: int, rows: int) -> Iterator[pa.RecordBatch]:
    found: Iterator[pa.RecordBatch] = file.iter_batches(
        batch_size=rows, row_groups=[group], columns=names, use_threads=False
    )
    return found


class _Bytes(io.RawIOBase):
    """A file of a source for a library that seeks: parts that were fetched, and others when they are read. What it is
    given is compared with the seal of the file, where that has one."""

    def __init__(self, source: Source, path: str, spill: Spill) -> None:
        super().__init__()
        self._source = source
        self._path = path
        self._spill = spill
        self._at = 0
        self._seal: Seal | None = None
        with source.open(path, 0, _FIRST) as stream:
            self.size = stream.size
            first = spill.empty(min(_FIRST, self.size), np.uint8).data
            stream.readinto(first)
            self._parts = [(0, first)]
        if self.size > _FIRST:
            self.prefetch([(max(_FIRST, (self.size - _TAIL) // BLOCK * BLOCK), self.size)])

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch what is missing of `ranges`, together what is near together."""
        wanted: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if self._part(start, stop) is not None:
                continue
            if self._seal is not None:
                start, stop = self._seal.around(start, stop)
            if wanted and start - wanted[-1][1] <= self._source.gap:
                wanted[-1] = wanted[-1][0], max(stop, wanted[-1][1])
            else:
                wanted.append((start, stop))
        if not wanted:
            return
        rooms = [self._spill.empty(stop - start, np.uint8).data for start, stop in wanted]
        with ThreadPoolExecutor(min(len(wanted), self._source.concurrency)) as pool:
            list(pool.map(self._fetch, wanted, rooms))
        self._parts += zip([start for start, _ in wanted], rooms, strict=True)

    def at(self, start: int, count: int) -> memoryview:
        """`count` bytes at `start`, which must lie inside the file."""
        part = self._part(start, start + count)
        if part is None:
            first, stop = (start, start + count) if self._seal is None else self._seal.around(start, start + count)
            part = first, memoryview(bytearray(stop - first))
            self._fetch((first, stop), part[1])
        first, data = part
        return data[start - first : start - first + count]

    @property
    def sealed(self) -> bool:
        """Whether what is read is checked."""
        return self._seal is not None

    def find_seal(self, footer: int) -> None:
        """Look for the seal in front of the footer, which begins at this byte, and compare what is there already."""
        try:
            self._seal = seal.find(self.at, footer, self.size)
        except BrokenSealError as error:
            raise self._damaged(error) from None
        for start, data in self._parts:
            self._check(start, data)

    def _check(self, start: int, data: memoryview) -> None:
        try:
            if self._seal is not None:
                self._seal.check(data, start)
        except BrokenSealError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: BrokenSealError) -> DamagedFileError:
        return DamagedFileError(self._path, f"{self._path} of {self._source.name} is damaged: {error}.", (0, self.size))

    def _part(self, start: int, stop: int) -> tuple[int, memoryview] | None:
        return next((part for part in self._parts if part[0] <= start and stop <= part[0] + len(part[1])), None)

    def _fetch(self, place: tuple[int, int], into: memoryview) -> None:
        with self._source.open(self._path, *place) as stream:
            stream.readinto(into)
        self._check(place[0], into)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        data = bytes(self.at(self._at, left if size < 0 else min(size, left)))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
