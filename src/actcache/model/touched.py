"""What somebody else has put on a model: hooks, and forward methods of single modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from actcache.errors import ForeignHooksError

if TYPE_CHECKING:
    import torch

_HARMLESS = ("transformers", "accelerate")


def refuse_foreign_hooks(model: torch.nn.Module, allowed: Collection[str]) -> None:
    """Raise `ForeignHooksError` for a hook, or a forward replaced on a module, whose name is not `allowed`.

    Those of transformers and accelerate place tensors and record outputs; they change no value.
    """
    from torch.nn.modules import module as torch_module

    found: list[tuple[str, Any]] = [
        ("every module", hook)
        for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
        for hook in hooks.values()
    ]
    for path, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            found += [(path, h) for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
        # accelerate puts its own wrapper there.
        if "forward" in part.__dict__ and not hasattr(part, "_hf_hook"):
            found.append((path, part.__dict__["forward"]))
    for path, hook in found:
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        if str(getattr(hook, "__module__", "")).split(".")[0] in _HARMLESS or name in allowed:
            continue
        raise ForeignHooksError(
            f"the model has a hook or forward of its own, {name!r} on {path or 'its root'!r}, which may change what is "
            f"stored: remove it, or pass allow_hooks=[{name!r}] if it does not."
        )
