"""What somebody else has put on a model: hooks, edits, and forward methods of single modules."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from actcache.errors import ForeignHooksError
from actcache.model.offload import hooks_of

if TYPE_CHECKING:
    import torch

_HARMLESS = ("transformers", "accelerate")
# Modules that stand under a forward of ours, which are looked at by other threads meanwhile.
_ours: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


@contextmanager
def our_forwards(model: torch.nn.Module) -> Iterator[None]:
    """Let what stands as forward on the modules of `model` inside the block count as ours, in every thread. What stood
    there before has been looked at."""
    modules = list(model.modules())
    _ours.update(modules)
    try:
        yield
    finally:
        _ours.difference_update(modules)


def refuse_foreign_hooks(model: torch.nn.Module, allowed: Collection[str]) -> None:
    """Raise `ForeignHooksError` inside an `ac.edit` block, and for a hook or a replaced forward whose name is not
    `allowed`.

    Those of transformers and accelerate place tensors and record outputs; they change no value. A module's own methods
    (of a quantised layer, say) are part of what it is, like its forward.
    """
    from torch.nn.modules import module as torch_module

    from actcache.model.probe import is_of_the_probe

    found: list[tuple[str, Any]] = [
        ("every module", hook)
        for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
        for hook in hooks.values()
    ]
    for path, part in model.named_modules():
        # Those of a run's own are part of its identity.
        if any(not change.declared for change in _changes(part)):
            raise _edited(path)
        if part._forward_hooks or part._forward_pre_hooks:
            hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            found += [(path, hook) for hook in hooks if getattr(hook, "__self__", None) is not part]
        found += [(path, type(hook)) for hook in hooks_of(part)]
        if (forward := _foreign_forward(part)) is not None:
            found.append((path, forward))
    for path, hook in found:
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        if str(getattr(hook, "__module__", "")).split(".")[0] in _HARMLESS or name in allowed or is_of_the_probe(hook):
            continue
        raise ForeignHooksError(
            f"the model has a hook or forward of its own, {name!r} on {path or 'its root'!r}, which may change what is "
            f"stored: remove it, or pass allow_hooks=[{name!r}] if it does not."
        )


def refuse_edits(model: torch.nn.Module) -> None:
    """Raise `ForeignHooksError` for any edit on `model`, that of another extraction too."""
    for path, part in model.named_modules():
        if _changes(part):
            raise _edited(path)


def _edited(path: str) -> ForeignHooksError:
    return ForeignHooksError(
        f"the model is inside an ac.edit block, which edits {path or 'its root'!r}, so its values are not what would "
        "be stored as its own: close the block first, or give ready-made edits to the extraction (edits=)."
    )


def _changes(part: torch.nn.Module) -> tuple[Any, ...]:
    """The edits on a module: they stand around its call."""
    found: tuple[Any, ...] = getattr(part.__dict__.get("_call_impl"), "changes", ())
    return found


def _foreign_forward(part: torch.nn.Module) -> Any:
    """The forward that was put on `part` itself, unless it is the one of its class, or accelerate's around that."""
    forward: Any = part.__dict__.get("forward")
    if forward is None or part in _ours:
        return None
    if getattr(forward, "__func__", None) is type(part).forward and forward.__self__ is part:
        # transformers 4.57 leaves it behind on every module whose outputs it has recorded.
        return None
    if not isinstance(forward, partial) or forward.func.__module__.split(".")[0] not in _HARMLESS:
        return forward
    # accelerate's wrapper keeps what it found, which may have been put there too.
    wrapped = part.__dict__.get("_old_forward")
    return None if getattr(wrapped, "__func__", None) is type(part).forward else wrapped
