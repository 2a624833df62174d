"""Change values of a running model: `edit`, with functions of the caller's or ready-made edits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from actcache.capture.edit_functions import Called, Function
from actcache.capture.edit_values import headed, is_pattern, resolve_heads
from actcache.capture.generation import Watch
from actcache.capture.knockout import Knockout, knockout
from actcache.capture.prompt_positions import PromptPositions
from actcache.capture.readers import OnInput
from actcache.capture.ready_made import OfValue, ReadyMade, ablate, patch, steer
from actcache.capture.recording import instead_of_missing
from actcache.capture.repeats import Part
from actcache.capture.requests import resolve_modules
from actcache.errors import (
    EditError,
    MissedModuleError,
    OptionError,
    SiteUnavailableError,
    UnknownModuleError,
    nearest,
)
from actcache.model.anatomy import Anatomy, describe, original
from actcache.model.eager import eager
from actcache.model.forms import first_tensor
from actcache.model.implementation import holding_probabilities
from actcache.model.inner_writing import head_count
from actcache.model.replacing import with_first_tensor
from actcache.model.sites import PER_HEAD, SITE_NAMES, Site
from actcache.model.structure import descend, require_module
from actcache.model.taps import Taps
from actcache.model.writing import WritePoint, write_point

__all__ = ["Editing", "ReadyMade", "ablate", "edit", "knockout", "patch", "steer"]

EditedSide = Literal["input", "output", "scores", "pattern"]
Edits = Mapping[Any, "Function | ReadyMade"] | ReadyMade | Sequence[ReadyMade]


def edit(model: nn.Module, edits: Edits) -> Editing:
    """Change values of `model` while the block is open.

        with ac.edit(model, {"resid_post.5": lambda x: x * 0, "transformer.h.3.attn": change}):
            model(**inputs)
        with ac.edit(model, [ac.ablate("attn_out.3"), ac.steer("resid_post.8", vector, positions="last")]):
            model.generate(**inputs)

    `edits`: functions by target, or ready-made edits (`ablate`, `steer`, `patch`, `knockout`), applied in their order.
    A target is a complete site name, a module's path, a pattern of paths, or a module object; a string that reads as a
    site is one.

    A function is given a copy of the value and returns the new one, or None when it changed the copy in place. Shape,
    dtype and device stay the same. At a site the value has the shape that `capture` shows, ``[B, S, D]`` or another one
    (of `z` ``[B, S, H, hd]``, of `pattern` ``[B, H, S, S]``), and the whole model goes on with the new one: what is
    written to `resid_mid` is both what the MLP reads and what it adds to. At a module it is whatever the module
    returns.

    Of `head_out` those heads change whose values do, and no others: what they make of `z` is taken out of attention's
    output, and their new values are added to it. A `pattern` is used as it is written, without being brought back to a
    sum of 1. A site that a model computes and does not go on with is refused: the `router_logits` of Mixtral and most
    others can be read and not edited, since the router goes on with scores that it made of them (edit what its module
    returns, by its path).

    An edit stands behind all hooks of the caller, and captures see what it made, whichever block was opened first;
    edits of one value follow each other in the order in which their blocks were opened. Gradients flow through edits;
    where the model runs blocks once more for them (gradient checkpointing) call ``backward()`` inside the block, which
    is an `EditError` behind it; passes from before the block are repeated as they were. Positions are those of the
    sequence that is handed over: of the prompt, in a call of `generate`, so that "last" is its last token in every
    step, with and without a KV cache; with "all" new tokens are edited too. As with `capture`, only passes of the
    thread that opens the block are edited.

    Raises, before any pass, `UnknownModuleError`, `UnknownSiteError`, `SiteUnavailableError`, `AdditivityError`,
    `LayerRangeError` or `OptionError`; during a pass `EditError` for a new value that does not fit; and
    `MissedModuleError` when the block closes and a target never ran.
    """
    return Editing(model, edits)


class Editing:
    """A context manager that edits one model; made by `edit`.

    `declared`: the edits are part of the identity under which values are stored, and may lie behind what is run.
    """

    def __init__(self, model: nn.Module, edits: Edits, *, declared: bool = False) -> None:
        require_module(model, "edit")
        self._model = original(model)
        self._declared = declared
        self._anatomy: Anatomy | None = None
        self._listeners: list[tuple[nn.Module, Any]] = []
        self._guards: list[tuple[nn.Module, Any]] = []
        self._holds_probabilities = False
        self._held = ExitStack()
        # By target, what changes which module.
        self._changes: dict[str, list[tuple[nn.Module, _Change]]] = {}
        self._positions: PromptPositions | None = None
        self._part = Part()
        self._taps: Taps | None = None
        self._watch: Watch | None = None
        for number, (target, one) in enumerate(_listed(edits)):
            self._add(f"{number}: {_shown(target)}", target, one)

    def __enter__(self) -> None:
        if self._taps is not None:
            raise RuntimeError("this edit block is already open: call edit() again for another one")
        changes = [pair for pairs in self._changes.values() for pair in pairs]
        for _, change in changes:
            change.ran = False
        listeners = list(self._listeners)
        if self._positions is not None:
            self._positions.forget()
            listeners += self._positions.listeners()
        taps = self._taps = Taps()
        self._part.open()
        try:
            if self._holds_probabilities:
                self._held.enter_context(holding_probabilities(self._model))
            taps.add(listeners=listeners, guards=self._guards, changes=changes)
            self._watch = self._positions.watch() if self._positions is not None else None
            eager.enter()
        except BaseException:
            self._release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        taps = self._taps
        self._release()
        eager.leave()
        idle = [key for key, pairs in self._changes.items() if not any(change.ran for _, change in pairs)]
        if kind is None and idle and not self._declared:
            names = ", ".join(repr(key.partition(": ")[2]) for key in idle[:5])
            instead = instead_of_missing(taps if len(idle) == len(self._changes) else None)
            raise MissedModuleError(
                f"{len(idle)} of the edits changed nothing, since what they edit did not run inside the block: "
                f"{names}. {instead}, and edit only what it runs."
            )

    def _release(self) -> None:
        taps, watch = self._taps, self._watch
        self._taps = self._watch = None
        self._part.close()
        if watch is not None:
            watch.end()
        if taps is not None:
            taps.remove()
        self._held.close()

    # -- from targets to changes

    def _add(self, key: str, target: Any, one: Any) -> None:
        if isinstance(one, ReadyMade):
            if _shown(target) != one.target:
                raise OptionError(
                    f"a ready-made edit of {one.target!r} stands under {_shown(target)!r}: give ready-made edits as a "
                    "list, they know their targets"
                )
            if not one.everywhere and self._positions is None:
                self._positions = PromptPositions(self._model, self._anatomy_if_any())
                self._part.state = self._positions.state
            if isinstance(one, Knockout):
                self._cut(key, one)
                return
        elif not callable(one):
            raise OptionError(
                f"the edit of {_shown(target)!r} is a {type(one).__name__}: expected a function, or one of ac.ablate, "
                "ac.steer, ac.patch and ac.knockout"
            )
        site = self._site(target)
        if site is None:
            self._changes[key] = [
                (module, self._made("output", self._of_module(path, _shown(target), one)))
                for path, module in self._modules(target).items()
            ]
            return
        anatomy = describe(self._model)
        # With the layer counted from the front.
        (site,) = anatomy.points(site)
        if isinstance(one, OfValue) and one.heads is not None:
            heads = head_count(anatomy, site)
            if heads is not None:
                resolve_heads(one.heads, heads, one.target)
        self._change(key, write_point(anatomy, site), self._function(_shown(target), one, site.stack))

    def _cut(self, key: str, one: Knockout) -> None:
        anatomy = describe(self._model)
        sites = [
            Site("pattern", layer, stack=one.stack) for layer in one.at_layers(anatomy.depth(one.stack, "pattern"))
        ]
        if one.layers == "all":
            # Of layers of several kinds those that attend.
            sites = [site for site in sites if anatomy.why_not(site) is None] or sites[:1]
        for site in sites:
            layer = site.layer
            assert layer is not None and self._positions is not None
            read = anatomy.read_point(site)
            heads = head_count(anatomy, site)
            if one.heads is not None and heads is not None:
                resolve_heads(one.heads, heads, str(site))

            def cut(scores: Tensor, layer: int = layer, places: PromptPositions = self._positions) -> Tensor:
                return one.cut(scores, places, layer)

            self._listeners += [(module, OnInput(note)) for module, note in read.around]
            self._guards += read.guards
            self._holds_probabilities = True
            self._changes[f"{key} at layer {layer}"] = [(read.module, self._made("scores", cut))]

    def _change(self, key: str, point: WritePoint, function: Callable[[Tensor], Tensor]) -> None:
        read = point.read
        self._listeners += [(module, OnInput(note)) for module, note in read.around]
        self._guards += read.guards
        self._holds_probabilities |= read.probabilities
        self._changes[key] = [(read.module, self._made(point.side, _at_site(point, function), early=point.early))]

    def _made(self, side: EditedSide, function: Function, *, early: bool = False) -> _Change:
        return _Change(side, function, self._part, declared=self._declared, early=early)

    def _site(self, target: Any) -> Site | None:
        """The site that `target` names; None when it names modules."""
        if isinstance(target, Site):
            site = target
        elif isinstance(target, str) and Site.looks_like(target):
            # A module of that name in a model whose blocks cannot be made out.
            if self._anatomy_if_any() is None and self._has(target):
                return None
            site = Site.parse(target)
        else:
            return None
        if not site.complete:
            raise SiteUnavailableError(f"site {str(site)!r} needs a layer: edit '{site}.0', one entry for each layer")
        return site

    def _has(self, path: str) -> bool:
        try:
            descend(self._model, path.split("."))
        except KeyError:
            return False
        return True

    def _modules(self, target: Any) -> dict[str, nn.Module]:
        if not isinstance(target, (str, nn.Module)):
            raise OptionError(f"{target!r} is no target: expected a site, a path, a pattern or a module of the model")
        try:
            return resolve_modules(self._model, target)
        except UnknownModuleError as error:
            near = _nearest_sites(target) if isinstance(target, str) else []
            if not near:
                raise
            raise UnknownModuleError(f"{error} Among sites it is nearest to {' or '.join(map(repr, near))}.") from None

    def _anatomy_if_any(self) -> Anatomy | None:
        if self._anatomy is None:
            try:
                self._anatomy = describe(self._model)
            except SiteUnavailableError:
                return None
        return self._anatomy

    # -- what is done

    def _function(self, target: str, one: Function | ReadyMade, stack: str | None) -> Callable[[Tensor], Tensor]:
        if not isinstance(one, ReadyMade):
            return Called(one, target)
        assert isinstance(one, OfValue)
        positions = None if one.everywhere else self._positions

        def change(value: Tensor) -> Tensor:
            chosen = None if positions is None else positions.find(one.positions, stack, value, target)
            return one.changed(value, chosen)

        if is_pattern(target) and headed(target):
            # Queries are what positions choose, as tokens elsewhere.
            return lambda pattern: change(pattern.transpose(1, 2)).transpose(1, 2)
        return change

    def _of_module(self, path: str, target: str, one: Function | ReadyMade) -> Function:
        if not isinstance(one, ReadyMade):
            return Called(one, target)
        stack = self._positions.stack_of(path) if self._positions is not None else None
        change = self._function(target, one, stack)

        def of_first(output: Any) -> Any:
            try:
                value = first_tensor(output)
            except (IndexError, KeyError, TypeError, StopIteration):
                raise EditError(f"module {path!r} returns no tensor that {target!r} could edit") from None
            return with_first_tensor(output, change(value))

        return of_first


class _Change:
    """One edit of one module, as its tap sees it."""

    __slots__ = ("declared", "early", "function", "part", "ran", "side")

    def __init__(self, side: EditedSide, function: Function, part: Part, *, declared: bool, early: bool) -> None:
        self.side = side
        self.function = function
        self.part = part
        self.declared = declared
        self.early = early
        self.ran = False

    def stands(self) -> bool:
        return self.part.taken()

    def __call__(self, value: Any) -> Any:
        if not self.part.taken():
            return value
        self.ran = True
        return self.function(value)


def _at_site(point: WritePoint, function: Callable[[Tensor], Tensor]) -> Function:
    take, write = point.take, point.write

    def change(raw: Any) -> Any:
        old = take(raw)
        return write(raw, function(old), old)

    return change


def _listed(edits: Any) -> list[tuple[Any, Any]]:
    if isinstance(edits, Mapping):
        pairs = list(edits.items())
    else:
        ready = [edits] if isinstance(edits, ReadyMade) else list(edits) if isinstance(edits, (list, tuple)) else None
        if ready is None or not all(isinstance(one, ReadyMade) for one in ready):
            raise OptionError(
                "edits must be a mapping from targets to functions, such as {'resid_post.5': function}, or a list of "
                "ready-made edits (ac.ablate, ac.steer, ac.patch, ac.knockout)"
            )
        pairs = [(one.target, one) for one in ready]
    if not pairs:
        raise OptionError("edits is empty: name at least one")
    return pairs


def _nearest_sites(text: str) -> list[str]:
    """Sites that a mistyped one is like, with its stack, layer and head; of the first block where it has no layer."""
    found = re.fullmatch(r"(?:(encoder|decoder)\.)?(.*?)((?:\.-?\d+)*)", text)
    assert found is not None
    near = [Site(one, stack=found[1]) for one in nearest(found[2], SITE_NAMES)]
    if found[3].count(".") > 1:
        near = [one for one in near if one.name in PER_HEAD]
    return [f"{one}{found[3] or '.0'}" if one.per_layer else str(one) for one in near]


def _shown(target: Any) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else str(target)
