"""What makes two activations the same: weights, configuration, dtype, attention, options (DESIGN rule 1).

Everything here is computed without loading a model from disk: files are digested with xxh3-128 and the
digest is remembered by path, inode, size, mtime and ctime; a Hub model is its commit. A model that is
already in memory is digested by its weights (`model/in_memory.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from actcache.model.host_memo import HostMemo, host_memo

IDENTITY_VERSION = 1

# Values of a config that name things or steer what is returned, and change no activation.
CONFIG_LABELS = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "architectures",
        "torch_dtype",
        "dtype",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "use_cache",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "id2label",
        "label2id",
        "task_specific_params",
    }
)

# What transformers looks for, in this order: one file, or the list of several.
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

_CHUNK = 8 << 20
# A file changed this recently could change again without its time stamps moving on.
_RACY_NS = 2_000_000_000


def digest_json(value: Any) -> str:
    """Hex digest (32 digits) of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of the values of a model config that can change numbers."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): strip(v) for k, v in value.items() if k not in CONFIG_LABELS}
        if isinstance(value, list | tuple):
            return [strip(v) for v in value]
        return value

    return digest_json(strip(config))


def file_digest(path: Path, memo: HostMemo | None = None) -> str:
    """Hex digest of a file's bytes; read again only when its inode, size or time stamps changed."""
    memo = memo or host_memo()
    real = path.resolve()
    before = real.stat()
    key = f"{real}\0{before.st_ino}\0{before.st_size}\0{before.st_mtime_ns}\0{before.st_ctime_ns}"
    known = memo.get("file", key)
    if known is not None:
        return known
    hasher = xxhash.xxh3_128()
    with real.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    after = real.stat()
    unchanged = (before.st_mtime_ns, before.st_size, before.st_ino) == (after.st_mtime_ns, after.st_size, after.st_ino)
    if unchanged and time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _RACY_NS:
        memo.put("file", key, hasher.hexdigest())
    return hasher.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """Digest of several files: their names and their bytes."""
    return digest_json({path.name: file_digest(path) for path in paths})


def stat_signature(paths: Iterable[Path]) -> tuple[tuple[str, int, int, int, int], ...]:
    """What tells whether any of these files was replaced or changed, for the price of a stat each."""
    signature = []
    for path in paths:
        stat = path.stat()
        signature.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(signature)


def settled(signature: Iterable[tuple[str, int, int, int, int]]) -> bool:
    """Whether these files were changed long enough ago for another change to show in their time stamps."""
    now = time.time_ns()
    return all(now - max(mtime, ctime) > _RACY_NS for _, _, _, mtime, ctime in signature)


def weight_files(folder: Path, *, every: bool = False) -> list[Path]:
    """The weight files that transformers loads from a local folder, in name order; empty when there are none.

    `every`: all that it could load with any arguments.
    """
    found: set[Path] = set()
    for single, index in WEIGHT_FILES:
        if (folder / single).is_file():
            found.add(folder / single)
        elif (folder / index).is_file():
            found.add(folder / index)
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            found.update(folder / shard for shard in set(shards))
        if found:
            break
    if every or not found:
        found.update(p for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for p in folder.glob(pattern))
    return sorted(p for p in found if not p.name.startswith("adapter_model."))
