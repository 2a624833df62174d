"""The index of a new dataset: one row per prompt, in row groups of bounded size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.derive.results import exponentials
from actcache.errors import MissingExtraError, PromptError
from actcache.share import ours, seal
from actcache.share.format import PREFIX
from actcache.share.stored_rows import Rows
from actcache.store.memory import return_free_memory
from actcache.store.prompts import IDS

if TYPE_CHECKING:
    from actcache.share.columns import Column
    from actcache.share.selection import Selection
    from actcache.share.shard_files import Shards

# A row group is in memory at once, on either side.
_ROWS, _TOKENS = 4_000, 250_000


def require_pyarrow() -> Any:
    """pyarrow, or `MissingExtraError`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            "datasets need pyarrow for their index: pip install 'actcache[hub]' (or pip install pyarrow)."
        ) from None
    return pyarrow


class Index:
    """What the index of a dataset holds; `write` makes the file."""

    def __init__(self, selection: Selection, shards: Shards, label: Column, metadata: Sequence[Column]) -> None:
        order = shards.order
        self._order = order
        self._table = selection.table.in_order(order)
        self._shards = shards
        self._label, self._metadata = label, metadata
        self._losses: Rows | None = None
        self._has_losses = selection.spill.zeros(len(order), bool)
        self._perplexity: Rows | None = None
        self._has_perplexity = selection.spill.zeros(len(order), bool)
        if selection.token_nll is not None:
            self._has_losses = selection.token_nll.found[order, 0]
        if self._has_losses.any() and selection.token_nll is not None:
            self._losses = Rows(selection.token_nll, "token_nll", order, selection.spill, whole=True)
        if selection.perplexity is not None:
            self._has_perplexity = selection.perplexity.found[order, 0]
        if self._has_perplexity.any() and selection.perplexity is not None:
            self._perplexity = Rows(selection.perplexity, "perplexity", order, selection.spill, whole=False)
        self.all_texts = self._table.all_texts

    @property
    def has_perplexity(self) -> bool:
        return self._perplexity is not None

    def text_context(self) -> str | None:
        """The context under which all texts became their tokens; None where there are several."""
        return self._table.text_context or None

    def schema(self) -> Any:
        """The columns: what people look at first, then where the rows are, then lists of tokens."""
        pa = require_pyarrow()
        fields = [("text", pa.string()), ("label", self._type(self._label.type)), ("num_tokens", pa.int32())]
        if not self.all_texts:
            fields.append((ours.KIND, pa.string()))
        if self._perplexity is not None:
            fields += [(f"perplexity_{name}", pa.float64()) for name in ("mean", "min", "max")]
        fields += [(column.name, self._type(column.type)) for column in self._metadata]
        fields += [(name, pa.int32()) for name in self._shards.location_columns]
        if self._shards.lengths is not None:
            fields.append(("token_offset", pa.int64()))
        if self._table.any_ids:
            fields.append(("token_ids", pa.list_(pa.int64())))
        if self._losses is not None:
            fields.append(("token_perplexity", pa.list_(pa.float64())))
        if self._shards.lengths is not None:
            fields += [(name, pa.list_(pa.int64())) for name in ("token_shard_ids", "token_shard_offsets")]
        return pa.schema(fields)

    def _type(self, name: str) -> Any:
        pa = require_pyarrow()
        if name.startswith("list<"):
            return pa.list_(self._type(name[5:-1]))
        return {"double": pa.float64(), "bool": pa.bool_()}.get(name) or getattr(pa, name)()

    def check(self) -> None:
        """Make a few rows and throw them away, and look at all texts: what cannot be written shows before anything is
        sent."""
        self._batch(self.schema(), 0, min(100, self._groups[-1]))

    def write(self, path: Path, described: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Write the file, with metadata under the keys of the format and of this library."""
        pa = require_pyarrow()
        import pyarrow.parquet as parquet

        metadata = {f"{PREFIX}{key}": json.dumps(value) for key, value in described.items()}
        metadata |= {f"{ours.PREFIX}{key}": json.dumps(value) for key, value in {**own, ours.SEALED: True}.items()}
        schema = self.schema().with_metadata(metadata)
        with parquet.ParquetWriter(path, schema, compression="snappy") as writer:
            for start, stop in pairwise(self._groups):
                writer.write_table(pa.Table.from_batches([self._batch(schema, start, stop)]))
                if stop < len(self._order):
                    return_free_memory()
        seal.put(path)

    @cached_property
    def _groups(self) -> list[int]:
        """Where row groups begin, and the number of rows. PromptError for a text that cannot be written."""
        bounds, tokens = [0], 0
        for start in range(0, len(self._order), _ROWS):
            some = self._table.part(start, min(start + _ROWS, len(self._order)))
            lengths = some.lengths if self._shards.lengths is None else self._shards.lengths[start : start + _ROWS]
            for i, (text, length) in enumerate(zip(some.texts, lengths.tolist(), strict=True), start):
                try:
                    (text or "").encode()
                except UnicodeEncodeError:
                    raise PromptError(
                        f"a prompt is no valid Unicode text: {text!r:.60} (row {i}). Leave it out."
                    ) from None
                if i > bounds[-1] and (i - bounds[-1] == _ROWS or tokens + length > _TOKENS):
                    bounds.append(i)
                    tokens = 0
                tokens += length
        return [*bounds, len(self._order)]

    def _batch(self, schema: Any, start: int, stop: int) -> Any:
        pa = require_pyarrow()
        columns = self._columns(start, stop)
        return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)

    def _columns(self, start: int, stop: int) -> dict[str, Any]:
        table, shards = self._table, self._shards
        rows = range(start, stop)
        some = table.part(start, stop)
        ids = some.ids
        lengths = [None if one is None else len(one) for one in ids]
        if shards.lengths is not None:
            lengths = shards.lengths[start:stop].tolist()
        found: dict[str, Any] = {
            "text": [
                json.dumps(some.tokens(i).tolist()) if kind == IDS else text
                for i, (kind, text) in enumerate(zip(some.kind.tolist(), some.texts, strict=True))
            ],
            "label": [self._label.values[i] for i in self._order[start:stop].tolist()],
            "num_tokens": lengths,
            ours.KIND: [ours.KINDS[kind] for kind in some.kind.tolist()],
            "token_ids": ids,
        }
        for column in self._metadata:
            found[column.name] = [column.values[i] for i in self._order[start:stop].tolist()]
        if self._perplexity is not None:
            has = self._has_perplexity[start:stop]
            values = np.full((len(has), 3), np.nan)
            members = np.flatnonzero(has)
            if len(members):
                values[members] = self._perplexity.of(members + start)
            for j, name in enumerate(("mean", "min", "max")):
                found[f"perplexity_{name}"] = [v if h else None for v, h in zip(values[:, j], has, strict=True)]
        if self._losses is not None:
            found["token_perplexity"] = [
                exponentials(self._losses.all_of(i)[:-1, 0]) if self._has_losses[i] else None for i in rows
            ]
        found |= shards.locations(start, stop)
        if shards.lengths is not None:
            found["token_offset"] = found["row_offset"]
            found["token_shard_ids"], found["token_shard_offsets"] = shards.token_locations(start, stop)
        return found
