"""What people say of prompts, stored beside their vectors: labels and metadata. docs/format.md is normative."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.store.prompts import PromptTable
from actcache.store.records import LABEL, METADATA, Records

if TYPE_CHECKING:
    from actcache.store.index import SpaceIndex
    from actcache.store.store import Store

KINDS = (LABEL, METADATA)
# How texts of several lengths lie in one matrix: ASCII has no such byte, and few widths make few segments.
_PAD, _LEAST_WIDTH = 0xFF, 64


def encoded(value: Any) -> bytes:
    """`value` (JSON with finite numbers) as it is stored: the same for what is the same."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def records(kind: str, prompts: PromptTable, values: Sequence[bytes]) -> list[Records]:
    """What a store keeps of `values` (see `encoded`), one for each of `prompts`: records of one width each.

    They are found by token ids alone, where these are known, so that a newer value counts however the prompt was given.
    """
    widths = np.array([max(_LEAST_WIDTH, 1 << (len(v) - 1).bit_length()) for v in values])
    made = []
    for width in np.unique(widths).tolist():
        members = np.flatnonzero(widths == width).tolist()
        data = b"".join(values[i].ljust(width, bytes([_PAD])) for i in members)
        table = prompts.select(members).by_ids()
        matrix = np.frombuffer(data, np.uint8).reshape(len(members), width)
        one = Records.pooled(table, kind, {kind: matrix})
        one.screened = True
        made.append(one)
    return made


def in_turn(index: SpaceIndex, records: list[Records]) -> list[Records]:
    """`records` of one signature, labels and metadata so that they count as newer than all that `index` knows of.

    Copies of vectors are equal, so that their age decides nothing; here a clock behind that of an earlier writer would
    hide what is said now.
    """
    layout = records[0].layout
    if layout not in KINDS:
        return records
    if index.copy is not None:
        index.copy.pull(index.folder.name)
    with index.lock:
        index.refresh()
        newest = max((info.created_ns for _, info in index.segments() if info.layout == layout), default=-1)
    return [replace(part, not_before=newest + 1) for part in records]


def stored(store: Store, space: str, kind: str, prompts: PromptTable) -> list[bytes | None]:
    """What is stored of `kind` for each of `prompts`, as `encoded`; None where nothing is."""
    placement = store.locate(space, table=prompts, sites=[kind], layout=kind)
    found: list[bytes | None] = [None] * len(prompts)
    members = np.flatnonzero(placement.found)
    for i, (row,) in zip(members.tolist(), placement.all_rows(members), strict=True):
        found[i] = _text(row)
    return found


def read(store: Store, space: str, kind: str, prompts: PromptTable) -> list[Any]:
    """The labels (`LABEL`) or the metadata (`METADATA`) of `prompts`; None for a prompt that has none."""
    return [None if text is None else json.loads(text) for text in stored(store, space, kind, prompts)]


def _text(row: npt.NDArray[np.uint8]) -> bytes:
    return row.tobytes().rstrip(bytes([_PAD]))
