"""Stores to share from, and datasets read with nothing but pyarrow and safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16 by its name)
import numpy as np
import pyarrow.parquet as pq
import torch
import xxhash
from safetensors import safe_open

import actcache as ac
from actcache.store.prompts import PromptTable
from actcache.store.records import DERIVED, Records
from actcache.store.store import Store

MODEL = "org/model"
LAYERS = ("resid_post.0", "resid_post.1")
DIM = 8
INDEX = "index/train-00000-of-00001.parquet"
BLOCKS = "tensors/blocks.xxh3"
N = range(20)


def text(i: int) -> str:
    return f"prompt {i} " + "é" * (i % 5)


TEXTS = [text(i) for i in N]


def length(i: int) -> int:
    """Tokens of prompt `i`."""
    return 1 + i % 7


def table(numbers) -> PromptTable:
    return PromptTable.build(
        [[i, *range(length(i) - 1)] for i in numbers], [text(i) for i in numbers], text_context="tokenizer"
    )


def rows(i: int, site: str, *, dim: int = DIM, tokens: int | None = None, seed: int = 0):
    """What prompt `i` has at `site`, float32 ``[T, dim]``: anyone can recompute it."""
    made = np.random.default_rng([seed, i, len(site), ord(site[0]), ord(site[-1])])
    return made.standard_normal((length(i) if tokens is None else tokens, dim)).astype(np.float32)


def new_store(folder: Path, *, dtype: str | None = None) -> Store:
    return Store(folder / "store", index_dir=folder / "index", dtype=dtype)


def new_space(store: Store, *, weights: str = "abc", name: str = MODEL, **identity) -> str:
    return store.open_space(
        {"weights": weights, **identity}, {"model_name": name, "revision": "r1", "dtype": "float32"}
    )


def fill_pooled(store, space, numbers, sites=LAYERS, *, layout="last_token", dim=DIM, dtype="float32", seed=0):
    """One row per prompt: the last of `rows`."""
    data = {s: np.stack([rows(i, s, dim=dim, seed=seed)[-1] for i in numbers]).astype(dtype) for s in sites}
    store.append(space, Records.pooled(table(numbers), layout, data))


def fill_tokens(store, space, numbers, sites=LAYERS, *, dim=DIM, dtype="float32", seed=0):
    """A row per token."""
    data = {s: np.concatenate([rows(i, s, dim=dim, seed=seed) for i in numbers]).astype(dtype) for s in sites}
    store.append(space, Records.tokens(table(numbers), data))


def fill_two_spaces(folder: Path) -> None:
    """Make a store of three segments in two spaces in `folder`."""
    store = new_store(folder)
    first, second = new_space(store), new_space(store, weights="def", name="org/other")
    fill_tokens(store, first, range(20))
    fill_tokens(store, first, range(20, 40))
    fill_tokens(store, second, range(5))
    store.close()


def fill_logits(store, space, numbers, k=3):
    values = np.stack([np.sort(rows(i, "logits", dim=k)[-1])[::-1] for i in numbers])
    indices = np.stack([np.arange(k) + i for i in numbers]).astype(np.int32)
    data = {f"logits.top{k}.values": values, f"logits.top{k}.indices": indices}
    store.append(space, Records.pooled(table(numbers), "last_token", data))


def losses(i: int):
    """Cross-entropies of the tokens after the first, float32 ``[T - 1]``."""
    return np.abs(rows(i, "nll", dim=1)[:-1, 0])


def fill_perplexity(store, space, numbers):
    prompts = table(numbers)
    features = []
    for i in numbers:
        c = losses(i).astype(np.float64)
        features.append(np.exp([c.mean(), c.min(), c.max()]) if len(c) else np.ones(3))
    store.append(space, Records.pooled(prompts, DERIVED, {"perplexity": np.array(features, np.float32)}))
    nll = np.concatenate([np.append(losses(i), 0) for i in numbers]).astype(np.float32)
    store.append(space, Records.tokens(prompts, {"token_nll": nll[:, None]}))


class Published:
    """A dataset in a folder, as somebody who has only its format reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.table = pq.read_table(self.folder / INDEX)
        metadata = self.table.schema.metadata
        self.ours = {k.decode()[9:]: json.loads(v) for k, v in metadata.items() if k.startswith(b"actcache:")}
        self.metadata = {k.decode()[8:]: json.loads(v) for k, v in metadata.items() if k.startswith(b"lmprobe:")}
        self.tensors = self.metadata["tensors"]
        self.index = self.table.to_pylist()
        self.by_text = {row["text"]: row for row in self.index}

    @property
    def files(self) -> set[str]:
        return {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()}

    def tensor(self, group: str, layer: int | None, shard: int):
        told = self.tensors[group]
        path = told["file_pattern"].format(layer=layer, shard=shard)
        with safe_open(self.folder / path, framework="pt") as file:
            return file.get_tensor(told["key_pattern"].format(layer=layer))

    def row(self, prompt: str, group: str = "hidden_layers", layer: int | None = 0):
        """The row of a prompt: pooled, or of its last token."""
        where = self.by_text[prompt]
        return self.tensor(group, layer, where["shard_index"])[where["row_offset"]]

    def tokens(self, prompt: str, group: str = "hidden_layers", layer: int | None = 0):
        """The rows of all tokens of a prompt."""
        where = self.by_text[prompt]
        places = zip(where["token_shard_ids"], where["token_shard_offsets"], strict=True)
        return torch.stack([self.tensor(group, layer, shard)[offset] for shard, offset in places])


def has_right_digests(found: Published) -> bool:
    """Whether the digests of blocks are those of the files that the index lists, and the index names them."""
    data = (found.folder / BLOCKS).read_bytes()

    def digests(content: bytes) -> list[int]:
        return [xxhash.xxh3_64(content[at : at + 65536]).intdigest() for at in range(0, len(content), 65536)]

    wanted = [d for path in sorted(found.ours["files"]) for d in digests((found.folder / path).read_bytes())]
    numbers = np.frombuffer(data, "<u8").tolist()
    tail = digests(data[: 8 * len(wanted)])
    assert numbers == [*wanted, *tail]
    digest = xxhash.xxh3_128(np.array(tail, "<u8").tobytes()).hexdigest()
    assert found.ours["blocks"] == {"block": 65536, "digest": digest}
    return True


def push(store, folder, prompts=TEXTS, model=MODEL, **options):
    """The dataset that is pushed into a folder, beside which nothing is left."""
    assert ac.push_dataset(folder, model, prompts, store=store, **options) == str(folder)
    assert not list(folder.parent.glob(".*pushing"))
    return Published(folder)


def flipped(path, at, bit=0):
    """Change one bit of a file, whose time stays."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
