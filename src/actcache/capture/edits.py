"""Change values of a running model: `edit`, with functions of the caller's or ready-made edits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from actcache.capture.eager import eager
from actcache.capture.generation import Watch
from actcache.capture.prompt_positions import PromptPositions
from actcache.capture.ready_made import ReadyMade, ablate, patch, steer
from actcache.capture.recording import OnInput
from actcache.capture.requests import resolve_modules
from actcache.capture.taps import Taps
from actcache.capture.values import map_tensors
from actcache.errors import (
    EditError,
    MissedModuleError,
    OptionError,
    SiteUnavailableError,
    UnknownModuleError,
    did_you_mean,
)
from actcache.model.anatomy import Anatomy, describe, original
from actcache.model.forms import first_tensor
from actcache.model.sites import SITE_NAMES, Site
from actcache.model.structure import descend
from actcache.model.writing import WritePoint, with_first_tensor, write_point

__all__ = ["Editing", "ReadyMade", "ablate", "edit", "patch", "steer"]

Function = Callable[[Any], Any]
Edits = Mapping[Any, "Function | ReadyMade"] | ReadyMade | Sequence[ReadyMade]


def edit(model: nn.Module, edits: Edits) -> Editing:
    """Change values of `model` while the block is open.

        with ac.edit(model, {"resid_post.5": lambda x: x * 0, "transformer.h.3.attn": change}):
            model(**inputs)
        with ac.edit(model, [ac.ablate("attn_out.3"), ac.steer("resid_post.8", vector, positions="last")]):
            model.generate(**inputs)

    `edits`: functions by target, or ready-made edits (`ablate`, `steer`, `patch`), applied in their order. A target is
    a complete site name, a module's path, a pattern of paths, or a module object; a string that reads as a site is one.

    A function is given a copy of the value and returns the new one, or None when it changed the copy in place. Shape,
    dtype and device stay the same. At a site the value is ``[B, S, D]`` (logits ``[B, S, V]``) as `capture` shows it,
    and the whole model goes on with the new one: what is written to `resid_mid` is both what the MLP reads and what it
    adds to. At a module it is whatever the module returns.

    An edit stands behind all hooks of the caller, and captures see what it made, whichever block was opened first;
    edits of one value follow each other in the order in which their blocks were opened. Gradients flow through edits;
    where the model recomputes blocks (gradient checkpointing) run ``backward()`` inside the block too. Positions are
    those of the sequence that is handed over: of the prompt, in a call of `generate`, so that "last" is its last token
    in every step, with and without a KV cache; with "all" new tokens are edited too.

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
        if not isinstance(model, nn.Module):
            raise OptionError(f"edit needs a torch.nn.Module, not {type(model).__name__}")
        self._model = original(model)
        self._declared = declared
        self._anatomy: Anatomy | None = None
        self._listeners: list[tuple[nn.Module, Any]] = []
        # By target, what changes which module.
        self._changes: dict[str, list[tuple[nn.Module, _Change]]] = {}
        self._positions: PromptPositions | None = None
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
        try:
            taps.add(listeners=listeners, changes=changes)
            self._watch = self._positions.watch() if self._positions is not None else None
            eager.enter()
        except BaseException:
            self._release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        eager.leave()
        idle = [key for key, pairs in self._changes.items() if not any(change.ran for _, change in pairs)]
        if kind is None and idle and not self._declared:
            names = ", ".join(repr(key.partition(": ")[2]) for key in idle[:5])
            raise MissedModuleError(
                f"{len(idle)} of the edits changed nothing, since what they edit did not run inside the block: "
                f"{names}. Run the model inside the block, and edit only what it runs."
            )

    def _release(self) -> None:
        taps, watch = self._taps, self._watch
        self._taps = self._watch = None
        if watch is not None:
            watch.end()
        if taps is not None:
            taps.remove()

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
        elif not callable(one):
            raise OptionError(
                f"the edit of {_shown(target)!r} is a {type(one).__name__}: expected a function, or one of ac.ablate, "
                "ac.steer and ac.patch"
            )
        site = self._site(target)
        if site is None:
            self._changes[key] = [
                (module, _Change("output", self._of_module(path, _shown(target), one), self._declared))
                for path, module in self._modules(target).items()
            ]
            return
        anatomy = describe(self._model)
        # With the layer counted from the front.
        (site,) = anatomy.points(site)
        point = write_point(anatomy, site)
        if point.read.around is not None:
            module, note = point.read.around
            self._listeners.append((module, OnInput(note)))
        function = self._function(_shown(target), one, site.stack)
        self._changes[key] = [(point.read.module, _Change(point.read.side, _at_site(point, function), self._declared))]

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
            near = did_you_mean(re.sub(r"[._]-?\d.*$", "", target), SITE_NAMES) if isinstance(target, str) else ""
            if not near:
                raise
            raise UnknownModuleError(f"{error} Among sites:{near}") from None

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
            return _Called(one, target)
        positions = None if one.everywhere else self._positions

        def change(value: Tensor) -> Tensor:
            chosen = None if positions is None else positions.find(one.positions, stack, value, target)
            return one.changed(value, chosen)

        return change

    def _of_module(self, path: str, target: str, one: Function | ReadyMade) -> Function:
        if not isinstance(one, ReadyMade):
            return _Called(one, target)
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

    __slots__ = ("declared", "function", "ran", "side")

    def __init__(self, side: Literal["input", "output"], function: Function, declared: bool) -> None:
        self.side = side
        self.function = function
        self.declared = declared
        self.ran = False

    def __call__(self, value: Any) -> Any:
        self.ran = True
        return self.function(value)


class _Called:
    """A function of the caller's, held to returning what the model can go on with."""

    def __init__(self, function: Function, target: str) -> None:
        self._function = function
        self._target = target

    def __call__(self, value: Any) -> Any:
        # A copy: others may hold the value (a module that hands on what it was given, a capture without copies), and
        # autograd may need it as it was.
        given = _copied(value)
        new = self._function(given)
        if new is None or new is given:
            _fits(self._target, value, given)
            return given
        _fits(self._target, value, new)
        # Some models add to what a module returned in place, which must not reach a tensor of the caller's.
        return _copied(new)


def _at_site(point: WritePoint, function: Callable[[Tensor], Tensor]) -> Function:
    read, write = point.read.extract, point.write

    def change(raw: Any) -> Any:
        return write(raw, function(read(raw)))

    return change


def _copied(value: Any) -> Any:
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        # What was one tensor in several places stays one.
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return map_tensors(value, copy, of_cache=lambda cache: cache)


def _fits(target: str, old: Any, new: Any) -> None:
    """Raise `EditError` unless `new` has the form of `old`: containers, shapes, dtypes and devices."""
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor):
            raise EditError(f"the edit of {target!r} returned a {type(new).__name__}: expected {_form(old)}, or None")
        if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            raise EditError(f"the edit of {target!r} returned {_form(new)}: expected {_form(old)}")
        return
    if not isinstance(old, (tuple, list, dict)):
        return
    same = type(new) is type(old) and len(new) == len(old)
    if isinstance(old, dict):
        same = same and new.keys() == old.keys()
    if not same:
        raise EditError(f"the edit of {target!r} returned {_form(new)}: expected {_form(old)}, as the module returns")
    pairs: Iterator[tuple[Any, Any]] = (
        ((old[key], new[key]) for key in old) if isinstance(old, dict) else zip(old, new, strict=True)
    )
    for before, after in pairs:
        _fits(target, before, after)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    if isinstance(value, dict):
        return f"a {type(value).__name__} of {', '.join(map(str, value))}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def _listed(edits: Any) -> list[tuple[Any, Any]]:
    if isinstance(edits, Mapping):
        pairs = list(edits.items())
    else:
        ready = [edits] if isinstance(edits, ReadyMade) else list(edits) if isinstance(edits, (list, tuple)) else None
        if ready is None or not all(isinstance(one, ReadyMade) for one in ready):
            raise OptionError(
                "edits must be a mapping from targets to functions, such as {'resid_post.5': function}, or a list of "
                "ready-made edits (ac.ablate, ac.steer, ac.patch)"
            )
        pairs = [(one.target, one) for one in ready]
    if not pairs:
        raise OptionError("edits is empty: name at least one")
    return pairs


def _shown(target: Any) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else str(target)
