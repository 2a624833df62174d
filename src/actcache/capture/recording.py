"""The capture block itself: what is read while it is open, and what it leaves when it closes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from actcache.capture.cache import ActivationCache
from actcache.capture.eager import eager
from actcache.capture.entry import MISSING, Entry
from actcache.capture.generation import Watch
from actcache.capture.passes import Passes
from actcache.capture.stacks import Track, Tracks, way_to_backbone
from actcache.capture.taps import Inputs, Taps
from actcache.capture.tokens import Tables
from actcache.capture.values import make_keeper, map_tensors
from actcache.errors import MissedModuleError
from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.offload import is_dispatched
from actcache.model.sites import Site

Keep = Callable[[Any], Any]


class StopForward(Exception):
    """Raised inside a forward pass to end it: everything that was asked for has been read."""

    def __init__(self, owner: object = None) -> None:
        super().__init__("the forward pass was ended: everything asked for has been read")
        self.owner = owner


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
        keep: dict[str, Any],
        positions: Any,
        stop_after_last: bool,
    ) -> None:
        self._model = model
        self._modules = modules
        self._points = points
        self._anatomy = anatomy
        self._required = required
        self._sides = (include_output, include_inputs)
        self._keep = keep
        self._positions = positions
        self._stop = stop_after_last
        self._track = False
        self._stopper: _Stopper | None = None
        self._taps: Taps | None = None
        self._watch: Watch | None = None

    def track_tokens(self) -> None:
        """Note token ids and masks even when nothing but the caller needs them."""
        self._track = True

    def __enter__(self) -> ActivationCache:
        if self._taps is not None:
            raise RuntimeError("this capture block is already open: call capture() again for another one")
        recorder = _Recorder(self._required)
        keep: Keep = make_keeper(**self._keep)
        outputs: list[tuple[nn.Module, Callable[[Any], None]]] = []
        listeners: list[tuple[nn.Module, Any]] = []
        guards: list[tuple[nn.Module, Any]] = []
        # A pass may begin at the model itself or at its backbone.
        tops = way_to_backbone(self._model, self._anatomy)
        cuts = not (isinstance(self._positions, str) and self._positions == "all")
        if self._points or cuts or self._track:
            recorder.tracks = Tracks(self._model, self._anatomy, self._positions)
            listeners += recorder.tracks.listeners(tops, whole=cuts and bool(self._modules))
        # Weights that accelerate brought in for a pass leave at its end, which an exception would skip.
        stops = self._stop and not is_dispatched(self._model)
        stopper = _Stopper(len(self._modules) + len(self._points)) if stops else None
        if stopper is not None:
            guards += [(module, stopper.guard) for module in {id(m): m for m in (tops[0], tops[-1])}.values()]
        self._stopper = stopper
        self._read_modules(recorder, keep, stopper, outputs, listeners)
        self._read_points(recorder, keep, stopper, outputs, listeners)
        cache = ActivationCache()
        cache._begin(recorder, self._model, self._anatomy)
        taps = self._taps = Taps()
        try:
            taps.add(outputs, listeners, guards)
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
        self._release()
        eager.leave()
        missed = self._cache._end()
        del self._cache
        # Only a pass that began below the model and its backbone can still carry our signal here.
        stopped = isinstance(error, StopForward) and error.owner is not None and error.owner is self._stopper
        if missed and (kind is None or stopped):
            some = ", ".join(repr(key) for key in missed[:5]) + (", ..." if len(missed) > 5 else "")
            raise MissedModuleError(
                f"{len(missed)} of the requested modules or sites did not run inside the block: {some}. "
                "Run the model inside the block, or ask only for what it runs; the rest was captured and can be read."
            )
        return stopped

    def _release(self) -> None:
        taps, watch = self._taps, self._watch
        self._taps = self._watch = None
        if watch is not None:
            watch.end()
        if taps is not None:
            taps.remove()

    def _read_modules(
        self, recorder: _Recorder, keep_all: Keep, stopper: _Stopper | None, outputs: list[Any], listeners: list[Any]
    ) -> None:
        include_output, include_inputs = self._sides
        for key, module in self._modules.items():
            keep = _cutting(keep_all, recorder.tracks, key)
            if include_inputs:
                pair = _Pair(keep, include_output, None if stopper is None else stopper.counter(key))
                recorder.entries[key] = Entry(pair.outputs, pair.inputs)
                listeners.append((module, pair))
            else:
                values: list[Any] = []
                recorder.entries[key] = Entry(values, None)
                outputs.append(
                    (module, _reader(values.append, keep, None if stopper is None else stopper.counter(key)))
                )

    def _read_points(
        self, recorder: _Recorder, keep: Keep, stopper: _Stopper | None, outputs: list[Any], listeners: list[Any]
    ) -> None:
        for site, point in self._points.items():
            values: list[tuple[int, Tensor]] = []
            assert recorder.tracks is not None
            track = recorder.tracks.of(site)
            recorder.sites[str(site)] = track, values
            counter = None if stopper is None else stopper.counter(site)
            read = _site_reader(values, point.extract, keep, track.passes, counter)
            if point.around is not None:
                listeners.append((point.around[0], OnInput(point.around[1])))
            if point.side == "output":
                outputs.append((point.module, read))
            else:
                listeners.append((point.module, OnInput(read)))


class _Recorder:
    """What the taps of one block fill, and the form in which the cache takes it over."""

    def __init__(self, required: Sequence[str]) -> None:
        self.entries: dict[str, Entry] = {}
        self.sites: dict[str, tuple[Track, list[tuple[int, Tensor]]]] = {}
        self.tracks: Tracks | None = None
        self._required = required
        self._published: dict[str, tuple[int, ...]] = {}

    def publish(self, items: dict[str, Any]) -> None:
        """Put what is new since the last call into `items`."""
        published = self._published
        for key, entry in self.entries.items():
            if key not in published and len(entry):
                published[key] = ()
                items[key] = entry
        for key, (track, values) in self.sites.items():
            # What a call of generate returned may join what was published while it ran in another way.
            state = len(values), *track.state
            if values and published.get(key) != state:
                published[key] = state
                items[key] = track.joined(values)

    def missed(self) -> list[str]:
        if not self._required and not any(map(len, self.entries.values())):
            # Whatever runs was asked for, and nothing did.
            return ["model"]
        return [key for key in self._required if not (len(self.entries.get(key, ())) or self._ran(key))]

    def _ran(self, key: str) -> bool:
        return key in self.sites and bool(self.sites[key][1])

    def close(self) -> Callable[[], Tables]:
        """Let go of the values, which the cache now holds; what is left answers for the tokens."""
        self.entries = {}
        self.sites = {key: (track, []) for key, (track, _) in self.sites.items()}
        return self.tokens

    def tokens(self) -> Tables:
        """Token ids and mask of the passes so far, by stack."""
        return self.tracks.tokens(self.sites) if self.tracks is not None else {}


class _Pair:
    """Records inputs and the outputs that belong to them, also when a module calls itself."""

    __slots__ = ("_count", "_keep", "inputs", "outputs")

    def __init__(self, keep: Keep, include_output: bool, count: Callable[[], None] | None) -> None:
        self.inputs: list[Inputs] = []
        self.outputs: list[Any] | None = [] if include_output else None
        self._keep = keep
        self._count = count

    def begin(self, inputs: Inputs) -> Inputs:
        args, kwargs = inputs
        # Kept now: the forward may change its inputs in place.
        return self._keep(args), self._keep(kwargs)

    def end(self, token: Inputs, output: Any) -> None:
        if self.outputs is not None:
            self.outputs.append(self._keep(output))
        self.inputs.append(token)
        if self._count is not None:
            self._count()

    def fail(self, token: Inputs) -> None:
        if self.outputs is not None:
            self.outputs.append(MISSING)
        self.inputs.append(token)


class OnInput:
    """A listener that reads what a module is called with."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[Inputs], None]) -> None:
        self.read = read

    def begin(self, inputs: Inputs) -> None:
        self.read(inputs)

    def end(self, token: Any, output: Any) -> None:
        return None

    def fail(self, token: Any) -> None:
        return None


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


def _reader(put: Callable[[Any], None], keep: Keep, count: Callable[[], None] | None) -> Callable[[Any], None]:
    if count is None:

        def read(output: Any) -> None:
            put(keep(output))

        return read

    def read_and_count(output: Any) -> None:
        put(keep(output))
        count()

    return read_and_count


def _site_reader(
    values: list[tuple[int, Tensor]],
    extract: Callable[[Any], Tensor],
    keep: Keep,
    passes: Passes,
    count: Callable[[], None] | None,
) -> Callable[[Any], None]:
    def read(raw: Any) -> None:
        tensor = extract(raw)
        if passes.cuts:
            tensor = passes.cut(tensor)
        values.append((passes.current, keep(tensor)))
        if count is not None:
            count()

    return read


def _cutting(keep: Keep, tracks: Tracks | None, path: str) -> Keep:
    track = tracks.of_module(path) if tracks is not None else None
    if track is None or not track.passes.cuts:
        return keep
    passes = track.passes

    def cut(tensor: Tensor) -> Tensor:
        # With four dimensions the second may be heads as well as positions.
        return passes.cut(tensor) if tensor.ndim in (2, 3) else tensor

    return lambda value: keep(map_tensors(value, cut))
