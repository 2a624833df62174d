"""What an extraction backend must offer: run token sequences, hand back rows per site (docs/backends.md).

Three small protocols: a `Backend` is made for one model, it opens a `Session` for a fixed set of sites, which runs
batches and gives `Rows`. `reducing` has what most of them need: the reduction of values, and rows that have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from actcache.capture.ready_made import ReadyMade
    from actcache.model.invariance import BatchPolicy
    from actcache.model.source import ModelSource

from actcache.derive.results import NOTHING, Asked

# What the names of results begin with among the rows of a batch: no site has such a name.
RESULT = "result/"

Pooling = str | Callable[[Any], Any] | None
# Where the model runs: here (False), at the backend's own service (True), at a server with this address.
Remote = bool | str
# As `remote`: run here what would be sent elsewhere.
DRY_RUN = "local"


@dataclass(frozen=True)
class Reduction:
    """What is kept of a site's values `[B, S, D]`, decided on the model's device before any copy.

    Attributes:
        pooling: one row per prompt by this rule; None keeps every chosen token.
        positions: which real tokens count (`positions.resolve_positions`); "all" keeps every one.
    """

    pooling: Pooling = None
    positions: Any = "all"


class Rows(Protocol):
    """The rows of one batch, perhaps still on their way from the device, by site; results by `RESULT` and name."""

    @property
    def ready(self) -> bool:
        """Whether `wait` returns at once."""

    def wait(self) -> Mapping[str, torch.Tensor]:
        """Per site a CPU tensor: `[b, D]` pooled, else `[sum of kept tokens, D]`, prompts in batch order. Of results
        `token_nll` `[sum of tokens]`, and logits in rows for every token, or the last of each prompt."""


class Session(Protocol):
    """A model made ready to run batches for a fixed set of sites."""

    @property
    def policy(self) -> BatchPolicy:
        """Which prompts may share a batch."""

    def run(self, sequences: Sequence[npt.NDArray[np.int32]], positions: Sequence[Any] | None = None) -> Rows:
        """One forward pass over `sequences` (token ids of each prompt); they may differ in length
        where `policy` allows it. `positions`: those of each prompt, None for the reduction's.

        An error fails this batch, and the next one is run; `TransientEngineError` is tried again before;
        `torch.OutOfMemoryError` halves the batch; `EngineUnavailableError` ends the run, what is finished is kept."""


@runtime_checkable
class SweepingSession(Session, Protocol):
    """A session that may run many batches in less time together than one after the other; none has to."""

    @property
    def sweeps(self) -> bool:
        """Whether it does so now."""

    def sweep(self, batches: Iterable[tuple[Sequence[Any], Sequence[Any] | None]]) -> Iterator[Rows | None]:
        """What `run` gives for each of the batches (its arguments), in order; None for one that is to be run by
        itself, which will tell what is wrong with it."""


class Backend(Protocol):
    """Runs one model somewhere."""

    @property
    def device(self) -> str:
        """Where the model runs, as torch names it, or ``"remote"``."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What has to be the same for values to be the same, besides the model itself, as JSON values: engine, host,
        version. Empty only when values are those of the local backend."""

    @property
    def retries(self) -> int:
        """How often a batch that failed is tried again where the caller does not say."""

    def check(self, sites: Sequence[str], asked: Asked = NOTHING) -> None:
        """Raise what makes a run for `sites` and what is `asked` impossible; called before any work."""

    def session(
        self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING
    ) -> AbstractContextManager[Session]:
        """Load and check the model, read `sites` on it and compute what is `asked` beside them until the block ends,
        then leave it as it was."""


@dataclass(frozen=True)
class Setting:
    """What a backend is made for.

    Attributes:
        source: the model: its `name`, `config`, `options`, `tokenizer()`, `batch_policy()`; `model_to_run()` loads it
            with transformers.
        edits: ready-made edits to run it with; a backend that cannot must refuse them.
        remote: False, or where else it is to run; a backend that runs models in one place only must refuse it.
    """

    source: ModelSource
    edits: Sequence[ReadyMade] = ()
    remote: Remote = False


class BackendFactory(Protocol):
    """What an entry point of the group ``actcache.backends`` names."""

    def __call__(self, setting: Setting) -> Backend:
        """A backend for one model. Cheap: nothing is loaded, nobody is asked. Raises `OptionError`."""
