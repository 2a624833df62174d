"""The page of a dataset: what its index says, and norms of some of its prompts."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import OptionError
from actcache.report.contents import Contents, Histogram, Layered, Variant
from actcache.report.of_store import lens_of
from actcache.share.format import HIDDEN, LOGITS, TensorGroup
from actcache.share.index import Index
from actcache.share.load import load_activations
from actcache.share.metadata import DatasetMetadata, fetch_dataset_metadata
from actcache.share.pull import pull
from actcache.share.source import open_source
from actcache.store.store import Store
from actcache.store.summaries import SiteSummary, StoredAs
from actcache.wording import size

_SAMPLE = 64
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dataset_contents(
    dataset: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    prompts: Sequence[Any] = (),
    model: str | os.PathLike[str] | None = None,
) -> Contents:
    """What a dataset of the Hub or in a folder holds. The index is read, and the rows of up to 64 prompts, spread over
    all of them, whose mean norms are shown. With `prompts` also the logit lens of these, by the dataset's model, or by
    `model` where that goes by another name here: of the dataset's vectors, and computed where it has none.

    Raises what `actcache.load_activations` and, with `prompts`, `UnifiedCache.logit_lens` do; `OptionError` for
    `prompts` of a dataset that does not name its model.
    """
    found = fetch_dataset_metadata(dataset, revision=revision, token=token)
    # The same commit, whatever is pushed meanwhile.
    revision = found.commit or revision
    index = Index(open_source(dataset, token=token, revision=revision))
    if prompts and (model or found.model_name) is None:
        raise OptionError(f"{found.dataset} does not say which model it is of: name the model, too (--model).")
    groups = [group for group in index.description.tensors.values() if group.dim and group.name != LOGITS]
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
    summaries += [_logits(group) for group in index.description.tensors.values() if group.name == LOGITS]
    variant = Variant(
        found.model_name or "a model that is not named",
        "",
        {
            "size": size(sum(s.size_bytes for s in summaries)),
            "stored as": ", ".join(sorted({str(group.described.get("dtype", "not said")) for group in groups})),
        },
        [
            Layered(_called(group), list(group.layers), [float(_bytes(group))] * len(group.layers))
            for group in groups
            if group.layers and _bytes(group)
        ],
        [
            Layered(_called(group), list(group.layers), [norms[group.name][layer] for layer in group.layers])
            for group in groups
            if group.layers and chosen
        ],
        summaries,
        lengths,
        [],
        [],
    )
    notes = (
        [f"Norms are means over {len(chosen)} of {every:,} prompts; all else is what the index says."] if chosen else []
    )
    notes.append("A dataset tells neither what storing its vectors has changed, nor when prompts were read.")
    lenses = [_lens(dataset, found, prompts, model, token)] if prompts else []
    shown = {name: value for name, value in facts.items() if value}
    return Contents(found.dataset, f"dataset {found.dataset}", shown, [variant], notes, lenses)


def _lens(
    dataset: str | os.PathLike[str],
    found: DatasetMetadata,
    prompts: Sequence[Any],
    model: str | os.PathLike[str] | None,
    token: str | bool | None,
) -> tuple[str, str]:
    """The page of a logit lens. The dataset answers in a store of its own, which is gone afterwards: what is stored for
    the model takes no part."""
    held = [prompt for prompt in prompts if prompt in found.prompts] if found.available_layers else []
    with (
        tempfile.TemporaryDirectory(prefix="actcache-report-") as folder,
        closing(Store(Path(folder, "store"), index_dir=Path(folder, "index"))) as store,
    ):
        if held:
            pull(
                store, dataset, tensors=[HIDDEN], layers=None, target_prompts=held, overwrite=False, token=token,
                materialize=False, num_workers=0, show=False, trust_names=True, revision=found.commit,
            )  # fmt: skip
        return lens_of(
            model or found.model_name, store, prompts, revision=None if model else found.revision, trust_names=True
        )


def _called(group: TensorGroup) -> str:
    return group.site if group.pooling is None else f"{group.site}, {group.pooling}"


def _norms(
    dataset: str | os.PathLike[str],
    group: TensorGroup,
    prompts: Sequence[Any],
    revision: str | None,
    token: str | bool | None,
) -> dict[int | None, float]:
    """The mean norm of a row, by layer; None is that of a site that is of no layer."""
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


def _summaries(group: TensorGroup, norms: Mapping[int | None, float]) -> list[SiteSummary]:
    layout = group.pooling or "tokens"
    dtype = group.described.get("dtype")
    unknown = math.nan
    stored = [StoredAs(dtype, _rows(group), unknown, unknown, unknown, unknown)] if isinstance(dtype, str) else []
    layers = group.layers or (None,)
    return [
        SiteSummary(
            layout,
            group.site if layer is None else f"{group.site}.{layer}",
            _rows(group),
            group.dim or 0,
            norms.get(layer),
            None,
            None,
            _bytes(group),
            stored,
        )
        for layer in layers
    ]


def _logits(group: TensorGroup) -> SiteSummary:
    """The largest logits: for each row as many values as token ids."""
    width, row_bytes = group.described.get("k"), group.described.get("row_bytes")
    numbers = [number if isinstance(number, int) else 0 for number in (width, row_bytes)]
    rows = _rows(group)
    return SiteSummary(group.pooling or "tokens", LOGITS, rows, numbers[0], None, None, None, rows * numbers[1], [])


def _lengths(index: Index) -> list[int]:
    if "num_tokens" not in index.columns:
        return []
    return [n for n in index.read(["num_tokens"])["num_tokens"].to_pylist() if isinstance(n, int) and n >= 0]


def _labels(found: DatasetMetadata) -> str:
    if found.labels is None:
        return ""
    names = sorted({str(label) for label in found.labels if label is not None})
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
