"""Sorted keys that this host keeps on disk, so that its processes share them and none sorts them again.

Disposable, never the truth: a file counts for the segments of which it has the very keys, the others are sorted anew.
It is replaced, never changed, so that who has mapped it may go on using it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from actcache.errors import FormatError
from actcache.store.files import log, open_plain
from actcache.store.keys import AT_ONCE, KEY_BYTES, Group, KeyTable, Mask, Run, run_in
from actcache.store.mapped import MappedFile
from actcache.store.records import SegmentInfo
from actcache.store.spill import Spill
from actcache.store.tombs import Keys

_MAGIC = b"actkeys1"
_SUFFIX = ".keys"
_OLD_S = 3600.0

KeysOf = Callable[[int, str], tuple[Keys, Mask | None]]


@dataclass
class _Saved:
    """A file: its keys, and under which number in `run.segment` those of a segment with that name and stamp are."""

    run: Run
    at: dict[tuple[str, int], int]


class KeysHere:
    """The keys of one space as this host has them: in files, many of them sorted. Not thread-safe."""

    def __init__(self, index_dir: Path, space: str) -> None:
        self.spill = Spill(index_dir)
        self.keep = self.spill.keep
        self._folder = index_dir / "keys" / space

    def kept(self, info: SegmentInfo) -> SegmentInfo:
        """The same with copies of its keys."""
        return replace(info, prompt_key=self.keep(info.prompt_key), text_key=self.keep(info.text_key))

    def table_of(
        self,
        group: Group,
        kind: str,
        members: Collection[tuple[int, str, int]],
        keys_of: KeysOf,
        groups: Iterable[tuple[str, Iterable[str]]],
    ) -> KeyTable:
        """The keys of one kind of the segments of a group: number, name ("" for what is none) and number of prompts of
        each, with `keys_of` as `KeyTable.add` takes them. `groups`: all of which somebody may ask for keys."""
        known = {_file_name(*one, which) for one in groups for which in ("text", "token")}
        path = self._folder / _file_name(group.layout, group.sites, kind)
        return _table_of(path, members, lambda number: keys_of(number, kind), self.spill, known)

    def forget(self) -> None:
        """Remove the files of a space that holds nothing any more."""
        _sweep(self._folder, ())
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def _file_name(layout: str, sites: Iterable[str], kind: str) -> str:
    return xxhash.xxh3_128_hexdigest(repr((layout, sorted(sites), kind)).encode("utf-8", "surrogatepass")) + _SUFFIX


def _table_of(
    path: Path,
    members: Collection[tuple[int, str, int]],
    keys_of: Callable[[int], tuple[Keys, Mask | None]],
    spill: Spill,
    known: Collection[str],
) -> KeyTable:
    """Many keys are read from the file at `path`, and written to it where it lacks a good part."""
    table = KeyTable(spill)
    if sum(prompts for _, _, prompts in members) <= AT_ONCE:
        for number, _, _ in members:
            table.add(number, *keys_of(number))
        return table
    saved = _load(path)
    stamps: dict[int, tuple[str, int]] = {}
    late = []
    for number, name, prompts in members:
        if not name:
            continue
        stamp = stamps[number] = name, _stamp(*keys_of(number))
        if saved is not None and stamp in saved.at and saved.run.numbers is not None:
            saved.run.numbers[saved.at[stamp]] = number
        else:
            late.append((number, prompts))
    lacking = sum(prompts for _, prompts in late)
    if saved is not None:
        lacking += len(saved.run) - saved.run.alive
        table.take(saved.run)
    for number, _ in late:
        table.add(number, *keys_of(number))
    if lacking > max(AT_ONCE, sum(prompts for _, name, prompts in members if name) // 4) and not table.is_empty:
        _save(path, table.whole(), stamps, known)
    # What is no segment will be gone, or one, when the file is read.
    for number, name, _ in members:
        if not name:
            table.add(number, *keys_of(number))
    return table


def _stamp(keys: Keys, live: Mask | None) -> int:
    """Digest of keys, and of which of them count."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(keys).data)
    if live is not None:
        digest.update(np.packbits(live).data)
    return digest.intdigest()


def _load(path: Path) -> _Saved | None:
    """What is in a file; None where there is none, or not as it was written."""
    try:
        fd = open_plain(path)
        try:
            size = os.fstat(fd).st_size
            if size < 32:
                raise FormatError("it is cut short")
            file = MappedFile(fd, size)
        finally:
            os.close(fd)
        file.populate(0, size)
        raw = file.raw
        digest, length, count = np.frombuffer(raw, np.uint64, 3, 8).tolist()
        if raw[:8] != _MAGIC or size != 32 + length + count * KEY_BYTES or length % 16:
            raise FormatError("it is none of ours, or cut short")
        if digest != xxhash.xxh3_64_intdigest(raw[16:]):
            raise FormatError("its digest does not match")
        names = json.loads(raw[32 : 32 + length].tobytes())
        run = run_in(file.array[32 + length :], count)
        at = {(str(name), int(stamp)): number for number, (name, stamp) in enumerate(names)}
        run.numbers = np.full(len(names), -1, np.int32)
        return _Saved(run, at)
    except FileNotFoundError:
        return None
    except (OSError, FormatError, ValueError, TypeError, OverflowError) as error:
        log.debug("the keys in %s cannot be used, sorting them again: %s", path, error)
        return None


def _save(path: Path, run: Run, stamps: dict[int, tuple[str, int]], known: Collection[str]) -> None:
    """Write the file; that it cannot be written costs other processes time only."""
    # Also of those without a key of this kind: they would count as lacking.
    names = json.dumps([stamps.get(number, ("", 0)) for number in range(max(stamps) + 1)]).encode()
    names += b" " * (-len(names) % 16)
    parts: list[Any] = [np.array([len(names), len(run)], np.uint64).data, names]
    parts += [array.data for array in (run.high, run.low, run.segment, run.row)]
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent, known)
        try:
            with temporary.open("xb") as file:
                file.write(_MAGIC + digest.intdigest().to_bytes(8, "little"))
                for part in parts:
                    file.write(part)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        log.debug("the keys are not kept in %s: %s", path, error)


def _sweep(folder: Path, known: Collection[str]) -> None:
    """Remove files that nobody asks for any more, and what processes that were killed have left half written."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            half = path.suffix == ".tmp" and path.stat().st_mtime < time.time() - _OLD_S
            if half or (path.suffix == _SUFFIX and path.name not in known):
                path.unlink(missing_ok=True)
