"""Full sequences cut in two: last tokens in shards of their own, all other tokens in those that follow.

A reader that wants one vector per prompt then fetches a few small files. Prompts keep their order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import DatasetAccessError
from actcache.share.format import FULL_SEQUENCE, HIDDEN_FILES, HIDDEN_KEYS, TensorGroup, expand
from actcache.share.rows import Ints, Runs
from actcache.share.shard_files import Part, ShardFile, greedy, located
from actcache.share.shards import Array, ShardReader

_CHUNK = 8 << 20
"""Bytes of vectors that a thread has in memory at once."""
_DIGEST = 32


class Split:
    """Where every row goes. `runs`: where the rows of each prompt are now.

    Attributes:
        lengths: tokens of each prompt.
        placed: prompts ``[start, stop)`` of each shard of last tokens.
        rest: prompts of each shard of other tokens; they cover all prompts, or there are none where no prompt has two
            tokens.
    """

    def __init__(self, runs: Runs, *, row_bytes: int, shard_max_bytes: int) -> None:
        self.runs = runs
        self.lengths: Ints = np.diff(runs.row_offset)
        count, per_shard = len(runs), max(1, shard_max_bytes // max(1, row_bytes))
        self.placed = [(a, min(a + per_shard, count)) for a in range(0, count, per_shard)]
        self.rest = greedy(self.lengths - 1, per_shard)
        self.shard, self.row = located(self.placed, count)
        first = np.array([a for a, _ in self.rest] or [0])
        self._rest_shard = located(self.rest, count)[0]
        before = np.concatenate([[0], np.cumsum(self.lengths - 1)])
        self._rest_row = before[:-1] - before[first[self._rest_shard]]

    def rows_of(self, number: int) -> int:
        """Rows in each file of the shard `number`."""
        if number < len(self.placed):
            start, stop = self.placed[number]
            return stop - start
        start, stop = self.rest[number - len(self.placed)]
        return int((self.lengths[start:stop] - 1).sum())

    def described(self, told: Mapping[str, Any], dim: int, dtype: str | None) -> dict[str, Any]:
        """The tensors as the format describes them, when `told` is what it said before; `dtype`: None of several."""
        shards = [
            {"num_prompts": stop - start, "num_tokens": self.rows_of(number)}
            for number, (start, stop) in enumerate(self.placed + self.rest)
        ]
        new = {"dim": dim, "layout": "per_layer", "file_pattern": HIDDEN_FILES}
        new |= {} if dtype is None else {"dtype": dtype}
        new |= {"key_pattern": HIDDEN_KEYS, "storage": FULL_SEQUENCE, "last_token_shards": len(self.placed)}
        return {**told, **new, "shards": shards}

    def columns(self, start: int, stop: int) -> dict[str, Any]:
        """What the index says of some prompts."""
        lengths = self.lengths[start:stop]
        ends = np.cumsum(lengths)
        last = ends - 1
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        shards = np.repeat(len(self.placed) + self._rest_shard[start:stop], lengths)
        rows = within + np.repeat(self._rest_row[start:stop], lengths)
        shards[last], rows[last] = self.shard[start:stop], self.row[start:stop]
        return {
            "shard_index": self.shard[start:stop],
            "row_offset": self.row[start:stop],
            "token_offset": self.row[start:stop],
            "token_shard_ids": (lengths, shards),
            "token_shard_offsets": (lengths, rows),
        }


class SplitLayer:
    """The new files of one layer.

    Last tokens are put aside while the files of all others are made, so that everything is read once; `aside` is the
    folder for that. Without them, as after a kill that lost them, they are read by themselves.
    """

    def __init__(self, reader: ShardReader, split: Split, layer: int, dim: int, dtype: np.dtype[Any]) -> None:
        self._reader, self._split, self._layer = reader, split, layer
        self._dim, self._dtype = dim, dtype
        self._most = max(1, _CHUNK // (dim * dtype.itemsize))
        self.aside: Path | None = None
        count = len(split.placed)
        self.last = [self._file(n, partial(self._last, a, b)) for n, (a, b) in enumerate(split.placed)]
        self.rest = [self._file(count + n, partial(self._rest, n)) for n in range(len(split.rest))]

    @property
    def group(self) -> TensorGroup:
        """The tensors that it is of, as they are now."""
        return self._reader.group

    @property
    def layer(self) -> int:
        """Which one it is."""
        return self._layer

    @property
    def runs(self) -> Runs:
        """Where its rows are now."""
        return self._split.runs

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return int(self._split.lengths.sum()) * self._dim * self._dtype.itemsize

    @property
    def aside_bytes(self) -> int:
        """Bytes that are put aside."""
        return len(self._split.lengths) * self._dim * self._dtype.itemsize

    def forget(self) -> None:
        """Remove what was put aside."""
        for number in range(len(self._split.rest)):
            if self.aside is not None:
                self._aside(number).unlink(missing_ok=True)

    def _file(self, number: int, read: Any) -> ShardFile:
        shape = self._split.rows_of(number), self._dim
        part = Part(expand(HIDDEN_KEYS, self._layer, 0), shape, self._dtype, read)
        return ShardFile(expand(HIDDEN_FILES, self._layer, number), (part,), ())

    def _read(self, runs: Runs, into: Array) -> Array:
        """Rows of `runs`, which are the first ones of `into`."""
        rows = into[: int(runs.length.sum())]
        self._reader.read_here(runs, self._layer, self._reader.group.key(self._layer), rows)
        if self._reader.source.stop.is_set():
            # Another file has failed, and what was being read was left as it is: no file may become whole of that.
            raise DatasetAccessError(f"{self._reader.source.name}: reading was stopped.")
        return rows

    def _room(self, rows: int) -> Array:
        # One for a whole file: given back and taken again, pieces would leave holes as large as they are.
        return np.empty((rows, self._dim), self._dtype)

    def _rest(self, number: int) -> Iterator[Array]:
        """All tokens but the last of the prompts of a shard; the last are put aside."""
        prompts = np.arange(*self._split.rest[number])
        aside = None if self.aside is None else self._aside(number)
        if aside is None:
            for rows, last in self._pieces(prompts):
                yield from _between(rows, last)
            return
        aside.parent.mkdir(parents=True, exist_ok=True)
        temporary, digest = aside.with_suffix(".making"), hashlib.sha256()
        with temporary.open("wb") as out:
            for rows, last in self._pieces(prompts):
                some = np.ascontiguousarray(rows[last]).view(np.uint8).reshape(-1).data
                digest.update(some)
                out.write(some)
                yield from _between(rows, last)
            out.write(digest.digest())
        # Before the shard is whole: one that is has its last tokens here, or in a file that was sent.
        os.replace(temporary, aside)

    def _pieces(self, prompts: Ints) -> Iterator[tuple[Array, Ints]]:
        """Rows of prompts one after the other, in pieces, and which of them are last tokens. A piece is there until
        the next one is asked for."""
        runs = self._split.runs.take(prompts)
        ends = np.zeros(len(runs.length), bool)
        ends[runs.offset[1:] - 1] = True
        # A prompt can be larger than a piece.
        parts = -(-runs.length // self._most)
        of = np.repeat(np.arange(len(parts)), parts)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
        start = runs.start[of] + nth * self._most
        length = np.minimum(self._most, runs.length[of] - nth * self._most)
        ends = ends[of] & (nth == parts[of] - 1)
        shard = runs.shard[of]
        filled = (np.cumsum(length) - 1) // self._most
        pieces = np.split(np.arange(len(of)), np.flatnonzero(np.diff(filled)) + 1)
        room = self._room(max(int(length[some].sum()) for some in pieces))
        for some in pieces:
            rows = self._read(Runs.of_each(shard[some], start[some], length[some]), room)
            yield rows, (np.cumsum(length[some]) - 1)[ends[some]]

    def _last(self, start: int, stop: int) -> Iterator[Array]:
        """The last tokens of prompts `start` to `stop`."""
        at = start
        for number, (a, b) in enumerate(self._split.rest):
            if b <= at or a >= stop:
                continue
            first, end = max(a, at), min(b, stop)
            yield from self._kept(number, first - a, end - a) or self._read_last(first, end)
            at = end
        if at < stop:
            yield from self._read_last(at, stop)

    def _read_last(self, start: int, stop: int) -> Iterator[Array]:
        runs, room = self._split.runs, self._room(min(self._most, stop - start))
        for first in range(start, stop, self._most):
            at = runs.offset[first + 1 : min(first + self._most, stop) + 1] - 1
            yield self._read(Runs.of_each(runs.shard[at], runs.start[at] + runs.length[at] - 1, np.ones_like(at)), room)

    def _kept(self, number: int, start: int, stop: int) -> Iterator[Array] | None:
        """Rows that were put aside; None where they are not there, or not as they were."""
        path, row_bytes = self._aside(number), self._dim * self._dtype.itemsize
        a, b = self._split.rest[number]
        size = (b - a) * row_bytes
        if self.aside is None or not path.is_file() or path.stat().st_size != size + _DIGEST:
            return None
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for at in range(0, size, _CHUNK):
                digest.update(file.read(min(_CHUNK, size - at)))
            if file.read() != digest.digest():
                return None
        return self._from_aside(path, start, stop)

    def _from_aside(self, path: Path, start: int, stop: int) -> Iterator[Array]:
        room = self._room(min(self._most, stop - start))
        with path.open("rb") as file:
            file.seek(start * self._dim * self._dtype.itemsize)
            for at in range(start, stop, self._most):
                rows = room[: min(self._most, stop - at)]
                file.readinto(rows.view(np.uint8).reshape(-1).data)
                yield rows

    def _aside(self, number: int) -> Path:
        return (self.aside or Path()) / f"layer{self._layer}-{number}.last"


def _between(rows: Array, without: Ints) -> Iterator[Array]:
    """The rows but some, as they lie."""
    for start, stop in zip([0, *(without + 1).tolist()], [*without.tolist(), len(rows)], strict=True):
        if start < stop:
            yield rows[start:stop]
