"""`load_activations` and `load_activation_dataset`: a dataset in memory, without its model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.capture.positions import pool_numpy
from actcache.config import user_cache
from actcache.errors import OptionError, did_you_mean
from actcache.model.sites import POOLINGS
from actcache.progress import progress
from actcache.share.format import TensorGroup
from actcache.share.index import Index
from actcache.share.layers import is_every, numbers_of
from actcache.share.prompts import find_prompts, label_values
from actcache.share.rows import Ints, Runs, every_row, one_row
from actcache.share.shards import ShardReader
from actcache.share.source import open_source
from actcache.store.spill import Spill

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Pooling = str | Callable[[Any], Any] | None
Layers = Sequence[int | None]

PERPLEXITY = "perplexity"
_PERPLEXITIES = ("perplexity_mean", "perplexity_min", "perplexity_max")
_BATCH_BYTES = 8 << 20
_LARGE = 256 << 20


def load_activations(
    dataset: str | os.PathLike[str],
    *,
    prompts: Sequence[Any] | str | None = None,
    layers: int | Sequence[int] | str | None = None,
    pooling: Pooling = "last_token",
    token: str | bool | None = None,
    as_dict: bool = True,
    return_labels: bool = False,
    show_progress: bool = True,
    site: str = "resid_post",
    revision: str | None = None,
) -> Any:
    """Activations of a dataset of the Hub (``"org/name"``) or in a folder (a `Path`, or ``"./folder"``).

    Only the layers and prompts asked for are transferred, and nothing is left on disk.

    Args:
        prompts: texts (token ids and chats where the dataset has such); their rows come in this order. None: all, in
            the order of the dataset's index.
        layers: block numbers; None or "all": every layer that the dataset has. Negative numbers would count from the
            end of the model, of which a dataset does not say how many layers it has.
        pooling: how the tokens of a prompt become one vector, computed here where the dataset has full sequences:
            "last_token", "first_token", "mean", "max", "min", or a function of an array ``[T, D]``. None: every token.
        token: a token of the Hub for a private dataset; None: the one that is logged in, False: none.
        return_labels: labels too.
        show_progress: a bar, where standard error is a terminal.
        site: which site, such as "attn_out", of a dataset that has others than "resid_post". One that is of no layer is
            under None.
        revision: a branch, a tag or a commit of the repository.

    Returns:
        ``{layer: float32 array [B, D]}`` with layers in the order asked, or with ``as_dict=False`` one array
        ``[B, L, D]``. With ``pooling=None`` lists of `B` arrays ``[T, D]`` or ``[T, L, D]``. With `return_labels` a
        pair of that and the labels ``[B]``: int64 or str where every prompt has one, else objects with None where
        there is none; None where no prompt has any.

    Raises:
        DatasetNotFoundError, DatasetAccessError: there is no such dataset, or it cannot be reached.
        DatasetFormatError: it is damaged, or says what it may not; NewerFormatError: it needs a later version.
        DatasetLayerError: a layer that it does not have.
        NotCachedError: a prompt that it does not have.
        OptionError: a pooling that cannot be had from what is stored, and other wrong arguments.
    """
    index = Index(open_source(dataset, token=token, revision=revision), _spill())
    group = _site(index, site)
    chosen = _layers(group, layers, index.source.name)
    _check_pooling(pooling, group, index.source.name)
    selection = find_prompts(index, prompts)
    labels = label_values(index, selection) if return_labels else None
    single = group.pooling is not None or pooling in ("last_token", "first_token")
    runs = one_row(index, group, first=pooling == "first_token") if single else every_row(index, group)
    if selection is not None:
        runs = runs.take(selection)
    rows = int(runs.length.sum(dtype=np.int64))
    with progress(rows * len(chosen), "load", unit="row", show=None if show_progress else False) as bar:
        reader = ShardReader(index.source, group, notice=bar.update, checksums=index.checksums)
        width = _width(reader, chosen, runs)
        if single or pooling is None:
            values = _gathered(reader, chosen, runs, width, as_dict=as_dict, pooled=single)
        else:
            values = _reduced(reader, chosen, runs, width, pooling, as_dict=as_dict)
    return (values, labels) if return_labels else values


def load_activation_dataset(
    repo_id: str | os.PathLike[str],
    *,
    tensors: Sequence[str] | str | None = None,
    layers: int | Sequence[int] | str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a dataset as they are stored, and what its metadata says.

    Args:
        tensors: some of "hidden_layers", "logits_topk", "router_logits", "perplexity" and names of sites, as far as the
            dataset has them; None: all.
        layers: block numbers; None or "all": every layer.

    Returns:
        ``{key: tensor [rows, D]}`` with the keys of the files (``hidden.layer_5``, ``logits_topk.values``,
        ``logits_topk.indices``, ``router.layer_5``) in their dtypes, and the metadata as a dict. Rows are those of all
        shards one after the other: the prompts in the order of the index; of full sequences the tokens of each prompt,
        or where last tokens are stored apart, those of all prompts and then their other tokens. ``perplexity`` float32
        ``[B, 3]`` holds the mean, min and max of each prompt, NaN where there is none.

    Raises what `load_activations` does, and `OptionError` for tensors that the dataset does not have.
    """
    from actcache.store.tensors import to_tensor

    index = Index(open_source(repo_id, token=token, revision=revision), _spill())
    groups = index.description.tensors
    known = [*groups, *([PERPLEXITY] if set(_PERPLEXITIES) <= set(index.columns) else [])]
    wanted = known if tensors is None else [tensors] if isinstance(tensors, str) else list(tensors)
    for name in wanted:
        if name not in known:
            hint = did_you_mean(name, known) if isinstance(name, str) else ""
            raise OptionError(f"{index.source.name} has no tensors {name!r}: it has {', '.join(known)}.{hint}")
    found: dict[str, torch.Tensor] = {}
    for name in wanted:
        if name == PERPLEXITY:
            found[PERPLEXITY] = to_tensor(_perplexity(index))
            continue
        group = groups[name]
        chosen = _layers(group, layers if group.layers else None, index.source.name)
        found.update({key: to_tensor(array) for key, array in _all_rows(index, group, chosen).items()})
    return found, dict(index.description.metadata)


def _spill() -> Spill:
    """Where what is known of each prompt lies: in the folder of what may be deleted, in memory without one."""
    try:
        return Spill(user_cache())
    except RuntimeError:
        return Spill(None)


def _check_pooling(pooling: Any, group: TensorGroup, where: str) -> None:
    """Refuse what cannot be had of a dataset; one that was pooled elsewhere may call it by any name."""
    if group.pooling is not None and pooling == group.pooling:
        return
    if pooling is not None and not callable(pooling) and pooling not in POOLINGS:
        known = list(dict.fromkeys([*POOLINGS, *([group.pooling] if group.pooling else [])]))
        hint = did_you_mean(pooling, known) if isinstance(pooling, str) else ""
        raise OptionError(
            f"unknown pooling {pooling!r:.80}: expected one of {', '.join(map(repr, known))}, a function or None.{hint}"
        )
    if group.pooling is not None:
        other = "to leave them all" if pooling is None else repr(pooling)
        raise OptionError(
            f"{where} holds one vector for each prompt, pooled with {group.pooling!r}; {other} needs those of every "
            f"token: choose {group.pooling!r}."
        )


def _site(index: Index, site: str) -> TensorGroup:
    sites = {g.site: g for g in index.description.tensors.values() if g.key_pattern}
    if site not in sites:
        raise OptionError(
            f"{index.source.name} has no site {site!r}: it has {', '.join(sites) or 'none'}."
            f"{did_you_mean(str(site), sites)}"
        )
    return sites[site]


def _layers(group: TensorGroup, layers: int | Sequence[int] | str | None, where: str) -> Layers:
    """Layers of the dataset, in the order asked; None stands for a site that is of no layer."""
    if is_every(layers):
        return list(group.layers) or [None]
    if not group.layers:
        raise OptionError(f"{group.site} of {where} is of no layer: leave layers out.")
    asked = numbers_of(layers, group.layers, where, f" of {group.site}")
    if len(set(asked)) != len(asked):
        raise OptionError(f"layers is {layers!r}: expected different block numbers.")
    return asked


def _width(reader: ShardReader, layers: Layers, runs: Runs) -> int:
    """Numbers in a row. Before much memory is taken every file is looked at that will be read."""
    group, rows = reader.group, int(runs.length.sum())
    first = next((number for number, shard in enumerate(group.shards) if shard.rows), None)
    width = group.dim
    if width is None:
        width = 1 if first is None else reader.placed(first, layers[0], group.key(layers[0])).width
    if rows * len(layers) * width * 4 > _LARGE:
        reader.verify(runs.shards(), [(layer, group.key(layer)) for layer in layers])
    return width


def _gathered(reader: ShardReader, layers: Layers, runs: Runs, width: int, *, as_dict: bool, pooled: bool) -> Any:
    """Rows as they are: one for each prompt, or lists of all of them."""
    rows = int(runs.length.sum())
    arrays, whole = _room(rows, layers, width, as_dict=as_dict)
    reader.read(runs, [(layer, reader.group.key(layer), arrays[layer]) for layer in layers])
    if pooled:
        return arrays if as_dict else whole
    spans = list(pairwise(runs.row_offset.tolist()))
    if not as_dict:
        return [whole[a:b] for a, b in spans]
    return {layer: [array[a:b] for a, b in spans] for layer, array in arrays.items()}


def _room(rows: int, layers: Layers, width: int, *, as_dict: bool) -> tuple[dict[int | None, Array], Array]:
    """An array ``[rows, width]`` for each layer, and where it is not `as_dict` the one that they are parts of."""
    if as_dict:
        return {layer: np.empty((rows, width), np.float32) for layer in layers}, np.empty(0)
    whole = np.empty((rows, len(layers), width), np.float32)
    return {layer: whole[:, i] for i, layer in enumerate(layers)}, whole


def _reduced(reader: ShardReader, layers: Layers, runs: Runs, width: int, pooling: Pooling, *, as_dict: bool) -> Any:
    """One vector for each prompt, computed from all its tokens, some prompts at a time."""
    arrays, whole = _room(len(runs), layers, width, as_dict=as_dict)
    batches = _batches(runs, width)

    def pool(layer: int | None, prompts: Ints) -> None:
        part = runs.take(prompts)
        offset = part.row_offset
        rows = np.empty((int(offset[-1]), width), np.float32)
        reader.read_here(part, layer, reader.group.key(layer), rows)
        for number, prompt in enumerate(prompts.tolist()):
            own = rows[offset[number] : offset[number + 1]]
            arrays[layer][prompt] = pool_numpy(own, pooling) if isinstance(pooling, str) else _called(pooling, own)

    reader.run([partial(pool, layer, some) for layer in layers for some in batches])
    return arrays if as_dict else whole


def _called(pooling: Any, rows: Array) -> Array:
    vector = np.asarray(pooling(rows))
    if vector.shape != rows.shape[1:]:
        raise OptionError(
            f"pooling function returned the shape {list(vector.shape)} for rows {list(rows.shape)}: "
            f"expected [{rows.shape[1]}]."
        )
    return vector


def _batches(runs: Runs, width: int) -> list[Ints]:
    """Prompts in the order of their files, as many together as fit a batch, at least one."""
    lengths = np.diff(runs.row_offset)
    first = runs.offset[:-1]
    order = np.lexsort((runs.start[first], runs.shard[first])) if len(runs) else np.zeros(0, np.int64)
    most = max(1, _BATCH_BYTES // (4 * width))
    filled = (np.cumsum(lengths[order]) - 1) // most
    return [part for part in np.split(order, np.flatnonzero(np.diff(filled)) + 1) if len(part)]


def _all_rows(index: Index, group: TensorGroup, layers: Layers) -> dict[str, Array]:
    """Every tensor of a kind, shards one after the other."""
    reader = ShardReader(index.source, group, checked=False, checksums=index.checksums)
    filled = [number for number, shard in enumerate(group.shards) if shard.rows]
    rows = np.array([group.shards[number].rows for number in filled], np.int64)
    runs = Runs.of_each(np.array(filled, np.int64), np.zeros_like(rows), rows)
    keys: dict[int | None, list[str]] = {}
    for layer in layers:
        named = group.key(layer) if group.key_pattern else None
        keys[layer] = [named] if named else reader.keys(filled[0], layer) if filled else []
    if not filled:
        return {key: np.empty((0, group.dim or 0), np.float32) for layer in layers for key in keys[layer]}
    places = {(layer, key): reader.placed(filled[0], layer, key) for layer in layers for key in keys[layer]}
    # Numbers as large as a dataset may say add up to more than 64 bits.
    if sum(rows.tolist()) * sum(place.row_bytes for place in places.values()) > _LARGE:
        reader.verify(filled, places)
    arrays = {at: np.empty((int(rows.sum()), place.width), place.dtype) for at, place in places.items()}
    reader.read(runs, [(layer, key, array) for (layer, key), array in arrays.items()])
    return {key: array for (_, key), array in arrays.items()}


def _perplexity(index: Index) -> Array:
    columns = index.read(_PERPLEXITIES)
    return np.stack([np.asarray(columns[name].to_numpy(), np.float32) for name in _PERPLEXITIES], axis=1)
