"""Extraction with transformers in this process.

Only the backbone runs (no head unless logits are asked for, no decoder for sites of the encoder), only up to the
deepest site requested, without a KV cache, and rows are cut and pooled on the device before they are copied.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from actcache.capture.edits import Editing
from actcache.capture.hooks import StopForward, observe
from actcache.capture.positions import resolve_positions
from actcache.config import sweep_bytes
from actcache.derive.results import NOTHING, Asked
from actcache.errors import MissedModuleError
from actcache.extract.backends import Reduction, Setting
from actcache.extract.backends.copies import CopiedRows
from actcache.extract.backends.interleaved import Pass, run_interleaved
from actcache.extract.backends.predictor import Predictor
from actcache.extract.backends.reducing import reduce_values, require_rows
from actcache.extract.backends.registry import refuse_remote
from actcache.extract.inventory import declared_width
from actcache.model.anatomy import Anatomy, ReadPoint, check_identities, describe
from actcache.model.decoder_inputs import require_decoder_start
from actcache.model.forward_inputs import ForwardInputs
from actcache.model.invariance import BatchPolicy
from actcache.model.modes import evaluating
from actcache.model.offload import input_device, is_dispatched
from actcache.model.options import resolve_device
from actcache.model.rope import forget_lengths
from actcache.model.sites import Site
from actcache.model.staying import can_stay
from actcache.model.touched import refuse_edits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# Reads, from a session's passes over a module, the values at points; whether a pass may end behind the last of them.
Observing = Callable[
    ["LocalSession", Anatomy, torch.nn.Module, Mapping[str, ReadPoint], bool], AbstractContextManager[object]
]


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
    def session(
        self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING, *, observing: Observing | None = None
    ) -> Iterator[LocalSession]:
        """`observing`: how values are read where it is not by hooks."""
        with self.prepared(sites) as model, ExitStack() as stack:
            parsed = {name: Site.parse(name) for name in sites}
            predictor = Predictor.of(model, asked, self._edits) if asked else None
            if predictor is not None:
                parsed.setdefault(predictor.site, Site.parse(predictor.site))
            check_identities(model, sites=list(parsed.values()))
            anatomy = describe(model)
            points = {name: anatomy.read_point(site) for name, site in parsed.items()}
            module = _to_run(anatomy, list(parsed.values()), list(points.values()))
            policy = self._source.batch_policy()
            start = partial(require_decoder_start, self._source.config)
            inputs = ForwardInputs(module, policy, decoder_start=start)
            if policy.lengths == "any" and not inputs.tells_lengths and not all(e.everywhere for e in self._edits):
                policy = replace(policy, lengths="equal", why="Edits at positions need to know each prompt's length.")
            session = LocalSession(anatomy, module, reduction, policy, inputs, sites, len(points), predictor)
            if self._edits:
                stack.enter_context(Editing(model, self._edits, declared=True))
            # Weights that were brought in for a pass leave at its end, which an exception would skip.
            to_the_end = is_dispatched(model)
            if observing is not None:
                stack.enter_context(observing(session, anatomy, module, points, not to_the_end))
            else:
                if to_the_end and not self._edits and not policy.forget_lengths and can_stay(model):
                    session.row_bytes = self._row_bytes(model, sites, asked)
                observer = stack.enter_context(observe(points, session.receive, stop_after_last=not to_the_end))
                session.reset = observer.reset
            yield session

    @contextmanager
    def prepared(self, sites: Sequence[str]) -> Iterator[torch.nn.Module]:
        """The model, to be run by this thread alone as the identity says: checked, in evaluation mode, exact, without
        gradients."""
        with ExitStack() as stack:
            # What one thread's pass reads must not be read by another's, nor taken for somebody else's hook.
            stack.enter_context(lock_of(self._source.model()))
            model = self._source.model_to_run()
            refuse_edits(model)
            stack.enter_context(evaluating(model))
            stack.enter_context(exact_float32())
            stack.enter_context(torch.autocast(input_device(model).type, enabled=False))
            check_identities(model, sites=[Site.parse(name) for name in sites])
            stack.enter_context(torch.no_grad())
            yield model

    def _row_bytes(self, model: torch.nn.Module, sites: Sequence[str], asked: Asked) -> int:
        """What a row of all that is kept takes, for each token or prompt, as far as the configuration tells."""
        source, size = self._source, getattr(model, "dtype", torch.float32).itemsize
        widths = [declared_width(source, Site.parse(name)) or 4 * source.d_model for name in sites]
        logits = (
            0 if asked.logits is None else (2 * asked.logits.top_k if asked.logits.top_k else source.vocab_size or 0)
        )
        return sum(widths) * size + 4 * (logits + 1)


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


class OnePass:
    """One batch on its way through the model.

    Attributes: its prompts' `sequences`, `lengths` and `positions`; `rows` of sites that ran, those handed over
    `copied`; the sites `seen`.
    """

    def __init__(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        positions: Sequence[Any] | None,
        reduction: Reduction,
        predictor: Predictor | None,
    ) -> None:
        self.sequences = sequences
        self.lengths = [len(s) for s in sequences]
        self.positions = positions
        self.rows: dict[str, torch.Tensor] = {}
        self.copied = CopiedRows()
        self.predictor = None if predictor is None else copy.copy(predictor)
        self.seen: set[str] = set()
        self._reduction = reduction
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @property
    def rows_to_keep(self) -> int:
        """How many rows of a site are kept."""
        if self._reduction.pooling is not None:
            return len(self.lengths)
        each = self.positions or [self._reduction.positions] * len(self.lengths)
        return sum(len(resolve_positions(where, n)) for where, n in zip(each, self.lengths, strict=True))

    def hand_over(self) -> None:
        """Begin to copy what rows there are."""
        for site, rows in self.rows.items():
            self.copied.add(site, rows)
        self.rows.clear()

    def reduce(self, hidden: torch.Tensor) -> torch.Tensor:
        """What is kept of a site's values ``[B, S, D]``, as a tensor of its own."""
        return reduce_values(hidden, self.lengths, self._reduction, self.positions, self._lengths_on(hidden.device))

    def _lengths_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.lengths, device=device)
        return self._on_device[device]


class LocalSession:
    """One model, its sites observed, ready for batches."""

    def __init__(
        self,
        anatomy: Anatomy,
        module: torch.nn.Module,
        reduction: Reduction,
        policy: BatchPolicy,
        inputs: ForwardInputs,
        sites: Iterable[str],
        points: int,
        predictor: Predictor | None = None,
    ) -> None:
        self.policy = policy
        self._anatomy = anatomy
        self._module = module
        self._device = input_device(anatomy.model)
        self._reduction = reduction
        self._inputs = inputs
        self._predictor = predictor
        self._sites = list(sites)
        self._points = points
        self._now = OnePass([], None, reduction, None)
        self._sweeping = False
        # Bytes that a row of all sites takes; None where batches run one after the other.
        self.row_bytes: int | None = None
        # What stands before a pass, and the pass itself.
        self.reset: Callable[[], object] = lambda: None
        self.forward: Callable[[dict[str, Any]], object] = lambda inputs: module(**inputs)

    def run(self, sequences: Sequence[npt.NDArray[np.int32]], positions: Sequence[Any] | None = None) -> CopiedRows:
        self._now = OnePass(sequences, positions, self._reduction, self._predictor)
        self.reset()
        if self.policy.forget_lengths:
            forget_lengths(self._module)
        try:
            with suppress(StopForward):
                self._call(self._now)
        finally:
            # What it is recognised by is the same after a pass as before.
            if self.policy.forget_lengths:
                forget_lengths(self._module)
        self._finish(self._now)
        return self._now.copied

    @property
    def sweeps(self) -> bool:
        """Whether offloaded weights would be read again for every batch."""
        return self.row_bytes is not None

    def sweep(self, batches: Iterable[tuple[Sequence[Any], Sequence[Any] | None]]) -> Iterator[CopiedRows | None]:
        """The same for many batches (each the arguments of `run`), block by block: offloaded weights are read once for
        as many of them as the limit of `config.sweep_bytes` takes. None for a batch that is to be run by itself.

        The first time what comes of one batch is held against a pass of its own.
        """
        begun = (
            (one, partial(self._call, one))
            for sequences, positions in batches
            for one in [OnePass(sequences, positions, self._reduction, self._predictor)]
        )
        while passes := self._sweep(begun):
            right = self._right(passes)
            results = [one.state.copied if right and one.error is None else None for one in reversed(passes)]
            # What was handed over must not wait here while the next ones run.
            del passes
            self._now = OnePass([], None, self._reduction, None)
            while results:
                yield results.pop()

    def _sweep(self, begun: Iterable[tuple[OnePass, Any]]) -> list[Pass]:
        limit: float = sweep_bytes().value
        assert self.row_bytes is not None

        def full(passes: list[Pass]) -> bool:
            rows = sum(one.state.rows_to_keep for one in passes) * (self.row_bytes or 0)
            held: int = rows + sum(one.bytes for one in passes)
            return held >= limit

        def turn(one: OnePass) -> None:
            self._now = one

        self.reset()
        self._sweeping = True
        try:
            return run_interleaved(
                self._anatomy.model, self._anatomy.blocks, begun, turn=turn, full=full, finish=self._finish
            )
        finally:
            self._sweeping = False

    def _right(self, passes: list[Pass]) -> bool:
        """Whether passes that run block by block give what each gives by itself, on this model and at these sites: they
        do not where a module keeps something of a pass that another one needs."""
        done = [one.state for one in passes if one.error is None]
        if len(done) < 2:
            return True
        known: dict[Any, bool] = _verified.setdefault(self._anatomy.model, {})
        # Layers and positions too: what is kept may be read by deeper blocks, or for later tokens only.
        asked = frozenset(self._sites), repr(self._reduction), self._predictor is not None
        # Not the last one, nor one as long, where there are others: what it left behind is its own.
        others = [one for one in done[:-1] if max(one.lengths) != max(done[-1].lengths)]
        key = asked, bool(others) or (asked, True) in known
        if key not in known:
            one = min(others or done[:-1], key=lambda one: sum(one.lengths))
            try:
                alone = self.run(one.sequences, one.positions).wait()
            except Exception:
                # Each batch will tell by itself.
                return False
            known[key] = _same(one.copied.wait(), alone)
            if not known[key]:
                _log.warning(
                    "%s keeps something between its blocks on its modules: batches run one after the other, and each "
                    "reads the offloaded weights again.",
                    type(self._anatomy.model).__name__,
                )
        return known[key]

    def _call(self, one: OnePass) -> None:
        self.forward(self._inputs.make(one.sequences, self._device))

    def _finish(self, one: OnePass) -> None:
        missed = [site for site in self._sites if site not in one.seen]
        if missed:
            raise MissedModuleError(f"{', '.join(missed)} did not run in this pass: ask for other sites.")
        if one.predictor is not None:
            one.rows |= one.predictor.predict(one.sequences)
        one.hand_over()
        one.copied.mark()

    def receive(self, site: str, hidden: torch.Tensor) -> None:
        """Keep what the reduction asks for of `hidden` `[B, S, D]` or `[B, S, H, hd]`, as a tensor of its own."""
        one = self._now
        require_rows(site, hidden.shape, one.lengths)
        if one.predictor is not None and site == one.predictor.site:
            one.predictor.receive(hidden, one.lengths)
        if site in self._sites:
            one.rows[site] = one.reduce(hidden)
        one.seen.add(site)
        if self._sweeping:
            # The others' blocks come first: what waits meanwhile does not wait on the device.
            one.hand_over()
            if len(one.seen) == self._points:
                raise StopForward


def _same(rows: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether two passes over the same batch are the same computation."""

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        if a.shape != b.shape or not a.dtype.is_floating_point:
            return bool(torch.equal(a, b))
        a, b = a.double(), b.double()
        finite = b[b.isfinite()].abs()
        # The same operations on the same numbers, but for what a device adds up in no fixed order.
        largest = float(finite.max()) if finite.numel() else 0.0
        return torch.allclose(a, b, rtol=0, atol=1e-3 * largest, equal_nan=True)

    return rows.keys() == others.keys() and all(close(rows[name], others[name]) for name in rows)


_log = logging.getLogger("actcache.extract")
_verified: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()
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
