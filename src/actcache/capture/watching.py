"""Gradients of captured values: hooks on the tensors that the model goes on with.

A tensor's hook is part of the graph and goes with it. It knows the place for its gradient weakly: when nobody holds the
cache any more, nothing is kept; and the place knows nothing of the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actcache.capture.gradients import Gradients
from actcache.capture.joining import Refused
from actcache.capture.tokens import position_axes
from actcache.capture.values import map_tensors, tensors_in
from actcache.errors import GradientError, SiteUnavailableError
from actcache.model.forms import first_input, first_tensor
from actcache.model.replacing import with_first_input
from actcache.model.sites import Site

if TYPE_CHECKING:
    from torch import nn

    from actcache.capture.stacks import Track
    from actcache.model.anatomy import Anatomy
    from actcache.model.forms import Side
    from actcache.model.read_points import ReadPoint

Change = Callable[[Tensor], Tensor]

# Columns of what is there, which may lie so that they are no view of it.
_CHOSEN = ("q", "k", "v", "z")

_NO_GRAPH = (
    "there is no graph for include_grads: the model ran without one (torch.no_grad, inference mode, generate, or "
    "gradient checkpointing with use_reentrant=True, which runs blocks without a graph first). Run it with gradients "
    'enabled, and checkpointing as gradient_checkpointing_enable({"use_reentrant": False})'
)


class Watcher:
    """Puts hooks on tensors; `convert` makes of a gradient what is kept of it."""

    def __init__(self, convert: Change) -> None:
        self._convert = convert
        self.saw_graph = False

    def output(self, value: Any, cut: Change | None) -> Gradients:
        """Watch every tensor of what a module returned. Raises `GradientError` where there is no graph."""
        _require_graph()
        tensors = list(tensors_in(value))
        found = Gradients([None] * len(tensors), watched=any(tensor.requires_grad for tensor in tensors))
        for place, tensor in enumerate(tensors):
            if tensor.requires_grad:
                self._hook(tensor, found, place, cut)
        return found

    def site(self, key: str, point: ReadPoint, raw: Any, value: Tensor, cut: Change | None) -> Gradients:
        """Watch the tensor from which a site's `value` was taken, out of the `raw` inputs or output of its module; of
        what heads add that is their sum."""
        _require_graph()
        added = Site.parse(key).name == "head_out"
        watched = (first_tensor(raw) if added else value).requires_grad
        found = Gradients([None], watched=watched)
        if watched:
            source, back = (first_tensor(raw), _Added(value)) if added else _source(key, point, raw, value)
            self._hook(source, found, 0, cut if back is None else _both(back, cut))
        return found

    def _hook(self, tensor: Tensor, found: Gradients, place: int, change: Change | None) -> None:
        self.saw_graph = True
        # None of what the hook holds may hold the graph.
        there, convert = weakref.ref(found), self._convert

        def arrived(gradient: Tensor) -> None:
            mine = there()
            if mine is not None:
                mine.arrived(place, convert(gradient if change is None else change(gradient)))

        tensor.register_hook(arrived)


class SiteGradients:
    """The gradients of the sites of one block, by key; `fixed` are some that do not change any more."""

    def __init__(self, fixed: Mapping[str, Tensor] | None = None) -> None:
        self._fixed = dict(fixed or {})
        self._of: dict[str, tuple[Track, list[tuple[int, Gradients, Tensor]]]] = {}

    def add(self, key: str, track: Track, found: list[tuple[int, Gradients, Tensor]]) -> None:
        """`found` holds, for each run, its pass's index, the place for its gradient, and a tensor of its form."""
        self._of[key] = track, found

    def __contains__(self, key: str) -> bool:
        return key in self._of or key in self._fixed

    def get(self, key: str) -> Tensor | None:
        """The gradient of a site's value, in its form; None while nothing has arrived. Raises `GradientError` where
        nothing can."""
        if key in self._fixed:
            return self._fixed[key]
        track, found = self._of[key]
        if found and not any(gradients.watched for _, gradients, _ in found):
            found[0][1].require(f"{key!r}")
        arrived = [(index, gradients.values()[0], form) for index, gradients, form in found]
        first = next((gradient for _, gradient, _ in arrived if gradient is not None), None)
        if first is None:
            return None
        # A pass on which the loss did not depend.
        values = [
            (index, torch.zeros_like(form, device=first.device) if gradient is None else gradient)
            for index, gradient, form in arrived
        ]
        joined = track.joined(values, position_axes(key))
        if joined is None:
            return None
        if isinstance(joined, Refused):
            raise joined.error(key)
        return joined

    def arrived(self) -> dict[str, Tensor]:
        """What there is so far."""
        found = dict(self._fixed)
        for key in self._of:
            with suppress(GradientError, SiteUnavailableError):
                gradient = self.get(key)
                if gradient is not None:
                    found[key] = gradient
        return found


def recomputing() -> bool:
    """Whether a backward pass is running here, and this run of a module repeats one for it."""
    return bool(torch._C._current_graph_task_id() != -1)


class OwnTensors:
    """A change of what a module is given or returns: tensors are handed on as tensors of their own.

    `every` one, so that a gradient counts this use of them only; otherwise leaves of the graph, which live longer than
    the pass and gather gradients of others.

    With `begins` a graph begins where there is none: at everything that is returned, or at the hidden states that the
    module is given. Frozen weights before it then cost nothing, and the gradients behind it are the same.
    """

    declared = True

    def __init__(
        self, side: Side | Literal["pattern"], *, every: bool = False, early: bool = False, begins: bool = True
    ) -> None:
        self.side = side
        self.early = early
        self._every = every
        self._begins = begins

    @classmethod
    def at(cls, site: Site, point: ReadPoint, anatomy: Anatomy) -> Iterator[tuple[nn.Module, OwnTensors]]:
        """For the gradient of a site: that of what an edit of it writes. The stream between two branches is written
        where it is, and everything else that a module is given is written for this module."""
        if point.probabilities:
            yield point.module, cls("pattern", every=True)
        elif site.name == "resid_mid" and point.side == "input":
            # It goes on beside that module too: a graph has to begin before both.
            yield anatomy.read_point(replace(site, name="resid_pre")).module, cls("input")
            yield point.module, cls("input", early=point.early, begins=False)
        else:
            if site.name == "router_logits":
                # Some routers make their scores of them, and go on with these.
                yield point.module, cls("input")
            yield point.module, cls(point.side, every=point.side == "input", early=point.early)

    def stands(self) -> bool:
        return True

    def __call__(self, value: Any) -> Any:
        if any(map(self._concerned, tensors_in(value))):
            value = map_tensors(value, self._own, of_cache=lambda cache: cache)
        if self.side == "input" and self._begins and _graphless(given := first_input(value)):
            value = with_first_input(value, _begun(given))
        return value

    def _concerned(self, tensor: Tensor) -> bool:
        if tensor.requires_grad:
            return self._every or tensor.is_leaf
        return self._begins and self.side != "input" and _graphless(tensor)

    def _own(self, tensor: Tensor) -> Tensor:
        if not self._concerned(tensor):
            return tensor
        return tensor.view_as(tensor) if tensor.requires_grad else _begun(tensor)


def _graphless(tensor: Tensor) -> bool:
    """Whether a graph could begin at `tensor`, and has not begun before it."""
    able = tensor.is_floating_point() or tensor.is_complex()
    return able and not tensor.requires_grad and torch.is_grad_enabled()


def _begun(tensor: Tensor) -> Tensor:
    # No leaf: the model may go on in place.
    return tensor.detach().requires_grad_().clone()


def _require_graph() -> None:
    if not torch.is_grad_enabled():
        raise GradientError(f"{_NO_GRAPH}.")


def _both(one: Change, other: Change | None) -> Change:
    return one if other is None else lambda gradient: other(one(gradient))


def _source(key: str, point: ReadPoint, raw: Any, value: Tensor) -> tuple[Tensor, Change | None]:
    """The tensor of `raw` that a site's value is, or is taken from, and how the site's gradient follows from its."""
    tensors = list(tensors_in(raw))
    if any(tensor is value for tensor in tensors):
        return value, None
    if point.scale != 1.0:
        source, shape, scale = first_tensor(raw), value.shape, point.scale
        return source, lambda gradient: gradient.reshape(shape) / scale
    base = value._base
    if point.probabilities:
        return (value, None) if base is None else (base, _Part(base, value))
    for tensor in tensors:
        if base is not None and (base is tensor or base is tensor._base) and 0 not in tensor.stride():
            return tensor, _Part(tensor, value)
    if Site.parse(key).name in _CHOSEN:
        source = first_input(raw) if point.side == "input" else first_tensor(raw)
        numbers = torch.arange(source.numel(), device=source.device).view(source.shape)
        places = point.extract(((numbers,), {}) if point.side == "input" else numbers)
        return source, lambda gradient: gradient.take(places)
    raise GradientError(
        f"{key!r} is computed from what the model goes on with, and is itself no part of the graph: it has no gradient "
        "of its own. Ask for the gradient of what it is computed from."
    )


class _Added:
    """The gradient of what each head adds, or one of them: that of the sum, once for each."""

    def __init__(self, value: Tensor) -> None:
        self._shape = value.shape

    def __call__(self, gradient: Tensor) -> Tensor:
        if gradient.numel() == self._shape.numel():
            return gradient.reshape(self._shape)
        return gradient.reshape(*self._shape[:-2], 1, self._shape[-1]).expand(self._shape)


class _Part:
    """The part of a tensor's gradient that belongs to a view of it."""

    def __init__(self, whole: Tensor, part: Tensor) -> None:
        self._whole = whole.shape, whole.stride()
        self._part = part.shape, part.stride(), part.storage_offset() - whole.storage_offset()

    def __call__(self, gradient: Tensor) -> Tensor:
        shape, stride = self._whole
        if gradient.stride() != stride:
            gradient = torch.empty_strided(shape, stride, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
        size, strides, offset = self._part
        return gradient.as_strided(size, strides, gradient.storage_offset() + offset)
