"""Datasets that eight releases of lmprobe have written, where they are at hand, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from made_datasets import INDEX, pq

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "lmprobe"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the datasets of lmprobe's releases are not here")
WRITTEN = sorted(path.name for path in FIXTURES.glob("dataset_*"))


def plain_read(folder: Path) -> dict[str, np.ndarray]:
    """Each prompt's rows ``[T, L, D]`` by the published recipe, a prompt and a layer at a time."""
    table = pq.read_table(folder / INDEX)
    said = {k.decode(): json.loads(v) for k, v in (table.schema.metadata or {}).items() if k.startswith(b"lmprobe:")}
    info = json.loads((folder / "lmprobe_info.json").read_text()) if not said else {}
    hidden = said["lmprobe:tensors"]["hidden_layers"] if said else info["tensors"]["hidden_layers"]
    found = {}
    for row in table.to_pylist():
        if row.get("token_shard_ids") is not None:
            places = list(zip(row["token_shard_ids"], row["token_shard_offsets"], strict=True))
        elif hidden["storage"] == "pooled":
            places = [(row["shard_index"], row["row_offset"])]
        else:
            start = row["token_offset"]
            if info["format_version"] == "1.2":
                start -= sum(shard["num_tokens"] for shard in hidden["shards"][: row["shard_index"]])
            places = [(row["shard_index"], start + t) for t in range(row["num_tokens"])]
        rows = []
        for shard, at in places:
            layers = []
            for layer in hidden["layers"]:
                name = hidden["shards"][shard].get(
                    "file", f"tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors"
                )
                with safe_open(folder / name, "np") as file:
                    layers.append(file.get_slice(f"hidden.layer_{layer}")[at])
            rows.append(layers)
        found[row["text"]] = np.array(rows)
    return found
