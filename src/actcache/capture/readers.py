"""What stands on a module while it is captured: readers of its outputs, of its inputs, of one site."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actcache.capture.entry import MISSING
from actcache.capture.gradients import Gradients
from actcache.capture.passes import Pass, Passes
from actcache.capture.stacks import Tracks
from actcache.capture.tokens import position_axes
from actcache.capture.values import map_tensors
from actcache.capture.watching import Watcher, recomputing
from actcache.model.read_points import ReadPoint
from actcache.model.taps import Inputs, OnOutput

Keep = Callable[[Any], Any]
Count = Callable[[], None]


class WatchedOutputs:
    """Notes the gradients of what one module returns, run by run."""

    __slots__ = ("_passes", "_watcher", "gradients")

    def __init__(self, watcher: Watcher, passes: Passes | None) -> None:
        self.gradients: list[Gradients] = []
        self._watcher = watcher
        self._passes = passes

    def __call__(self, output: Any) -> None:
        one = self._passes.latest if self._passes is not None else None
        cut = None if one is None else partial(_cut_of_module, one)
        self.gradients.append(self._watcher.output(output, cut))


class WatchedSite:
    """Notes the gradients of one site, pass by pass."""

    __slots__ = ("_axis", "_key", "_passes", "_point", "_watcher", "found")

    def __init__(self, watcher: Watcher, key: str, point: ReadPoint, passes: Passes) -> None:
        self.found: list[tuple[int, Gradients, Tensor]] = []
        self._watcher = watcher
        self._key = key
        self._point = point
        self._passes = passes
        self._axis = position_axes(key)[0]

    def __call__(self, raw: Any, value: Tensor, kept: Tensor) -> None:
        one, axis, logits = self._passes.latest, self._axis, self._key == "logits"
        cut = None if one is None or not self._passes.cuts else lambda gradient: one.cut(gradient, axis, logits=logits)
        gradients = self._watcher.site(self._key, self._point, raw, value, cut)
        self.found.append((self._passes.current, gradients, kept.new_empty(kept.shape, device="meta")))


class Pair:
    """Records inputs and the outputs that belong to them, also when a module calls itself."""

    __slots__ = ("_count", "_keep", "_watch", "inputs", "outputs")

    def __init__(self, keep: Keep, include_output: bool, count: Count | None, watch: WatchedOutputs | None) -> None:
        self.inputs: list[Inputs] = []
        self.outputs: list[Any] | None = [] if include_output else None
        self._keep = keep
        self._count = count
        self._watch = watch

    def begin(self, inputs: Inputs) -> Inputs:
        args, kwargs = inputs
        # Kept now: the forward may change its inputs in place.
        return self._keep(args), self._keep(kwargs)

    def end(self, token: Inputs, output: Any) -> None:
        if self._watch is not None:
            if recomputing():
                return
            self._watch(output)
        if self.outputs is not None:
            self.outputs.append(self._keep(output))
        self.inputs.append(token)
        if self._count is not None:
            self._count()

    def fail(self, token: Inputs) -> None:
        if self._watch is not None:
            if recomputing():
                return
            self._watch(None)
        if self.outputs is not None:
            self.outputs.append(MISSING)
        self.inputs.append(token)


class OnInput:
    """A listener that reads what a module is called with."""

    __slots__ = ("early", "read")

    def __init__(self, read: Callable[[Inputs], None], *, early: bool = False) -> None:
        self.read = read
        self.early = early

    def begin(self, inputs: Inputs) -> None:
        self.read(inputs)

    def end(self, token: Any, output: Any) -> None:
        return None

    def fail(self, token: Any) -> None:
        return None


class OnReturn:
    """A listener that reads what a module returns while the guards around its call are still in place."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[Any], None]) -> None:
        self.read = read

    def begin(self, inputs: Inputs) -> None:
        return None

    def end(self, token: Any, output: Any) -> None:
        self.read(output)

    def fail(self, token: Any) -> None:
        return None


def reader(put: Callable[[Any], None], keep: Keep, count: Count | None, watch: WatchedOutputs | None) -> OnOutput:
    """A reader of outputs: `put` is given what `keep` makes of each."""
    if count is None and watch is None:

        def read(output: Any) -> None:
            put(keep(output))

        return read

    def read_and_tell(output: Any) -> None:
        if watch is not None:
            # Gradients arrive where the graph was made.
            if recomputing():
                return
            watch(output)
        put(keep(output))
        if count is not None:
            count()

    return read_and_tell


def graphless(extract: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """`extract` for values that are detached: what it computes on the way is no part of the model's graph, which a
    checkpoint may make once more when nobody reads along."""

    def extract_alone(raw: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return extract(raw)
        with torch.no_grad():
            return extract(raw)

    return extract_alone


def site_reader(
    values: list[tuple[int, Tensor]],
    extract: Callable[[Any], Tensor],
    keep: Keep,
    passes: Passes,
    key: str,
    count: Count | None,
    watch: WatchedSite | None,
) -> Callable[[Any], None]:
    """A reader of one site, out of what its module returned or was called with."""
    axis, logits = position_axes(key)[0], key == "logits"

    def read(raw: Any) -> None:
        tensor = extract(raw)
        # Not before: a run that repeats another has to save for the graph what that saved.
        if watch is not None and recomputing():
            return
        kept = keep(passes.cut(tensor, axis, logits=logits) if passes.cuts else tensor)
        values.append((passes.current, kept))
        if watch is not None:
            watch(raw, tensor, kept)
        if count is not None:
            count()

    return read


def cut_of_module(tracks: Tracks | None, path: str) -> Passes | None:
    """The passes whose kept positions the values of a module are cut to; None where nothing is cut."""
    track = tracks.of_module(path) if tracks is not None else None
    return None if track is None or not track.passes.cuts else track.passes


def cutting(keep: Keep, passes: Passes) -> Keep:
    """`keep` for what a module returns or is given, cut to the kept positions first."""

    def cut(tensor: Tensor) -> Tensor:
        return _cut_of_module(passes.require(), tensor)

    return lambda value: keep(map_tensors(value, cut))


def _cut_of_module(one: Pass, tensor: Tensor) -> Tensor:
    # With four dimensions the second may be heads as well as positions.
    return one.cut(tensor) if tensor.ndim in (2, 3) else tensor
