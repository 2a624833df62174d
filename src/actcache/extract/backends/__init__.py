"""What an extraction backend must offer: run token sequences, hand back rows per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from actcache.model.invariance import BatchPolicy

from actcache.derive.results import NOTHING, Asked

# What the names of results begin with among the rows of a batch: no site has such a name.
RESULT = "result/"

Pooling = str | Callable[[Any], Any] | None


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
        where `policy` allows it. `positions`: those of each prompt, None for the reduction's."""


class Backend(Protocol):
    """Runs a model somewhere."""

    @property
    def device(self) -> str:
        """Where the model runs, as torch names it."""

    def session(
        self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING
    ) -> AbstractContextManager[Session]:
        """Load and check the model, read `sites` on it and compute what is `asked` beside them until the block ends,
        then leave it as it was."""
