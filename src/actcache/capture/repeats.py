"""Gradient checkpointing of edited models: what a backward pass runs once more has to meet the edits it met at first.

A checkpoint of torch keeps the function that it will run again, and lets go of it with its graph. Where an edit takes
part in the first run, `Repeated` takes the place of what is kept: it lets the function run again only while the blocks
of those edits are open, and as of the pass that is repeated. So nothing stays on a module for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.utils import checkpoint

from actcache.errors import EditError
from actcache.model.threads import thread_key, works_for

State = Callable[[], AbstractContextManager[None]]

_FILE = checkpoint.__file__
# Not in the first versions of torch that we run with.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
# What torch calls the code that runs a function for the second time.
_AGAIN = ("backward", "unpack_hook")

_CLOSED = (
    "backward() runs parts of the model again (gradient checkpointing), and the ac.edit block in which they ran is "
    "{where}: without the edit their gradients would be those of other values. Call backward() inside the block, or "
    "run the edited model without checkpointing."
)
_UNKNOWN = (
    "this version of torch keeps what gradient checkpointing will run again where it is not known, so that it could "
    "run without the edit: run the edited model without checkpointing (model.gradient_checkpointing_disable())."
)


class Part:
    """The part that one edit block has in runs of modules.

    `state` notes how things stand with the block in the pass that is running, and returns what brings that back for a
    while; None where its edits know nothing of passes.
    """

    __slots__ = ("_key", "state")

    def __init__(self) -> None:
        self._key: object | None = None
        self.state: Callable[[], State] | None = None

    def open(self) -> None:
        """The block is open, for this thread."""
        self._key = thread_key()

    def close(self) -> None:
        self._key = None

    def require_open(self) -> None:
        """Raise `EditError` where a pass of this thread would not meet the block's edits."""
        if not works_for(self._key):
            where = "closed" if self._key is None else "another thread's"
            raise EditError(_CLOSED.format(where=where))

    def taken(self) -> bool:
        """Whether the block's edits take part in the call that is under way: not in one that repeats another, in which
        they took none. Checkpoints around it are told. Raises `EditError` where one cannot be."""
        kept, repeats, known = _around(sys._getframe(1))
        if repeats and (known is None or self not in known.parts):
            return False
        for holder, name in kept:
            function = getattr(holder, name)
            if type(function) is not Repeated:
                function = Repeated(function)
                setattr(holder, name, function)
            if self not in function.parts:
                function.parts[self] = nullcontext if self.state is None else self.state()
        return True


class Repeated:
    """Stands in for what a checkpoint runs again; `parts` are of the edit blocks that took part in the first run."""

    __slots__ = ("_function", "parts")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.parts: dict[Part, State] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for part in self.parts:
            part.require_open()
        with ExitStack() as as_it_was:
            for bring_back in self.parts.values():
                as_it_was.enter_context(bring_back())
            return self._function(*args, **kwargs)


_REPEATED = Repeated.__call__.__code__


def _around(frame: FrameType | None) -> tuple[list[tuple[Any, str]], bool, Repeated | None]:
    """The checkpoints that run for the first time around `frame`: what keeps the function, and under which name;
    whether all of it repeats an earlier run; and what stands in for that."""
    saving = _frame_saving()
    # A checkpoint may also be hooks on a module, and then has no call around what it runs.
    kept = [] if saving is None else [(saving, "recompute_fn")]
    reentrant = False
    while frame is not None:
        code = frame.f_code
        if code is _REPEATED:
            return kept, True, frame.f_locals["self"]
        if code.co_filename == _FILE:
            if code.co_name in _AGAIN:
                return kept, True, None
            if code.co_name == "forward" and "ctx" in frame.f_locals:
                kept.append((frame.f_locals["ctx"], "run_function"))
                reentrant = True
            elif code.co_name == "checkpoint":
                # The call that the `forward` before belongs to, or one of a checkpoint of the other kind.
                if not reentrant and (found := _frame_of(frame)) is not saving:
                    kept.append((found, "recompute_fn"))
                reentrant = False
        frame = frame.f_back
    return kept, False, None


def _frame_saving() -> Any:
    """What torch keeps for the checkpoint that the tensors go to which are saved now; None where they stay."""
    hooks = _top_hooks(True) if _top_hooks is not None else None
    code = getattr(hooks[0], "__code__", None) if hooks is not None else None
    if hooks is None or code is None or code.co_filename != _FILE or "frame" not in code.co_freevars:
        return None
    found = hooks[0].__closure__[code.co_freevars.index("frame")].cell_contents
    return found if hasattr(found, "recompute_fn") else None


def _frame_of(call: FrameType) -> Any:
    """What torch keeps for a call of `checkpoint` with ``use_reentrant=False``."""
    running = getattr(call.f_locals.get("gen"), "gi_frame", None)
    found = None if running is None else running.f_locals.get("new_frame")
    if found is None or not hasattr(found, "recompute_fn"):
        raise EditError(_UNKNOWN)
    return found
