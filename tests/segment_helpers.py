"""Segments written to a folder, and headers of them that somebody has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from hypothesis import strategies as st

from actcache.store import segment
from store_helpers import pooled

SPACE = "0" * 32


def write(folder: Path, records: Any) -> Path:
    info = segment.write(folder, records, space=SPACE)
    return folder / f"{info.name}.safetensors"


ragged = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), min_size=1, max_size=8)


def hostile(edit: Any) -> bytes:
    """A header changed by `edit(entries)`, with the body of a good file and its own digest set right."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        raw = write(Path(folder), pooled([1, 2], sites=["x"], dim=4)).read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:size])
    text = edit(entries)
    text = text if isinstance(text, bytes) else json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    head = len(text).to_bytes(8, "little") + text
    body = bytearray(raw[size:])
    body[:8] = xxhash.xxh3_64_digest(head)[::-1]
    return head + bytes(body)


def entry(name: str, **changes: Any) -> Any:
    return lambda e: e[name].update(changes)


HOSTILE: dict[str, Any] = {
    "not JSON": lambda e: b"{" * 100,
    "deep JSON": lambda e: b"[" * 100_000,
    "not an object": lambda e: b"[]",
    "name twice": lambda e: b'{"a":1,"a":2}',
    "other format": lambda e: e["__metadata__"].update(format="pt"),
    "newer version": lambda e: e["__metadata__"].update(version="2.0"),
    "metadata of numbers": lambda e: e["__metadata__"].update(version=1),
    "no layout": lambda e: e["__metadata__"].pop("layout"),
    "layout with a path": lambda e: e["__metadata__"].update(layout="../x"),
    "created beyond 64 bits": lambda e: e["__metadata__"].update(created_ns="9" * 19),
    "created in other digits": lambda e: e["__metadata__"].update(created_ns="١٢٣"),
    "replaces nonsense": lambda e: e["__metadata__"].update(replaces="[1]"),
    "wrong dtype": entry("token_ids", dtype="U32"),
    "unknown dtype": entry("token_ids", dtype="Q4"),
    "overlap": entry("last_token/x", data_offsets=[0, 32]),
    "huge shape": entry("last_token/x", shape=[2**40, 2**40]),
    "huge offsets": entry("last_token/x", data_offsets=[2**63, 2**63 + 32]),
    "negative offsets": entry("last_token/x", data_offsets=[-32, 0]),
    "shape of floats": entry("last_token/x", shape=[2.0, 4.0]),
    "shape does not fit": entry("last_token/x", shape=[4, 4]),
    "rows do not fit": entry("last_token/x", shape=[4, 2]),
    "missing index": lambda e: e.update(kinds=e.pop("kind")),
    "other layout's data": lambda e: e.update({"mean/x": e.pop("last_token/x")}),
    "keys of another width": entry("prompt_key", shape=[4, 8]),
    "entry of another form": lambda e: e.update({"last_token/x": 5}),
}
