"""A small writer of datasets in every published version of the format, independent of the code that reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

INDEX = "index/train-00000-of-00001.parquet"
VERSIONS = (
    "1.0 pooled", "1.1 pooled", "1.2 pooled", "2.0 pooled",
    "1.0 full", "1.1 full", "1.2 full", "1.2 split", "2.0 split", "2.0 full local", "2.0 full global",
)  # fmt: skip
FULL = tuple(version for version in VERSIONS if "pooled" not in version)


@dataclass
class Made:
    """A dataset: what was put into it, its metadata and index before they were written, and where it is.

    `vectors`: ``[T, L, D]`` of each prompt, in the order of the index. Change `metadata`, `columns` or `files` and
    `write` again to make it another one.
    """

    folder: Path
    version: str
    texts: list[str]
    vectors: list[np.ndarray]
    layers: list[int]
    metadata: dict[str, Any]
    columns: dict[str, Any]
    files: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def hidden(self) -> dict[str, Any]:
        return self.metadata["tensors"]["hidden_layers"]

    def write(self) -> Made:
        (self.folder / "index").mkdir(parents=True, exist_ok=True)
        (self.folder / "tensors").mkdir(exist_ok=True)
        table = pa.table(self.columns)
        if self.version.startswith("2"):
            said = {f"lmprobe:{key}": json.dumps(value) for key, value in self.metadata.items()}
            table = table.replace_schema_metadata(said)
        else:
            (self.folder / "lmprobe_info.json").write_text(json.dumps(self.metadata, indent=2))
        pq.write_table(table, self.folder / INDEX, compression="snappy")
        for name, tensors in self.files.items():
            save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, self.folder / name)
        return self

    def put(self, column: str, row: int, value: Any) -> Made:
        """Another value in one row of a column of the index."""
        values = self.columns[column]
        values = values.to_pylist() if isinstance(values, pa.Array) else list(values)
        values[row] = value
        self.columns[column] = values
        return self.write()

    def expected(self, pooling: str | None = "last_token") -> list[np.ndarray]:
        """What each prompt has: ``[L, D]``, or ``[T, L, D]`` without pooling. Computed in float64."""
        reduce = {
            None: lambda v: v,
            "last_token": lambda v: v[-1],
            "first_token": lambda v: v[0],
            "mean": lambda v: v.astype(np.float64).mean(0),
            "max": lambda v: v.max(0),
            "min": lambda v: v.min(0),
        }[pooling]
        return [reduce(vector).astype(np.float32) for vector in self.vectors]


def make(
    folder: Path,
    version: str = "2.0 pooled",
    *,
    n: int = 11,
    layers: tuple[int, ...] = (0, 2, 5),
    dim: int = 6,
    per_shard: int = 4,
    tokens_per_shard: int = 17,
    labels: list[Any] | None = None,
    dtype: Any = np.float32,
    extra: dict[str, Any] | None = None,
    k: int = 3,
    seed: int = 0,
    longest: int = 7,
) -> Made:
    """A dataset of random vectors; its first prompt has one token."""
    random = np.random.default_rng(seed)
    number, *kind = version.split()
    lengths = [1, *random.integers(1, longest + 1, n - 1).tolist()]
    vectors = [random.standard_normal((t, len(layers), dim)).astype(dtype) for t in lengths]
    texts = [f"prompt {i}: größe" for i in range(n)]
    tensors: dict[str, Any] = {}
    columns: dict[str, Any] = {"text": texts}
    if labels is not None:
        columns["label"] = labels
    made = Made(folder, number, texts, vectors, list(layers), {"format_version": number, "tensors": tensors}, columns)
    made.metadata |= {"model": {"name": "org/model", "revision": None}, "num_prompts": n, "prompt_ordering": "random"}
    shared = {"type": "hidden", "layers": list(layers), "dim": dim, "dtype": "float32"}
    if number != "1.0":
        shared["layout"] = "per_layer"
    if number == "2.0":
        shared["file_pattern"] = "tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors"
        shared["key_pattern"] = "hidden.layer_{layer}"

    def put(shard: int, rows: np.ndarray) -> dict[str, Any]:
        """The files of a shard `rows` ``[R, L, D]``; what is said of its file."""
        if number == "1.0":
            name = f"tensors/hidden_layers_{shard:03d}.safetensors"
            made.files[name] = {f"hidden.layer_{layer}": rows[:, i] for i, layer in enumerate(layers)}
            return {"file": name}
        for i, layer in enumerate(layers):
            if len(rows):
                made.files[f"tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors"] = {
                    f"hidden.layer_{layer}": rows[:, i]
                }
        return {}

    groups = [list(range(n))[i : i + per_shard] for i in range(0, n, per_shard)]
    last = np.stack([vector[-1] for vector in vectors])
    shards: list[dict[str, Any]] = []
    if "pooled" in kind:
        shards = [{**put(s, last[group]), "num_prompts": len(group)} for s, group in enumerate(groups)]
        tensors["hidden_layers"] = {**shared, "shards": shards, "storage": "pooled", "pooling": "last_token"}
        columns["num_tokens"] = pa.array([None] * n, pa.int32())
        place = [(s, i) for s, group in enumerate(groups) for i in range(len(group))]
    elif "split" in kind:
        shards = [
            {**put(s, last[group]), "num_prompts": len(group), "num_tokens": len(group)}
            for s, group in enumerate(groups)
        ]
        place = [(s, i) for s, group in enumerate(groups) for i in range(len(group))]
        ids: list[list[int]] = []
        offsets: list[list[int]] = []
        for group in _greedy([t - 1 for t in lengths], tokens_per_shard):
            rest = [vectors[i][:-1] for i in group]
            at = 0
            for i in group:
                count = lengths[i] - 1
                ids.append([len(shards)] * count + [place[i][0]])
                offsets.append([*range(at, at + count), place[i][1]])
                at += count
            shards.append({**put(len(shards), np.concatenate(rest)), "num_prompts": len(group), "num_tokens": at})
        tensors["hidden_layers"] = {
            **shared, "shards": shards, "storage": "full_sequence", "last_token_shards": len(groups),
        }  # fmt: skip
        columns |= {"num_tokens": pa.array(lengths, pa.int32()), "token_offset": [row for _, row in place]}
        columns |= {"token_shard_ids": ids, "token_shard_offsets": offsets}
    else:
        is_local = number in ("1.0", "1.1") or "local" in kind
        place, starts, before = [], [], 0
        for s, group in enumerate(_greedy(lengths, tokens_per_shard)):
            at = 0
            for i, prompt in enumerate(group):
                place.append((s, i))
                starts.append(at if is_local else before + at)
                at += lengths[prompt]
            rows = np.concatenate([vectors[i] for i in group])
            shards.append({**put(s, rows), "num_prompts": len(group), "num_tokens": at})
            before += at
        tensors["hidden_layers"] = {**shared, "shards": shards, "storage": "full_sequence"}
        columns |= {"num_tokens": pa.array(lengths, pa.int32()), "token_offset": starts}
    columns["shard_index"] = pa.array([s for s, _ in place], pa.int32())
    columns["row_offset"] = pa.array([row for _, row in place], pa.int32())
    if k:
        made.files["tensors/logits_topk_000.safetensors"] = {
            "logits_topk.values": np.sort(random.standard_normal((n, k)).astype(np.float32))[:, ::-1],
            "logits_topk.indices": random.integers(0, 99, (n, k)).astype(np.int32),
        }
        tensors["logits_topk"] = {
            "type": "logits_topk", "k": k, "dtype": "float32", "pooling": "last_token", "row_bytes": k * 12,
            "shards": [{"file": "tensors/logits_topk_000.safetensors", "num_prompts": n}],
        }  # fmt: skip
        columns["shard_index_logits"] = pa.array([0] * n, pa.int32())
        columns["row_offset_logits"] = pa.array(range(n), pa.int32())
    columns |= extra or {}
    return made.write()


def _greedy(sizes: list[int], most: int) -> list[list[int]]:
    """Prompts in order, in groups that hold no more than `most` together where they can."""
    groups: list[list[int]] = [[]]
    for i, size in enumerate(sizes):
        if groups[-1] and sum(sizes[j] for j in groups[-1]) + size > most:
            groups.append([])
        groups[-1].append(i)
    return groups
