"""The probabilities of one attention module while it is called: read, and changed, in the thread that calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from actcache.errors import EditError, SiteUnavailableError
from actcache.model.attention_sites import Making
from actcache.model.forms import first_input
from actcache.model.probabilities import Probabilities, aside
from actcache.model.probe import of_this_thread
from actcache.model.structure import descend
from actcache.model.taps import Change, Guard, Inputs, changes_of

_UNSEEN = (
    "attention ran without probabilities that could be seen: another implementation was chosen since it was looked at; "
    "load the model with attn_implementation='eager'"
)
_OTHER = (
    "where another implementation was chosen since then load the model anew with it, and take away global hooks that "
    "compute attention"
)


class _Call(threading.local):
    depth = 0
    changes: tuple[Change, ...] = ()
    dtype = torch.float32
    # Of what the module is given.
    rows = queries = 0
    # Whether the module's own code runs, between what hooks do before and behind it.
    own = False
    taken = 0
    making = False
    unfit: tuple[int, ...] | None = None
    found: Tensor | None = None
    changed: Tensor | None = None

    def begin(self) -> None:
        self.taken, self.making, self.own = 0, False, False
        self.unfit = self.found = self.changed = None


class AttentionCalls:
    """The calls of one block's attention; everybody who reads or edits its probabilities shares this object.

    `guards` stand around each call, once or several times, and `note` is told what the module is given. Edits that are
    on the module (`Change`) with the side "scores" are given the scores ``[B, H, S, keys]`` before the softmax and
    return what takes their place; those with the side "pattern" the probabilities, which come of them. Both are given
    what came of the edits before, and readers, on the way out, what is left in the end: ``pattern()``. A sink, to which
    a query may attend beside the keys, is none of the keys.

    Of several softmaxes that the module's code takes it is the one that was the attention's when it was looked at. What
    edits, hooks and modules inside take the softmax of is not counted.
    """

    def __init__(self, heads: int, sinks: int, making: Making) -> None:
        self.heads = heads
        self._sinks = sinks
        self._making = making
        self._call = _Call()

    def guards(self, module: nn.Module, block: nn.Module) -> tuple[tuple[nn.Module, Guard], ...]:
        """What to put around the calls of modules of `block`; `module` is the attention module."""
        apart = [descend(block, path.split(".")) for path in self._making.apart]
        return ((module, self._guard(module)), *((one, _apart()) for one in apart))

    def note(self, inputs: Inputs) -> None:
        """Told what the module is given: its own code begins."""
        here, given = self._call, first_input(inputs)
        here.rows, here.queries = given.shape[:2] if given.ndim == 3 else (0, 0)
        here.dtype = given.dtype
        here.own = True

    def _guard(self, module: nn.Module) -> Guard:
        def ended(*_: Any) -> None:
            self._call.own = False

        def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            here = self._call
            if here.depth:
                here.depth += 1
                try:
                    return call(*args, **kwargs)
                finally:
                    here.depth -= 1
            here.begin()
            here.depth, here.changes = 1, changes_of(module)
            hooked = bool(module._forward_hooks or torch_module._global_forward_hooks)
            hook = module.register_forward_hook(of_this_thread(ended), prepend=True) if hooked else None
            try:
                with Probabilities(self):
                    output = call(*args, **kwargs)
                if self.changing():
                    why = self._why_not()
                    if why is not None:
                        raise EditError(f"edits of attention's probabilities cannot be made: {why}")
                return output
            finally:
                if hook is not None:
                    hook.remove()
                here.begin()
                here.depth, here.changes = 0, ()

        return around

    def pattern(self, head: int | None = None) -> Tensor:
        """The probabilities ``[B, H, queries, keys]`` of the call that is under way in this thread, or those of one
        head, in the dtype of the values that they weight."""
        found, changed, why = self._call.found, self._call.changed, self._why_not()
        if why is not None or found is None:
            raise SiteUnavailableError(why)
        value = self._keys(found).to(self._call.dtype) if changed is None else changed
        return value if head is None else value[:, head]

    def _why_not(self) -> str | None:
        """Why the probabilities of the call are not known; None where they are."""
        here, making = self._call, self._making
        if here.taken == making.of and here.found is not None:
            return None
        if here.unfit is not None:
            expected = f"[{here.rows}, {self.heads}, {here.queries}, keys]"
            return f"attention takes the softmax of {list(here.unfit)} in this pass, which is no {expected}; {_OTHER}"
        if not here.taken:
            return _UNSEEN
        if here.taken == making.of:
            return "what was seen of it is gone: an edit of its own probabilities ran the model"
        return (
            f"attention takes {here.taken} softmaxes in this pass and took {making.of} when it was looked at, so that "
            f"which of them makes its probabilities is not known; {_OTHER}"
        )

    # -- told by `Probabilities`

    def changing(self) -> bool:
        return any(change.side in ("scores", "pattern") for change in self._call.changes)

    def scores(self, scores: Tensor) -> Tensor:
        here = self._call
        if not here.own:
            return scores
        here.making = here.taken == self._making.number
        here.taken += 1
        if here.making and not self._fits(scores):
            here.making, here.unfit = False, tuple(scores.shape)
        return self._changed(scores, "scores", scores.dtype) if here.making else scores

    def probabilities(self, probabilities: Tensor) -> Tensor:
        here = self._call
        if not here.making:
            return probabilities
        here.making = False
        probabilities = self._changed(probabilities, "pattern", here.dtype)
        here.found = self._of_heads(probabilities)
        return probabilities

    def _fits(self, scores: Tensor) -> bool:
        here = self._call
        if scores.shape[-1] - self._sinks < here.queries:
            return False
        if scores.ndim == 3:
            return scores.shape[:2] == (here.rows * self.heads, here.queries)
        return scores.shape[:3] == (here.rows, self.heads, here.queries) or self._grouped(scores)

    def _of_heads(self, value: Tensor) -> Tensor:
        if value.ndim == 3:
            return value.reshape(-1, self.heads, *value.shape[1:])
        return value if value.shape[1] == self.heads else value.flatten(1, 2).unsqueeze(2)

    def _grouped(self, scores: Tensor) -> bool:
        """Whether the heads that share their keys stand where queries do: so is one token attended from, beside keys
        that are kept."""
        one, rows, heads = self._call.queries == 1, scores.shape[0], scores.shape[1] * scores.shape[2]
        return one and (rows, heads) == (self._call.rows, self.heads)

    def _keys(self, value: Tensor) -> Tensor:
        return value[..., : value.shape[-1] - self._sinks] if self._sinks else value

    def _changed(self, value: Tensor, side: str, dtype: torch.dtype) -> Tensor:
        changes = [change for change in self._call.changes if change.side == side]
        if not changes:
            return value
        keys = self._keys(self._of_heads(value)).to(dtype)
        for change in changes:
            keys = aside(change, keys)
        if side == "pattern":
            # What the model goes on with, in its graph too.
            self._call.changed = keys
        keys = keys.to(value.dtype)
        if self._sinks:
            keys = torch.cat([keys, self._of_heads(value)[..., -self._sinks :]], -1)
        return keys.reshape(value.shape)


def _apart() -> Guard:
    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return aside(call, *args, **kwargs)

    return around
