"""Extraction with transformers in this process.

Only the backbone runs (no head unless logits are asked for, no decoder for sites of the encoder), only up to the
deepest site requested, without a KV cache, and rows are cut and pooled on the device before they are copied.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from actcache.capture.edits import Editing
from actcache.capture.hooks import StopForward, observe
from actcache.derive.results import NOTHING, Asked
from actcache.errors import MissedModuleError
from actcache.extract.backends import Reduction, Setting
from actcache.extract.backends.predictor import Predictor
from actcache.extract.backends.reducing import reduce_values, require_rows
from actcache.extract.backends.registry import refuse_remote
from actcache.model.anatomy import Anatomy, ReadPoint, check_identities, describe
from actcache.model.decoder_inputs import require_decoder_start
from actcache.model.forward_inputs import ForwardInputs
from actcache.model.invariance import BatchPolicy
from actcache.model.modes import evaluating
from actcache.model.offload import input_device, is_dispatched
from actcache.model.options import resolve_device
from actcache.model.rope import forget_lengths
from actcache.model.sites import Site
from actcache.model.touched import refuse_edits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class LocalBackend:
    """Runs the model of a source here."""

    # What transformers computes here is what a model's identity stands for.
    identity: Mapping[str, Any] = {}
    retries = 0

    def __init__(self, setting: Setting) -> None:
        refuse_remote("local", setting.remote)
        self._source = setting.source
        self._edits = list(setting.edits)

    @property
    def device(self) -> str:
        if self._source.loaded:
            return str(input_device(self._source.model()))
        return resolve_device(self._source.options.device)

    def check(self, sites: Sequence[str], asked: Asked = NOTHING) -> None:
        self._source.model_to_run()

    @contextmanager
    def session(self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING) -> Iterator[LocalSession]:
        parsed = {name: Site.parse(name) for name in sites}
        with ExitStack() as stack:
            # What one thread's pass reads must not be read by another's, nor taken for somebody else's hook.
            stack.enter_context(lock_of(self._source.model()))
            model = self._source.model_to_run()
            predictor = Predictor.of(model, asked, self._edits) if asked else None
            if predictor is not None:
                parsed.setdefault(predictor.site, Site.parse(predictor.site))
            refuse_edits(model)
            stack.enter_context(evaluating(model))
            stack.enter_context(exact_float32())
            stack.enter_context(torch.autocast(input_device(model).type, enabled=False))
            check_identities(model, sites=list(parsed.values()))
            anatomy = describe(model)
            points = {name: anatomy.read_point(site) for name, site in parsed.items()}
            module = _to_run(anatomy, list(parsed.values()), list(points.values()))
            policy = self._source.batch_policy()
            start = partial(require_decoder_start, self._source.config)
            inputs = ForwardInputs(module, policy, decoder_start=start)
            if policy.lengths == "any" and not inputs.tells_lengths and not all(e.everywhere for e in self._edits):
                policy = replace(policy, lengths="equal", why="Edits at positions need to know each prompt's length.")
            session = LocalSession(module, input_device(model), reduction, policy, inputs, sites, predictor)
            stack.enter_context(torch.no_grad())
            if self._edits:
                stack.enter_context(Editing(model, self._edits, declared=True))
            # Weights that were brought in for a pass leave at its end, which an exception would skip.
            to_the_end = is_dispatched(model)
            session.observer = stack.enter_context(observe(points, session.receive, stop_after_last=not to_the_end))
            yield session


def _to_run(anatomy: Anatomy, sites: Sequence[Site], points: Sequence[ReadPoint]) -> torch.nn.Module:
    """The smallest module that is a forward pass of its own and runs everything that is read."""
    if any(site.name == "logits" for site in sites):
        return anatomy.model
    encoder = getattr(anatomy.model, "get_encoder", None)
    if {site.stack for site in sites} == {"encoder"} and callable(encoder):
        found = encoder()
        inside = {id(module) for module in found.modules()} if isinstance(found, torch.nn.Module) else set()
        if all(id(point.module) in inside for point in points):
            return cast(torch.nn.Module, found)
    return anatomy.backbone


class LocalSession:
    """One model, its sites observed, ready for batches."""

    observer: Any

    def __init__(
        self,
        module: torch.nn.Module,
        device: torch.device,
        reduction: Reduction,
        policy: BatchPolicy,
        inputs: ForwardInputs,
        sites: Iterable[str],
        predictor: Predictor | None = None,
    ) -> None:
        self.policy = policy
        self._module = module
        self._device = device
        self._reduction = reduction
        self._inputs = inputs
        self._sites = list(sites)
        self._predictor = predictor
        self._lengths: list[int] = []
        self._positions: Sequence[Any] | None = None
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def run(self, sequences: Sequence[npt.NDArray[np.int32]], positions: Sequence[Any] | None = None) -> CopiedRows:
        self._lengths = [len(s) for s in sequences]
        self._positions = positions
        self._on_device = {}
        self._rows = {}
        self.observer.reset()
        if self.policy.forget_lengths:
            forget_lengths(self._module)
        try:
            with suppress(StopForward):
                self._module(**self._inputs.make(sequences, self._device))
        finally:
            # What it is recognised by is the same after a pass as before.
            if self.policy.forget_lengths:
                forget_lengths(self._module)
        if self._predictor is not None:
            self._rows |= self._predictor.predict(sequences)
        rows, self._rows = self._rows, {}
        missed = [site for site in self._sites if site not in rows]
        if missed:
            raise MissedModuleError(f"{', '.join(missed)} did not run in this pass: ask for other sites.")
        return CopiedRows(rows)

    def receive(self, site: str, hidden: torch.Tensor) -> None:
        """Keep what the reduction asks for of `hidden` `[B, S, D]` or `[B, S, H, hd]`, as a tensor of its own."""
        require_rows(site, hidden.shape, self._lengths)
        if self._predictor is not None and site == self._predictor.site:
            self._predictor.receive(hidden, self._lengths)
        if site in self._sites:
            on_device = self._lengths_on(hidden.device)
            self._rows[site] = reduce_values(hidden, self._lengths, self._reduction, self._positions, on_device)

    def _lengths_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self._lengths, device=device)
        return self._on_device[device]


class CopiedRows:
    """Rows on their way to the CPU: pinned, asynchronous copies on CUDA; already there on a CPU."""

    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        self._rows: dict[str, torch.Tensor] = {}
        self._events: list[torch.cuda.Event] = []
        devices = set()
        for site, tensor in rows.items():
            if tensor.device.type == "cuda":
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                pinned.copy_(tensor, non_blocking=True)
                devices.add(tensor.device)
                self._rows[site] = pinned
            else:
                self._rows[site] = tensor.to("cpu")
        for device in devices:
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                event.record()
                self._events.append(event)

    @property
    def ready(self) -> bool:
        return not self._events

    def wait(self) -> Mapping[str, torch.Tensor]:
        for event in self._events:
            event.synchronize()
        return self._rows


_locks: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def lock_of(model: torch.nn.Module) -> threading.RLock:
    """What a thread holds while it runs `model`: what one thread's pass reads must not be read by another's."""
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products: they keep 10 and 7 bits of each factor."""
    backends: Any = torch.backends
    places: list[Any] = []
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        places = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [place.fp32_precision for place in places]
    matmul: str | None = None
    cudnn: bool | None = None
    # Where the newer settings were used alone, torch refuses to read the older ones.
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = backends.cudnn.allow_tf32
    try:
        # The older settings set the newer ones too; the other way round they would contradict each other.
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
