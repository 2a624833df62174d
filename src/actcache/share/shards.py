"""Rows of the files of a dataset, read by ranges: only those asked for, many files at a time, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError, FormatError, ValueOverflowError
from actcache.share.blocks import DamagedFileError
from actcache.share.checksums import Checksums
from actcache.share.format import TensorGroup
from actcache.share.rows import Ints, Runs
from actcache.share.source import Source, Stream
from actcache.store import container
from actcache.store.dtypes import common_dtype

Array = npt.NDArray[Any]

PIECE = 2 << 20
"""Bytes that a thread holds of what it reads."""
_HEAD = 2048
_MAX_HEADER = 4 << 20
_AT_ONCE = 64 << 20
"""Files up to this size are read by one request, where most of them is wanted."""
_RANGE = 32 << 20
_NEARLY_ALL = 0.9
_LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class Placed:
    """A tensor of one file: `rows` of `width` numbers each, from byte `start` of the file."""

    path: str
    key: str
    start: int
    rows: int
    width: int
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Wanted:
    """Rows of one tensor of a shard, ascending, and the rows of `into` that they become."""

    key: str
    rows: Ints
    targets: Ints | range
    into: Array


@dataclass(frozen=True)
class _Job:
    shard: int
    path: str
    wanted: tuple[Wanted, ...]


class ShardReader:
    """Reads the files of one kind of tensors.

    Args:
        checked: refuse NaN, which is no activation, and convert; otherwise rows are as they are stored.
        exact: convert only to what holds every value.
        notice: is told how many rows were read.
    """

    def __init__(
        self,
        source: Source,
        group: TensorGroup,
        *,
        checked: bool = True,
        exact: bool = False,
        notice: Callable[[int], object] = lambda rows: None,
        checksums: Checksums | None = None,
    ) -> None:
        self.source = source
        self.group = group
        self._checked = checked
        self._exact = exact
        self._checksums = checksums or Checksums(source)
        self._notice = notice
        self._headers: dict[str, dict[str, container.Tensor]] = {}

    def keys(self, shard: int, layer: int | None = None) -> list[str]:
        """The names of all tensors of a file."""
        return sorted(self._header(self.group.file(shard, layer)))

    def placed(self, shard: int, layer: int | None, key: str) -> Placed:
        """Where a tensor is in its file, which must be what the dataset says of it."""
        path = self.group.file(shard, layer)
        return self._placed(path, shard, key, self._header(path))

    def verify(self, shards: Iterable[int], keys: Iterable[tuple[int | None, str]]) -> None:
        """Check the headers of files that hold `keys` (layer, key); `DatasetFormatError` where one is not what the
        dataset says."""
        chosen = [int(shard) for shard in shards]
        self.run([partial(self.placed, shard, layer, key) for layer, key in keys for shard in chosen])

    def read(self, runs: Runs, into: Iterable[tuple[int | None, str, Array]]) -> None:
        """Fill arrays ``[rows, D]`` with the rows of `runs`, one after the other; `into`: layer, key, array."""
        rest: list[_Job] = []
        self.run([partial(self._whole, job, rest) for job in self._jobs(runs, list(into))])
        self.run([work for job in rest for work in self._parts(job)])

    def read_here(self, runs: Runs, layer: int | None, key: str, into: Array) -> None:
        """The same of one tensor, in the thread that asks for it."""
        for job in self._jobs(runs, [(layer, key, into)]):
            for work in self._parts(job):
                work()

    def _jobs(self, runs: Runs, into: Sequence[tuple[int | None, str, Array]]) -> list[_Job]:
        """What is wanted of each file."""
        shard, row = runs.rows()
        order: Ints | range = range(len(shard))
        if not _in_order(shard, row):
            order = np.lexsort((row, shard))
            shard, row = shard[order], row[order]
        jobs = []
        for begin, end in itertools.pairwise(_bounds(shard)):
            number = int(shard[begin])
            files: dict[str, list[Wanted]] = {}
            for layer, key, array in into:
                wanted = Wanted(key, row[begin:end], order[begin:end], array)
                files.setdefault(self.group.file(number, layer), []).append(wanted)
            jobs += [_Job(number, path, tuple(wanted)) for path, wanted in files.items()]
        return jobs

    def run(self, work: Sequence[Callable[[], object]]) -> None:
        """Do all of it, several at a time; after the first error nothing new is begun."""
        with ThreadPoolExecutor(max(1, min(len(work), self.source.concurrency))) as pool:
            futures = [pool.submit(one) for one in work]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.source.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _whole(self, job: _Job, rest: list[_Job]) -> None:
        """Read a file from its beginning where that costs no more than what is wanted; else put it into `rest`."""
        group = self.group
        shard = group.shards[job.shard]
        together = 1 if shard.file is None else max(1, len(group.layers))
        wanted = sum(len(w.rows) for w in job.wanted)
        size = together * shard.rows * (group.dim or 0) * 4
        # What can be checked only as a whole is read from its beginning to its end, however large it is.
        small = job.path not in self._headers and size <= _AT_ONCE
        if (
            not (small or self._checksums.needs_all(job.path))
            or wanted < _NEARLY_ALL * together * shard.rows
            or not size
        ):
            self._header(job.path)
            rest.append(job)
            return
        with self._checksums.open(job.path) as stream:
            header = self._parsed(job.path, stream)
            try:
                places = [(self._placed(job.path, job.shard, w.key, header), w) for w in job.wanted]
            except DatasetFormatError:
                # A header that is damaged is that first.
                self._checksums.finish(stream)
                raise
            at = min(place.start for place in header.values())
            with self._named(job.path, header):
                for place, w in sorted(places, key=lambda found: found[0].start):
                    at = self._scatter(stream, at, place, w)
                if not self.source.stop.is_set():
                    if self._checksums.needs_all(job.path):
                        _skip(stream, stream.size - at)
                    self._checksums.finish(stream)

    def _parts(self, job: _Job) -> list[Callable[[], object]]:
        """Ranges of a file, each to be read by a request of its own."""
        header = self._header(job.path)
        parts: list[Callable[[], object]] = []
        for w in job.wanted:
            place = self._placed(job.path, job.shard, w.key, header)
            most = max(1, _RANGE // place.row_bytes)
            begin = 0
            gaps = np.flatnonzero(np.diff(w.rows) * place.row_bytes > self.source.gap + place.row_bytes) + 1
            for end in (*gaps.tolist(), len(w.rows)):
                while begin < end:
                    cut = min(end, int(np.searchsorted(w.rows, w.rows[begin] + most)))
                    some = Wanted(w.key, w.rows[begin:cut], w.targets[begin:cut], w.into)
                    parts.append(partial(self._range, place, some))
                    begin = cut
        return parts

    def _range(self, place: Placed, wanted: Wanted) -> None:
        start, stop = (place.start + int(row) * place.row_bytes for row in (wanted.rows[0], wanted.rows[-1] + 1))
        header = self._header(place.path)
        with self._named(place.path, header), self._checksums.open(place.path, start, stop) as stream:
            self._scatter(stream, start, place, wanted)
            if not self.source.stop.is_set():
                self._checksums.finish(stream)

    @contextmanager
    def _named(self, path: str, header: Mapping[str, container.Tensor]) -> Iterator[None]:
        """Of bytes of a file that turn out to be damaged inside the block say which rows they are."""
        try:
            yield
        except DamagedFileError as error:
            if error.path == path:
                raise error.of(_rows_in(header, error.span)) from None
            # The digests themselves.
            raise

    def _scatter(self, stream: Stream, at: int, place: Placed, wanted: Wanted) -> int:
        """Read rows from a stream that stands at byte `at`; where it stands then."""
        rows, targets, into = wanted.rows, wanted.targets, wanted.into
        if into.shape[1] != place.width:
            raise self._wrong(place.path, f"{place.key} has rows of {place.width:,} numbers, not {into.shape[1]:,}")
        most = max(1, PIECE // place.row_bytes)
        buffer = np.empty(0, place.dtype)
        begin = 0
        while begin < len(rows) and not self.source.stop.is_set():
            first = int(rows[begin])
            end = int(np.searchsorted(rows, first + most))
            count = int(rows[end - 1]) + 1 - first
            start = place.start + first * place.row_bytes
            _skip(stream, start - at)
            at = start + count * place.row_bytes
            target = _slice(targets[begin:end])
            # A prompt asked for twice has its row twice, so that their number alone does not tell.
            neighbours = count == end - begin and bool((np.diff(rows[begin:end]) == 1).all())
            straight = neighbours and isinstance(target, slice)
            if straight and into.dtype == place.dtype and into[target].flags.c_contiguous:
                stream.readinto(_raw(into[target]))
                found = into[target]
            else:
                if buffer.size < count * place.width:
                    buffer = np.empty(count * place.width, place.dtype)
                stream.readinto(_raw(buffer[: count * place.width]))
                piece = buffer[: count * place.width].reshape(count, place.width)
                found = self._cast(piece if neighbours else piece[rows[begin:end] - first], into.dtype, place)
                into[target] = found
            if self._checked and np.isnan(found.min()):
                # Damaged bytes are that first, and whatever they look like then.
                self._checksums.finish(stream)
                bad = int(rows[begin + int(np.flatnonzero(np.isnan(found).any(1))[0])])
                raise self._wrong(
                    place.path,
                    f"row {bad:,} of {place.key} holds NaN, which is no activation; load_activation_dataset returns "
                    "tensors as they are",
                )
            self._notice(end - begin)
            begin = end
        return at

    def _cast(self, rows: Array, dtype: np.dtype[Any], place: Placed) -> Array:
        if rows.dtype == dtype:
            return rows
        if not self._checked or (self._exact and common_dtype([rows.dtype, dtype]) != dtype):
            raise self._wrong(place.path, f"{place.key} holds {rows.dtype}, and {dtype} in other shards")
        try:
            with np.errstate(over="raise"):
                return rows.astype(dtype)
        except FloatingPointError:
            raise ValueOverflowError(
                f"{place.path} of {self.source.name}: a value of {place.key} does not fit {dtype}: "
                "load_activation_dataset returns tensors as they are."
            ) from None

    def _header(self, path: str) -> dict[str, container.Tensor]:
        found = self._headers.get(path)
        if found is None:
            with self._checksums.open(path, 0, _HEAD) as stream:
                found = self._parsed(path, stream, _HEAD)
                self._checksums.finish(stream)
            self._headers[path] = found
        return found

    def _parsed(self, path: str, stream: Stream, most: int | None = None) -> dict[str, container.Tensor]:
        """The header of a file whose `stream` stands at its beginning and ends after `most` bytes."""
        try:
            first = stream.read(min(8, stream.size))
            size = container.header_size(first, stream.size)
            if size > _MAX_HEADER:
                raise FormatError(f"its header has {size:,} bytes, more than the {_MAX_HEADER:,} that are read")
            if most is None or size <= most:
                head = first + stream.read(size - 8)
            else:
                with self._checksums.open(path, 8, size) as rest:
                    head = first + rest.read(size - 8)
                    self._checksums.finish(rest)
            return container.parse(head, stream.size)[1]
        except FormatError as error:
            if isinstance(error, DatasetFormatError):
                raise
            self._checksums.finish(stream)
            raise self._wrong(path, str(error)) from None

    def _placed(self, path: str, shard: int, key: str, header: dict[str, container.Tensor]) -> Placed:
        tensor = header.get(key)
        rows = self.group.shards[shard].rows
        if tensor is None:
            raise self._wrong(path, f"it holds no tensor {key!r}")
        if len(tensor.shape) != 2 or tensor.shape[1] < 1:
            raise self._wrong(path, f"{key} has the shape {list(tensor.shape)}, expected [rows, numbers]")
        if tensor.shape[0] != rows:
            raise self._wrong(path, f"{key} has {tensor.shape[0]:,} rows, and the dataset says {rows:,}")
        if self.group.dim is not None and tensor.shape[1] != self.group.dim:
            raise self._wrong(path, f"{key} has rows of {tensor.shape[1]:,} numbers, not {self.group.dim:,}")
        whole = key.endswith("indices")
        if (tensor.dtype.kind in "iu") != whole or tensor.dtype.kind == "b":
            raise self._wrong(path, f"{key} holds {tensor.dtype}, expected {'whole' if whole else 'floating'} numbers")
        return Placed(path, key, tensor.start, rows, tensor.shape[1], tensor.dtype)

    def _wrong(self, path: str, what: str) -> DatasetFormatError:
        return DatasetFormatError(f"{path} of {self.source.name}: {what}.")


def _rows_in(header: Mapping[str, container.Tensor], span: tuple[int, int] | None) -> str:
    """Which rows of which tensors some bytes of a file are."""
    found: list[str] = []
    if span is None:
        return ""
    for key, tensor in header.items():
        if len(tensor.shape) != 2 or not tensor.nbytes:
            continue
        row_bytes = tensor.nbytes // tensor.shape[0]
        first, last = (max(0, span[0] - tensor.start) // row_bytes, (span[1] - 1 - tensor.start) // row_bytes)
        if first < tensor.shape[0] and last >= 0:
            found.append(f"rows {first:,} to {min(last, tensor.shape[0] - 1):,} of {key}")
    return ", ".join(found)


def _skip(stream: Stream, count: int) -> None:
    while count > 0:
        count -= len(stream.read(min(count, PIECE)))


def _in_order(shard: Ints, row: Ints) -> bool:
    """Whether rows come in the order of their shards, and of their places there."""
    for first in range(0, len(shard), _LOOKED_AT):
        step = np.diff(shard[first : first + _LOOKED_AT + 1])
        if (step < 0).any() or ((step == 0) & (np.diff(row[first : first + _LOOKED_AT + 1]) < 0)).any():
            return False
    return True


def _bounds(shard: Ints) -> list[int]:
    """Where each shard begins, and the end."""
    found = [0] if len(shard) else []
    for first in range(0, len(shard), _LOOKED_AT):
        found += (np.flatnonzero(np.diff(shard[first : first + _LOOKED_AT + 1])) + first + 1).tolist()
    return [*found, len(shard)]


def _slice(targets: Ints | range) -> slice | Ints:
    """Targets as a slice where they follow one another."""
    if isinstance(targets, range):
        return slice(targets.start, targets.stop)
    first, last = int(targets[0]), int(targets[-1])
    if last - first == len(targets) - 1 and (np.diff(targets) == 1).all():
        return slice(first, last + 1)
    return targets


def _raw(array: Array) -> memoryview:
    return array.view(np.uint8).reshape(-1).data
