"""ActivationCache: what one capture, or many, left in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from actcache.capture import display, memory
from actcache.capture.aggregation import Join, overlay
from actcache.capture.analysis import Analysis
from actcache.capture.entry import Entry
from actcache.capture.notes import ValueWithInfo
from actcache.capture.strategies import Strategies, Strategy
from actcache.capture.values import map_tensors, read_device, read_dtype
from actcache.errors import GradientError, JoinError, OptionError, require_choice
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.capture.saved import SavedCache


class ActivationCache(Analysis):
    """A mapping from module paths to `Entry` and from sites to tensors, in the order in which they were asked for; any
    other text may be a key of your own.

    A key is looked up as written, then without one leading "model.", then as a site under any of its names; one head
    (``cache["pattern.3.1"]``) is also a view of all heads. Modules can be reached by attribute too:
    ``cache.transformer.h[-1].output``; names of your own for them (``names=`` of a capture) do in either. The cache may
    be read inside its block.

    Attributes: `missed` (keys that were asked for and did not run), `tokens` (strings per prompt, when captured
    through `run_with_cache` with a tokenizer), `columns` (values of your own with one item per prompt), `metadata`.
    """

    # -- joining batches

    def cat(self, other: ActivationCache, *, missing: str = "error", pad: bool = True) -> Self:
        """Append the prompts of `other` to this cache, which is returned; `other` is copied and stays as it is.

        Tensors and arrays join on dim 0, shorter ones are padded with zeros and the mask says so (without `pad` they
        become a list, one item per batch); dicts join per key, modules per visit, labels in `columns` per prompt; lists
        are strung together, and all other values are collected into a list, one item per batch. What was registered
        with `register_aggregation` comes first. Keys that only one side has: an error, or with ``missing="pad"`` zeros
        (None) and a mask that leaves them out, or with ``missing="drop"`` they go. Captures of every token do not join
        those of chosen `positions`, which count other tokens.

        Values are joined when one is next read, so that any number of calls in a row costs one join; to read values in
        between at no cost, see `deferred_mode`. Raises `JoinError` or `AggregationError`; either changes nothing.
        """
        return self._add(other, missing, pad, copying=True)

    def _add(self, other: ActivationCache, missing: str, pad: bool, *, copying: bool) -> Self:
        require_choice(missing, ("error", "pad", "drop"), "missing")
        if not isinstance(other, ActivationCache):
            raise OptionError(f"caches are joined with caches, not with {type(other).__name__}")
        if self._source is not None:
            raise JoinError("the block that fills this cache is still open: join caches after it")
        batch = other._batch()
        if not batch.items and not batch.columns:
            return self
        if None not in (self._cut, other._cut) and self._cut != other._cut:
            chosen, all_of = ("what is added", "what there is") if other._cut else ("what there is", "what is added")
            raise JoinError(
                f"{chosen} holds chosen positions (positions=), {all_of} every token: a position would mean another "
                "token in one than in the other. Capture both with the same positions, or take all tokens in both and "
                "choose later"
            )
        join = self._join
        if join is None or join.pad != pad:
            self._settle()
            join = Join(self._batch(), self._registered(), pad=pad)
        join.add(batch, missing=missing, copy=copying)
        self._join = join
        self._depths, self._model = self._depths or other._depths, self._model or other._model
        self._cut = other._cut if self._cut is None else self._cut
        self._layouts, self._called = self._layouts or other._layouts, self._called or other._called
        self.missed += [key for key in other.missed if key not in self.missed]
        return self

    @classmethod
    def concatenate(cls, caches: Iterable[ActivationCache], *, missing: str = "error", pad: bool = True) -> Self:
        """One cache of the prompts of all `caches`, by the rules of `cat`; it shares no memory with them. Strategies
        registered with any of them hold (of the same pattern, the last)."""
        parts = list(caches)
        joined = cls()
        for part in parts:
            if isinstance(part, ActivationCache) and part._strategies is not None:
                joined._registered().update(part._strategies)
        for part in parts:
            joined._add(part, missing, pad, copying=False)
        joined._settle()
        return joined

    @contextmanager
    def deferred_mode(self) -> Iterator[Self]:
        """Inside the block the cache reads as it was before, and what `cat` adds is joined once, when the block ends:
        also when it ends by an exception. What does not fit is refused by the very `cat` that adds it."""
        self._data  # noqa: B018 - joins what was added before
        self._deferred += 1
        try:
            yield self
        finally:
            self._deferred -= 1
            if not self._deferred:
                self._settle()

    def register_aggregation(self, key_pattern: str, function: Strategy) -> None:
        """Join the values of `key_pattern` (a key, or a pattern with ``*``, ``?``, ``[]``; the most specific wins, of
        equals the last) by ``function(old_or_None, new) -> merged``. Ready-made ones are in `ac.aggregate`.

        A pattern that matches no key is an error at the first join. Strategies go with copies, pickles and files.
        """
        self._settle()
        self._registered().register(key_pattern, function)

    def remove_aggregation(self, key_pattern: str) -> None:
        """Forget the strategy of exactly this pattern; raises `UnknownKeyError` when there is none."""
        self._settle()
        self._registered().remove(key_pattern)

    def _registered(self) -> Strategies:
        if self._strategies is None:
            self._strategies = Strategies()
        return self._strategies

    def __or__(self, other: Mapping[str, Any]) -> Self:
        """A new cache with the entries of both; of keys that both have, the right one's."""
        if not isinstance(other, Mapping):
            return NotImplemented
        right = other if isinstance(other, ActivationCache) else ActivationCache(dict(other))
        both = copy.copy(self)
        both._take(overlay(self._batch(), right._batch()))
        if right._strategies is not None:
            both._registered().update(right._strategies)
        both._depths, both._layouts = self._depths or right._depths, self._layouts or right._layouts
        both._called = self._called or right._called
        both.missed += [key for key in right.missed if key not in both.missed]
        return both

    def __ror__(self, other: Mapping[str, Any]) -> Self:
        if not isinstance(other, Mapping):
            return NotImplemented
        return type(self)(dict(other)) | self

    __add__, __radd__ = __or__, __ror__

    # -- gradients

    def grad(self, key: str) -> Any:
        """The gradient of the value of `key`, captured with ``include_grads``: of a site a tensor in the form of its
        value, of a module `Entry.grad`. Several backward passes add up; a pass on which no loss depended gives zeros.

        Raises `UnknownKeyError` for an absent key, and `GradientError` where there is no gradient: none was asked for,
        none can arrive, or none has yet.
        """
        found, value = self._held(key)
        if isinstance(value, Entry):
            gradient = value.grad
        elif self._gradients is None or found not in self._gradients:
            head = Site.parse(found).head if Site.looks_like(found) else None
            if head is not None and self._gradients is not None:
                return self.gradients()[found]
            raise GradientError(
                f"no gradient was captured of {key!r}: capture with include_grads=True. Of a part of a cache, or of "
                "joined caches, take that part, or join, what gradients() gives."
            )
        else:
            gradient = self._gradients.get(found)
        if gradient is None:
            raise GradientError(
                f"no gradient of {key!r} has arrived: capture with include_grads=True, and call backward() on a loss "
                "that depends on it"
            )
        return gradient

    def gradients(self) -> Self:
        """A cache of the gradients that have arrived, under the keys of their values and with the same tokens and
        columns: to select from, join and save like any other. The values' own files and joins hold no gradients."""
        found = copy.copy(self)
        found._items, sites = {}, {} if self._gradients is None else self._gradients.arrived()
        for key, value in self._data.items():
            if key in sites:
                found._items[key] = sites[key]
            elif isinstance(value, Entry):
                arrived = [visit.grad if visit.in_graph else None for visit in value]
                if any(gradient is not None for gradient in arrived):
                    found._items[key] = Entry(arrived, None)
        found._gradients, found._strategies = None, None
        return found

    # -- notes

    def add_with_info(self, key: str, value: Any, info: Any) -> None:
        """Store `value` under `key` with a note about it: ``cache[key]`` is a `ValueWithInfo`."""
        self[key] = ValueWithInfo(value, info)

    def info(self, key: str) -> Any:
        """The note on the value of `key`; None when it has none. Raises `UnknownKeyError` for an absent key."""
        value = self[key]
        return value.info() if isinstance(value, ValueWithInfo) else None

    @property
    def metadata(self) -> dict[str, Any]:
        """What was said with `add_metadata` about how the values were made. Caches to be joined must agree in it."""
        # Also in deferred mode: what is written here must agree with what comes next.
        self._settle()
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    def add_metadata(
        self,
        target_token_positions: Any = None,
        model_name: str | None = None,
        extraction_config: Any = None,
        interventions: Any = None,
        **more: Any,
    ) -> None:
        """Note how the values were made; fields given before and not given now stay."""
        given = {
            "target_token_positions": target_token_positions,
            "model_name": model_name,
            "extraction_config": extraction_config,
            "interventions": interventions,
        }
        kept = {name: value for name, value in given.items() if value is not None or name not in self.metadata}
        self.metadata.update(kept | more)

    # -- memory

    @property
    def nbytes(self) -> int:
        """Bytes of all the memory that the values keep alive; what several of them share counts once."""
        return memory.held_bytes(self._data.values())

    def memory_size(self, key: str | None = None) -> str:
        """Size of the value of `key`, or of all values: ``"400 B"``, ``"12.35 MB"`` (decimal units), and for views of
        larger memory ``"400 B (view of 12.35 MB)"``. Raises `UnknownKeyError` for an absent key."""
        return memory.size_of(self._data.values() if key is None else [self._held(key)[1]])

    def memory_tree(self, print_tree: bool = False, grouped_tree: bool = False) -> dict[str, Any]:
        """Size of every value by key, nested as the values are; with `grouped_tree` layers and heads are folded, as in
        ``"resid_post (12 items)"``. `print_tree` prints it, with totals for what is nested."""
        data = self._data
        sizes = memory.grouped(data) if grouped_tree else memory.tree(data)
        if print_tree:
            print("\n".join([f"total: {memory.size_of(data.values())}", *memory.lines(sizes, data)]))
        return sizes

    def to(self, target: str | torch.device | torch.dtype) -> Self:
        """Move every tensor to a device, or cast every floating tensor to a dtype, wherever it is nested, in place;
        the cache itself is returned. Tensors that are one stay one."""
        dtype = target if isinstance(target, torch.dtype) else None
        if isinstance(target, str) and isinstance(getattr(torch, target, None), torch.dtype):
            dtype = read_dtype(target)
        if dtype is not None:
            # One of our own checks: integers and booleans are no targets.
            read_dtype(dtype)
        device = read_device(target) if dtype is None and not isinstance(target, torch.dtype) else None
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                cast = dtype is not None and tensor.is_floating_point()
                moved[id(tensor)] = tensor, tensor.to(device=device, dtype=dtype if cast else None)
            return moved[id(tensor)][1]

        self._settle()
        data = self._data
        new = {
            key: value.map(lambda part: map_tensors(part, move))
            if isinstance(value, Entry)
            else map_tensors(value, move)
            for key, value in data.items()
        }
        data.update(new)
        return self

    def cpu(self) -> Self:
        """Move every tensor to the CPU; the cache itself is returned."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move every tensor to a GPU (None: the current one); the cache itself is returned."""
        return self.to("cuda" if device is None else torch.device(device))

    # -- keeping

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything to one safetensors file, whole or not at all: values, tokens, columns, notes, metadata and
        strategies (by importable name). No pickle; views write only what they show, and tensors come back on the CPU
        without a graph. `path` is a file, or a folder, in which a new file is made; returns the file.

        Raises `UnsavableError`, naming the key, for what has no place in such a file; `MissingFileError` when there is
        no such folder."""
        from actcache.capture.saving import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote. Raises `MissingFileError`, or `FormatError` for another file. Nothing in the file is
        run: a registered strategy is imported when a join first needs it."""
        from actcache.capture.saving import load

        return load(cls, path)

    @classmethod
    def saved(cls, folder: str | PathLike[str], **fields: Any) -> list[SavedCache[Self]]:
        """The caches saved in `folder` and below, the newest last, of which only the headers are read: those whose
        metadata (`add_metadata`) has all of `fields`, such as ``tag="baseline"``.

            ActivationCache.saved("runs", model_name="gpt2")[-1].load()

        A cache is its file: it is moved, renamed and removed with it. Raises `MissingFileError` for a missing folder.
        """
        from actcache.capture.saved import saved_in

        return saved_in(cls, folder, fields)

    # -- display

    def __repr__(self) -> str:
        return display.as_text(type(self).__name__, self._data, self._about())

    def _repr_html_(self) -> str:
        return display.as_html(type(self).__name__, self._data, self._about())

    def _about(self) -> str:
        return display.about(list(self._tables().values()), list(self._columns or ()))
