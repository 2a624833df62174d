"""The one mechanism that reads modules: a tap on the call of a module.

`nn.Module.__call__` looks `_call_impl` up on the instance, so an object put there sees the call from outside all hooks:
what it hands on is the value after every hook of the caller, in whatever order they were added, also during the block.
Edits stand there too, between the hooks and the readers. It costs less than a forward hook, since a module without
hooks keeps its short path. One tap serves every reader and every edit of a module, and goes with the last of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, Literal, Protocol, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
OnOutput = Callable[[Any], None]
R = TypeVar("R")

_SLOT = "_call_impl"
_lock = threading.Lock()


class Listener(Protocol):
    """A reader of inputs, with the output that belongs to them."""

    def begin(self, inputs: Inputs) -> Any:
        """Told what the forward is about to see, after all pre-hooks; returns a token for `end` or `fail`."""

    def end(self, token: Any, output: Any) -> None:
        """Told what the call returned."""

    def fail(self, token: Any) -> None:
        """Told that the call raised."""


class Change(Protocol):
    """An edit of what a module is called with (side "input": the pair ``(args, kwargs)``), or of what it returns.

    `declared`: what it does is part of the identity under which values of this model are stored.
    """

    @property
    def side(self) -> Literal["input", "output"]: ...

    @property
    def declared(self) -> bool: ...

    def __call__(self, value: Any) -> Any:
        """The value that takes the place of `value`."""


class Guard(Protocol):
    """Stands around the call of a module and may catch what it raises."""

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class Tap:
    """Stands in for one module's `_call_impl` while somebody reads the module."""

    __slots__ = ("call", "changes", "compiled", "guards", "listeners", "module", "outputs", "plain", "previous")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Any = module.__dict__.get(_SLOT)
        self.call: Callable[..., Any] = self.previous or MethodType(type(module)._call_impl, module)
        self.compiled: Any = module.__dict__.get("_compiled_call_impl")
        # Tuples, replaced as a whole: a reader may come or go while the module runs.
        self.outputs: tuple[OnOutput, ...] = ()
        self.listeners: tuple[Listener, ...] = ()
        self.guards: tuple[Guard, ...] = ()
        self.changes: tuple[Change, ...] = ()
        # Nothing but readers of outputs: the short way.
        self.plain = True

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.plain:
            output = self.call(*args, **kwargs)
        else:
            output = self._full_call(args, kwargs)
        for read in self.outputs:
            read(output)
        return output

    def _full_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.call
        if self.listeners or self.changes:
            call = self._listened_call
        for guard in self.guards:
            call = _guarded(guard, call)
        return call(*args, **kwargs)

    def _listened_call(self, /, *args: Any, **kwargs: Any) -> Any:
        listeners, changes = self.listeners, self.changes
        before = [change for change in changes if change.side == "input"] if changes else ()
        tokens: list[Any] = []

        def begin(inputs: Inputs) -> Inputs:
            for change in before:
                inputs = change(inputs)
            tokens.extend(listener.begin(inputs) for listener in listeners)
            return inputs

        try:
            module = self.module
            if not listeners and not before:
                output = self.call(*args, **kwargs)
            elif module._forward_pre_hooks or torch_module._global_forward_pre_hooks:
                output = self._call_behind_hooks(begin, args, kwargs)
            else:
                args, kwargs = begin((args, kwargs))
                output = self.call(*args, **kwargs)
            for change in changes:
                if change.side == "output":
                    output = change(output)
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

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
            # Gone before the forward runs, so that a nested call of the same module does not meet it.
            handle.remove()
            return begin((args, kwargs))

        handle = self.module.register_forward_pre_hook(read, with_kwargs=True)
        try:
            return self.call(*args, **kwargs)
        finally:
            handle.remove()

    def settle(self) -> None:
        """Go when nobody is left; otherwise note whether the short way will do."""
        self.plain = not (self.listeners or self.guards or self.changes)
        if self.plain and not self.outputs:
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
        import copy

        module = copy.deepcopy(self.module, memo)
        return MethodType(type(module)._call_impl, module)

    def __reduce__(self) -> Any:
        return getattr, (self.module, _SLOT)


def _guarded(guard: Guard, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return guard(call, args, kwargs)

    return run


class Taps:
    """The taps of one reader or edit: what it adds it takes away again, all at once."""

    __slots__ = ("_changes", "_guards", "_listeners", "_outputs")

    def __init__(self) -> None:
        self._outputs: list[tuple[Tap, OnOutput]] = []
        self._listeners: list[tuple[Tap, Listener]] = []
        self._guards: list[tuple[Tap, Guard]] = []
        self._changes: list[tuple[Tap, Change]] = []

    def add(
        self,
        outputs: Iterable[tuple[nn.Module, OnOutput]] = (),
        listeners: Iterable[tuple[nn.Module, Listener]] = (),
        guards: Iterable[tuple[nn.Module, Guard]] = (),
        changes: Iterable[tuple[nn.Module, Change]] = (),
    ) -> None:
        with _lock:
            for module, read in outputs:
                tap = _tap(module)
                tap.outputs += (read,)
                self._outputs.append((tap, read))
            for module, listener in listeners:
                tap = _tap(module)
                tap.listeners += (listener,)
                tap.plain = False
                self._listeners.append((tap, listener))
            for module, guard in guards:
                tap = _tap(module)
                tap.guards += (guard,)
                tap.plain = False
                self._guards.append((tap, guard))
            for module, change in changes:
                tap = _tap(module)
                tap.changes += (change,)
                tap.plain = False
                self._changes.append((tap, change))

    def remove(self) -> None:
        with _lock:
            for tap, read in self._outputs:
                tap.outputs = _without(tap.outputs, read)
                tap.settle()
            for tap, listener in self._listeners:
                tap.listeners = _without(tap.listeners, listener)
                tap.settle()
            for tap, guard in self._guards:
                tap.guards = _without(tap.guards, guard)
                tap.settle()
            for tap, change in self._changes:
                tap.changes = _without(tap.changes, change)
                tap.settle()
            self._outputs, self._listeners, self._guards, self._changes = [], [], [], []


def _without(readers: tuple[R, ...], one: R) -> tuple[R, ...]:
    return tuple([r for r in readers if r is not one]) if len(readers) > 1 else ()


def _tap(module: nn.Module) -> Tap:
    tap = module.__dict__.get(_SLOT)
    if type(tap) is not Tap:
        tap = Tap(module)
        tap.install()
    return tap
