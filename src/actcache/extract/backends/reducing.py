"""What backends have in common: which values of a batch are kept, and rows that have arrived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from actcache.capture.positions import pool, pool_rows, resolve_positions
from actcache.errors import OptionError, SiteUnavailableError

if TYPE_CHECKING:
    from actcache.extract.backends import Reduction


def reduce_values(
    hidden: torch.Tensor,
    lengths: Sequence[int],
    reduction: Reduction,
    positions: Sequence[Any] | None = None,
    on_device: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `reduction` keeps of ``hidden [B, S, ...]``, padded on the right, as a tensor of its own on the same device.

    Args:
        lengths: the real tokens of each prompt.
        positions: those of each prompt, None for the reduction's.
        on_device: `lengths` as a tensor, where that is at hand.

    Returns:
        ``[B, D]`` pooled, else ``[sum of kept tokens, D]``; dimensions behind the second lie side by side.

    Raises:
        OptionError: a pooling function that does not return one vector.
    """
    hidden = hidden.flatten(2)
    pooling = reduction.pooling
    if positions is not None:
        rows = [h[resolve_positions(where, n)] for h, where, n in zip(hidden, positions, lengths, strict=True)]
    elif isinstance(reduction.positions, str) and reduction.positions == "all":
        if isinstance(pooling, str):
            return pool(hidden, torch.tensor(lengths) if on_device is None else on_device, pooling)
        rows = [h[:n] for h, n in zip(hidden, lengths, strict=True)]
    else:
        rows = [h[resolve_positions(reduction.positions, n)] for h, n in zip(hidden, lengths, strict=True)]
    return pooled_rows(rows, pooling)


def pooled_rows(rows: Sequence[torch.Tensor], pooling: Any) -> torch.Tensor:
    """The kept rows of each prompt ``[T, D]`` as one tensor, pooled where `pooling` says so."""
    if pooling is None:
        return torch.cat(list(rows))
    if isinstance(pooling, str):
        return torch.stack([pool_rows(r, pooling) for r in rows])
    # A copy: a function may work in place, and the pass goes on with what it is given.
    return torch.stack([_one_row(pooling(r.clone()), r) for r in rows])


def require_rows(site: str, shape: Sequence[int], lengths: Sequence[int]) -> None:
    """Raise `SiteUnavailableError` for values that have not one row for each token of each prompt."""
    expected = len(lengths), max(lengths)
    if tuple(shape[:2]) != expected:
        raise SiteUnavailableError(
            f"site {site!r} has the shape {list(shape)} for {expected[0]} prompts of up to {expected[1]} "
            "tokens: this model adds or arranges tokens inside, so that it has no row for each of the prompt's."
        )


class ArrivedRows:
    """Rows that are on the CPU already."""

    ready = True

    def __init__(self, rows: Mapping[str, torch.Tensor]) -> None:
        self._rows = rows

    def wait(self) -> Mapping[str, torch.Tensor]:
        return self._rows


def _one_row(pooled: Any, rows: torch.Tensor) -> torch.Tensor:
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 1:
        shape = f"of shape {tuple(pooled.shape)}" if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        raise OptionError(
            f"the pooling function returned a value {shape} for rows {tuple(rows.shape)}: expected one vector [D]."
        )
    return pooled
