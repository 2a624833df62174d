"""ActivationCache: what one capture left, in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from actcache.capture.entry import Entry, brief, hidden_of
from actcache.capture.joining import Refused
from actcache.capture.nodes import Node
from actcache.capture.values import map_tensors, same_content, tensors_in
from actcache.errors import ActCacheError, LayerRangeError, UnknownKeyError, did_you_mean
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy


# Token ids and mask of each stack, by its name; first the one that stands for the cache as a whole.
Tables = dict[str | None, tuple[Tensor | None, Tensor | None]]


class _Source(Protocol):
    """A block that is still filling the cache."""

    def publish(self, items: dict[str, Any]) -> None: ...

    def tokens(self) -> Tables: ...

    def missed(self) -> list[str]: ...

    def close(self) -> Callable[[], Tables]:
        """Let go of the values; what is left answers for the tokens."""


class ActivationCache(MutableMapping[str, Any]):
    """A mapping from module paths to `Entry` and from sites to tensors, in the order in which they were asked for.

    A key is looked up as written, then without one leading "model.", then as a site under any of its names. Modules can
    be reached by attribute too: ``cache.transformer.h[-1].output``. The cache may be read inside its block.

    Attributes: `missed` (keys that were asked for and did not run), `tokens` (strings per prompt, when captured
    through `run_with_cache` with a tokenizer).
    """

    def __init__(self, items: MutableMapping[str, Any] | None = None) -> None:
        self._items: dict[str, Any] = dict(items or {})
        self._source: _Source | None = None
        self._model: weakref.ref[nn.Module] | None = None
        # Blocks of each stack of the model, by the stack's name.
        self._depths: dict[str | None, int] = {}
        self._tokens: Tables | None = None
        self._read_tokens: Callable[[], Tables] | None = None
        self.missed: list[str] = []
        self.tokens: list[list[str]] | None = None

    def _begin(self, source: _Source, model: nn.Module, anatomy: Anatomy | None) -> None:
        self._source = source
        self._model = weakref.ref(model)
        self._depths = {name: anatomy.depth(name) for name in anatomy.stacks} if anatomy is not None else {}

    def _end(self) -> list[str]:
        source, self._source = self._source, None
        if source is not None:
            source.publish(self._items)
            self.missed = source.missed()
            # Read when first asked for: most captures never are.
            self._tokens, self._read_tokens = None, source.close()
        return self.missed

    @property
    def _data(self) -> dict[str, Any]:
        if self._source is not None:
            self._source.publish(self._items)
        return self._items

    # -- mapping

    def __getitem__(self, key: str) -> Any:
        data = self._data
        found = self._key(key, data)
        value = data[found]
        if isinstance(value, Refused):
            raise value.error(found)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        data = self._data
        del data[self._key(key, data)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key, self._data) is not None

    def __eq__(self, other: object) -> bool:
        """By content: the same keys, and values equal in dtype, shape and elements."""
        if not isinstance(other, ActivationCache):
            return NotImplemented
        mine, theirs = self._data, other._data
        return mine.keys() == theirs.keys() and all(same_content(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def _find(self, key: str, data: dict[str, Any]) -> str | None:
        """The key under which `key` is held, or None."""
        if key in data:
            return key
        bare = "" if key == "model" else key.removeprefix("model.")
        if bare in data:
            return bare
        try:
            site = Site.parse(key)
        except ActCacheError:
            return None
        if site.layer is not None and site.layer < 0:
            if site.stack not in self._depths:
                return None
            site = Site(site.name, site.layer + self._depths[site.stack], site.head, site.stack)
        return str(site) if str(site) in data else None

    def _key(self, key: str, data: dict[str, Any]) -> str:
        found = self._find(key, data) if isinstance(key, str) else None
        if found is None:
            held = ", ".join(repr(k) for k in list(data)[:5]) + (", ..." if len(data) > 5 else "")
            hint = did_you_mean(key, data) if isinstance(key, str) else ""
            raise UnknownKeyError(f"{key!r} is not in the cache, which holds {held or 'nothing'}.{hint}")
        return found

    # -- attribute access

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(Node(self._data, "", self._model), name)

    # -- tokens

    @property
    def input_ids(self) -> Tensor | None:
        """Token ids ``[B, S]`` of what was captured, on the CPU; None when not known. Of an encoder-decoder those of
        the stack that was captured, the encoder's (the prompts) where both were."""
        return self._token_table()[0]

    @property
    def attention_mask(self) -> Tensor | None:
        """Which positions are real, bool ``[B, S]`` on the CPU; None when not known. Of the stack of `input_ids`."""
        return self._token_table()[1]

    def _token_table(self) -> tuple[Tensor | None, Tensor | None]:
        return next(iter(self._tables().values()), (None, None))

    def _tables(self) -> Tables:
        if self._source is not None:
            return self._source.tokens()
        if self._tokens is None:
            self._tokens = self._read_tokens() if self._read_tokens is not None else {}
            self._read_tokens = None
        return self._tokens

    def _mask_of(self, key: str, value: Tensor) -> Tensor | None:
        """Which positions of the value of `key` are real; None when not known."""
        tables = self._tables()
        if len(tables) > 1 and Site.looks_like(key):
            # Logits have no stack, and are the decoder's.
            tables = {None: tables[Site.parse(key).stack or "decoder"]}
        masks = [mask for _, mask in tables.values() if mask is not None]
        # The logits of generation exist for the last positions only.
        fitting = (m for m in masks if value.ndim > 1 and m.shape[0] == value.shape[0] and m.shape[1] >= value.shape[1])
        return next(fitting, None)

    # -- layers and positions

    def layer_numbers(self, site: str = "resid_post") -> list[int]:
        """The layers of `site` that the cache holds, in ascending order."""
        asked = Site.parse(site)
        same = [s for s in self._sites() if (s.stack, s.name) == (asked.stack, asked.name) and s.head is None]
        return sorted(s.layer for s in same if s.layer is not None)

    @property
    def n_layers(self) -> int:
        """How many layers the cache holds, whatever the site."""
        return len({s.layer for s in self._sites() if s.layer is not None})

    def seq_len(self) -> int:
        """Positions per prompt, padding included; raises `LayerRangeError` on an empty cache."""
        mask = self.attention_mask
        if mask is not None:
            return int(mask.shape[1])
        for value in self._data.values():
            tensor = _tensor_of(value)
            if tensor is not None and tensor.ndim >= 2:
                return int(tensor.shape[1])
        raise LayerRangeError("the cache is empty: it has no positions")

    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._data

    def get_layer(self, layer: int, site: str = "resid_post") -> Tensor:
        """`site` at one layer, ``[B, S, D]``; negative layers count from the end of the model.

        Raises `LayerRangeError` (an `IndexError`) for a layer that the cache does not hold.
        """
        asked = Site.parse(site)
        held = self.layer_numbers(site)
        depth = self._depths.get(asked.stack, held[-1] + 1 if held else 0)
        number = layer + depth if layer < 0 else layer
        if number not in held:
            has = f"layers {', '.join(map(str, held))}" if held else "no layer of it"
            raise LayerRangeError(f"layer {layer} of {site} is not in the cache: it holds {has}")
        value: Tensor = self[str(Site(asked.name, number, stack=asked.stack))]
        return value

    def get_position(self, layer: int, position: int, site: str = "resid_post") -> Tensor:
        """One position of every prompt, ``[B, D]``: real tokens are counted, whatever the padding side, negative
        positions from each prompt's end. Raises `LayerRangeError` naming layer, position and range."""
        value = self.get_layer(layer, site)
        picked: list[Tensor] = []
        for row in self._real_rows(site, value):
            if not -row.shape[0] <= position < row.shape[0]:
                raise LayerRangeError(
                    f"position {position} of layer {layer} is out of range: "
                    f"prompt {len(picked)} has {row.shape[0]} tokens (0 to {row.shape[0] - 1})"
                )
            picked.append(row[position])
        return torch.stack(picked)

    def stack(self, site: str = "resid_post") -> Tensor:
        """Every held layer of `site`, ``[L, B, S, D]``, in ascending order of layers."""
        numbers = self.layer_numbers(site)
        if not numbers:
            raise LayerRangeError(f"the cache holds no layer of {site}")
        return torch.stack([self.get_layer(number, site) for number in numbers])

    def rows(self, key: str) -> list[Tensor]:
        """The value of `key` prompt by prompt, without padding: one ``[T, D]`` each (views)."""
        value = _tensor_of(self[key])
        if value is None:
            raise UnknownKeyError(f"{key!r} holds no tensor that has one row per token")
        return self._real_rows(self._key(key, self._data), value)

    def _real_rows(self, key: str, value: Tensor) -> list[Tensor]:
        mask = self._mask_of(key, value)
        if mask is None:
            return list(value.unbind(0))
        rows = []
        for row, real in zip(value, mask[:, mask.shape[1] - value.shape[1] :], strict=True):
            at = real.nonzero()[:, 0]
            together = len(at) > 0 and int(at[-1] - at[0]) + 1 == len(at)
            rows.append(row[int(at[0]) : int(at[-1]) + 1] if together else row[at.to(row.device)])
        return rows

    # -- parts

    def select(
        self, prompts: int | slice | Sequence[int] | None = None, sites: Any = None, layers: Any = None
    ) -> ActivationCache:
        """A cache of some prompts (an int, a slice, or a list of row numbers), sites and layers.

        Memory is shared where prompts are an int or a slice. `sites` and `layers` choose among site keys; naming either
        leaves modules out.
        """
        part = ActivationCache()
        part._model, part._depths, part.missed = self._model, self._depths, list(self.missed)
        names = None if sites is None else {Site.parse(s) for s in ([sites] if isinstance(sites, str) else sites)}
        numbers = None if layers is None else self._numbers(layers)
        rows = slice(prompts, prompts + 1 or None) if isinstance(prompts, int) else prompts
        tables = self._tables()
        mask = self._token_table()[1]
        batch = mask.shape[0] if mask is not None else None
        for key, value in self._data.items():
            if (names is not None or numbers is not None) and not _wanted(key, names, numbers):
                continue
            part._items[key] = value if rows is None else _take_rows(value, rows, batch)
        if not part._items and self._items:
            raise UnknownKeyError(f"nothing in the cache matches sites={sites!r}, layers={layers!r}")
        if rows is None:
            part._tokens, part.tokens = tables, self.tokens
        else:
            part._tokens = {name: _take_rows(table, rows, batch) for name, table in tables.items()}
            chosen = range(batch or 0)[rows] if isinstance(rows, slice) else rows
            part.tokens = None if self.tokens is None else [self.tokens[i] for i in chosen]
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held; memory that several of them share counts once."""
        seen: dict[tuple[str, int], int] = {}
        for value in self._data.values():
            parts = value.values() if isinstance(value, Entry) else [value]
            for tensor in tensors_in(parts):
                storage = tensor.untyped_storage()
                seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def __repr__(self) -> str:
        data = self._data
        lines = [
            f"  {key or 'model'}: {value if isinstance(value, Entry) else brief(value)}" for key, value in data.items()
        ]
        shown = lines if len(lines) <= 12 else [*lines[:10], f"  ... and {len(lines) - 10} more"]
        return "\n".join([f"ActivationCache with {len(data)} entries, {self.nbytes / 2**20:.2f} MB", *shown])

    def _sites(self) -> list[Site]:
        return [
            Site.parse(key)
            for key, value in self._data.items()
            if isinstance(value, (Tensor, Refused)) and Site.looks_like(key)
        ]

    def _numbers(self, layers: Any) -> set[int]:
        from actcache.model.sites import resolve_layers

        held = [s.layer for s in self._sites() if s.layer is not None]
        return set(resolve_layers(layers, max(self._depths.values(), default=max(held, default=-1) + 1)))

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_items": dict(self._data), "_tokens": self._tables()}
        # A copy is a cache of its own: it knows neither the model nor the block that fills the original.
        return {**state, "_source": None, "_read_tokens": None, "_model": None}


def _wanted(key: str, names: set[Site] | None, numbers: set[int] | None) -> bool:
    if not Site.looks_like(key):
        return False
    site = Site.parse(key)
    named = names is None or site in names or Site(site.name, None, None, site.stack) in names
    return named and (numbers is None or site.layer in numbers)


def _take_rows(value: Any, rows: Any, batch: int | None) -> Any:
    """The chosen prompts of every tensor whose first dimension is the batch."""

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or (batch is not None and tensor.shape[0] != batch):
            return tensor
        return tensor[rows] if isinstance(rows, slice) else tensor[torch.as_tensor(list(rows), device=tensor.device)]

    return value.map(lambda part: map_tensors(part, take)) if isinstance(value, Entry) else map_tensors(value, take)


def _tensor_of(value: Any) -> Tensor | None:
    return hidden_of(value.output) if isinstance(value, Entry) else (value if isinstance(value, Tensor) else None)
