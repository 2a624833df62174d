"""What of a store goes into a dataset: of which prompts, which sites, in which form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.derive.results import PERPLEXITY, TOKEN_NLL
from actcache.errors import NotCachedError, OptionError, PromptTypeError, did_you_mean
from actcache.share.format import HIDDEN, LOGITS
from actcache.share.groups import by_name, group_and_layer, not_stored, preference
from actcache.share.stored_prompts import StoredPrompts, StoredTable, of_other_tokens
from actcache.store.asking import Located
from actcache.store.default import model_label, one_variant
from actcache.store.files import log
from actcache.store.memory import return_free_memory
from actcache.store.prompts import IDS
from actcache.store.records import COMPLETION, DERIVED, TOKENS
from actcache.store.site_names import LAST, logits_of
from actcache.store.spill import Spill
from actcache.store.tensors import kind_of

if TYPE_CHECKING:
    from actcache.store.spaces import SpaceInfo
    from actcache.store.store import Store

Ints = npt.NDArray[np.int64]
STREAM = "resid_post"
_AT_ONCE = 1 << 15
_NAMED = 5


@dataclass
class Group:
    """One kind of tensors of a dataset: a site at its layers.

    `sites`: the stored names, by layer; one under None for a site that is of no layer. `layout`: as in the store.
    """

    name: str
    layout: str
    sites: dict[int | None, str]
    located: Located = field(repr=False)

    @property
    def layers(self) -> list[int]:
        return [layer for layer in self.sites if layer is not None]

    @property
    def whole(self) -> bool:
        """Whether every token has its row."""
        return self.layout == TOKENS


@dataclass
class Selection:
    """What goes into a dataset.

    Attributes:
        space: the variant of the model.
        given: which of the prompts that were given are taken, in their order; `table`: what is stored of them.
        groups: their activations. `logits`: their largest logits, and how many.
        perplexity, token_nll: of those that have them.
        left_out: what was stored and is not taken, in words.
        spill: where what is said of each prompt may lie.
    """

    space: SpaceInfo
    given: Ints
    groups: list[Group]
    logits: tuple[int, Group] | None
    perplexity: Located | None
    token_nll: Located | None
    table: StoredTable
    left_out: list[str]
    spill: Spill = field(repr=False)


def select(
    store: Store,
    model: str | Path,
    prompts: Iterable[Any] | None,
    *,
    tensors: Sequence[str] | None = None,
    pooling: str | None = None,
    skip_missing: bool = True,
    revision: str | None = None,
    dtype: str | None = None,
    space: str | None = None,
) -> Selection:
    """What is stored of `prompts` (None: of all) for one variant of a model, checked to the last byte.

    Raises:
        AmbiguousVariantError: several variants of the model agree with what is chosen.
        OptionError: `tensors` or `pooling` names what is not stored.
        NotCachedError: nothing is stored of the prompts, or of some of them and `skip_missing` is False.
    """
    chosen = one_variant(store, model_label(model), revision=revision, dtype=dtype, space=space)
    spill = Spill(store.index_dir)
    given = StoredPrompts(store.everything(chosen), spill) if prompts is None else as_prompts(prompts)
    held = {layout: sites for layout, sites in store.held(chosen).items() if layout != COMPLETION}
    return_free_memory()
    finder = _Finder(store, chosen, given, held, tensors, pooling)
    found = finder.choose()
    return_free_memory()
    missing = spill.flatnonzero(~found)
    if len(missing) and (not skip_missing or not found.any()):
        raise NotCachedError(
            f"{len(missing)} of {len(given)} prompts lack what is to be shared of {chosen.model_name!r} "
            f"({', '.join(finder.names())}); the first is {finder.lacking(missing[:1])}. {_remedy(chosen)}"
            + (", or leave them out with skip_missing=True." if found.any() else " first, or name other tensors.")
        )
    if len(missing):
        finder.left_out.append(f"{len(missing)} of {len(given)} prompts, which lack some of it")
        shown = finder.lacking(missing[:_NAMED]) + (f"; and {more} more" if (more := len(missing) - _NAMED) > 0 else "")
        log.warning("%d of %d prompts are left out: they lack what is shared: %s", len(missing), len(given), shown)
    return finder.selection(spill.flatnonzero(found), spill)


def as_prompts(prompts: Any) -> list[Any]:
    """Prompts as a list, each looked at; `PromptError` or `PromptTypeError` for one that is none."""
    # A set has an order of its own, and rows and labels come in that of the prompts.
    if isinstance(prompts, (bytes, Mapping, set, frozenset)) or not isinstance(prompts, Iterable):
        raise PromptTypeError(f"prompts is a {type(prompts).__name__}: expected a list of texts, token ids or chats.")
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise OptionError("the list of prompts is empty: expected at least one, or None for all that are stored.")
    for i, prompt in enumerate(given):
        kind_of(prompt, i)
    return given


def _remedy(space: SpaceInfo) -> str:
    """How prompts that are not stored come to be."""
    if space.pulled is None:
        return "Warm them up"
    return f"Fetch what {space.pulled} has of them with pull_dataset(..., materialize=True)"


def _shown(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Finder:
    """Chooses groups. Where the caller names nothing, what all prompts have in common is taken, so that no prompt is
    lost to what only others have."""

    def __init__(
        self,
        store: Store,
        space: SpaceInfo,
        prompts: Sequence[Any],
        held: dict[str, list[str]],
        tensors: Sequence[str] | None,
        pooling: str | None,
    ) -> None:
        self.store, self.space, self.prompts, self.held = store, space, prompts, held
        self.pooling = pooling
        self.left_out: list[str] = []
        self.groups: list[tuple[str, str, dict[int | None, str]]] = []
        self.k: tuple[int, str] | None = None
        self.by_name = by_name(held)
        self.wanted = None if tensors is None else self._checked(tensors)
        self.perplexity = PERPLEXITY in held.get(DERIVED, ()) and (self.wanted is None or PERPLEXITY in self.wanted)
        if pooling is not None:
            layouts = {layout for choices in self.by_name.values() for layout in choices}
            if pooling not in layouts:
                raise OptionError(
                    f"nothing is stored with pooling={pooling!r} for {space.model_name!r}."
                    f"{did_you_mean(pooling, layouts)} Stored: {', '.join(sorted(layouts))}."
                )

    def names(self) -> list[str]:
        named = [name for name, _, _ in self.groups]
        return named + ([LOGITS] if self.k else []) + ([PERPLEXITY] if self.perplexity else []) or ["activations"]

    def lacking(self, numbers: Ints) -> str:
        """These prompts, and what each lacks of what is chosen."""
        groups = self.groups + ([(LOGITS, self.k[1], {None: f"logits.top{self.k[0]}.values"})] if self.k else [])
        if self.perplexity and self.wanted is not None:
            groups.append((PERPLEXITY, DERIVED, {None: PERPLEXITY}))
        said = []
        for i in numbers.tolist():
            lacks = []
            for name, layout, sites in groups:
                found = self.store.locate_sites(
                    self.space, [self.prompts[i]], list(sites.values()), layout, check=False
                )
                missing = [str(layer) for layer, has in zip(sites, found.found[0], strict=True) if not has]
                if missing:
                    layers = f" of layers {', '.join(missing)}" if len(missing) < len(sites) else ""
                    lacks.append(name + layers + ("" if layout == DERIVED else f" (as {layout})"))
            said.append(
                f"prompt {i}, {_shown(self.prompts[i])}" + (f", which lacks {', '.join(lacks)}" if lacks else "")
            )
        return "; ".join(said)

    def _checked(self, tensors: Sequence[str]) -> dict[str, set[int | None]]:
        """Groups that are asked for, each with the layers of it that are (None: all)."""
        if isinstance(tensors, str):
            tensors = [tensors]
        logits = logits_of({layout: set(sites) for layout, sites in self.held.items()})
        known = {HIDDEN if name == STREAM else name for name in self.by_name}
        known |= {LOGITS} if any(k is not None for ks in logits.values() for k in ks) else set()
        known |= {PERPLEXITY} if PERPLEXITY in self.held.get(DERIVED, ()) else set()
        wanted: dict[str, set[int | None]] = {}
        for name in tensors:
            group, layer = group_and_layer(str(name))
            group = str(name) if str(name) in known else group
            group, layer = (HIDDEN if group == STREAM else group), (None if str(name) in known else layer)
            choices = self.by_name.get(STREAM if group == HIDDEN else group, {})
            layers = {one for sites in choices.values() for one in sites}
            if group not in known or (layer is not None and layer not in layers):
                raise not_stored(str(name), self.space.model_name, layers if group in known else (), known)
            wanted.setdefault(group, set()).add(layer)
        if not wanted:
            raise OptionError(f"tensors is empty: expected some of {', '.join(sorted(known))}, or None for all.")
        return wanted

    def choose(self) -> npt.NDArray[np.bool_]:
        """Fill `groups`; which prompts have all of them, bool ``[B]``."""
        some = np.zeros(len(self.prompts), bool)
        coverage: dict[str, list[tuple[str, dict[int | None, str], npt.NDArray[np.bool_]]]] = {}
        for name, choices in self.by_name.items():
            shown = HIDDEN if name == STREAM else name
            if self.wanted is not None and shown not in self.wanted:
                continue
            for layout, sites in choices.items():
                if self.pooling not in (None, layout):
                    continue
                layers = None if self.wanted is None else self.wanted[shown]
                taken = {k: s for k, s in sites.items() if layers is None or None in layers or k in layers}
                found = self.store.locate_sites(self.space, self.prompts, list(taken.values()), layout, check=False)
                for piece in _pieces(len(some)):
                    some[piece] |= found.found[piece].any(axis=1)
                coverage.setdefault(shown, []).append((layout, taken, found.found))
        keep = some.copy() if self.wanted is None else np.ones(len(self.prompts), bool)
        # The residual stream decides first who is in.
        for shown in sorted(coverage, key=lambda name: name != HIDDEN):
            keep &= self._take(shown, coverage[shown], keep)
        if not coverage:
            keep[:] = True
        self._take_logits(keep, alone=not coverage)
        if self.k is not None and (self.wanted is not None or not coverage):
            keep &= all_of(self._logits(self.prompts, check=False).found)
        if self.perplexity and self.wanted is not None:
            keep &= self._located(PERPLEXITY, DERIVED, self.prompts, check=False).found[:, 0]
        if not self.groups and self.k is None and self.wanted is not None and set(self.wanted) == {PERPLEXITY}:
            raise OptionError("tensors: perplexity is a column beside vectors or logits: name some of these, too.")
        if not self.groups and self.k is None:
            what = "of the residual stream or any other site" if self.wanted is None else f"of {', '.join(self.wanted)}"
            raise NotCachedError(
                f"nothing {what} is stored for all of these prompts of {self.space.model_name!r}. "
                f"{_remedy(self.space)} first."
            )
        return keep

    def _take(
        self,
        name: str,
        choices: list[tuple[str, dict[int | None, str], npt.NDArray[np.bool_]]],
        keep: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.bool_]:
        """Choose layout and layers of one group; who has them."""
        best = None
        for layout, sites, found in sorted(choices, key=lambda choice: preference(choice[0])):
            common, some = np.ones(len(sites), bool), self.wanted is not None
            # Layers that everybody has who has any.
            for piece in _pieces(len(keep)) if self.wanted is None else ():
                having = found[piece][keep[piece] & found[piece].any(axis=1)]
                common &= np.logical_and.reduce(having)
                some = some or bool(len(having))
            covered = int((keep & all_of(found, common)).sum()) if some and common.any() else 0
            if covered and (best is None or covered > best[0]):
                best = covered, layout, sites, common, found
        everybody = int(keep.sum())
        if best is None or (self.wanted is None and name != HIDDEN and best[0] < everybody):
            if self.wanted is None:
                self._leave_out(f"{name}: not every prompt has it")
                return np.ones(len(keep), bool)
            return np.zeros(len(keep), bool)
        _, layout, sites, common, found = best
        lost = [str(layer) for layer, kept in zip(sites, common.tolist(), strict=True) if not kept]
        if lost:
            self._leave_out(f"{name}: not every prompt has the layers {', '.join(lost)}")
        others = sorted({other for other, _, _ in choices} - {layout})
        if others:
            self._leave_out(f"{name}: also stored as {', '.join(others)}")
        taken = {layer: site for (layer, site), kept in zip(sites.items(), common.tolist(), strict=True) if kept}
        self.groups.append((name, layout, taken))
        return all_of(found, common)

    def _take_logits(self, keep: npt.NDArray[np.bool_], *, alone: bool) -> None:
        """The largest logits of the last token, of as many as are stored; `alone`: nothing else says who is in."""
        if self.wanted is not None and LOGITS not in self.wanted:
            return
        held = {layout: set(sites) for layout, sites in self.held.items()}
        ks = {k for k in logits_of(held).get("last", set()) if k is not None}
        for k in sorted(ks, reverse=True):
            for layout in (LAST, TOKENS):
                if f"logits.top{k}.values" not in held.get(layout, ()):
                    continue
                self.k = k, layout
                found = self._logits(self.prompts, check=False).found
                whole = all_of(found)
                if whole[keep].all() or ((alone or self.wanted is not None) and whole.any()):
                    return
                self.k = None
        if ks:
            self._leave_out(f"{LOGITS}: not every prompt has it")

    def _leave_out(self, what: str) -> None:
        self.left_out.append(what)
        log.info("left out of the dataset: %s", what)

    def _logits(self, prompts: Sequence[Any], *, check: bool) -> Located:
        assert self.k is not None
        k, layout = self.k
        names = [f"logits.top{k}.values", f"logits.top{k}.indices"]
        return self.store.locate_sites(self.space, prompts, names, layout, check=check)

    def _located(self, site: str, layout: str, prompts: Sequence[Any], *, check: bool = True) -> Located:
        return self.store.locate_sites(self.space, prompts, [site], layout, check=check)

    def selection(self, given: Ints, spill: Spill) -> Selection:
        """What is chosen of the prompts `given`, located for good: every byte that will be read is checked."""
        prompts = self.prompts
        if len(given) < len(prompts) and isinstance(prompts, StoredPrompts):
            prompts = prompts.chosen(given)
        elif len(given) < len(prompts):
            prompts = [prompts[i] for i in given.tolist()]
        groups = []
        for name, layout, sites in self.groups:
            located = self.store.locate_sites(self.space, prompts, list(sites.values()), layout)
            groups.append(Group(name, layout, sites, located))
        logits = None
        if self.k is not None:
            names: dict[int | None, str] = {0: f"logits.top{self.k[0]}.values", 1: f"logits.top{self.k[0]}.indices"}
            logits = self.k[0], Group(LOGITS, self.k[1], names, self._logits(prompts, check=True))
        for group in [*groups, *([logits[1]] if logits else [])]:
            damaged = np.flatnonzero(~all_of(group.located.found))
            if len(damaged):
                raise NotCachedError(
                    f"{len(damaged)} prompts can no longer be read at {group.name} (the first is prompt "
                    f"{given[damaged[0]]}): `actcache verify` says why. Warm them up again."
                )
            # They are all there, and mostly in one place: nothing to be said of each prompt.
            group.located.found = np.broadcast_to(True, group.located.found.shape)
            if (group.located.owner == 0).all():
                group.located.owner = np.broadcast_to(np.int32(0), len(group.located.owner))
        perplexity = self._located(PERPLEXITY, DERIVED, prompts) if self.perplexity else None
        token_nll = None
        if self.perplexity and TOKEN_NLL in self.held.get(TOKENS, ()):
            token_nll = self._located(TOKEN_NLL, TOKENS, prompts)
        first, *others = [*groups, *([logits[1]] if logits else [])]
        self._check_tokens(first, others, [one for one in (perplexity, token_nll) if one is not None], given)
        # Whoever has given ids looks for ids, and may not want to publish the text.
        bare = None
        if isinstance(prompts, list):
            bare = np.array([kind_of(prompt)[0] == IDS for prompt in prompts], bool)
        table = StoredTable(token_nll if token_nll is not None and token_nll.found.all() else first.located, bare)
        return Selection(self.space, given, groups, logits, perplexity, token_nll, table, self.left_out, spill)

    def _check_tokens(self, first: Group, others: Sequence[Group], results: Sequence[Located], given: Ints) -> None:
        """What is said of a prompt is of the same tokens: else `OptionError`, or it has no perplexity."""
        for group in others:
            apart = np.flatnonzero(of_other_tokens(first.located, group.located, whole=first.whole and group.whole))
            if len(apart):
                number = given[apart[0]]
                raise OptionError(
                    f"{len(apart)} prompts are stored with other token ids at {group.name} than at {first.name}, since "
                    f"two tokenizers have read them, or one with other settings; the first is prompt {number}, "
                    f"{_shown(self.prompts[int(number)])}. Pass their token ids, or share one of these with tensors=."
                )
        for located in results:
            apart = np.flatnonzero(of_other_tokens(first.located, located, whole=False))
            located.found[apart], located.owner[apart] = False, -1


def all_of(found: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
    """Which rows of `found` bool ``[n, sites]`` have all sites, or those marked in `columns`."""
    whole = np.empty(len(found), bool)
    for piece in _pieces(len(whole)):
        some = found[piece] if columns is None else found[piece][:, columns]
        whole[piece] = some.all(axis=1)
    return whole


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))
