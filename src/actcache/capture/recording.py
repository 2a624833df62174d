"""The capture block itself: what is read while it is open, and what it leaves when it closes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from actcache.capture.attempts import StopForward
from actcache.capture.cache import ActivationCache
from actcache.capture.entry import Entry
from actcache.capture.generation import Watch
from actcache.capture.names import Names
from actcache.capture.readers import (
    Keep,
    OnInput,
    OnReturn,
    Pair,
    WatchedOutputs,
    WatchedSite,
    cut_of_module,
    cutting,
    graphless,
    reader,
    site_reader,
)
from actcache.capture.stacks import Track, Tracks, way_to_backbone
from actcache.capture.tokens import TokenState, position_axes
from actcache.capture.values import make_converter, make_keeper
from actcache.capture.watching import OwnTensors, SiteGradients, Watcher
from actcache.errors import GradientError, MissedModuleError
from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.eager import eager
from actcache.model.implementation import holding_probabilities
from actcache.model.offload import is_dispatched
from actcache.model.sites import Site
from actcache.model.taps import Taps


class Recording:
    """A context manager that records one model; made by `capture`."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        points: Mapping[Site, ReadPoint],
        *,
        anatomy: Anatomy | None,
        required: Sequence[str],
        include_output: bool,
        include_inputs: bool,
        include_grads: bool,
        keep: dict[str, Any],
        positions: Any,
        stop_after_last: bool,
        names: Names | None,
    ) -> None:
        self._model = model
        self._modules = modules
        self._points = points
        self._anatomy = anatomy
        self._required = required
        self._sides = (include_output, include_inputs)
        self._grads = include_grads
        self._keep = keep
        self._positions = positions
        self._stop = stop_after_last
        self._names = names
        self._track = False
        self._stopper: _Stopper | None = None
        self._watcher: Watcher | None = None
        self._tracks: Tracks | None = None
        self._taps: Taps | None = None
        self._watch: Watch | None = None
        self._held: ExitStack | None = None

    def track_tokens(self) -> None:
        """Note token ids and masks even when nothing but the caller needs them."""
        self._track = True

    def __enter__(self) -> ActivationCache:
        if self._taps is not None:
            raise RuntimeError("this capture block is already open: call capture() again for another one")
        watcher = Watcher(make_converter(**self._keep)) if self._grads else None
        recorder, self._watcher = _Recorder(self._required, watcher), watcher
        keep: Keep = make_keeper(**self._keep)
        outputs: list[tuple[nn.Module, Callable[[Any], None]]] = []
        listeners: list[tuple[nn.Module, Any]] = []
        guards: list[tuple[nn.Module, Any]] = []
        last: list[tuple[nn.Module, Any]] = []
        # A pass may begin at the model itself or at its backbone.
        tops = way_to_backbone(self._model, self._anatomy)
        cuts = not (isinstance(self._positions, str) and self._positions == "all")
        if self._points or cuts or self._track:
            asked = None if self._modules else {site.stack for site in self._points}
            self._tracks = recorder.tracks = Tracks(self._model, self._anatomy, self._positions, asked)
            # First, so that it is told first that a call begins.
            listeners.append((tops[0], recorder.tracks.attempts()))
            listeners += recorder.tracks.listeners(tops, whole=cuts and bool(self._modules))
        # Weights that accelerate brought in for a pass leave at its end, which an exception would skip.
        stops = self._stop and not is_dispatched(self._model)
        stopper = _Stopper(len(self._modules) + len(self._points)) if stops else None
        if stopper is not None:
            guards += [(module, stopper.guard) for module in {id(m): m for m in (tops[0], tops[-1])}.values()]
        self._stopper = stopper
        self._read_modules(recorder, keep, stopper, outputs, listeners)
        self._read_points(recorder, keep, stopper, outputs, listeners, guards)
        if watcher is not None:
            last += [(module, OwnTensors("output")) for module in self._modules.values()]
            for site, point in self._points.items():
                assert self._anatomy is not None
                last += OwnTensors.at(site, point, self._anatomy)
        elif not self._keep["detach"]:
            # Computed beside the model, they are in the graph only if it goes on with them.
            last += [(p.module, OwnTensors("pattern", every=True)) for p in self._points.values() if p.probabilities]
        cache = ActivationCache()
        cache._begin(recorder, self._model, self._anatomy)
        cache._cut = cuts
        if self._names is not None:
            cache._called = self._names
        taps = self._taps = Taps()
        try:
            if any(point.probabilities for point in self._points.values()):
                self._held = ExitStack()
                self._held.enter_context(holding_probabilities(self._model))
            taps.add(outputs, listeners, guards, last=last)
            self._watch = recorder.tracks.watch(tops) if recorder.tracks is not None else None
            eager.enter()
        except BaseException:
            self._release()
            raise
        self._cache = cache
        return cache

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        taps, watcher, tracks = self._taps, self._watcher, self._tracks
        self._tracks = None
        self._release()
        eager.leave()
        missed = self._cache._end()
        nothing = bool(missed) and self._cache.is_empty()
        del self._cache
        # Only a pass that began below the model and its backbone can still carry our signal here.
        stopped = isinstance(error, StopForward) and error.owner is not None and error.owner is self._stopper
        if missed and (kind is None or stopped):
            some = ", ".join(repr(key) for key in missed[:5]) + (", ..." if len(missed) > 5 else "")
            instead = instead_of_missing(taps if nothing else None)
            raise MissedModuleError(
                f"{len(missed)} of the requested modules or sites did not run inside the block: {some}. "
                f"{instead}, or ask only for what it runs (a module whose forward() is called, and not itself, is not "
                "seen); the rest was captured and can be read."
            )
        if watcher is not None and not watcher.saw_graph and kind is None:
            raise GradientError(
                "nothing that was captured can have a gradient (include_grads): it holds no floating-point tensor. The "
                "values were captured and can be read."
            )
        if kind is None and tracks is not None and (lost := tracks.left_out()):
            warnings.warn(
                f"{lost} of the passes in this block were ended by an exception: what was read in them is left out, "
                "since other passes ran to their end. To keep what a pass computes until you end it yourself, give it "
                "a capture block of its own.",
                stacklevel=2,
            )
        return stopped

    def _release(self) -> None:
        taps, watch = self._taps, self._watch
        self._taps = self._watch = None
        if watch is not None:
            watch.end()
        if taps is not None:
            taps.remove()
        if self._held is not None:
            held, self._held = self._held, None
            held.close()

    def _read_modules(
        self, recorder: _Recorder, keep_all: Keep, stopper: _Stopper | None, outputs: list[Any], listeners: list[Any]
    ) -> None:
        include_output, include_inputs = self._sides
        for key, module in self._modules.items():
            cut = cut_of_module(recorder.tracks, key)
            keep = keep_all if cut is None else cutting(keep_all, cut)
            count = None if stopper is None else stopper.counter(key)
            watch = None if recorder.watcher is None else WatchedOutputs(recorder.watcher, cut)
            gradients = None if watch is None else watch.gradients
            if include_inputs:
                pair = Pair(keep, include_output, count, watch)
                recorder.entries[key] = Entry(pair.outputs, pair.inputs, gradients)
                listeners.append((module, pair))
            else:
                values: list[Any] = []
                recorder.entries[key] = Entry(values, None, gradients)
                outputs.append((module, reader(values.append, keep, count, watch)))

    def _read_points(
        self,
        recorder: _Recorder,
        keep: Keep,
        stopper: _Stopper | None,
        outputs: list[Any],
        listeners: list[Any],
        guards: list[Any],
    ) -> None:
        for site, point in self._points.items():
            key = str(site)
            values: list[tuple[int, Tensor]] = []
            assert recorder.tracks is not None
            track = recorder.tracks.of(site)
            recorder.sites[key] = track, values
            count = None if stopper is None else stopper.counter(site)
            watch = None
            if recorder.watcher is not None and recorder.gradients is not None:
                watch = WatchedSite(recorder.watcher, key, point, track.passes)
                recorder.gradients.add(key, track, watch.found)
            extract = point.extract
            if self._keep["detach"] and (watch is None or site.name == "head_out"):
                extract = graphless(extract)
            read = site_reader(values, extract, keep, track.passes, key, count, watch)
            listeners += [(module, OnInput(note)) for module, note in point.around]
            if point.guards:
                guards += point.guards
                listeners.append((point.module, OnReturn(read)))
            elif point.side == "output":
                outputs.append((point.module, read))
            else:
                listeners.append((point.module, OnInput(read, early=point.early)))


def instead_of_missing(taps: Taps | None) -> str:
    """What to do about what did not run in a block; `taps` are the block's where nothing of it ran."""
    if taps is not None and taps.ran_elsewhere():
        return (
            "The model ran in another thread, and a block belongs to the thread that opened it: "
            "open the block in the thread that runs the model"
        )
    return "Run the model inside the block"


class _Recorder:
    """What the taps of one block fill, and the form in which the cache takes it over."""

    def __init__(self, required: Sequence[str], watcher: Watcher | None) -> None:
        self.watcher = watcher
        self.gradients = SiteGradients() if watcher is not None else None
        self.entries: dict[str, Entry] = {}
        self.sites: dict[str, tuple[Track, list[tuple[int, Tensor]]]] = {}
        self.tracks: Tracks | None = None
        self._required = required
        self._published: dict[str, tuple[Any, ...]] = {}
        # Known when the values are gone.
        self._widths: dict[str, list[tuple[int, int]]] | None = None

    def publish(self, items: dict[str, Any]) -> None:
        """Put what is new since the last call into `items`."""
        published = self._published
        states: dict[Track, tuple[int, ...]] = {}
        for key, entry in self.entries.items():
            if key not in published and len(entry):
                published[key] = ()
                items[key] = entry
        for key, (track, values) in self.sites.items():
            if not values:
                continue
            # What a call of generate returned may join what was published while it ran in another way.
            state = len(values), states.get(track) or states.setdefault(track, track.state)
            if published.get(key) != state:
                published[key] = state
                joined = track.joined(values, position_axes(key))
                if joined is not None:
                    items[key] = joined
                else:
                    items.pop(key, None)

    def missed(self) -> list[str]:
        if not self._required and not any(map(len, self.entries.values())):
            # Whatever runs was asked for, and nothing did.
            return ["model"]
        return [key for key in self._required if not (len(self.entries.get(key, ())) or self._ran(key))]

    def _ran(self, key: str) -> bool:
        if key not in self.sites:
            return False
        track, values = self.sites[key]
        dropped = track.passes.dropped
        return any(index not in dropped for index, _ in values) if dropped else bool(values)

    def close(self) -> Callable[[], TokenState]:
        """Let go of the values, which the cache now holds; what is left answers for the tokens."""
        self._widths = self._irregular()
        self.entries = {}
        self.sites = {key: (track, []) for key, (track, _) in self.sites.items()}
        return self.tokens

    def tokens(self) -> TokenState:
        """Token ids and mask of the passes so far, by stack, and the masks of sites that these do not describe."""
        if self.tracks is None:
            return TokenState()
        widths = self._irregular() if self._widths is None else self._widths
        return TokenState(self.tracks.tokens(self.sites), self.tracks.masks(widths) if widths else {})

    def _irregular(self) -> dict[str, list[tuple[int, int]]]:
        """Of each site whose value may have other rows or positions than the tokens: which passes gave how many."""
        found = {}
        for key, (track, values) in self.sites.items():
            if len(track.passes.passes) > 1 or (track.passes.passes and track.passes.passes[0].computed is not None):
                axis = position_axes(key)[0]
                found[key] = [(i, value.shape[axis] if value.ndim > axis else -1) for i, value in values]
        return found


class _Stopper:
    """Ends the pass once everything was seen in it, and makes the interrupted call return None."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._seen: set[Any] = set()
        self._depth = 0

    def counter(self, key: Any) -> Callable[[], None]:
        def count() -> None:
            self._seen.add(key)
            if len(self._seen) == self.total:
                self._seen.clear()
                raise StopForward(self)

        return count

    def guard(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth == 0:
            self._seen.clear()
        self._depth += 1
        try:
            return call(*args, **kwargs)
        except StopForward as stop:
            if stop.owner is self and self._depth == 1:
                return None
            raise
        finally:
            self._depth -= 1
