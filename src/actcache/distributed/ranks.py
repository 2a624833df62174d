"""One process among many that something else has started: which of them it is, by its environment."""

from __future__ import annotations

import os
from typing import Any

from actcache.errors import OptionError

_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS"),
    ("Kubernetes", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
)
_ON_MACHINE = ("LOCAL_RANK", "SLURM_LOCALID")


def own_rank(size: int | None = None) -> tuple[int, int]:
    """The number of this process and how many there are, as torchrun, Slurm, or an indexed job of Kubernetes says it.

    `size`: how many, where the launcher does not say so.

    Raises:
        OptionError: nothing says which one this is, or what is said does not fit together.
    """
    for launcher, rank_name, size_name in _LAUNCHERS:
        if rank_name not in os.environ:
            continue
        rank, said = _number(rank_name), _number(size_name) if size_name in os.environ else None
        if said is not None and size is not None and said != size:
            raise OptionError(f"num_workers={size}, and {launcher} says {size_name}={said}: leave num_workers out.")
        count = said if said is not None else size
        if count is None:
            raise OptionError(
                f"{rank_name}={rank}, and nothing says of how many: pass num_workers, or set {size_name}."
            )
        if not 0 <= rank < count:
            raise OptionError(f"{rank_name}={rank} is not below the number of processes, {count}.")
        return rank, count
    names = ", ".join(f"{rank} and {size} ({launcher})" for launcher, rank, size in _LAUNCHERS)
    raise OptionError(f"engine='rank' needs a launcher that says which process this is: none of {names} is set.")


def own_device(device: Any) -> Any:
    """`device`, or where that is any GPU and this machine shows several to each of its processes, the one of this
    process by its number on the machine."""
    if str(device) not in ("auto", "cuda"):
        return device
    import torch

    count = torch.cuda.device_count()
    name = next((name for name in _ON_MACHINE if name in os.environ), None)
    return device if name is None or count < 2 else f"cuda:{_number(name) % count}"


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise OptionError(f"{name}={os.environ[name]!r} in the environment: expected a number.") from None
