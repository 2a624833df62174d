"""Whether the folder of a dataset is what it was when it was pulled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from actcache.errors import DatasetFormatError
from actcache.share.folder import Folder
from actcache.share.format import INDEX, INFO, TensorGroup
from actcache.share.source import Source

if TYPE_CHECKING:
    from actcache.share.offered import Offered
    from actcache.store.spaces import SpaceInfo

_MOST_FILES = 1 << 18


def files_of(group: TensorGroup) -> Iterator[tuple[int, int | None, str]]:
    """Every file of a kind of tensors that has rows: number of the shard, layer, path."""
    for number, shard in enumerate(group.shards):
        if shard.rows:
            for layer in (None,) if shard.file is not None else group.layers or (None,):
                yield number, layer, group.file(number, layer)


def fingerprint(source: Source, offered: Offered) -> str:
    """What stands for the commit of a folder: the names, sizes and times of its files.

    Raises DatasetFormatError where it is said to have more files than a dataset can have.
    """
    assert isinstance(source, Folder)
    # What the JSON of 1.x says of the files decides what their rows are.
    paths = {INDEX, INFO}
    groups = {c.group.name: c.group for c in offered.columns.values() if c.group is not None}.values()
    for group in groups:
        filled = sum(1 for shard in group.shards if shard.rows)
        if filled * max(1, len(group.layers)) > _MOST_FILES:
            raise DatasetFormatError(
                f"{source.name}: {group.name} has {filled:,} shards of {len(group.layers):,} layers, more than "
                f"{_MOST_FILES:,} files."
            )
        paths |= {path for _, _, path in files_of(group)}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(_stamp(source, path).encode())
    return digest.hexdigest()[:40]


def _stamp(source: Folder, path: str) -> str:
    try:
        status = os.stat(source.folder / path)
    except OSError:
        return f"{path} is not there\n"
    return f"{path} {status.st_size} {status.st_mtime_ns}\n"


def state_of_index(source: Source) -> str:
    """What stands for the index of a folder, and what JSON says of it, as they are now; "" for a commit."""
    return "".join(_stamp(source, path) for path in (INDEX, INFO)) if isinstance(source, Folder) else ""


def check_unchanged(info: SpaceInfo, source: Source, offered: Offered) -> None:
    """DatasetFormatError where the folder of a dataset is not what was pulled any more."""
    if isinstance(source, Folder) and fingerprint(source, offered) != info.identity["pulled"]["commit"]:
        raise DatasetFormatError(
            f"{source.name} was changed since it was pulled: pull it again, and drop what was pulled before with "
            "overwrite=True."
        )
