"""`push_dataset`: what is stored for a model becomes a dataset, on the Hub or in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import DatasetAccessError, OptionError, require_choice
from actcache.progress import progress
from actcache.share import blocks, card
from actcache.share.columns import Absent, Column, label_column, metadata_columns
from actcache.share.contents import Contents
from actcache.share.hub_errors import check_token
from actcache.share.hub_target import HubTarget, quiet_client
from actcache.share.index_file import Index, require_pyarrow
from actcache.share.location import local_folder
from actcache.share.selection import Selection, as_prompts, select
from actcache.share.shard_files import ShardFile, Shards
from actcache.share.staging import Staged, Staging
from actcache.share.target import Folder, Target
from actcache.store import given
from actcache.store.default import store_at
from actcache.store.files import log
from actcache.store.memory import return_free_memory
from actcache.store.records import LABEL, METADATA
from actcache.store.spaces import SpaceInfo

if TYPE_CHECKING:
    from actcache.share.stored_rows import Rows
    from actcache.store.store import Store

DEFAULT_SHARD_BYTES = 2**30
"""How large a file of a dataset becomes at most: 1 GB."""

_PRELOADS = ("none", "per_layer", "full")


def push_dataset(
    repo_id: str | os.PathLike[str],
    model_name: str | Path,
    prompts: Iterable[Any] | None,
    *,
    labels: Any = None,
    metadata: Any = None,
    tensors: Sequence[str] | None = None,
    shard_max_bytes: int = DEFAULT_SHARD_BYTES,
    private: bool = False,
    exist_ok: bool = False,
    skip_missing: bool = True,
    description: str | None = None,
    license: str = "cc-by-4.0",
    token: str | bool | None = None,
    num_workers: int | None = None,
    commit_batch_size: int | None = None,
    stream: bool = False,
    stream_batch_size: int = 10,
    preload: str = "none",
    preload_workers: int = 8,
    shuffle: bool = True,
    pooling: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    space: SpaceInfo | str | None = None,
    store: Store | str | Path | None = None,
) -> str:
    """Publish what is stored for `prompts` of a model as a dataset, in version 2.0 of the lmprobe format.

    Everything that can fail here is looked at before anything is made there. A push that was cut goes on where it was
    when it is called again; files that have arrived are not sent twice. What a repository shows already is replaced by
    one commit, so that nobody reads half of two datasets.

    Args:
        repo_id: ``"org/name"`` on the Hub, or a folder: a `Path`, or a string that starts with ".", "/", "~", "file://".
        model_name: as it is stored, a Hub id or a folder. Of several variants of it `revision`, `dtype` (the model
            computed in) and `space` choose one.
        prompts: texts, token ids or chats, which are published as they are given here; None for all that are stored.
        labels: for each prompt an int or a str, all of one type, or None; True and False become 1 and 0. None for those
            that are stored with them.
        metadata: a dict for each prompt, all with the same names, or a list for each name; columns keep the types of
            their values. None for what is stored with the prompts.
        tensors: some of "hidden_layers" (the residual stream after each block), "logits_topk", "perplexity",
            "router_logits", other sites, or single layers of these ("attn_out.3"). None: all that the prompts have in
            common.
        pooling: which of several stored forms is shared, "tokens" for full sequences; None: what most prompts have,
            of equals full sequences, then "last_token".
        shard_max_bytes: the size that a file reaches at most, if one prompt fits into it.
        private: make a new repository a private one.
        exist_ok: replace the dataset that is there.
        skip_missing: leave out prompts that lack something of what is shared; False refuses.
        description: goes into the card, Markdown.
        license: of the dataset, as the Hub calls it.
        token: of the Hub; None for the one that is logged in.
        num_workers: files that are made, and sent, at the same time.
        commit_batch_size: files per commit to a new repository; None: all in one.
        stream: make only `stream_batch_size` files at a time, send and remove them, and so on: little of the disk is
            needed.
        preload: "per_layer" reads a layer whole, in the order of the disk, before its files are made; "full" all of
            them; in `preload_workers` threads. Worth their memory where reading here and there is slow.
        shuffle: bring the rows in a random order, which follows from the name.
        store: an `ac.Store`, a folder, or None for the default store.

    Returns:
        The dataset's address on the Hub, or its folder.

    Raises:
        OptionError: an argument, a label or a column that cannot be; a text whose tensors are of different token ids.
        NotCachedError: nothing, or not all, is stored of the prompts.
        AmbiguousVariantError: the model is stored in several variants, and none is chosen; they are named.
        DatasetExistsError: there is something already, without `exist_ok`; a public repository, with `private`.
        DatasetAccessError: the Hub cannot be reached, no token is known or it may not write, or somebody else changed
            the dataset meanwhile.
        DiskFullError: no room for the files on their way.
        MissingExtraError: pyarrow is not installed.
    """
    workers = _positive(num_workers, "num_workers") if num_workers is not None else min(8, os.cpu_count() or 1)
    settings = _Settings(
        workers,
        None if commit_batch_size is None else _positive(commit_batch_size, "commit_batch_size"),
        _positive(stream_batch_size, "stream_batch_size") if stream else None,
        require_choice(preload, _PRELOADS, "preload"),
        _positive(preload_workers, "preload_workers"),
    )
    _positive(shard_max_bytes, "shard_max_bytes")
    card.check_license(license)
    check_token(token)
    if description is not None and not isinstance(description, str):
        raise OptionError(f"description is {description!r:.60}: expected text.")
    require_pyarrow()
    folder = local_folder(repo_id)
    target: Target
    if folder is not None:
        target = Folder(folder, exist_ok=exist_ok)
        if private:
            log.warning(
                "%s: private=True is for repositories of the Hub; who may read a folder its permissions say", folder
            )
    else:
        target = HubTarget(str(repo_id), token=token, private=bool(private), exist_ok=exist_ok, num_threads=workers)
        target.keep_out(description, "description")
    where = store_at(store)
    asked = None if prompts is None else as_prompts(prompts)
    label, columns = _said(labels, metadata, None if asked is None else len(asked))
    found = select(
        where, model_name, asked, tensors=tensors, pooling=pooling, skip_missing=skip_missing, revision=revision,
        dtype=dtype, space=_space_id(space),
    )  # fmt: skip
    label, columns = _of_selected(where, found, label, columns)
    name = str(repo_id) if folder is None else folder.name
    # What was taken for one piece of the work would be kept beside what the next one takes.
    return_free_memory()
    shards = Shards(found, name=name, shard_max_bytes=shard_max_bytes, shuffle=shuffle)
    index = Index(found, shards, label, columns)
    index.check()
    contents = Contents(found, shards, index, target, license, description, shuffle)
    contents.check()
    with Staging(target.staging_root(where.folder), target.url, contents.digest(label, columns)) as staging:
        return _push(target, staging, shards, contents, settings)


@dataclass(frozen=True)
class _Settings:
    workers: int
    commit_batch: int | None
    stream_batch: int | None
    preload: str
    preload_workers: int


def _positive(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{what} is {value!r}: expected a whole number from 1 on.")
    return value


def _said(labels: Any, metadata: Any, count: int | None) -> tuple[Column | None, list[Column] | None]:
    """What the caller says of the prompts, checked."""
    if count is None and (labels is not None or metadata is not None):
        raise OptionError("labels and metadata belong to prompts: name these, or leave both to what is stored.")
    return (
        None if labels is None else label_column(labels, count or 0),
        None if metadata is None else metadata_columns(metadata, count or 0),
    )


def _space_id(space: Any) -> str | None:
    if isinstance(space, SpaceInfo):
        return space.space
    if space is not None and not isinstance(space, str):
        raise OptionError(
            f"space is {space!r:.60}: expected the id of a variant, or its SpaceInfo, as Store.spaces() lists them."
        )
    return space


def _of_selected(
    store: Store, found: Selection, label: Column | None, columns: list[Column] | None
) -> tuple[Column, list[Column]]:
    """Labels and metadata of the prompts that are shared: the caller's, else what is stored with them."""
    held = store.held(found.space)
    if label is not None:
        label = label.select(found.given.tolist())
    elif LABEL not in held:
        label = Column("label", "int32", Absent(len(found.given)))
    else:
        try:
            label = label_column(_stored(store, found, LABEL), len(found.given))
        except OptionError as error:
            raise OptionError(f"the labels that are stored: {error} Or pass labels= here.") from None
    if columns is not None:
        columns = [column.select(found.given.tolist()) for column in columns]
    elif METADATA not in held:
        columns = []
    else:
        rows = _stored(store, found, METADATA)
        names = sorted({name for row in rows if row for name in row})
        try:
            columns = metadata_columns({name: [(row or {}).get(name) for row in rows] for name in names}, len(rows))
        except OptionError as error:
            raise OptionError(f"the metadata that is stored: {error} Or pass metadata= here.") from None
    said = [column for column in (label, *columns) if any(value is not None for value in column.values)]
    _refuse_contradictions(found, said)
    return label, columns


def _stored(store: Store, found: Selection, kind: str) -> list[Any]:
    """What is stored of `kind` with the prompts, in their order."""
    return [value for _, table in found.table.parts() for value in given.read(store, found.space.space, kind, table)]


def _refuse_contradictions(found: Selection, columns: Sequence[Column]) -> None:
    """Refuse two values for one prompt that is given twice."""
    if not columns:
        return
    keys = np.concatenate([table.token_key for _, table in found.table.parts()])
    words = np.ascontiguousarray(keys).view(np.uint64)
    order = np.lexsort((words[:, 1], words[:, 0]))
    same = np.flatnonzero((words[order[1:]] == words[order[:-1]]).all(axis=1))
    for j, i in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        for column in columns:
            if column.values[i] != column.values[j]:
                first, second = found.given[[j, i]].tolist()
                raise OptionError(
                    f"prompts {first} and {second} are the same, and their {column.name!r} is not: "
                    f"{column.values[j]!r:.60} and {column.values[i]!r:.60}. Give each prompt one."
                )


def _push(target: Target, staging: Staging, shards: Shards, contents: Contents, settings: _Settings) -> str:
    """Make, send, publish."""
    target.look(staging)
    staging.drop_others()
    left: list[ShardFile] = []
    arrived: dict[str, Staged] = {}
    for shard in shards.files:
        known = staging.sent.get(shard.path)
        if known is not None and known.size == shard.nbytes and target.has(known):
            arrived[shard.path] = known
        else:
            left.append(shard)
    if target.finished and not left:
        staging.remove()
        return target.url
    missing = [shard for shard in left if shard.path not in staging.done]
    if settings.stream_batch is None:
        staging.check_room(sum(shard.nbytes for shard in missing))
    else:
        staging.check_room(sum(sorted(shard.nbytes for shard in left)[-settings.stream_batch :]))
    maker = _Maker(staging, settings)
    with progress(len(shards.files), f"push {target.name}", unit="file") as bar, quiet_client():
        bar.update(len(arrived))
        if settings.stream_batch is None:
            with progress(len(missing), "prepare", unit="file") as making:
                for _ in maker.made(left, making.update):
                    pass
        # From here on the other side changes.
        target.begin([*(shard.path for shard in left), blocks.FILE])
        size = settings.stream_batch or settings.commit_batch or len(left) or 1
        for start in range(0, len(left), size):
            _send(target, maker, left[start : start + size], arrived, bar.update, keep=settings.stream_batch is None)
    maker.close()
    return_free_memory()
    files = [arrived[shard.path] for shard in shards.files]
    small = contents.write(staging, files)
    target.finish(small, [staged.path for staged in files], staging)
    staging.remove()
    return target.url


def _send(
    target: Target, maker: _Maker, shards: Sequence[ShardFile], arrived: dict[str, Staged], update: Any, *, keep: bool
) -> None:
    """Send some files, and commit them where that changes nothing that is published."""
    staging = maker.staging
    by_path = {shard.path: shard for shard in shards}
    sent: list[Staged] = []
    # A few at a time, so that a push that is cut knows of most of what has arrived.
    step = max(1, 4 * maker.settings.workers)
    batch = list(maker.made(shards))
    for start in range(0, len(batch), step):
        part = batch[start : start + step]
        for _ in range(3):
            damaged = target.send(part)
            sent += [staged for staged in part if staged not in damaged]
            part = [staging.remake(by_path[staged.path]) for staged in damaged]
            if not part:
                break
            log.warning("%s: %d files on their way were damaged, and are made again", target.name, len(part))
        else:
            raise DatasetAccessError(f"files in {staging.folder} change while they are sent: what else writes there?")
        update(min(step, len(batch) - start))
    for staged in sent:
        # Before the commit: files of which nobody knows would look like somebody else's.
        staging.note_sent(staged)
        arrived[staged.path] = staged
    gone = set(target.commit(f"Add {len(sent)} files of activations"))
    for staged in sent:
        if not keep and staged.path in gone:
            staging.forget(staged)


class _Maker:
    """Makes the files of a dataset in several threads, what they are made of in memory first where that is asked."""

    def __init__(self, staging: Staging, settings: _Settings) -> None:
        self.staging, self.settings = staging, settings
        self._loaded: dict[int, Rows] = {}

    def made(self, shards: Sequence[ShardFile], update: Any = lambda n=1: None) -> Iterator[Staged]:
        """These files, staged."""
        with ThreadPoolExecutor(self.settings.workers) as pool:
            for run in _runs(shards) if self.settings.preload == "per_layer" else [list(shards)]:
                self._load([shard for shard in run if shard.path not in self.staging.done])
                for staged in pool.map(self.staging.make, run):
                    update(1)
                    yield staged

    def _load(self, shards: Sequence[ShardFile]) -> None:
        if self.settings.preload == "none":
            return
        needed = {id(rows): rows for shard in shards for rows in shard.sites}
        if self.settings.preload == "per_layer":
            for key in self._loaded.keys() - needed.keys():
                self._loaded.pop(key).forget()
        for key, rows in needed.items():
            if key not in self._loaded:
                rows.load(self.settings.preload_workers)
                self._loaded[key] = rows

    def close(self) -> None:
        """Give back the memory."""
        for rows in self._loaded.values():
            rows.forget()
        self._loaded.clear()


def _runs(shards: Sequence[ShardFile]) -> Iterator[list[ShardFile]]:
    """Neighbours that are made of the same sites."""
    run: list[ShardFile] = []
    for shard in shards:
        if run and run[-1].sites != shard.sites:
            yield run
            run = []
        run.append(shard)
    if run:
        yield run
