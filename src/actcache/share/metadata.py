"""`fetch_dataset_metadata`: what a dataset holds, from its index alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actcache.share.columns import is_fixed
from actcache.share.format import HIDDEN
from actcache.share.index import Index
from actcache.share.index_prompts import PERPLEXITIES
from actcache.share.prompts import labels_of, prompts_of
from actcache.share.source import open_source
from actcache.share.unchanged import files_of
from actcache.share.values import is_plain, values_of


@dataclass(frozen=True)
class DatasetMetadata:
    """What a dataset holds.

    Attributes:
        model_name: the model as its maker called it, None where that is not said; `revision`: its commit on the Hub.
        available_layers: layers of the residual stream, in ascending order.
        num_prompts: how many prompts there are.
        format_version: "1.0", "1.1", "1.2" or "2.0".
        tensor_descriptors: what is said of each kind of tensors, by name.
        prompts: in the order in which `load_activations` returns rows: texts, token ids or chats, as they were given.
        labels: the label of each prompt, None where it has none; None where the dataset has no labels.
        metadata: other columns of the dataset by name, one value for each prompt: numbers, truth values, texts and
            lists of these.
        provenance: what made the dataset, as it says itself.
        dataset: where it is; `commit`: the commit of the repository that was read, None for a folder.
        has_perplexity: whether its index has the perplexity of prompts.
        checksums: what is compared with what is read: "blocks" of 64 KiB, "files" that are read whole, or "some" of the
            files, of others nothing being known; None: nothing.
    """

    model_name: str | None
    available_layers: list[int]
    num_prompts: int
    format_version: str
    tensor_descriptors: Mapping[str, Mapping[str, Any]]
    prompts: list[Any] = field(repr=False)
    labels: list[int | str | None] | None = field(default=None, repr=False)
    metadata: Mapping[str, list[Any]] = field(default_factory=dict, repr=False)
    revision: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    dataset: str = ""
    commit: str | None = None
    has_perplexity: bool = False
    checksums: str | None = None


def fetch_dataset_metadata(
    repo_id: str | os.PathLike[str], *, token: str | bool | None = None, revision: str | None = None
) -> DatasetMetadata:
    """What a dataset of the Hub or in a folder holds. No activations are transferred, and of a large index only the
    columns that are returned here.

    Args:
        token: a token of the Hub for a private dataset; None: the one that is logged in, False: none.
        revision: a branch, a tag or a commit of the repository.

    Raises:
        DatasetNotFoundError, DatasetAccessError: there is no such dataset, or it cannot be reached.
        DatasetFormatError: it is damaged, or says what it may not; NewerFormatError: it needs a later version.
    """
    index = Index(open_source(repo_id, token=token, revision=revision))
    found = index.description
    hidden = found.tensors.get(HIDDEN)
    others = [name for name in index.columns if not is_fixed(name)]
    provenance = found.metadata.get("provenance")
    return DatasetMetadata(
        model_name=found.model_name,
        available_layers=sorted(hidden.layers) if hidden else [],
        num_prompts=index.num_rows,
        format_version=found.version,
        tensor_descriptors={name: dict(group.described) for name, group in found.tensors.items()},
        prompts=prompts_of(index),
        labels=labels_of(index),
        metadata={name: values_of(index, name) for name in others if is_plain(index.kind(name))},
        revision=found.revision,
        provenance=provenance if isinstance(provenance, dict) else {},
        dataset=index.source.name,
        commit=index.source.commit,
        has_perplexity=set(PERPLEXITIES) <= set(index.columns),
        checksums=index.checksums.kind_of(path for g in found.tensors.values() for _, _, path in files_of(g)),
    )
