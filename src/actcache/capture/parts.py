"""Parts of a cache: prompts, sites, layers, positions."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from actcache.capture.entry import Entry
from actcache.capture.keyed import Keyed
from actcache.capture.positions import one_number
from actcache.capture.residual import FullActivationCache
from actcache.capture.rows import Chosen
from actcache.capture.tokens import columns_of, cut_tables, position_axes, real_rows, take_columns, tensor_of
from actcache.capture.values import map_tensors
from actcache.errors import LayerRangeError, OptionError, UnknownKeyError, did_you_mean
from actcache.model.sites import Site, resolve_layers


class Parts(Keyed):
    """What can be taken out of a cache."""

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
        for key, value in self._data.items():
            tensor, axis = tensor_of(value), position_axes(key)[0]
            if tensor is not None and tensor.ndim > axis:
                return int(tensor.shape[axis])
        raise LayerRangeError("the cache is empty: it has no positions")

    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._data

    def get_layer(self, layer: int, site: str = "resid_post") -> Tensor:
        """`site` at one layer, ``[B, S, D]``; negative layers count from the end of the model.

        Raises `LayerRangeError` (an `IndexError`) for a layer that the cache does not hold, `OptionError` for a layer
        that is no int.
        """
        layer = one_number(layer, "layer", "; stack(site) is every layer that is held")
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
        """One position of every row, ``[B, D]``: real tokens are counted, whatever the padding side, negative
        positions from each row's end. Of a pattern that is a query with all its keys, ``[B, H, K]``. A row is a prompt,
        or one of the sequences that an encoder-decoder returned for it.

        Raises `LayerRangeError` naming layer, position and range, `OptionError` for a layer or position that is no
        int."""
        position = one_number(
            position,
            "position",
            ". A name that was given to positions is read with cache.at(name), several are kept "
            "with capture(positions=)",
        )
        value = self.get_layer(layer, site)
        picked: list[Tensor] = []
        axis = position_axes(site)[0] - 1
        what = "prompt" if value.shape[0] == self._n_rows() else "row"
        for row in real_rows(site, value, self._layer_mask(layer, site, value)):
            if not -row.shape[axis] <= position < row.shape[axis]:
                raise LayerRangeError(
                    f"position {position} of layer {layer} is out of range: "
                    f"{what} {len(picked)} has {row.shape[axis]} tokens (0 to {row.shape[axis] - 1})"
                )
            picked.append(row.select(axis, position))
        return torch.stack(picked)

    def _layer_mask(self, layer: int, site: str, value: Tensor) -> Tensor | None:
        asked = Site.parse(site)
        number = layer + self._depths.get(asked.stack, 0) if layer < 0 else layer
        name = str(Site(asked.name, number, stack=asked.stack))
        return self._mask_of(self._find(name, self._data) or name, value)

    def stack(self, site: str = "resid_post") -> Tensor:
        """Every held layer of `site`, ``[L, B, S, D]``, in ascending order of layers.

        Raises `LayerRangeError` where none is held, `OptionError` where they have other numbers of rows.
        """
        numbers = self.layer_numbers(site)
        if not numbers:
            raise LayerRangeError(f"the cache holds no layer of {site}")
        values = [self.get_layer(number, site) for number in numbers]
        if len({value.shape[0] for value in values}) > 1:
            counts = ", ".join(f"{value.shape[0]} of layer {n}" for n, value in zip(numbers, values, strict=True))
            raise OptionError(
                f"the layers of {site} have other rows, {counts}: not every pass of the block reached all of them. "
                "Capture such passes in blocks of their own."
            )
        return torch.stack(values)

    def residual_stream(
        self, prompt: int = 0, site: str = "resid_post", *, sequence: int | None = None
    ) -> FullActivationCache:
        """One prompt's `site` at every held layer, ``[T, D]`` each, without padding (views). Where an encoder-decoder
        returned several sequences for each prompt, `sequence` says which of the prompt's.

        Raises `LayerRangeError` for a prompt, sequence or site that the cache does not hold, `OptionError` where a
        prompt has several sequences and none is chosen.
        """
        numbers = self.layer_numbers(site)
        if not numbers:
            raise LayerRangeError(f"the cache holds no layer of {site}")
        asked = Site.parse(site)
        stream = FullActivationCache.with_capacity(self._depths.get(asked.stack, numbers[-1] + 1), site=site)
        for number in numbers:
            key = str(Site(asked.name, number, stack=asked.stack))
            rows = self.rows(key)
            stream.push(rows[self._prompt_rows().row(key, len(rows), prompt, sequence)], number)
        return stream

    # -- prompts and positions

    def rows(self, key: str) -> list[Tensor]:
        """The value of `key` row by row, without padding: one ``[T, D]`` each (views); ``[T, H, D]`` where there are
        heads, and ``[H, T, T]`` for patterns. A row is a prompt; where an encoder-decoder returned several sequences,
        those of the first prompt come first, then those of the second.

        Raises `UnknownKeyError` for what is not held or has no rows, `OptionError` for a module that ran several times.
        """
        found, value = self._held(key)
        if isinstance(value, Entry) and len(value) > 1:
            raise OptionError(
                f"{key!r} ran {len(value)} times inside the block, and what it gave is there run by run, as in "
                f"cache[{key!r}][0].hidden. By the name of a site, sites=, runs are joined into rows."
            )
        if isinstance(value, list) and value and all(isinstance(part, Tensor) for part in value):
            return self._rows_of_parts(found, value)
        tensor = tensor_of(value)
        if tensor is None or tensor.ndim == 0:
            raise UnknownKeyError(f"{key!r} holds no tensor that has one row per token")
        state = self._state()
        return real_rows(found, tensor, state.mask_of(found, tensor), state.keys_of(found, tensor))

    def _rows_of_parts(self, key: str, parts: list[Tensor]) -> list[Tensor]:
        """The same for batches that were joined without padding: their masks are padded on the right."""
        total, state = sum(part.shape[0] for part in parts), self._state()
        own, table = state.own_mask(key), state.table_of(key)
        masks = (table.mask, table.keys) if own is None else own
        # Patterns have keys for every position, if nothing else is said.
        masks = masks[0], masks[0] if masks[1] is None else masks[1]
        rows: list[Tensor] = []
        for part in parts:
            real: list[Tensor | None] = [None, None]
            for side, (mask, axis) in enumerate(zip(masks, position_axes(key), strict=False)):
                if mask is not None and mask.shape[0] == total and part.ndim > axis:
                    real[side] = mask[len(rows) : len(rows) + part.shape[0], : part.shape[axis]]
            rows += real_rows(key, part, *real)
        return rows

    @property
    def columns(self) -> dict[str, Any]:
        """Labels and other values with one item per prompt, by name: lists, arrays or tensors, to be set by whoever
        fills the cache. They follow the prompts when caches are joined and when prompts are selected."""
        # Also in deferred mode: what is written here is to be joined with what comes next.
        self._settle()
        if self._columns is None:
            self._columns = {}
        return self._columns

    def at(self, name: str) -> Self:
        """A cache with only the positions called `name` (as captured with ``positions={name: ...}``), ``[B, w, D]``
        for every value that has them; a prompt with fewer of them is padded, and says so in `attention_mask`. Patterns
        keep all their keys.

        Raises `UnknownKeyError` for a name under which nothing was captured.
        """
        state = self._state()
        self._require_name(name, sorted({known for table in state.tables.values() for known in table.names}))
        part = type(self)()
        part._model, part._depths, part._layouts, part.tokens = self._model, self._depths, self._layouts, None
        part._called, part._cut = self._called, True
        part._tokens = cut_tables(state.tables, name)
        part._columns, part._metadata = dict(self._columns or {}), dict(self._metadata or {})
        for key, value in self._data.items():
            taken = self._named(key, value)
            if taken is not None and name in taken:
                part._items[key] = taken[name]
        return part

    def map_to_dict(self, key: str) -> dict[str, Tensor]:
        """The value of `key` at every named position: ``{name: [B, w, D]}``, and ``[B, D]`` for the name of a single
        position. The batch axis is always there; where a prompt has fewer positions than others, zeros. Of patterns
        positions choose queries, ``[B, H, w, K]``; all keys stay.

        Raises `UnknownKeyError` when positions were not named, or `key` has no value per position.
        """
        found, value = self._held(key)
        names = self._state().table_of(found).names
        taken = self._named(found, value)
        if not names or taken is None:
            why = "no positions were named: capture with positions={'last': -1}" if not names else "it has no positions"
            raise UnknownKeyError(f"{key!r} cannot be mapped to named positions: {why}")
        result = {}
        for name, part in taken.items():
            tensor = tensor_of(part)
            assert tensor is not None
            result[name] = tensor.squeeze(position_axes(found)[0]) if names[name].ndim == 1 else tensor
        return result

    def _named(self, key: str, value: Any) -> dict[str, Any] | None:
        """The value at each named position; None for one that has no positions."""
        state = self._state()
        table, axis, tensor, own = state.table_of(key), position_axes(key)[0], tensor_of(value), state.own_mask(key)
        if table.mask is None or tensor is None:
            return None
        if own is not None and not torch.equal(own.positions, table.mask):
            # The names are of other columns than its own.
            return None
        shape = table.mask.shape

        def fits(part: Tensor) -> bool:
            return part.ndim > axis and (part.shape[0], part.shape[axis]) == shape

        if not fits(tensor):
            return None
        result = {}
        for name, index in table.names.items():
            columns = columns_of(index)

            def take(part: Tensor, columns: Tensor = columns) -> Tensor:
                return take_columns(part, columns, axis) if fits(part) else part

            result[name] = _map(value, take)
        return result

    @staticmethod
    def _require_name(name: str, known: list[str]) -> None:
        if name not in known:
            held = ", ".join(map(repr, known)) or "none: capture with positions={'last': -1}"
            raise UnknownKeyError(
                f"no positions are called {name!r}; named positions: {held}.{did_you_mean(name, known)}"
            )

    def select(self, prompts: int | slice | Sequence[int] | None = None, sites: Any = None, layers: Any = None) -> Self:
        """A cache of some prompts (an int, a slice, or a list of numbers), sites and layers.

        Prompts are the rows of `input_ids`. Where an encoder-decoder returned several sequences for each prompt, they
        are what was encoded, and each takes all of its sequences with it, in order: also where only sites of the
        decoder were captured, and `input_ids` (and `columns`) have a row for each sequence. Of modules, and under keys
        of your own, tensors are cut that have a row for every prompt (or every such sequence); anything else in them
        stays whole: what a router gives for each token, the rows of a beam search. Memory is shared where prompts are
        an int or a slice.

        `sites` and `layers` choose among site keys; naming either leaves modules out.

        Raises `LayerRangeError` for a prompt that the cache does not hold, `UnknownKeyError` where nothing is chosen,
        `OptionError` for a site of which the rows of a prompt cannot be told.
        """
        if prompts is not None:
            self._check_prompts(prompts)
        part = type(self)()
        part._model, part._depths, part._layouts = self._model, self._depths, self._layouts
        part._called, part._cut = self._called, self._cut
        part.missed = list(self.missed)
        names = None if sites is None else {Site.parse(s) for s in ([sites] if isinstance(sites, str) else sites)}
        numbers = None if layers is None else self._numbers(layers)
        tables, masks = self._tables(), self._masks or {}
        chosen = None if prompts is None else Chosen(self._prompt_rows(), prompts)
        for key, value in self._data.items():
            if (names is not None or numbers is not None) and not _wanted(key, names, numbers):
                continue
            part._items[key] = value if chosen is None else chosen.of(key, value)
        if not part._items and self._items:
            raise UnknownKeyError(f"nothing in the cache matches sites={sites!r}, layers={layers!r}")
        part._metadata, part._batches = dict(self._metadata or {}), self._batches
        part._strategies = copy.copy(self._strategies)
        if chosen is None:
            part._tokens, part.tokens, part._columns = tables, self.tokens, self._columns
            part._masks = {key: own for key, own in masks.items() if key in part._items}
        else:
            part._tokens = chosen.tables()
            part._masks = {key: chosen.mask(key, own) for key, own in masks.items() if key in part._items}
            part.tokens = None if self.tokens is None else [self.tokens[i] for i in chosen.leading]
            part._columns = {
                name: _take_items(column, chosen.leading) for name, column in (self._columns or {}).items()
            }
        return part

    def _check_prompts(self, prompts: Any) -> None:
        """Raise `OptionError` for what chooses no prompts, and for columns whose items are not theirs."""
        if not isinstance(prompts, slice):
            single = hasattr(prompts, "__index__") and getattr(prompts, "shape", ()) == ()
            listed = [prompts] if single or not isinstance(prompts, Iterable) else prompts
            if isinstance(prompts, str) or any(isinstance(one, (str, float)) or one is None for one in listed):
                raise OptionError(f"prompts is {prompts!r:.80}: expected an int, a slice, or a list of ints")
        rows = self._n_rows()
        for name, column in (self._columns or {}).items():
            if len(column) != rows:
                raise OptionError(
                    f"column {name!r} has {len(column)} items and the cache {rows} prompts: give it one for each"
                )

    def _numbers(self, layers: Any) -> set[int]:
        held = [s.layer for s in self._sites() if s.layer is not None]
        return set(resolve_layers(layers, max(self._depths.values(), default=max(held, default=-1) + 1)))


def _wanted(key: str, names: set[Site] | None, numbers: set[int] | None) -> bool:
    if not Site.looks_like(key):
        return False
    site = Site.parse(key)
    named = names is None or site in names or Site(site.name, None, None, site.stack) in names
    return named and (numbers is None or site.layer in numbers)


def _take_items(column: Any, chosen: Sequence[int]) -> Any:
    if isinstance(column, (list, tuple)):
        return [column[i] for i in chosen]
    return column[list(chosen)]


def _map(value: Any, function: Any) -> Any:
    return (
        value.map(lambda part: map_tensors(part, function))
        if isinstance(value, Entry)
        else map_tensors(value, function)
    )
