"""What of a dataset can be pulled: its sites by the names they have in a store, and in which layout each is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from actcache.derive.results import LOGITS as LOGITS_SITE
from actcache.derive.results import PERPLEXITY, TOKEN_NLL
from actcache.errors import DatasetFormatError, OptionError, did_you_mean
from actcache.share.format import LOGITS, TensorGroup
from actcache.share.index import Index
from actcache.share.index_prompts import LOSSES_COLUMN, PERPLEXITIES
from actcache.share.layers import is_every, numbers_of
from actcache.store.pulled import kind_of
from actcache.store.records import COMPLETION, DERIVED, LABEL, METADATA, PULLED, SCALE, TOKENS, is_layout, is_result

_MOST = 1 << 16
_TAKEN = (TOKENS, DERIVED, COMPLETION, LABEL, METADATA, PULLED)


@dataclass(frozen=True)
class Column:
    """One site: the tensor that holds it (None: a column of the index), its layer there and its key."""

    site: str
    layout: str
    group: TensorGroup | None = None
    layer: int | None = None
    key: str = ""


class Offered:
    """The sites of a dataset.

    Attributes:
        columns: by the names of sites in a store.
        forms: of each kind of sites its layout; where those of a kind differ in it, of each site.
    """

    def __init__(self, index: Index) -> None:
        self.name = index.source.name
        self.columns: dict[str, Column] = {}
        self._by_tensor: dict[str, list[Column]] = {}
        for name, group in index.description.tensors.items():
            for column in self._logits(group) if name == LOGITS else self._sites(group):
                self._add(name, column)
        if set(PERPLEXITIES) <= set(index.columns):
            self._add(PERPLEXITY, Column(PERPLEXITY, DERIVED))
            if LOSSES_COLUMN in index.columns:
                self._add(PERPLEXITY, Column(TOKEN_NLL, TOKENS))
        layouts: dict[str, set[str]] = {}
        for site, column in self.columns.items():
            layouts.setdefault(kind_of(site), set()).add(column.layout)
        self.forms = {
            kind_of(site) if len(layouts[kind_of(site)]) == 1 else site: column.layout
            for site, column in self.columns.items()
        }

    def _add(self, tensor: str, column: Column) -> None:
        if len(self.columns) == _MOST:
            raise DatasetFormatError(f"{self.name}: its tensors have more than {_MOST:,} layers together.")
        if column.site in self.columns:
            raise DatasetFormatError(f"{self.name}: two of its tensors are {column.site!r}.")
        self.columns[column.site] = column
        self._by_tensor.setdefault(tensor, []).append(column)

    def _sites(self, group: TensorGroup) -> Iterable[Column]:
        layout = TOKENS if group.pooling is None else group.pooling
        if is_result(group.site) or group.site.endswith(SCALE):
            raise DatasetFormatError(
                f"{self.name}: tensors cannot be called {group.name!r}, which means something else."
            )
        if group.pooling is not None and (layout in _TAKEN or not is_layout(layout)):
            raise DatasetFormatError(f"{self.name}: {group.name} is pooled with {layout!r:.60}, which is no pooling.")
        for layer in group.layers or (None,):
            site = group.site if layer is None else f"{group.site}.{layer}"
            yield Column(site, layout, group, layer, group.key(layer))

    def _logits(self, group: TensorGroup) -> Iterable[Column]:
        if group.dim is None or group.pooling is None:
            raise DatasetFormatError(f"{self.name}: {LOGITS} does not say how many logits of a prompt there are.")
        if group.pooling in _TAKEN or not is_layout(group.pooling):
            raise DatasetFormatError(
                f"{self.name}: {LOGITS} is pooled with {group.pooling!r:.60}, which is no pooling."
            )
        for part in ("values", "indices"):
            yield Column(f"{LOGITS_SITE}.top{group.dim}.{part}", group.pooling, group, None, f"{LOGITS}.{part}")

    def choose(self, tensors: Any, layers: Any) -> list[Column]:
        """The sites of `tensors` (names of tensors or sites, single layers of these; None: all) at `layers` (block
        numbers; None or "all": all). OptionError and DatasetLayerError name what there is."""
        wanted = None if tensors is None else [tensors] if isinstance(tensors, str) else list(tensors)
        found: dict[str, Column] = {}
        by_site: dict[str, list[Column]] = {}
        for column in self.columns.values():
            by_site.setdefault(kind_of(column.site), []).append(column)
        for name in self._by_tensor if wanted is None else wanted:
            columns = self._by_tensor.get(name) or by_site.get(name) or [*filter(None, [self.columns.get(name)])]
            if not columns:
                hint = did_you_mean(name, [*self._by_tensor, *by_site]) if isinstance(name, str) else ""
                raise OptionError(f"{self.name} has no tensors {name!r}: it has {', '.join(self._by_tensor)}.{hint}")
            found.update({column.site: column for column in columns})
        if not found:
            raise OptionError(f"tensors is empty: expected some of {', '.join(self._by_tensor)}, or None for all.")
        if is_every(layers):
            return list(found.values())
        known = {column.layer for column in found.values() if column.layer is not None}
        asked = numbers_of(layers, known, self.name)
        return [c for c in found.values() if c.layer is None or c.layer in asked]
