"""Extraction with transformers in this process.

Only the backbone runs (no head unless logits are asked for), only up to the deepest site requested, without
a KV cache, and rows are cut and pooled on the device before they are copied.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actcache.capture.hooks import StopForward, observe
from actcache.capture.positions import pool, pool_rows, resolve_positions
from actcache.errors import MissedModuleError, OptionError
from actcache.extract.backends import Reduction
from actcache.model.anatomy import check_identities, describe
from actcache.model.modes import evaluating
from actcache.model.options import resolve_device
from actcache.model.rope import depends_on_longest, forget_lengths
from actcache.model.sites import Site

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.model.source import ModelSource


class LocalBackend:
    """Runs the model of a source here."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @property
    def device(self) -> str:
        if self._source.loaded:
            return str(_input_device(self._source.model()))
        return resolve_device(self._source.options.device)

    @contextmanager
    def session(self, sites: Sequence[str], reduction: Reduction) -> Iterator[LocalSession]:
        model = self._source.model_to_run()
        parsed = {name: Site.parse(name) for name in sites}
        with ExitStack() as stack:
            # What one thread's pass reads must not be read by another's.
            stack.enter_context(_lock_of(model))
            stack.enter_context(evaluating(model))
            stack.enter_context(_exact_float32())
            stack.enter_context(torch.autocast(_input_device(model).type, enabled=False))
            check_identities(model, sites=list(parsed.values()))
            anatomy = describe(model)
            points = {name: anatomy.read_point(site) for name, site in parsed.items()}
            whole = any(site.name == "logits" for site in parsed.values())
            session = LocalSession(
                model if whole else anatomy.backbone,
                _input_device(model),
                reduction,
                sites=list(parsed),
                forget_lengths=depends_on_longest(self._source.config),
            )
            stack.enter_context(torch.no_grad())
            session.observer = stack.enter_context(observe(points, session.receive, stop_after_last=True))
            yield session


class LocalSession:
    """One model, its sites observed, ready for batches."""

    observer: Any

    def __init__(
        self,
        module: torch.nn.Module,
        device: torch.device,
        reduction: Reduction,
        *,
        sites: Sequence[str],
        forget_lengths: bool,
    ) -> None:
        self._module = module
        self._device = device
        self._reduction = reduction
        self._sites = sites
        self._forget_lengths = forget_lengths
        self._accepts = set(inspect.signature(module.forward).parameters)
        self._lengths: list[int] = []
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def run(self, sequences: Sequence[npt.NDArray[np.int32]]) -> CopiedRows:
        self._lengths = [len(s) for s in sequences]
        self._on_device = {}
        self._rows = {}
        self.observer.reset()
        if self._forget_lengths:
            forget_lengths(self._module)
        with suppress(StopForward):
            self._module(**self._inputs(sequences))
        rows, self._rows = self._rows, {}
        missed = [site for site in self._sites if site not in rows]
        if missed:
            raise MissedModuleError(f"{', '.join(missed)} did not run in this pass: ask for other sites.")
        return CopiedRows(rows)

    def _inputs(self, sequences: Sequence[npt.NDArray[np.int32]]) -> dict[str, Any]:
        longest = max(self._lengths)
        # Any id will do after a prompt's end: those positions are masked and never kept.
        ids = np.zeros((len(sequences), longest), np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(self._device)}
        if min(self._lengths) != longest:
            mask = np.arange(longest)[None, :] < np.asarray(self._lengths)[:, None]
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(self._device)
        if "position_ids" in self._accepts:
            positions = torch.arange(longest, device=self._device)
            inputs["position_ids"] = positions.unsqueeze(0).expand(len(sequences), -1)
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        return inputs

    def receive(self, site: str, hidden: torch.Tensor) -> None:
        """Keep what the reduction asks for of `hidden` `[B, S, D]`, as a tensor of its own."""
        self._rows[site] = self._reduce(hidden)

    def _reduce(self, hidden: torch.Tensor) -> torch.Tensor:
        pooling, positions = self._reduction.pooling, self._reduction.positions
        if isinstance(positions, str) and positions == "all":
            if isinstance(pooling, str):
                return pool(hidden, self._lengths_on(hidden.device), pooling)
            rows = [h[:n] for h, n in zip(hidden, self._lengths, strict=True)]
        else:
            rows = [h[resolve_positions(positions, n)] for h, n in zip(hidden, self._lengths, strict=True)]
        if pooling is None:
            return torch.cat(rows)
        if isinstance(pooling, str):
            return torch.stack([pool_rows(r, pooling) for r in rows])
        # A copy: a function may work in place, and the pass goes on with what it is given.
        return torch.stack([_one_row(pooling(r.clone()), r) for r in rows])

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


def _one_row(pooled: Any, rows: torch.Tensor) -> torch.Tensor:
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 1:
        shape = f"of shape {tuple(pooled.shape)}" if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        raise OptionError(
            f"the pooling function returned a value {shape} for rows {tuple(rows.shape)}: expected one vector [D]."
        )
    return pooled


def _input_device(model: torch.nn.Module) -> torch.device:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    parameter = next((embedding if embedding is not None else model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


_locks: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(model: torch.nn.Module) -> threading.RLock:
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


@contextmanager
def _exact_float32() -> Iterator[None]:
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
