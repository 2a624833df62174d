"""The mapping that a cache is: how a key is found, and where the values come from."""

from __future__ import annotations

import copy
import difflib
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from actcache.capture.aggregation import Batch, Join
from actcache.capture.joining import Refused
from actcache.capture.names import Names
from actcache.capture.nodes import Node
from actcache.capture.rows import PromptRows
from actcache.capture.strategies import Strategies
from actcache.capture.tokens import Mask, Tables, Tokens, TokenState, position_axes, tensor_of
from actcache.capture.values import same_content
from actcache.capture.watching import SiteGradients
from actcache.errors import ActCacheError, OptionError, UnknownKeyError, UnknownSiteError, did_you_mean
from actcache.model.layout import Layouts, known_layouts
from actcache.model.sites import HEAD_AXIS, SITE_NAMES, Site

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

_LIKE_A_SITE = re.compile(r"(?:(?:encoder|decoder)\.)?([a-z][a-z_]{4,}?)(?:\.|_L?)-?\d+(?:\.\d+|H\d+)?")


class Source(Protocol):
    """A block that is still filling the cache."""

    def publish(self, items: dict[str, Any]) -> None: ...

    def tokens(self) -> TokenState: ...

    def missed(self) -> list[str]: ...

    @property
    def gradients(self) -> SiteGradients | None: ...

    def close(self) -> Callable[[], TokenState]:
        """Let go of the values; what is left answers for the tokens."""


class Keyed(MutableMapping[str, Any]):
    """Values by key, with the tokens they belong to and the batches that are still to be joined to them."""

    # What most caches never need stands here until they do.
    _masks: dict[str, Mask] | None = None
    _columns: dict[str, Any] | None = None
    _metadata: dict[str, Any] | None = None
    _strategies: Strategies | None = None
    _gradients: SiteGradients | None = None
    _join: Join | None = None
    _called: Names | None = None
    # Whether positions were chosen when it was captured; None where nobody knows.
    _cut: bool | None = None
    _deferred = 0
    _batches = 1

    def __init__(self, items: MutableMapping[str, Any] | None = None) -> None:
        self._items: dict[str, Any] = dict(items or {})
        self._source: Source | None = None
        self._model: weakref.ref[nn.Module] | None = None
        # Blocks of each stack of the model, by the stack's name.
        self._depths: dict[str | None, int] = {}
        self._layouts: Layouts = {}
        self._tokens: Tables | None = None
        self._read_tokens: Callable[[], TokenState] | None = None
        self.missed: list[str] = []
        self.tokens: list[list[str]] | None = None

    def _begin(self, source: Source, model: nn.Module, anatomy: Anatomy | None) -> None:
        self._source = source
        self._gradients = source.gradients
        self._model = weakref.ref(model)
        if anatomy is not None:
            self._depths = anatomy.depths
            self._layouts = known_layouts(anatomy)

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
        elif self._join is not None and not self._deferred:
            self._settle()
        return self._items

    def _settle(self) -> None:
        """Join what was added."""
        join, self._join = self._join, None
        if join is not None:
            self._take(join.result())

    def _take(self, batch: Batch) -> None:
        self._items = batch.items
        self._tokens, self._read_tokens, self._masks = batch.state.tables, None, batch.state.masks
        self._columns, self._metadata = batch.columns, batch.metadata
        self._batches, self.tokens = batch.batches, batch.tokens

    def _batch(self) -> Batch:
        """All that is held, for joining."""
        items, state = self._data, self._state()
        batches = self._batches if items else 0
        return Batch(
            items, state, self._n_rows(), batches, dict(self._columns or {}), dict(self._metadata or {}), self.tokens
        )

    def _n_rows(self) -> int:
        """How many prompts the values are of."""
        for table in self._tables().values():
            if table.mask is not None:
                return int(table.mask.shape[0])
        if self._columns:
            return len(next(iter(self._columns.values())))
        # Values of the caller's own may be of anything.
        for of_site in (True, False):
            for key, value in self._data.items():
                if Site.looks_like(key) is of_site:
                    # Batches that were joined without padding are a list.
                    parts = value if isinstance(value, list) and of_site else [value]
                    tensors = [tensor for part in parts if (tensor := tensor_of(part)) is not None and tensor.ndim]
                    if tensors and len(tensors) == len(parts):
                        return sum(tensor.shape[0] for tensor in tensors)
        return 1

    def _prompt_rows(self) -> PromptRows:
        return PromptRows(self._tables(), self._n_rows())

    # -- mapping

    def __getitem__(self, key: str) -> Any:
        return self._held(key)[1]

    def _held(self, key: str) -> tuple[str, Any]:
        """The value of `key` and the name it goes by: that of a key, or of one head of what is held of all heads."""
        data = self._data
        found = self._find(key, data) if isinstance(key, str) else None
        head = self._head(key) if found is None and isinstance(key, str) else None
        if head is not None:
            return head
        found = self._key(key, data) if found is None else found
        value = data[found]
        if isinstance(value, Refused):
            raise value.error(found)
        return found, value

    def _head(self, key: str) -> tuple[str, Any] | None:
        """One head's part of the value of all heads (a view), or None where there is none."""
        site = self._site(key)
        if site is None or site.head is None:
            return None
        whole = self._find(str(replace(site, head=None)), self._names)
        if whole is None:
            return None
        value, axis = self[whole], HEAD_AXIS[site.name]
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, Tensor) and part.ndim > axis and site.head < part.shape[axis] for part in parts):
            return None
        views = [part.select(axis, site.head) for part in parts]
        return str(site), views if isinstance(value, list) else views[0]

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise OptionError(f"the keys of a cache are strings, not {key!r}")
        self._settle()
        data = self._data
        home = self._home(key, data)
        data[home] = value
        if self._masks:
            self._masks.pop(home, None)

    def __delitem__(self, key: str) -> None:
        self._settle()
        data = self._data
        found = self._key(key, data)
        del data[found]
        if self._masks:
            self._masks.pop(found, None)

    def _home(self, key: str, data: dict[str, Any]) -> str:
        """The key under which a value is stored: as written, or as the site of that name that is there already.

        Raises `UnknownSiteError` for what reads as a mistyped site; any other text is a key.
        """
        home = self._find(key, data)
        if home is not None:
            return home if key in data or Site.looks_like(key) else key
        site = self._site(key)
        if site is not None:
            # Where the model's end is known, a layer is named from the front.
            return str(site) if site.layer is not None and str(site) != str(Site.parse(key)) else key
        found = _LIKE_A_SITE.fullmatch(key)
        near = difflib.get_close_matches(found[1], SITE_NAMES, 1, 0.85) if found else []
        if found and near and near[0] != found[1]:
            meant = key.replace(found[1], near[0], 1)
            raise UnknownSiteError(
                f"{key!r} reads as a mistyped site. Did you mean {meant!r}? (Any text that is unlike a site is a key "
                "of your own.)"
            )
        return key

    @property
    def _names(self) -> Mapping[str, Any]:
        """The keys, which are known without joining values."""
        return self._join.keys if self._join is not None and not self._deferred else self._data

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (self._find(key, self._names) is not None or self._head(key) is not None)

    def __eq__(self, other: object) -> bool:
        """By content: the same keys, and values equal in dtype, shape and elements."""
        if not isinstance(other, Keyed):
            return NotImplemented
        mine, theirs = self._data, other._data
        return mine.keys() == theirs.keys() and all(same_content(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def _find(self, key: str, data: Mapping[str, Any]) -> str | None:
        """The key under which `key` is held, or None."""
        if key in data:
            return key
        if self._called is not None:
            meant = self._called.find(key, data.__contains__)
            if meant is not None:
                return meant
        bare = "" if key == "model" else key.removeprefix("model.")
        if bare in data:
            return bare
        site = self._site(key)
        if site is None:
            return None
        if str(site) in data:
            return str(site)
        # Who fills a cache by hand may use another name of a site.
        return next((held for held in data if Site.looks_like(held) and Site.parse(held) == site), None)

    def _site(self, key: str) -> Site | None:
        """The site that `key` names, its layer counted from the front; None where it names none."""
        try:
            site = Site.parse(key)
        except ActCacheError:
            return None
        if site.layer is not None and site.layer < 0:
            if site.stack not in self._depths:
                return None
            site = replace(site, layer=site.layer + self._depths[site.stack])
        return site

    def _key(self, key: str, data: dict[str, Any]) -> str:
        found = self._find(key, data) if isinstance(key, str) else None
        if found is None:
            held = ", ".join(repr(k) for k in list(data)[:5]) + (", ..." if len(data) > 5 else "")
            hint = (self._capture_it(key, data) or did_you_mean(key, data)) if isinstance(key, str) else ""
            raise UnknownKeyError(f"{key!r} is not in the cache, which holds {held or 'nothing'}.{hint}")
        return found

    def _capture_it(self, key: str, data: Mapping[str, Any]) -> str:
        """How to get a site that is not held; empty for a key that is none."""
        site = self._site(key)
        if site is None or not site.complete:
            return ""
        if (depth := self._depths.get(site.stack)) is not None and (site.layer or 0) >= depth:
            return f" The model has {depth} layers (0 to {depth - 1})."
        whole = None if site.head is None else data.get(self._find(str(replace(site, head=None)), data) or "")
        if isinstance(whole, Tensor) and whole.ndim > HEAD_AXIS[site.name]:
            heads = whole.shape[HEAD_AXIS[site.name]]
            return f" {str(replace(site, head=None))!r} has {heads} heads (0 to {heads - 1})."
        wanted = site.stack, site.name, site.head
        alike = [held for held in self._sites() if (held.stack, held.name, held.head) == wanted]
        if alike:
            near = ", ".join(repr(str(held)) for held in alike[:3]) + (", ..." if len(alike) > 3 else "")
            return f" It holds {near}: add layer {site.layer} to layers= where it is captured."
        return f" Add it where the cache is captured, sites=[..., {str(site)!r}].{did_you_mean(key, data)}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(Node(self._data, "", self._model, self._called), name)

    # -- tokens

    @property
    def input_ids(self) -> Tensor | None:
        """Token ids ``[B, S]`` of what was captured, on the CPU; None when not known. Of an encoder-decoder those of
        the stack that was captured, the encoder's (the prompts) where both were."""
        return self._token_table().ids

    @property
    def attention_mask(self) -> Tensor | None:
        """Which positions are real, bool ``[B, S]`` on the CPU; None when not known. Of the stack of `input_ids`."""
        mask = self._token_table().mask
        if mask is None and self._masks:
            # Values that came without tokens, and were padded: when all were padded alike, that is the mask.
            first, *others = (own.positions for own in self._masks.values())
            mask = first if all(same_content(first, other) for other in others) else None
        return mask

    def _token_table(self) -> Tokens:
        return next(iter(self._tables().values()), Tokens())

    def _tables(self) -> Tables:
        if self._source is not None:
            return self._learned(self._source.tokens())
        if self._join is not None and not self._deferred:
            self._settle()
        if self._tokens is None:
            self._tokens = self._learned(self._read_tokens()) if self._read_tokens is not None else {}
            self._read_tokens = None
        return self._tokens

    def _learned(self, state: TokenState) -> Tables:
        """The tables of what a block says, whose masks are taken over for the values that they are of: others may
        stand in their place by now."""
        data = self._data
        self._masks = {
            key: mask
            for key, mask in state.masks.items()
            if (value := tensor_of(data.get(key))) is not None
            and value.ndim > (axis := position_axes(key)[0])
            and (value.shape[0], value.shape[axis]) == mask.positions.shape
        } or None
        return state.tables

    def _state(self) -> TokenState:
        return TokenState(self._tables(), self._masks or {})

    def _mask_of(self, key: str, value: Tensor) -> Tensor | None:
        """Which positions of the value of `key` are real; None when not known."""
        return self._state().mask_of(key, value)

    def _sites(self) -> list[Site]:
        return [
            Site.parse(key)
            for key, value in self._data.items()
            if (isinstance(value, Refused) or tensor_of(value) is not None) and Site.looks_like(key)
        ]

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        # First, since masks are learned with them.
        tables = self._tables()
        state = {**self.__dict__, "_items": self._data, "_tokens": tables}
        # A copy is a cache of its own: it knows neither the model nor the block that fills the original.
        state |= {"_source": None, "_read_tokens": None, "_model": None, "_deferred": 0}
        if self._gradients is not None:
            state["_gradients"] = SiteGradients(self._gradients.arrived())
        return {
            name: copy.copy(value) if isinstance(value, (dict, list, Strategies)) else value
            for name, value in state.items()
        }
