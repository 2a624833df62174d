"""The page of a dataset: what its index says, and norms of some of its prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actcache.report.contents import Contents, Histogram, Layered, Variant
from actcache.share.format import TensorGroup
from actcache.share.index import Index
from actcache.share.load import load_activations
from actcache.share.metadata import DatasetMetadata, fetch_dataset_metadata
from actcache.share.source import open_source
from actcache.store.summaries import SiteSummary
from actcache.wording import size

_SAMPLE = 64
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dataset_contents(
    dataset: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Contents:
    """What a dataset of the Hub or in a folder holds. The index is read, and the rows of up to 64 prompts, spread over
    all of them, whose mean norms are shown.

    Raises what `actcache.load_activations` does.
    """
    found = fetch_dataset_metadata(dataset, revision=revision, token=token)
    index = Index(open_source(dataset, token=token, revision=revision))
    groups = [group for group in index.description.tensors.values() if group.layers and group.dim]
    every = len(found.prompts)
    chosen = [found.prompts[i] for i in np.unique(np.linspace(0, every - 1, min(every, _SAMPLE)).astype(int))]
    norms = {group.name: _norms(dataset, group, chosen, revision, token) for group in groups if chosen}
    lengths = Histogram.of(_lengths(index))
    facts = {
        "format": found.format_version,
        "model": found.model_name or "not said",
        "revision": found.revision or "",
        "commit": found.commit or "",
        "prompts": f"{found.num_prompts:,}",
        "tensors": ", ".join(found.tensor_descriptors),
        "labels": _labels(found),
        "columns": ", ".join(found.metadata),
    }
    summaries = [summary for group in groups for summary in _summaries(group, norms.get(group.name, {}))]
    variant = Variant(
        found.model_name or "a model that is not named",
        "",
        {
            "size": size(sum(s.size_bytes for s in summaries)),
            "stored as": ", ".join(sorted({str(group.described.get("dtype", "not said")) for group in groups})),
        },
        [
            Layered(group.site, list(group.layers), [float(_bytes(group))] * len(group.layers))
            for group in groups
            if _bytes(group)
        ],
        [Layered(group.site, list(norms[group.name]), list(norms[group.name].values())) for group in groups if chosen],
        summaries,
        lengths,
        [],
        [],
    )
    note = f"Norms are means over {len(chosen)} of {every:,} prompts; all else is what the index says."
    shown = {name: value for name, value in facts.items() if value}
    return Contents(found.dataset, f"dataset {found.dataset}", shown, [variant], [note] if chosen else [])


def _norms(
    dataset: str | os.PathLike[str],
    group: TensorGroup,
    prompts: Sequence[Any],
    revision: str | None,
    token: str | bool | None,
) -> dict[int, float]:
    """The mean norm of a row, by layer."""
    rows = load_activations(
        dataset,
        prompts=prompts,
        pooling=group.pooling,
        site=group.site,
        revision=revision,
        token=token,
        show_progress=False,
    )
    flat = {layer: np.concatenate([np.atleast_2d(part) for part in values]) for layer, values in rows.items()}
    return {layer: float(np.linalg.norm(v.astype(np.float64), axis=1).mean()) for layer, v in flat.items()}


def _rows(group: TensorGroup) -> int:
    return sum(shard.rows for shard in group.shards)


def _bytes(group: TensorGroup) -> int:
    """Of one layer."""
    return _rows(group) * (group.dim or 0) * _ITEM_BYTES.get(str(group.described.get("dtype")), 0)


def _summaries(group: TensorGroup, norms: Mapping[int, float]) -> list[SiteSummary]:
    layout = group.pooling or "tokens"
    return [
        SiteSummary(
            layout,
            f"{group.site}.{layer}",
            _rows(group),
            group.dim or 0,
            norms.get(layer),
            None,
            None,
            _bytes(group),
            [],
        )
        for layer in group.layers
    ]


def _lengths(index: Index) -> list[int]:
    if "num_tokens" not in index.columns:
        return []
    return [n for n in index.read(["num_tokens"])["num_tokens"].to_pylist() if isinstance(n, int) and n >= 0]


def _labels(found: DatasetMetadata) -> str:
    if found.labels is None:
        return ""
    names = sorted({str(label) for label in found.labels if label is not None})
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
