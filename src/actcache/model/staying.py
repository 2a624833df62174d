"""Offloaded weights that stay where a pass has brought them, until they are told to go.

accelerate brings the weights of a module in before each call and takes them out after it. Inside `staying` the first
call of a module brings them in, further calls find them there, and `release` takes them out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actcache.model.offload import hooks_of

if TYPE_CHECKING:
    from torch import nn

_SLOT = "_hf_hook"


def can_stay(model: nn.Module) -> bool:
    """Whether every hook that takes weights of `model` out after a call is one whose doings are known."""
    for module in model.modules():
        for hook in hooks_of(module):
            # Of a hook that is not known nothing is taken for granted.
            if getattr(hook, "offload", True) and type(hook).__name__ != "AlignDevicesHook":
                return False
    return True


class Staying:
    """What `staying` yields."""

    def __init__(self) -> None:
        self._here: dict[int, tuple[Any, nn.Module]] = {}

    def before(self, hook: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook's part before a call, which brings weights in where they are not here."""
        if not getattr(hook, "offload", False):
            return hook.pre_forward(module, *args, **kwargs)
        if id(hook) in self._here:
            with _off(hook, "offload"):
                return hook.pre_forward(module, *args, **kwargs)
        # First, so that what a failing read has brought in by then goes too.
        self._here[id(hook)] = hook, module
        try:
            return hook.pre_forward(module, *args, **kwargs)
        except BaseException:
            self._out([id(hook)])
            raise

    def after(self, hook: Any, module: nn.Module, output: Any) -> Any:
        """The hook's part behind a call, but for the weights."""
        with _off(hook, "offload"):
            return hook.post_forward(module, output)

    def release(self, keep: Collection[nn.Module] = ()) -> None:
        """Take out what is here, but for the weights that the modules of `keep` hold themselves."""
        kept = {id(module) for module in keep}
        self._out([key for key, (_, module) in self._here.items() if id(module) not in kept])

    def _out(self, keys: list[int]) -> None:
        for key in keys:
            hook, module = self._here.pop(key)
            if not hasattr(hook, "tied_pointers_to_remove"):
                hook.tied_pointers_to_remove = set()
            with _off(hook, "io_same_device"):
                hook.post_forward(module, None)


@contextmanager
def _off(hook: Any, name: str) -> Iterator[None]:
    before = getattr(hook, name, False)
    setattr(hook, name, False)
    try:
        yield
    finally:
        setattr(hook, name, before)


class _Stays:
    """Stands in for the `hooks` of one module, which `hooks_of` finds as ever."""

    def __init__(self, hooks: list[Any], staying: Staying) -> None:
        self.no_grad = any(getattr(hook, "no_grad", False) for hook in hooks)
        self.hooks = hooks
        self._staying = staying

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for hook in self.hooks:
            args, kwargs = self._staying.before(hook, module, args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in self.hooks:
            output = self._staying.after(hook, module, output)
        return output


@contextmanager
def staying(model: nn.Module) -> Iterator[Staying]:
    """Inside the block weights of `model` stay in memory once a call has brought them in; at its end all go out.

    Only for models that `can_stay`, and for one thread's passes at a time.
    """
    weights = Staying()
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            hooks = hooks_of(module)
            if any(getattr(hook, "offload", False) for hook in hooks):
                replaced.append((module, module.__dict__[_SLOT]))
                module.__dict__[_SLOT] = _Stays(hooks, weights)
        yield weights
    finally:
        for module, hook in replaced:
            module.__dict__[_SLOT] = hook
        weights.release()
