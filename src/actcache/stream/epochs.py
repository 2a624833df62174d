"""Who reads a stream, and which epoch it is: ranks, workers of a DataLoader, and what they must agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from numbers import Integral
from typing import Any

import torch

from actcache.errors import OptionError

_NONCE_BITS = 40


@dataclass(frozen=True)
class Reader:
    """One of ``world * workers`` that share an epoch; each takes every so many-th batch."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1
    seed: int | None = None
    """What the workers of one iteration of a DataLoader have in common, and those of another do not; None: this is no
    worker."""

    def batches(self, total: int, first: int) -> range:
        """Its batches among `total`, of which this rank has taken `first`."""
        return range(self.rank + self.world * (first + self.worker), total, self.world * self.workers)


def share_of(total: int, rank: int, world: int) -> int:
    """How many of `total` batches a rank has."""
    return len(range(rank, total, world))


def is_spawning() -> bool:
    """Whether what is pickled now goes to a child process, as for the workers of a DataLoader."""
    return get_spawning_popen() is not None


def rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    """The rank of this process and their number: as given, else of `torch.distributed`, else of the environment."""
    if rank is not None and world is not None:
        return rank, world
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        said = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return said if 0 <= said[0] < said[1] else (0, 1)


def check_ranks(rank: Any, world: Any) -> tuple[int, int] | tuple[None, None]:
    """Both as they are; OptionError unless both are None, or `rank` is one of `world`."""
    if rank is None and world is None:
        return None, None
    if all(isinstance(one, Integral) and not isinstance(one, bool) for one in (rank, world)) and 0 <= rank < world:
        return int(rank), int(world)
    raise OptionError(f"rank={rank!r}, world_size={world!r}: give both, with 0 <= rank < world_size, or neither.")


class Epochs:
    """How many epochs were begun, by whichever process: each iteration begins one.

    Memory that processes share has one word: the number, and what the latest iteration goes by. Workers of one
    iteration of a DataLoader find the same there, or write the same, so that they need no lock. Another one says
    whether something else has taken its place in the process that made the stream.
    """

    def __init__(self, begun: int = 0) -> None:
        self._word = torch.tensor([begun << _NONCE_BITS, 0], dtype=torch.int64).share_memory_()
        self._mine = int(self._word[0])
        self._turns = 0

    @property
    def begun(self) -> int:
        """How many were begun."""
        return int(self._word[0]) >> _NONCE_BITS

    @property
    def mine(self) -> bool:
        """Whether the latest was begun in this process, and not by a worker."""
        return int(self._word[0]) == self._mine

    @property
    def is_replaced(self) -> bool:
        """Whether another one counts, of which the workers that were started with this one do not know."""
        return bool(self._word[1])

    def replaced_by(self, other: Epochs) -> Epochs:
        """`other`, which counts from now on."""
        self._word[1] = 1
        return other

    def begin(self, seed: int | None) -> int:
        """The number of the epoch that begins, from 0 on; `seed` as in `Reader`."""
        self._turns += 1
        # Workers that persist have one seed for all their iterations, and begin as many each.
        nonce = hash((os.getpid() if seed is None else seed, self._turns)) & ((1 << _NONCE_BITS) - 1)
        word = int(self._word[0])
        if seed is None or word & ((1 << _NONCE_BITS) - 1) != nonce:
            word = (((word >> _NONCE_BITS) + 1) << _NONCE_BITS) | nonce
            self._word[0] = word
        self._mine = word
        return (word >> _NONCE_BITS) - 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if is_spawning() else {"begun": self.begun}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "begun" in state:
            self.__init__(state["begun"])  # type: ignore[misc]
        else:
            self.__dict__.update(state)
