"""`migrate_dataset` and `upgrade_dataset_format`: a dataset of an older form becomes one that is read today."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import DatasetFormatError, OptionError
from actcache.share.change import Change, paths_of, verify
from actcache.share.format import HIDDEN, INFO, VERSION, TensorGroup
from actcache.share.index import Index
from actcache.share.push import DEFAULT_SHARD_BYTES
from actcache.share.reform import Job, run
from actcache.share.restated import metadata_of, own_columns, told_dtype
from actcache.share.rows import Ints, Runs, every_row
from actcache.share.split import Split, SplitLayer


def migrate_dataset(
    repo_id: str | os.PathLike[str],
    *,
    shard_max_bytes: int = DEFAULT_SHARD_BYTES,
    token: str | bool | None = None,
    private: bool | None = None,
    dry_run: bool = False,
) -> str:
    """Give the last tokens of a dataset of full sequences shards of their own, in version 2.0 of the format.

    Who wants one vector per prompt then transfers no more than that, and lmprobe 0.10.3, which reads no older version,
    reads it. Vectors keep their bits and prompts their order; labels, metadata, logits, perplexity and files of others
    stay. Everything is looked at before anything is changed; then there is one commit on top of the one that was read.
    A migration that is cut goes on where it was when it is called again: what has arrived is not sent twice.

    Args:
        repo_id: ``"org/name"`` on the Hub, or a folder: a `Path`, or a string that starts with ".", "/", "~", "file://".
        shard_max_bytes: the size that a file reaches at most, if one prompt fits into it.
        token: of the Hub; None for the one that is logged in.
        private: make the repository a private one (True, just before the commit) or a public one (False, after it).
        dry_run: change nothing, and return what would be done: files and bytes. The index and the headers of files are
            read for it.

    Returns:
        The dataset's address on the Hub, or its folder; with `dry_run` a text. A dataset that is split already stays as
        it is, which the log says.

    Raises:
        OptionError: it holds one vector per prompt, or no prompts; an argument that cannot be.
        DatasetFormatError: it is damaged, or says what it may not; NewerFormatError: it needs a later version.
        DatasetNotFoundError, DatasetAccessError: it is not to be had, or somebody has changed it meanwhile.
        DiskFullError: no room for the few files that are on their way (of a folder: for the new one).
        MissingExtraError: pyarrow is not installed.
    """
    return run(Migration(repo_id, shard_max_bytes=shard_max_bytes, token=token, private=private), dry_run)


def upgrade_dataset_format(
    repo_id: str | os.PathLike[str], *, token: str | bool | None = None, remove_json: bool = True, dry_run: bool = False
) -> str:
    """Bring a dataset of version 1.x to 2.0: its metadata goes into the schema of the index; no vectors are touched.

    For full sequences whose tokens lie together the index also gets the columns that say where each token is, since 2.0
    does not tell how older versions counted them. `migrate_dataset` does all this, and splits.

    Args:
        remove_json: remove ``lmprobe_info.json``. False leaves it; where the index now says more than it knows, it is
            replaced by the new metadata.
        repo_id, token, dry_run: see `migrate_dataset`.

    Returns and raises what `migrate_dataset` does.
    """
    return run(Upgrade(repo_id, token=token, remove_json=remove_json), dry_run)


class Migration(Job):
    """`migrate_dataset`."""

    doing = "migrating"

    def __init__(
        self,
        repo_id: str | os.PathLike[str],
        *,
        shard_max_bytes: int = DEFAULT_SHARD_BYTES,
        token: str | bool | None = None,
        private: bool | None = None,
    ) -> None:
        super().__init__(repo_id, token=token, private=private)
        if not isinstance(shard_max_bytes, int) or isinstance(shard_max_bytes, bool) or shard_max_bytes < 1:
            raise OptionError(f"shard_max_bytes is {shard_max_bytes!r}: expected a whole number from 1 on.")
        self._most = shard_max_bytes

    def _nothing(self, index: Index) -> str | None:
        found = index.description
        group = found.tensors.get(HIDDEN)
        if group is None or group.pooling is not None:
            what = "no hidden_layers" if group is None else "one vector per prompt"
            raise OptionError(
                f"{index.source.name} holds {what}, so that there is nothing to split; `upgrade_dataset_format` brings "
                f"a dataset of format 1.x to {VERSION}."
            )
        if group.last_token_shards:
            older = "; upgrade_dataset_format brings it to 2.0" if found.version.startswith("1.") else ""
            return f"its last tokens have shards of their own already (format {found.version}): nothing changes{older}"
        if not index.num_rows:
            raise OptionError(f"{index.source.name} has no prompts: there is nothing to split.")
        others = [n for n, g in found.tensors.items() if n != HIDDEN and g.pooling is None]
        if others:
            raise OptionError(
                f"{index.source.name}: {others[0]} holds every token too, and only {HIDDEN} can be split."
            )
        return None

    def _change(self, index: Index, folder: Path, shown: str) -> tuple[Change, str]:
        group = index.description.tensors[HIDDEN]
        runs = every_row(index, group)
        own = own_columns(index, but=HIDDEN)
        first = next(number for number, shard in enumerate(group.shards) if shard.rows)
        tensors = dict(index.description.tensors)
        reader = verify(index, tensors.pop(HIDDEN))
        for other in tensors.values():
            verify(index, other)
        places = {layer: reader.placed(first, layer, group.key(layer)) for layer in group.layers}
        widths = {place.width for place in places.values()}
        if len(widths) > 1:
            raise DatasetFormatError(f"{index.source.name}: layers have rows of {sorted(widths)} numbers.")
        for layer, place in places.items():
            for number in (n for n, shard in enumerate(group.shards) if shard.rows):
                found = reader.placed(number, layer, group.key(layer)).dtype
                if found != place.dtype:
                    raise DatasetFormatError(
                        f"{group.file(number, layer)} of {index.source.name} holds {found}, and {place.path} "
                        f"{place.dtype}: one file cannot hold both."
                    )
        dim = widths.pop()
        row_bytes = max(place.row_bytes for place in places.values())
        split = Split(runs, row_bytes=row_bytes, shard_max_bytes=self._most)
        layers = [SplitLayer(reader, split, layer, dim, places[layer].dtype) for layer in group.layers]

        def make(start: int, stop: int) -> dict[str, Any]:
            return split.columns(start, stop) | {name: values[start:stop] for name, values in own.items()}

        metadata = metadata_of(index)
        metadata["tensors"][HIDDEN] = split.described(group.described, dim, told_dtype(reader, group))
        change = Change(
            index,
            folder,
            metadata=metadata,
            columns=[*split.columns(0, 1), *own],
            make=make,
            lengths=split.lengths,
            layers=layers,
            old=paths_of(group),
            removed=[INFO],
            shown=shown,
            note=f"last tokens split from the others, from format {index.description.version}",
        )
        before = sum(1 for shard in group.shards if shard.rows)
        return change, (
            f"Split {before} shards of {len(layers)} layers into {len(split.placed)} of last tokens and "
            f"{len(split.rest)} of other tokens, in format {VERSION}"
        )


class Upgrade(Job):
    """`upgrade_dataset_format`."""

    doing = "upgrading"

    def __init__(
        self, repo_id: str | os.PathLike[str], *, token: str | bool | None = None, remove_json: bool = True
    ) -> None:
        super().__init__(repo_id, token=token)
        self._remove = bool(remove_json)

    def _nothing(self, index: Index) -> str | None:
        version = index.description.version
        return None if version.startswith("1.") else f"it is of format {version} already: nothing changes"

    def _change(self, index: Index, folder: Path, shown: str) -> tuple[Change, str]:
        lengths = np.zeros(index.num_rows, np.int64)
        columns: dict[str, Ints] = {}
        runs: Runs | None = None
        group = index.description.tensors.get(HIDDEN)
        told = {name: told_dtype(verify(index, other), other) for name, other in index.description.tensors.items()}
        if group is not None and group.pooling is None:
            found = every_row(index, group)
            lengths = np.diff(found.row_offset)
            if not group.last_token_shards and "token_shard_ids" not in index.columns:
                runs = found
                columns = own_columns(index, but=HIDDEN) | _together(group, runs)

        def make(start: int, stop: int) -> dict[str, Any]:
            new: dict[str, Any] = {name: values[start:stop] for name, values in columns.items()}
            if runs is not None:
                some = runs.take(np.arange(start, stop))
                shard, row = some.rows()
                counts = lengths[start:stop]
                new |= {"token_shard_ids": (counts, shard), "token_shard_offsets": (counts, row)}
            return new

        metadata = metadata_of(index)
        for name, dtype in told.items():
            metadata["tensors"][name] |= {} if dtype is None else {"dtype": dtype}
        names = [*columns, *(["token_shard_ids", "token_shard_offsets"] if runs is not None else [])]
        version = index.description.version
        change = Change(
            index,
            folder,
            metadata=metadata,
            columns=names,
            make=make,
            lengths=lengths,
            removed=[INFO] if self._remove else [],
            keep_info=not self._remove and runs is not None,
            shown=shown,
            note=f"upgraded from format {version}",
        )
        return change, f"Upgrade from format {version} to {VERSION}"


def _together(group: TensorGroup, runs: Runs) -> dict[str, Ints]:
    """Columns that say where prompts are whose tokens lie together, so that whichever of them a reader goes by is
    right: the row of the last token, as 2.0 has it, and the first one.

    lmprobe counts the first from the beginning of the shard where it unpacks, and through all shards where it reads on
    demand; beside the lists of places only the latter is used where layers have files of their own.
    """
    at = runs.offset[1:] - 1
    first = runs.start[runs.offset[:-1]]
    if group.described.get("layout") == "per_layer":
        rows = np.array([shard.rows for shard in group.shards], np.int64)
        first = first + (np.cumsum(rows) - rows)[runs.shard[runs.offset[:-1]]]
    return {"row_offset": runs.start[at] + runs.length[at] - 1, "token_offset": first}
