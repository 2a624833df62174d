"""`pull_dataset`: what a dataset holds answers for its model, fetched when it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetAccessError, DatasetFormatError, OptionError
from actcache.progress import progress
from actcache.share.different import Different
from actcache.share.fetching import SLICE_BYTES, Dataset, fetch, found_as_given, remember
from actcache.share.folder import Folder
from actcache.share.index import Index
from actcache.share.index_prompts import lengths_of, pieces
from actcache.share.offered import Column, Offered
from actcache.share.prompts import find_prompts
from actcache.share.rows import Ints
from actcache.share.source import open_source
from actcache.share.taken import Piece, Taken
from actcache.share.unchanged import check_unchanged, fingerprint, state_of_index
from actcache.store.default import store_at
from actcache.store.files import log
from actcache.store.locks import exclusive
from actcache.store.memory import return_free_memory
from actcache.store.pulled import CONTEXT, PROMPT, TRUSTED
from actcache.store.records import PULLED, Records
from actcache.store.spaces import SpaceInfo, space_id
from actcache.store.spill import Spill
from actcache.store.tombs import is_member

if TYPE_CHECKING:
    from actcache.store.store import Store

_WAIT_S = 60.0
# Prompts that are fetched, and become durable, together.
_STEP_BYTES = 256 << 20
_LONGEST_NAME = 500
_AT_ONCE = 1 << 13
_MOST_BYTES = 1 << 30
_MANY_TOKENS = 1 << 22


def pull_dataset(
    repo_id: str | os.PathLike[str],
    *,
    tensors: Sequence[str] | str | None = None,
    layers: int | Sequence[int] | str | None = None,
    target_prompts: Sequence[Any] | str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    materialize: bool = False,
    num_workers: int = 0,
    show_progress: bool = False,
    trust_names: bool = False,
    revision: str | None = None,
    store: Store | str | Path | None = None,
) -> int:
    """Let a dataset of the Hub (``"org/name"``), or in a folder, answer for its model.

    Its prompts, labels, other columns and perplexities are stored; vectors are fetched when they are first read, of the
    prompts and layers that are read, and are stored from then on. They answer `UnifiedCache` and `ac.activations` where
    nothing was computed here, and never instead of what was. That they are of just this model (weights, dtype and all)
    is known of what this library has pushed; of other datasets a name alone, which must be trusted.

    Args:
        tensors: some of "hidden_layers", "logits_topk", "router_logits", "perplexity", names of sites, or single layers
            of these; None: all.
        layers: block numbers; None or "all": every layer.
        target_prompts: texts (token ids, chats) of the dataset; None: all.
        overwrite: forget what was pulled of this dataset before, at whichever commit, and fetch it anew.
        token: of the Hub, for a private dataset; None: the one that is logged in, False: none. It is not stored: what
            is fetched later, in another process, is fetched with the one that is logged in there.
        materialize: fetch all of it now. Cut short, it goes on from there when it is called again.
        num_workers: streams at the same time; 0: as many as suit the place.
        show_progress: a bar, where standard error is a terminal.
        trust_names: a dataset that only claims a model's name answers for every model of that name. Without, it does so
            in `UnifiedCache(trust_names=True)` alone.
        revision: a branch, a tag or a commit of the repository. The commit that it means now is what is pulled.
        store: an `ac.Store`, a folder, or None for the default store.

    Returns:
        How many different prompts can be read.

    Raises:
        DatasetNotFoundError, DatasetAccessError: there is no such dataset, or it cannot be reached.
        DatasetFormatError: it is damaged, or says what it may not; NewerFormatError: it needs a later version.
        DatasetLayerError: a layer that it does not have.
        NotCachedError: a prompt that it does not have.
        OptionError: other tensors than it has; a store whose limit is 0.
        ValueOverflowError: with `materialize`, a value that does not fit the dtype of the store.
        DiskFullError, StoreAccessError: the store cannot take it.
    """
    where = store_at(store)
    return pull(
        where, repo_id, tensors=tensors, layers=layers, target_prompts=target_prompts, overwrite=overwrite, token=token,
        materialize=materialize, num_workers=num_workers, show=None if show_progress else False,
        trust_names=trust_names, revision=revision,
    )[1]  # fmt: skip


def pull(
    where: Store,
    repo_id: str | os.PathLike[str],
    *,
    tensors: Sequence[str] | str | None,
    layers: int | Sequence[int] | str | None,
    target_prompts: Sequence[Any] | str | None,
    overwrite: bool,
    token: str | bool | None,
    materialize: bool,
    num_workers: int,
    show: bool | None,
    trust_names: bool,
    revision: str | None,
) -> tuple[SpaceInfo, int]:
    """What `pull_dataset` does: the space that the dataset is in, and how many prompts can be read."""
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
        raise OptionError(f"num_workers is {num_workers!r}: expected a whole number, 0 for as many as suit.")
    if not isinstance(trust_names, bool):
        raise OptionError(
            f"trust_names is {trust_names!r:.80}: expected True, for whoever asks for a model of the name that the "
            "dataset claims, or False. UnifiedCache(model, trust_names='name') says which of these names a model has."
        )
    if where.limit.value == 0:
        raise OptionError("the limit of the store is 0, so that it keeps nothing: raise it (set_cache_limit) and pull.")
    source = open_source(repo_id, token=token, revision=revision)
    source.concurrency = num_workers or source.concurrency
    before = state_of_index(source)
    index = Index(source, Spill(where.index_dir))
    dataset = Dataset(index)
    columns = dataset.offered.choose(tensors, layers)
    rows = Different(index).first_rows() if target_prompts is None else _unique(find_prompts(index, target_prompts))
    _check_size(source.name, len(columns), len(rows))
    info = _space(index, dataset.offered)
    lengths = _lengths(index, dataset)
    context = str(info.label["pulled"]["context"])
    taken = Taken(pieces(index, rows, lengths, context), index.spill)
    # What reading the index took would be kept beside what storing takes.
    return_free_memory()
    for column in columns:
        # What lies outside the shards is refused before anything is stored.
        if column.group is not None:
            dataset.runs(column.group, column.layout)
    if state_of_index(source) != before:
        raise DatasetFormatError(f"{source.name} was changed while it was read: pull it again.")
    where.check_writable()
    where.open_space(info.identity, info.label)
    with exclusive(where.index_dir, f"pull-{info.space}", wait_s=_WAIT_S):
        if overwrite:
            _forget(where, info)
            where.open_space(info.identity, info.label)
        check_unchanged(info, source, dataset.offered)
        for piece in taken.together(_AT_ONCE):
            _register(where, info, columns, piece, trust_names=trust_names)
            return_free_memory()
    remember(info.space, dataset, token)
    if materialize:
        _materialize(where, info, dataset, columns, taken, rows, show=show)
    where.merge(info)
    return info, len(taken)


def _unique(rows: Ints | None) -> Ints:
    assert rows is not None
    return np.unique(rows)


def _check_size(name: str, sites: int, prompts: int) -> None:
    """Refuse to write much for what may be next to nothing: a small index can promise many prompts and layers."""
    if sites * prompts * 4 > _MOST_BYTES:
        raise OptionError(
            f"{name} promises {sites:,} tensors of {prompts:,} prompts: to say where these are takes more than "
            f"{_MOST_BYTES:,} bytes. Choose some of them with layers=, tensors= or target_prompts=."
        )


def _lengths(index: Index, dataset: Dataset) -> Ints | None:
    """How many tokens each prompt has, where the dataset has full sequences: of all its tensors the same."""
    found: Ints | None = None
    for column in {c.group.name: c for c in dataset.offered.columns.values() if c.group is not None}.values():
        lengths = lengths_of(index, column.group)
        if lengths is not None and int(lengths.sum()) > _MANY_TOKENS:
            # So many are taken for what the files hold, not for what the index promises.
            dataset.verify(column)
        if lengths is not None and found is not None and not np.array_equal(found, lengths):
            raise DatasetFormatError(f"{index.source.name}: {column.site} has other numbers of tokens than others.")
        found = found if lengths is None else lengths
    return found


def _space(index: Index, offered: Offered) -> SpaceInfo:
    """The space of a dataset at this commit, and what is said of it there."""
    source, described = index.source, index.description
    commit = fingerprint(source, offered) if isinstance(source, Folder) else source.commit
    if not commit:
        raise DatasetAccessError(f"the Hub does not say which commit of {source.name} it gave: it cannot be pulled.")
    space = index.ours.get("space")
    own: Mapping[str, Any] = space if isinstance(space, Mapping) else {}
    given, label, identity = own.get("space"), own.get("label"), own.get("identity")
    label = label if isinstance(label, Mapping) else {}
    claims = given if isinstance(identity, Mapping) and _is_id(given, identity) else None
    if own and claims is None:
        log.warning("%s does not say of which model it is in a way that can be checked: its name is all", source.name)
    context = index.ours.get("text_context")
    name = _plain(label.get("model_name") if claims else None) or _plain(described.model_name) or source.name
    full = {
        "model_name": name, "source": "external", "pulled": {"dataset": source.name, "commit": commit},
    }  # fmt: skip
    said = {
        "claims": claims, "forms": offered.forms, "format": described.version, "as_it_is": _as_it_is(identity),
        "context": context if claims and isinstance(context, str) and _plain(context) else CONTEXT,
    }  # fmt: skip
    shown = {"revision": _plain(described.revision), "dtype": _plain(label.get("dtype"))}
    return SpaceInfo(space_id(full), full, {"model_name": name, **shown, "pulled": said})


def _as_it_is(identity: Any) -> bool:
    """Whether a dataset holds what the model itself gives, as far as it says: no edits, no prompts it continued."""
    return not isinstance(identity, Mapping) or not (identity.get("edits") or identity.get("generate"))


def _is_id(given: Any, identity: Mapping[str, Any]) -> bool:
    try:
        return bool(given == space_id(identity))
    except (ValueError, TypeError, RecursionError):
        return False


def _plain(text: Any) -> str | None:
    """A text that may be shown; None for anything else."""
    return text if isinstance(text, str) and 0 < len(text) <= _LONGEST_NAME and text.isprintable() else None


def _forget(store: Store, info: SpaceInfo) -> None:
    """Drop what was pulled of this dataset before."""
    dataset = info.identity["pulled"]["dataset"]
    for other in store.spaces():
        if other.pulled and other.identity["pulled"]["dataset"] == dataset:
            store.clear(other.space)


def _register(store: Store, info: SpaceInfo, columns: Sequence[Column], piece: Piece, *, trust_names: bool) -> None:
    """Store where prompts are, and what the index says of them, as far as that is not there."""
    table = piece.table
    sites = [PROMPT, *([TRUSTED] if trust_names else [])]
    sites += [f"{PULLED}.{column.site}" for column in columns if column.group is not None]
    results = piece.results if any(column.group is None for column in columns) else []
    of_index = sorted({site for records in results for site in records.data})
    # They are of some prompts only, and become readable with their registration.
    keys = {site: [r.prompts.token_key for r in results if site in r.data] for site in of_index}
    has = np.zeros((len(table), 0), bool)
    for site in of_index:
        has = np.column_stack([has, is_member(table.token_key, np.concatenate(keys[site]))])
    kinds, which = np.unique(has, axis=0, return_inverse=True)
    for number, kind in enumerate(kinds):
        members = np.flatnonzero(which.ravel() == number)
        named = [f"{PULLED}.{site}" for site, there in zip(of_index, kind.tolist(), strict=True) if there]
        named = [*sites, *named]
        new = members[~found_as_given(store, info, table.select(members), named, PULLED).all(axis=1)]
        if not len(new):
            continue
        chosen = table if len(new) == len(table) else table.select(new)
        for parts in _alike([*piece.said, *results], None if chosen is table else chosen.token_key):
            store.append(info.space, parts)
        own = piece.rows[new].astype(np.int32)[:, None]
        made = Records.pooled(chosen, PULLED, dict.fromkeys(named, own))
        made.screened = True
        # Last, so that whoever finds the prompts finds what is said of them.
        store.append(info.space, made)


def _alike(every: Sequence[Records], keys: npt.NDArray[np.uint8] | None) -> list[list[Records]]:
    """What of `every` is of prompts with these keys (None: all), those together that can share a segment."""
    found: dict[tuple[Any, ...], list[Records]] = {}
    for records in every:
        part = records if keys is None else records.select(is_member(records.prompts.token_key, keys))
        if len(part.prompts):
            found.setdefault(part.signature, []).append(part)
    return list(found.values())


def _materialize(
    store: Store,
    info: SpaceInfo,
    dataset: Dataset,
    columns: Sequence[Column],
    taken: Taken,
    rows: Ints,
    *,
    show: bool | None,
) -> None:
    """Fetch everything, tensor by tensor, from the front of its files to their end."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        if column.group is not None:
            groups.setdefault(column.group.name, []).append(column)
    total = len(groups) * len(taken)
    with (
        # One for all of it: what the C library has given to the threads of one stays taken when they end.
        store.writer(info.space, max_bytes=SLICE_BYTES) as writer,
        progress(total, "pull", unit="row", show=show) as bar,
    ):
        for some in groups.values():
            layout, sites = some[0].layout, [column.site for column in some]
            for members in dataset.in_order(rows, some, layout, _STEP_BYTES):
                fetch(store, info, taken.select(members), sites, layout, told=bar.update, writer=writer)
                return_free_memory()
