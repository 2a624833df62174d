"""A change of a dataset that is published: all of what it will be, made and checked before anything is changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from actcache._version import __version__
from actcache.errors import DatasetAccessError, DatasetFormatError, DatasetNotFoundError
from actcache.share import blocks, ours, recard, reindex
from actcache.share.folder import Folder
from actcache.share.format import CARD, INDEX, INFO, PREFIX, TensorGroup, describe
from actcache.share.index import Index
from actcache.share.rows import Ints, every_row
from actcache.share.shards import ShardReader
from actcache.share.source import NoFileError, Source
from actcache.share.split import SplitLayer
from actcache.share.staging import Staged, Staging

AT_ONCE = 4
"""Files that are made, and lie here, at the same time."""

_STALE_COLUMNS = ("shard_index_hidden", "row_offset_hidden", "token_offset_hidden")
"""What 1.2 says twice. In other versions a column of such a name is somebody's own."""


@dataclass(frozen=True)
class Report:
    """What a change does, or would do.

    Attributes:
        dataset: the name, and `url` where it is; `commit`: the one that was read, None for a folder.
        summary: the change in a sentence.
        changed: whether there is anything to change.
        added, replaced: path -> bytes; `removed`: paths.
        bytes_to_fetch: of vectors, beyond the index and headers; `bytes_to_send`: all that is new.
    """

    dataset: str
    url: str
    commit: str | None
    summary: str
    changed: bool
    added: Mapping[str, int] = field(default_factory=dict)
    replaced: Mapping[str, int] = field(default_factory=dict)
    removed: Sequence[str] = ()
    bytes_to_fetch: int = 0
    bytes_to_send: int = 0

    def __str__(self) -> str:
        at = f" at {self.commit[:12]}" if self.commit else ""
        lines = [f"{self.dataset}{at}: {self.summary}"]
        lines += [f"  add      {path}  {size:,} bytes" for path, size in self.added.items()]
        lines += [f"  replace  {path}  {size:,} bytes" for path, size in self.replaced.items()]
        lines += [f"  remove   {path}" for path in self.removed]
        if self.changed:
            lines.append(f"  fetch {self.bytes_to_fetch:,} bytes, send {self.bytes_to_send:,} bytes")
        return "\n".join(lines)


class Change:
    """What a dataset will be.

    Args:
        folder: for the new index and card; the caller removes it.
        description: what its metadata will say.
        columns: names of new or replaced columns of the index; `make`: their values of some rows.
        lengths: tokens of each prompt.
        layers: new files of vectors, layer by layer.
        old: files of vectors that the new ones are made of, and take the place of.
        removed: other files to remove, as far as they are there.
        note: a line for the card.
    """

    def __init__(
        self,
        index: Index,
        folder: Path,
        *,
        metadata: Mapping[str, Any],
        columns: Sequence[str],
        make: Callable[[int, int], reindex.Columns],
        lengths: Ints,
        layers: Sequence[SplitLayer] = (),
        old: Sequence[str] = (),
        removed: Sequence[str] = (),
        keep_info: bool = False,
        shown: str,
        note: str,
    ) -> None:
        self.source: Source = index.source
        self.layers = layers
        self._index, self._folder = index, folder
        self._metadata, self._lengths = dict(metadata), lengths
        self._columns, self._make = list(columns), make
        self.files = [file for layer in layers for file in (*layer.rest, *layer.last)]
        new = {file.path for file in self.files}
        self.removed = [path for path in old if path not in new]
        self.removed += [path for path in removed if exists(self.source, path)]
        self.used = list(old)
        self._old = {*old, INDEX}
        self.small = {INDEX: folder / "index.parquet"}
        self._stale = _STALE_COLUMNS if index.description.version == "1.2" else ()
        self._own = dict(index.ours)
        before = self._own.get("changes")
        change = {"change": note, "with": __version__, "at": _now()}
        self._own["changes"] = [*(before if isinstance(before, list) else []), change]
        self._check_kept(new)
        listed: Any = self._own.get("files")
        gone = {*new, *self._old, *self.removed}
        self._kept: dict[str, Any] = (
            {p: one for p, one in listed.items() if p not in gone} if isinstance(listed, dict) else {}
        )
        self._plan_blocks()
        # As long as it will be when the files are there.
        self._write_index({file.path: [file.nbytes, "0" * 64] for file in self.files})
        self._check()
        card = read_text(self.source, CARD)
        if card is not None or not exists(self.source, CARD):
            self.small[CARD] = folder / CARD
            self._old |= {CARD} if card is not None else set()
            text = recard.updated(
                card,
                repo_id=shown,
                model=index.description.model_name or "a model",
                described=self._metadata["tensors"],
                columns=[*(c for c in index.columns if c not in self._stale), *self._added_columns()],
                count=index.num_rows,
                note=f"{note} with actcache {__version__} at {_now()}",
            )
            # What JSON says may hold halves of characters.
            self.small[CARD].write_bytes(text.encode("utf-8", "replace"))
        if keep_info and exists(self.source, INFO):
            self._old.add(INFO)
            self.small[INFO] = folder / INFO
            self.small[INFO].write_text(json.dumps(self._metadata, indent=2), encoding="utf-8")

    def report(self, url: str, summary: str) -> Report:
        sizes = {file.path: file.nbytes for file in self.files}
        sizes |= {path: file.stat().st_size for path, file in self.small.items()}
        return Report(
            self.source.name,
            url,
            self.source.commit,
            summary,
            True,
            {path: size for path, size in sorted(sizes.items()) if path not in self._old},
            {path: size for path, size in sorted(sizes.items()) if path in self._old},
            sorted(self.removed),
            sum(layer.nbytes for layer in self.layers),
            sum(sizes.values()),
        )

    def finish(self, files: Mapping[str, Staged], staging: Staging) -> dict[str, Path]:
        """Index, card and what else is small: path in the dataset -> file; `files` are those that were made."""
        if files and blocks.FILE in self.small:
            kept, known = self._kept, self._index.checksums
            lists = (
                staging.blocks(files[path]) if path in files else known.digests(path) or b""
                for path in sorted({*kept, *files})
            )
            self._own["blocks"] = blocks.write(self.small[blocks.FILE], lists)
        if files:
            self._write_index({staged.path: [staged.size, staged.sha256] for staged in files.values()})
        return self.small

    def digest(self, used: Mapping[str, str]) -> str:
        """Of everything that decides the files; `used`: the digest of every file that they are made of."""
        return digest_of(self.layers, used)

    def _added_columns(self) -> list[str]:
        return [name for name in self._columns if name not in self._index.columns]

    def _check_kept(self, new: set[str]) -> None:
        """Refuse to remove or replace a file that other tensors of the dataset are in."""
        changed = {*new, *self.removed}
        for name, group in self._index.description.tensors.items():
            if self.layers and group is self.layers[0].group:
                continue
            for path in paths_of(group):
                if path in changed:
                    raise DatasetFormatError(f"{self.source.name}: {path} of {name} is also a file of hidden layers.")

    def _plan_blocks(self) -> None:
        """Make room for the digests of blocks of the new files and of those that stay."""
        if not self.files:
            return
        there = exists(self.source, blocks.FILE)
        if self._kept and self._index.checksums.kind != "blocks":
            # Those that stay are not read, and only some could be checked then.
            self._own.pop("blocks", None)
            self.removed += [blocks.FILE] if there else []
            return
        self._old |= {blocks.FILE} if there else set()
        sizes = [file.nbytes for file in self.files] + [one[0] for one in self._kept.values()]
        self.small[blocks.FILE] = self._folder / "blocks.xxh3"
        with self.small[blocks.FILE].open("wb") as file:
            file.truncate(blocks.size(sizes))
        self._own["blocks"] = {"block": blocks.BLOCK, "digest": "0" * 32}

    def _write_index(self, files: Mapping[str, Any]) -> None:
        own = dict(self._own)
        if files:
            own["files"] = {**self._kept, **files}
        metadata = {f"{PREFIX}{key}": json.dumps(value).encode() for key, value in self._metadata.items()}
        own[ours.SEALED] = True
        metadata |= {f"{ours.PREFIX}{key}": json.dumps(value).encode() for key, value in own.items()}
        reindex.rewrite(
            self._index,
            self.small[INDEX],
            lengths=self._lengths,
            names=self._columns,
            make=self._make,
            drop=self._stale,
            metadata=metadata,
        )

    def _check(self) -> None:
        """Read the new index as anybody will, and refuse what then would not be right."""
        describe(self._metadata, self.source.name)
        place = self._folder / "read" / INDEX
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.small[INDEX], place)
        index = Index(Folder(self._folder / "read"))
        for group in index.description.tensors.values():
            if group.pooling is not None:
                continue
            if not np.array_equal(np.diff(every_row(index, group).row_offset), self._lengths):
                raise index.wrong("its prompts have other numbers of tokens than before")
        os.replace(place, self.small[INDEX])


def made(staging: Staging, layers: Sequence[SplitLayer], source: Source) -> Iterator[list[Staged]]:
    """The files of all layers, some at a time; what was sent before is left out. The caller deals with each batch
    before it asks for the next."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for layer in layers:
            layer.aside = staging.folder / "aside"
            for part in (layer.rest, layer.last):
                left = [file for file in part if file.path not in staging.sent]
                for start in range(0, len(left), AT_ONCE):
                    try:
                        batch = list(pool.map(staging.make, left[start : start + AT_ONCE]))
                    except BaseException:
                        source.stop.set()
                        raise
                    yield batch
            layer.forget()


def digest_of(layers: Sequence[SplitLayer], used: Mapping[str, str]) -> str:
    """Of everything that decides the files of `layers`: what is told of each, the tensors that their rows are read
    from, and which rows. `used`: the digest of every file that they are made of."""
    digest = hashlib.sha256()

    def add(*told: Any) -> None:
        digest.update(json.dumps(told).encode() + b"\n")

    add(2, sorted(used.items()))
    for layer in layers:
        # The same bytes can be other rows: an index may name another tensor of a file, or other files in its order.
        shards = [[shard.rows, layer.group.file(n, layer.layer)] for n, shard in enumerate(layer.group.shards)]
        add(layer.layer, layer.group.key(layer.layer), shards)
        for file in (*layer.rest, *layer.last):
            add(file.path, [[part.key, part.shape, part.dtype.name] for part in file.parts])
    # One for all layers.
    for runs in (layer.runs for layer in layers[:1]):
        for array in (runs.offset, runs.shard, runs.start, runs.length):
            add(array.dtype.str, len(array))
            digest.update(array.tobytes())
    return digest.hexdigest()


def paths_of(group: TensorGroup) -> list[str]:
    """The files of tensors; a shard without rows has none."""
    filled = [number for number, shard in enumerate(group.shards) if shard.rows]
    found = [group.file(number, layer) for number in filled for layer in group.layers or (None,)]
    return list(dict.fromkeys(found))


def verify(index: Index, group: TensorGroup) -> ShardReader:
    """Look at the header of every file of some tensors; `DatasetFormatError` where one is not what is said of it."""
    reader = ShardReader(index.source, group, checked=False, checksums=index.checksums)
    filled = [number for number, shard in enumerate(group.shards) if shard.rows]
    layers: Sequence[int | None] = group.layers or (None,)
    if group.key_pattern is not None:
        reader.verify(filled, [(layer, group.key(layer)) for layer in layers])
    elif filled:
        keys = reader.keys(filled[0])
        if not keys:
            raise DatasetFormatError(f"{group.file(filled[0])} of {index.source.name} holds no tensors.")
        reader.verify(filled, [(None, key) for key in keys])
    return reader


def exists(source: Source, path: str) -> bool:
    """Whether a dataset has a file."""
    try:
        with source.open(path, 0, 1):
            return True
    except NoFileError:
        return False
    except DatasetFormatError:
        # It is empty, or no ordinary file.
        return True


def read_text(source: Source, path: str) -> str | None:
    """A small text file; None where there is none, and where it is none."""
    try:
        with source.open(path, 0, recard.MAX_CARD) as stream:
            if stream.size > recard.MAX_CARD:
                return None
            return stream.read(stream.size).decode()
    except (DatasetNotFoundError, DatasetFormatError, UnicodeDecodeError):
        return None


def damaged(path: Path) -> DatasetAccessError:
    """The error for files on their way that do not stay as they are."""
    return DatasetAccessError(f"files in {path} change while they are used: what else writes there?")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
