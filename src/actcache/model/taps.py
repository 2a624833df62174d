"""The one mechanism that reads modules: a tap on the call of a module.

`nn.Module.__call__` looks `_call_impl` up on the instance, so an object put there sees the call from outside all hooks:
what it hands on is the value after every hook of the caller, in whatever order they were added, also during the block.
Edits stand there too, between the hooks and the readers. It costs less than a forward hook, since a module without
hooks keeps its short path. One tap serves every reader and every edit of a module, and goes with the last of them.

What a thread puts on a module is for its own passes (`threads`): another thread's pass through the same module meets
the tap and is handed on at once.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, Protocol, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

from actcache.model.probabilities import aside
from actcache.model.threads import here, key_at_work, thread_key

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
OnOutput = Callable[[Any], None]
R = TypeVar("R")

_SLOT = "_call_impl"
_lock = threading.Lock()
_clock = itertools.count(1)


@contextmanager
def bare(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside `unseen`: passes of this thread through these modules meet no hooks either. Another thread's do."""
    taps = Taps()
    try:
        taps.add(guards=[(module, _only(module)) for module in modules])
        yield
    finally:
        taps.remove()


def _only(module: nn.Module) -> Guard:
    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return module.forward(*args, **kwargs)

    return around


class Listener(Protocol):
    """A reader of inputs, with the output that belongs to them. One that has an attribute `early` that is true is told
    what the module is given before those edits of it that are not `early` too, and nothing else."""

    def begin(self, inputs: Inputs) -> Any:
        """Told what the forward is about to see, after all pre-hooks; returns a token for `end` or `fail`."""

    def end(self, token: Any, output: Any) -> None:
        """Told what the call returned."""

    def fail(self, token: Any) -> None:
        """Told that the call raised."""


class Change(Protocol):
    """An edit of what a module is called with (side "input": the pair ``(args, kwargs)``), of what it returns
    ("output"), or of an attention module's scores before the softmax or its probabilities behind it ("scores",
    "pattern"), which a guard of the module hands to it.

    `declared`: what it does is part of the identity under which values of this model are stored. `early`: what a module
    is given stands for a value that goes on beside the module too, and changes before edits of the module's own.
    """

    @property
    def side(self) -> Literal["input", "output", "scores", "pattern"]: ...

    @property
    def declared(self) -> bool: ...

    @property
    def early(self) -> bool: ...

    def stands(self) -> bool:
        """Whether it is to be made in the call that is under way; where it is not it hands values on as they are."""

    def __call__(self, value: Any) -> Any:
        """The value that takes the place of `value`."""


class Guard(Protocol):
    """Stands around the call of a module and may catch what it raises."""

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class _View:
    """What the blocks of one thread have on one module."""

    __slots__ = ("changes", "early", "guards", "key", "last", "listeners", "outputs", "plain")

    def __init__(self, key: object) -> None:
        self.key = key
        # Tuples, replaced as a whole: a reader may come or go while the module runs.
        self.outputs: tuple[OnOutput, ...] = ()
        self.listeners: tuple[Listener, ...] = ()
        self.early: tuple[Listener, ...] = ()
        self.guards: tuple[Guard, ...] = ()
        self.changes: tuple[Change, ...] = ()
        # Changes behind all others, which are no edits: the values stay what they are.
        self.last: tuple[Change, ...] = ()
        # Nothing but readers of outputs: the short way.
        self.plain = True


class Tap:
    """Stands in for one module's `_call_impl` while somebody reads the module."""

    __slots__ = ("call", "compiled", "elsewhere", "module", "previous", "views")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Any = module.__dict__.get(_SLOT)
        self.call: Callable[..., Any] = self.previous or MethodType(type(module)._call_impl, module)
        self.compiled: Any = module.__dict__.get("_compiled_call_impl")
        self.views: dict[object, _View] = {}
        # When it was last called by a thread that has nothing on it.
        self.elsewhere = 0

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        view = self.views.get(here.key)
        if view is None:
            view = self.views.get(key_at_work())
            if view is None:
                if not here.unseen:
                    self.elsewhere = next(_clock)
                return (self.compiled or self.call)(*args, **kwargs)
        output = self.call(*args, **kwargs) if view.plain else self._full_call(view, args, kwargs)
        for read in view.outputs:
            read(output)
        return output

    @property
    def changes(self) -> tuple[Change, ...]:
        """The edits that a pass of this thread meets."""
        view = self.views.get(here.key)
        return () if view is None else view.changes

    def _full_call(self, view: _View, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guards = view.guards
        if not guards:
            return self._listened_call(view, args, kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._listened_call(view, args, kwargs)

        for guard in guards:
            call = _guarded(guard, call)
        return call(*args, **kwargs)

    def _listened_call(self, view: _View, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        listeners, early, changes = view.listeners, view.early, (*view.changes, *view.last)
        before = [change for change in changes if change.side == "input"] if changes else ()
        tokens: list[Any] = []

        def begin(inputs: Inputs) -> Inputs:
            for change in before:
                if change.early:
                    inputs = aside(change, inputs)
            for listener in early:
                listener.begin(inputs)
            for change in before:
                if not change.early:
                    inputs = aside(change, inputs)
            tokens.extend(listener.begin(inputs) for listener in listeners)
            return inputs

        try:
            module = self.module
            if not listeners and not before and not early:
                output = self.call(*args, **kwargs)
            elif module._forward_pre_hooks or torch_module._global_forward_pre_hooks:
                output = self._call_behind_hooks(begin, args, kwargs)
            else:
                args, kwargs = begin((args, kwargs))
                output = self.call(*args, **kwargs)
            for change in changes:
                if change.side == "output":
                    output = aside(change, output)
        except BaseException:
            for listener, token in zip(listeners, tokens, strict=False):
                listener.fail(token)
            raise
        for listener, token in zip(listeners, tokens, strict=True):
            listener.end(token, output)
        return output

    def _call_behind_hooks(
        self, begin: Callable[[Inputs], Inputs], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call with a pre-hook of our own behind the caller's, for this one call: it sees what the forward will see."""
        thread = threading.get_ident()

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
            if threading.get_ident() != thread:
                # Another thread's call of this module, at the same time.
                return None
            # Gone before the forward runs, so that a nested call of the same module does not meet it.
            handle.remove()
            return begin((args, kwargs))

        handle = self.module.register_forward_pre_hook(read, with_kwargs=True)
        try:
            return self.call(*args, **kwargs)
        finally:
            handle.remove()

    def view(self, key: object) -> _View:
        view = self.views.get(key)
        if view is None:
            view = self.views[key] = _View(key)
        return view

    def settle(self, view: _View) -> None:
        """Go when nobody is left; otherwise note whether the short way will do."""
        view.plain = not (view.listeners or view.early or view.guards or view.changes or view.last)
        if view.plain and not view.outputs:
            self.views.pop(view.key, None)
            if not self.views:
                self.uninstall()

    def install(self) -> None:
        self.module.__dict__[_SLOT] = self
        if self.compiled is not None:
            # A module compiled in place would otherwise run its compiled call, which knows no tap.
            self.module.__dict__["_compiled_call_impl"] = None

    def uninstall(self) -> None:
        slots = self.module.__dict__
        if slots.get(_SLOT) is not self:
            return
        if self.previous is None:
            del slots[_SLOT]
        else:
            slots[_SLOT] = self.previous
        if self.compiled is not None:
            slots["_compiled_call_impl"] = self.compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model made inside a block is a plain model: it must not call the original's modules.
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        module = copy.deepcopy(self.module, memo)
        call = MethodType(type(module)._call_impl, module)
        # What copying keeps alive it lets go at its end, when the copy has everything that the original has.
        memo.setdefault(id(memo), []).append(_Emptying(module, call))
        return call

    def __reduce__(self) -> Any:
        return getattr, (self.module, _SLOT)


class _Emptying:
    """Takes what stands in the slot of a copied module away when it goes itself."""

    __slots__ = ("_call", "_module")

    def __init__(self, module: nn.Module, call: Any) -> None:
        self._module = module
        self._call = call

    def __del__(self) -> None:
        slots = self._module.__dict__
        if slots.get(_SLOT) is self._call:
            del slots[_SLOT]


def changes_of(module: nn.Module) -> tuple[Change, ...]:
    """The changes on a module that are to be made in the pass of this thread that is under way, edits first."""
    tap = module.__dict__.get(_SLOT)
    view = None
    if type(tap) is Tap:
        view = tap.views.get(here.key) or tap.views.get(key_at_work())
    return () if view is None else tuple([change for change in (*view.changes, *view.last) if change.stands()])


def _guarded(guard: Guard, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return guard(call, args, kwargs)

    return run


class Taps:
    """The taps of one reader or edit, for the passes of the thread that adds them: what it adds it takes away again,
    all at once, in whatever thread."""

    __slots__ = ("_held", "_since")

    def __init__(self) -> None:
        self._held: list[tuple[Tap, _View, str, Any]] = []
        self._since = next(_clock)

    def add(
        self,
        outputs: Iterable[tuple[nn.Module, OnOutput]] = (),
        listeners: Iterable[tuple[nn.Module, Listener]] = (),
        guards: Iterable[tuple[nn.Module, Guard]] = (),
        changes: Iterable[tuple[nn.Module, Change]] = (),
        last: Iterable[tuple[nn.Module, Change]] = (),
    ) -> None:
        key = thread_key()
        with _lock:
            for module, read in outputs:
                view = self._view(module, key, "outputs", read)
                view.outputs += (read,)
            for module, listener in listeners:
                if getattr(listener, "early", False):
                    view = self._view(module, key, "early", listener)
                    view.early += (listener,)
                else:
                    view = self._view(module, key, "listeners", listener)
                    view.listeners += (listener,)
            for module, guard in guards:
                view = self._view(module, key, "guards", guard)
                view.guards += (guard,)
            for module, change in changes:
                view = self._view(module, key, "changes", change)
                # Early ones first, each kind in the order in which blocks were opened.
                place = sum(one.early for one in view.changes) if change.early else len(view.changes)
                view.changes = (*view.changes[:place], change, *view.changes[place:])
            for module, change in last:
                view = self._view(module, key, "last", change)
                view.last += (change,)

    def _view(self, module: nn.Module, key: object, slot: str, one: Any) -> _View:
        """What this thread has on a module, to which `one` is about to be added in `slot`."""
        tap = _tap(module)
        view = tap.view(key)
        view.plain = view.plain and slot == "outputs"
        self._held.append((tap, view, slot, one))
        return view

    def remove(self) -> None:
        with _lock:
            for tap, view, slot, one in self._held:
                setattr(view, slot, _without(getattr(view, slot), one))
                tap.settle(view)

    def ran_elsewhere(self) -> bool:
        """Whether another thread ran one of the modules since."""
        return any(tap.elsewhere > self._since for tap, *_ in self._held)


def _without(readers: tuple[R, ...], one: R) -> tuple[R, ...]:
    return tuple([r for r in readers if r is not one]) if len(readers) > 1 else ()


def _tap(module: nn.Module) -> Tap:
    tap = module.__dict__.get(_SLOT)
    if type(tap) is not Tap:
        tap = Tap(module)
        tap.install()
    return tap
