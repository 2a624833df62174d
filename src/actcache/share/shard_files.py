"""The files of a new dataset: which rows go where, and their bytes a few megabytes at a time."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from actcache.share import blocks
from actcache.share.format import (
    FULL_SEQUENCE,
    HIDDEN,
    HIDDEN_FILES,
    HIDDEN_KEYS,
    LOGITS,
    LOGITS_FILES,
    POOLED,
    ROUTER,
    ROUTER_FILES,
    ROUTER_KEYS,
    expand,
)
from actcache.share.stored_rows import Array, Ints, Order, Rows
from actcache.store import container
from actcache.store.site_names import LAST
from actcache.store.spill import Spill

if TYPE_CHECKING:
    from actcache.share.selection import Group, Selection

Places = npt.NDArray[np.int32]
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Part:
    """One tensor of a file: its bytes come from `read`, piece by piece."""

    key: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    read: Callable[[], Iterator[Array]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class ShardFile:
    """A file with tensors. `sites`: what it is made of, to be loaded before."""

    path: str
    parts: tuple[Part, ...]
    sites: tuple[Rows, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self._header()) + sum(part.nbytes for part in self.parts)

    def _header(self) -> bytes:
        # The container's own order: what has the larger elements comes first, so that everything is aligned.
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for part in self.parts:
            code = container.code_of(part.dtype)
            entries[part.key] = {"dtype": code, "shape": list(part.shape), "data_offsets": [at, at + part.nbytes]}
            at += part.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, file: BinaryIO) -> tuple[str, bytes]:
        """Write the file, the same bytes each time; their SHA-256, and the digests of their blocks."""
        digest, of_blocks = hashlib.sha256(), blocks.hasher()
        for data in self._bytes():
            digest.update(data)
            of_blocks.update(memoryview(data))
            file.write(data)
        return digest.hexdigest(), blocks.as_bytes(of_blocks.finish())

    def _bytes(self) -> Iterator[Any]:
        yield self._header()
        for part in self.parts:
            rows = 0
            for piece in part.read():
                rows += len(piece)
                yield np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data
            assert rows == part.shape[0], f"{self.path}: {rows} rows of {part.key}, not {part.shape[0]}"


class Shards:
    """Where every row of a dataset is, and the files that hold them.

    Rows are in the order of the dataset: row ``r`` is prompt ``order[r]`` of the selection. The shards that come first
    hold one row of each prompt; full sequences have the rest of their tokens in those that follow.
    """

    def __init__(self, selection: Selection, *, name: str, shard_max_bytes: int, shuffle: bool) -> None:
        count = len(selection.given)
        spill = selection.spill
        self.order: Order = spill.empty(count, np.int32 if count < 2**31 else np.int64)
        for start in range(0, count, _AT_ONCE):
            self.order[start : start + _AT_ONCE] = np.arange(start, min(start + _AT_ONCE, count))
        if shuffle:
            # Single elements of an array are slow, and those of a list take four times the room.
            random.Random(_seed(name)).shuffle(self.order.data)  # type: ignore[arg-type]
        self.groups: list[tuple[Group, dict[int | None, Rows]]] = []
        for group in selection.groups:
            rows: dict[int | None, Rows] = {}
            for layer, site in group.sites.items():
                like = next(iter(rows.values()), None)
                rows[layer] = Rows(group.located, site, self.order, spill, whole=group.whole, like=like)
            self.groups.append((group, rows))
        sites = [rows for _, by_layer in self.groups for rows in by_layer.values()]
        # All groups lie in shards of the same prompts, so that one column says for all of them where a prompt is.
        widest = max((rows.row_bytes for rows in sites), default=1)
        per_shard = max(1, shard_max_bytes // widest)
        self.placed = [(a, min(a + per_shard, count)) for a in range(0, count, per_shard)] if sites else []
        self.whole = [
            rows
            for group, by_layer in self.groups
            if group.whole and group.name != ROUTER
            for rows in by_layer.values()
        ]
        self.lengths: Ints | None = None
        self.rest: list[tuple[int, int]] = []
        if self.whole:
            self.lengths = self.whole[0].lengths()
            widest = max(rows.row_bytes for rows in self.whole)
            rest = spill.empty(count, np.int64)
            np.subtract(self.lengths, 1, out=rest)
            self.rest = greedy(rest, max(1, shard_max_bytes // widest), spill)
        self.logits: tuple[int, Rows, Rows] | None = None
        self.logits_shards: list[tuple[int, int]] = []
        if selection.logits is not None:
            k, group = selection.logits
            values, indices = (
                Rows(group.located, site, self.order, spill, whole=group.whole) for site in group.sites.values()
            )
            self.logits = k, values, indices
            per_shard = max(1, shard_max_bytes // (values.row_bytes + indices.row_bytes))
            self.logits_shards = [(a, min(a + per_shard, count)) for a in range(0, count, per_shard)]
        self.files = [*self._group_files(), *self._logits_files()]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def _group_files(self) -> Iterator[ShardFile]:
        for group, by_layer in self.groups:
            if group.name == ROUTER:
                yield from self._router_files(by_layer)
                continue
            files, keys = _patterns(group.name, any(layer is not None for layer in by_layer))
            for layer, rows in by_layer.items():
                for number, (start, stop) in enumerate(self.placed):
                    read = partial(rows.one_each, start, stop)
                    yield _file(files, keys, layer, number, stop - start, rows, read)
                for number, (start, stop) in enumerate(self.rest if group.whole else (), len(self.placed)):
                    assert self.lengths is not None
                    tokens = int(self.lengths[start:stop].sum()) - (stop - start)
                    yield _file(files, keys, layer, number, tokens, rows, partial(rows.all_but_last, start, stop))

    def _router_files(self, by_layer: dict[int | None, Rows]) -> Iterator[ShardFile]:
        for number, (start, stop) in enumerate(self.placed):
            parts = tuple(
                Part(
                    expand(ROUTER_KEYS, layer or 0, 0),
                    (stop - start, rows.width),
                    rows.dtype,
                    partial(rows.one_each, start, stop),
                )
                for layer, rows in by_layer.items()
            )
            yield ShardFile(expand(ROUTER_FILES, 0, number), parts, tuple(by_layer.values()))

    def _logits_files(self) -> Iterator[ShardFile]:
        if self.logits is None:
            return
        k, values, indices = self.logits
        for number, (start, stop) in enumerate(self.logits_shards):
            parts = tuple(
                Part(f"{LOGITS}.{key}", (stop - start, k), rows.dtype, partial(rows.one_each, start, stop))
                for key, rows in (("values", values), ("indices", indices))
            )
            yield ShardFile(expand(LOGITS_FILES, 0, number), parts, (values, indices))

    def described(self) -> dict[str, Any]:
        """The tensors as the format describes them."""
        found: dict[str, Any] = {}
        for group, by_layer in self.groups:
            rows = next(iter(by_layer.values()))
            told: dict[str, Any] = {"type": "hidden" if group.name == HIDDEN else "site", "layers": group.layers}
            told |= {"dim": rows.width, "dtype": rows.dtype.name, "site": _site(group.name)}
            told["stored_as"] = sorted({dtype for one in by_layer.values() for dtype in one.stored_as})
            if group.name == ROUTER:
                told |= {"type": "router", "num_experts": rows.width, "pooling": LAST, "file_pattern": ROUTER_FILES}
                told |= {"row_bytes": len(by_layer) * rows.row_bytes, "key_pattern": ROUTER_KEYS}
                told["shards"] = [
                    {"file": expand(ROUTER_FILES, 0, number), "num_prompts": stop - start}
                    for number, (start, stop) in enumerate(self.placed)
                ]
                found[group.name] = told
                continue
            files, keys = _patterns(group.name, bool(group.layers))
            told |= {"layout": "per_layer", "file_pattern": files, "key_pattern": keys}
            if group.whole:
                told |= {
                    "storage": FULL_SEQUENCE,
                    "last_token_shards": len(self.placed),
                    "shards": self._whole_shards(),
                }
            else:
                told |= {"storage": POOLED, "pooling": group.layout, "row_bytes": rows.row_bytes}
                told["shards"] = [{"num_prompts": stop - start} for start, stop in self.placed]
            found[group.name] = told
        if self.logits is not None:
            k, values, indices = self.logits
            found[LOGITS] = {
                "type": "logits_topk",
                "k": k,
                "dtype": values.dtype.name,
                "pooling": LAST,
                "file_pattern": LOGITS_FILES,
                "row_bytes": values.row_bytes + indices.row_bytes,
                "shards": [
                    {"file": expand(LOGITS_FILES, 0, number), "num_prompts": stop - start}
                    for number, (start, stop) in enumerate(self.logits_shards)
                ],
            }
        return found

    def _whole_shards(self) -> list[dict[str, int]]:
        assert self.lengths is not None
        placed = [{"num_prompts": stop - start, "num_tokens": stop - start} for start, stop in self.placed]
        rest = [
            {"num_prompts": stop - start, "num_tokens": int(self.lengths[start:stop].sum()) - (stop - start)}
            for start, stop in self.rest
        ]
        return placed + rest

    @property
    def location_columns(self) -> list[str]:
        """The columns of the index that say where a prompt's row is."""
        names = ["shard_index", "row_offset"]
        return [*names, *(f"{name}_logits" for name in names)] if self.placed and self.logits is not None else names

    def locations(self, start: int, stop: int) -> dict[str, Places]:
        """What is in these columns in rows `start` to `stop`, int32 each."""
        columns = [places(shards, start, stop) for shards in (self.placed, self.logits_shards) if shards]
        return dict(zip(self.location_columns, (part for column in columns for part in column), strict=True))

    def token_locations(self, start: int, stop: int) -> tuple[list[Ints], list[Ints]]:
        """Shard and row of every token of the prompts in rows `start` to `stop`; the last is in the shards in front."""
        assert self.lengths is not None
        where = self.locations(start, stop)
        of_rest, _ = places(self.rest, start, stop)
        begins = np.array([a for a, _ in self.rest] or [0])
        # Rows in the shard of the first prompt that are before it, then what each shard begins with.
        first = int(begins[of_rest[0]])
        before = int(self.lengths[first:start].sum()) - (start - first) + np.cumsum(self.lengths[start:stop] - 1)
        before -= self.lengths[start:stop] - 1
        base = np.where(of_rest == of_rest[0], 0, before[np.maximum(begins[of_rest] - start, 0)])
        shards, rows = [], []
        for i, length in enumerate(self.lengths[start:stop].tolist()):
            in_rest = int(before[i] - base[i]) + np.arange(length - 1)
            shards.append(np.append(np.full(length - 1, len(self.placed) + int(of_rest[i])), where["shard_index"][i]))
            rows.append(np.append(in_rest, where["row_offset"][i]))
        return shards, rows


def _file(
    files: str, keys: str, layer: int | None, number: int, count: int, rows: Rows, read: Callable[[], Iterator[Array]]
) -> ShardFile:
    part = Part(expand(keys, layer or 0, 0), (count, rows.width), rows.dtype, read)
    return ShardFile(expand(files, layer or 0, number), (part,), (rows,))


def _patterns(name: str, layered: bool) -> tuple[str, str]:
    if name == HIDDEN:
        return HIDDEN_FILES, HIDDEN_KEYS
    # A folder each: no name of a site then makes the path of another one's file.
    if layered:
        return f"tensors/{name}/layer{{layer:03d}}_shard{{shard:03d}}.safetensors", f"{name}.layer_{{layer}}"
    return f"tensors/{name}/shard{{shard:03d}}.safetensors", name


def _site(name: str) -> str:
    return "resid_post" if name == HIDDEN else name


def _seed(name: str) -> int:
    """What rows are shuffled with: the format's own rule, so that the order follows from the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 2**31


def greedy(sizes: Ints, limit: int, spill: Spill | None = None) -> list[tuple[int, int]]:
    """Neighbours together up to `limit` rows; one that is larger has a shard to itself. Empty without any row."""
    ends = (spill or Spill(None)).empty(len(sizes), np.int64)
    np.cumsum(sizes, out=ends)
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(sizes) and ends[-1] > (ends[start - 1] if start else 0):
        before = int(ends[start - 1]) if start else 0
        # At least up to the first that has a row: no file is empty.
        least = int(np.searchsorted(ends, before, side="right")) + 1
        stop = max(least, int(np.searchsorted(ends, before + limit, side="right")))
        found.append((start, stop))
        start = stop
    if found:
        # Those behind have no row left, and belong somewhere.
        found[-1] = found[-1][0], len(sizes)
    return found


def places(shards: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[Places, Places]:
    """Of the prompts `start` to `stop` the shard, and the place in it: `shards` follow one another from the first."""
    first = np.array([a for a, _ in shards] or [0], np.int64)
    prompts = np.arange(start, stop)
    shard = np.searchsorted(first, prompts, side="right") - 1
    return shard.astype(np.int32), (prompts - first[shard]).astype(np.int32)


def located(shards: Sequence[tuple[int, int]], count: int) -> tuple[Places, Places]:
    shard = np.zeros(count, np.int32)
    offset = np.zeros(count, np.int32)
    for number, (start, stop) in enumerate(shards):
        shard[start:stop] = number
        offset[start:stop] = np.arange(stop - start)
    return shard, offset
